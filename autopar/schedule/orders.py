"""Compute orders: in which order a stage runs its forwards and backwards. Communication is added by passes.

A generator is pure: (stage, num_stages, microbatches) -> instructions of that stage. All schedules here run
microbatches in ascending order in each direction, so that gradients are summed in one order whatever the schedule.

S stages, M microbatches; s is the stage, 0 the first.

| name    | source                                            | microbatches in flight on stage s |
|---------|---------------------------------------------------|-----------------------------------|
| gpipe   | Huang et al. 2019, GPipe, section 2.3             | M                                 |
| 1f1b    | Fan et al. 2021, DAPPLE, section 3 (early backward| min(S - s, M)                     |
|         | scheduling); PipeDream-flush in Narayanan et al.  |                                   |
|         | 2021, PipeDream-2BW, section 3.3                  |                                   |
| forward | evaluation: no backward                           | 0                                 |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from .instructions import Backward, Forward

ComputeOrder = Callable[[int, int, int], Iterator[Forward | Backward]]


@dataclass(frozen=True, slots=True)
class Schedule:
    """A compute order and the bound it keeps.

    in_flight(stage, num_stages, microbatches): the most microbatches between forward and backward on that stage.
    """

    name: str
    order: ComputeOrder
    in_flight: Callable[[int, int, int], int]


def gpipe(stage: int, num_stages: int, microbatches: int) -> Iterator[Forward | Backward]:
    """All forwards, then all backwards."""
    for m in range(microbatches):
        yield Forward(stage, m)
    for m in range(microbatches):
        yield Backward(stage, m)


def one_forward_one_backward(stage: int, num_stages: int, microbatches: int) -> Iterator[Forward | Backward]:
    """min(S - s, M) forwards to fill the pipeline, then one backward for each further forward, then the rest."""
    depth = min(num_stages - stage, microbatches)
    for m in range(depth):
        yield Forward(stage, m)
    for m in range(depth, microbatches):
        yield Backward(stage, m - depth)
        yield Forward(stage, m)
    for m in range(microbatches - depth, microbatches):
        yield Backward(stage, m)


def forward_only(stage: int, num_stages: int, microbatches: int) -> Iterator[Forward | Backward]:
    """Evaluation."""
    for m in range(microbatches):
        yield Forward(stage, m)


SCHEDULES: Mapping[str, Schedule] = MappingProxyType(
    {
        schedule.name: schedule
        for schedule in (
            Schedule("gpipe", gpipe, lambda stage, num_stages, microbatches: microbatches),
            Schedule(
                "1f1b",
                one_forward_one_backward,
                lambda stage, num_stages, microbatches: min(num_stages - stage, microbatches),
            ),
        )
    }
)
# Not among the names that a plan may give: every plan evaluates in this order.
FORWARD_ONLY = Schedule("forward", forward_only, lambda stage, num_stages, microbatches: 0)


def schedule_named(name: str) -> Schedule:
    """The training schedule of that name; ValueError lists the names there are."""
    if name not in SCHEDULES:
        raise ValueError(f"schedule={name!r} is not known; choose one of {', '.join(sorted(SCHEDULES))}")
    return SCHEDULES[name]
