"""What happened when: predicted by the simulator or measured by the runtime, in one form."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

# Kinds of instruction (schedule/instructions.py) during which a rank does not compute: it waits, or its link is busy.
TRANSFER_KINDS = frozenset({"SA", "RA", "SG", "RG"})
_KIND = re.compile(r"\d+([A-Z]+)")


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

    @property
    def kind(self) -> str:
        """The letters of the token: F, B, I, W, P, D, O, SA, RA, SG or RG; the whole token where it has no such form."""
        match = _KIND.match(self.token)
        return match.group(1) if match else self.token


@dataclass(frozen=True)
class Timeline:
    """Events of one step. Times start at 0 with the step; `peak_memory_bytes` by rank, empty where not known.

    transfers: what was on its way beside the instructions of a measured step, from its start to when it was known to be
    complete: sends and receives by their instruction's token, asynchronous collectives by kind and mesh axis.
    waits: when a rank stood still in the midst of an instruction, until a collective had ended; by the same tokens.
    step_time_s runs from the first event to the end of the optimizer step.
    """

    events: tuple[Event, ...]
    step_time_s: float
    peak_memory_bytes: Mapping[int, int] = field(default_factory=dict)
    transfers: tuple[Event, ...] = ()
    waits: tuple[Event, ...] = ()

    def by_rank(self) -> dict[int, tuple[Event, ...]]:
        """The events of each rank that has any, ranks ascending, in order of start."""
        found: dict[int, list[Event]] = defaultdict(list)
        for event in self.events:
            found[event.rank].append(event)
        return {rank: tuple(sorted(found[rank], key=lambda event: event.start_s)) for rank in sorted(found)}

    def by_token(self) -> dict[str, tuple[Event, ...]]:
        """The events of each instruction, one per rank that ran it and has events."""
        found: dict[str, list[Event]] = defaultdict(list)
        for event in self.events:
            found[event.token].append(event)
        return {token: tuple(events) for token, events in found.items()}

    def busy_s(self) -> dict[int, float]:
        """Per rank: time in anything but transfers and waits for them, overlaps counted once."""
        return {
            rank: _covered_s(e for e in events if e.kind not in TRANSFER_KINDS)
            for rank, events in self.by_rank().items()
        }

    def idle_s(self) -> dict[int, float]:
        """Per rank: the rest of the step."""
        return {rank: self.step_time_s - busy for rank, busy in self.busy_s().items()}

    def hidden_s(self) -> dict[int, float]:
        """Per rank with transfers: the time of their way during which the rank computed and did not wait for one of them,
        overlaps counted once."""
        events, found = self.by_rank(), {}
        for rank in sorted({transfer.rank for transfer in self.transfers}):
            mine = [t for t in self.transfers if t.rank == rank]
            busy = [e for e in events.get(rank, ()) if e.kind not in TRANSFER_KINDS]
            waits = [w for w in self.waits if w.rank == rank]
            found[rank] = _common_s(mine, busy) - _common_s(waits, busy)
        return found

    def bubble_fraction(self) -> float:
        """Share of the step in which the ranks with events are idle, averaged over them.

        Every rank with events counts alike; in a timeline with one rank per stage that is every stage alike.
        """
        idle = self.idle_s()
        return sum(idle.values()) / (len(idle) * self.step_time_s) if idle and self.step_time_s > 0 else 0.0

    def to_json(self) -> str:
        """Exact: floats as their shortest representation that reads back equal."""
        return json.dumps(
            {
                "step_time_s": self.step_time_s,
                "peak_memory_bytes": {str(rank): size for rank, size in self.peak_memory_bytes.items()},
                "events": [_plain(e) for e in self.events],
                "transfers": [_plain(e) for e in self.transfers],
                "waits": [_plain(e) for e in self.waits],
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Timeline:
        """The inverse of `to_json`; ValueError for anything else."""
        try:
            data = json.loads(text)
            return cls(
                _events(data["events"]),
                float(data["step_time_s"]),
                {int(rank): int(size) for rank, size in data["peak_memory_bytes"].items()},
                _events(data.get("transfers", ())),
                _events(data.get("waits", ())),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"not a timeline ({error!r}); expected what Timeline.to_json wrote") from error


def joined(lines: Sequence[Timeline]) -> Timeline:
    """What several ranks have measured of one step, as one; the step is as long as the slowest's."""
    return Timeline(
        events=tuple(event for line in lines for event in line.events),
        step_time_s=max(line.step_time_s for line in lines),
        peak_memory_bytes={rank: size for line in lines for rank, size in line.peak_memory_bytes.items()},
        transfers=tuple(transfer for line in lines for transfer in line.transfers),
        waits=tuple(wait for line in lines for wait in line.waits),
    )


def _plain(event: Event) -> list[int | str | float]:
    return [event.rank, event.token, event.start_s, event.end_s, event.bytes]


def _events(rows) -> tuple[Event, ...]:
    return tuple(Event(int(r), str(t), float(s), float(e), int(b)) for r, t, s, e, b in rows)


def _common_s(some: Sequence[Event], others: Sequence[Event]) -> float:
    """Length of what the unions of both sides' intervals have in common."""
    return _covered_s(some) + _covered_s(others) - _covered_s([*some, *others])


def _covered_s(events) -> float:
    """Length of the union of the events' intervals."""
    total_s = end_s = 0.0
    for start, end in sorted((e.start_s, e.end_s) for e in events):
        total_s += max(0.0, end - max(start, end_s))
        end_s = max(end_s, end)
    return total_s
