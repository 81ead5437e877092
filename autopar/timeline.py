"""What happened when: predicted by the simulator or measured by the runtime, in one form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Event:
    """One instruction of one rank. `token` is the instruction's printed form; `bytes` what it moved (0 for compute)."""

    rank: int
    token: str
    start_s: float
    end_s: float
    bytes: int = 0

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True)
class Timeline:
    """Events of one step. Times start at 0 with the step; `peak_memory_bytes` by rank, empty where not known.

    step_time_s runs from the first event to the end of the optimizer step.
    """

    events: tuple[Event, ...]
    step_time_s: float
    peak_memory_bytes: Mapping[int, int] = field(default_factory=dict)
