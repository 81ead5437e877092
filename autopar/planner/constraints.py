"""What a user pins of a plan, and what a method can make of it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

from ..plan_validate import RECOMPUTE
from ..schedule.orders import SCHEDULES, Schedule
from .pins import checked_layout, checked_stage

# What the searches choose among by themselves; `Space` says what else a method makes when it is pinned.
SEARCHED_SCHEDULES = ("1f1b", "gpipe")
SEARCHED_ZEROS = (0, 3)
SEARCHED_RECOMPUTE = ("none", "full")


@dataclass(frozen=True, slots=True)
class Space:
    """What a method can make when it is pinned; what it chooses among by itself is less.

    unlike: whether it makes pipelines whose depth does not divide the number of devices, where these are equal.
    """

    schedules: tuple[str, ...] = SEARCHED_SCHEDULES
    zeros: tuple[int, ...] = (0, 1, 2, 3)
    recompute: tuple[str, ...] = ("none", "selective", "full")
    roles: tuple[str, ...] = ()
    unlike: bool = False


@dataclass(frozen=True, slots=True)
class Constraints:
    """What the user pins; None leaves it to the search. ValueError for values that no problem allows.

    context, expert: the degree of a model axis of that role (planner/roles.py), beside which tensor is the degree of one
    more; 1 asks for no such axis, and leaves an axis of tensor= as free as it is without.
    memory_limit_bytes: what a plan may use of each device; or memory_reserve: what it must leave free, a share (a float
    below 1) or bytes (a whole number). layout, stage: by pattern of modules' names, see planner/pins.py; given as
    mappings, kept as pairs. rewrites: False keeps the graph as it was captured.
    """

    data: int | None = None
    tensor: int | None = None
    pipeline: int | None = None
    microbatches: int | None = None
    schedule: str | None = None
    zero: int | None = None
    recompute: str | None = None
    memory_limit_bytes: int | None = None
    context: int | None = None
    expert: int | None = None
    memory_reserve: float | int | None = None
    layout: Mapping[str, str] | tuple[tuple[str, str], ...] | None = None
    stage: Mapping[str, int] | tuple[tuple[str, int], ...] | None = None
    rewrites: Literal[False] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layout", checked_layout(self.layout))
        object.__setattr__(self, "stage", checked_stage(self.stage))
        self._check_reserve()
        for name in ("data", "tensor", "pipeline", "microbatches", "memory_limit_bytes", "context", "expert"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name}={value!r}: expected a positive integer, or None to let the search choose")
        if self.rewrites is not None and self.rewrites is not False:
            raise ValueError(
                f"rewrites={self.rewrites!r}: expected False to keep the graph as it was captured, or None to let the search "
                "choose"
            )
        for name, legal in (("schedule", tuple(SCHEDULES)), ("zero", (0, 1, 2, 3)), ("recompute", RECOMPUTE)):
            value = getattr(self, name)
            if value is not None and (value not in legal or isinstance(value, bool)):
                near = difflib.get_close_matches(str(value), map(str, legal), 1)
                raise ValueError(
                    f"{name}={value!r}: expected one of {', '.join(map(repr, legal))}"
                    + (f"; did you mean {near[0]!r}?" if near else "")
                )

    @property
    def roles(self) -> tuple[tuple[str, int], ...]:
        """The (name, degree) of model axes whose role is pinned, outermost first."""
        given = (("context", self.context), ("expert", self.expert))
        return tuple((name, degree) for name, degree in given if degree is not None and degree > 1)

    @property
    def is_scheduled(self) -> bool:
        """Whether a schedule is pinned that the searches do not choose among by themselves."""
        return self.schedule not in (None, *SEARCHED_SCHEDULES)

    def may_have(self, schedule: Schedule) -> bool:
        """Whether a plan may have it: one without a flush only if it is pinned."""
        return schedule.flushes if self.schedule is None else self.schedule == schedule.name

    def _check_reserve(self) -> None:
        given = self.memory_reserve
        if given is None:
            return
        is_number = isinstance(given, int | float) and not isinstance(given, bool)
        if not is_number or not given >= 0 or (isinstance(given, float) and given >= 1):
            raise ValueError(
                f"memory_reserve={given!r}: expected a share of a device's memory as a float from 0 to below 1, or whole bytes"
            )
        if self.memory_limit_bytes is not None:
            raise ValueError(
                f"memory_reserve={given!r} and memory_limit_bytes={self.memory_limit_bytes!r} say the same thing twice; "
                "give one of them"
            )

    def __str__(self) -> str:
        pinned = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        pinned |= {name: dict(pinned[name]) for name in ("layout", "stage") if name in pinned}
        return ", ".join(f"{name}={value!r}" for name, value in pinned.items()) or "no constraints"
