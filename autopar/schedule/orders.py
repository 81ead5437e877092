"""Compute orders: in which order a group runs the forwards and backwards of its stages. Passes add communication.

A generator is pure: (group, num_groups, microbatches, virtual) -> compute instructions of that group, `virtual` being
how many stages each group runs. All schedules here run the microbatches of a stage in ascending order in each direction,
so that gradients are summed in one order whatever the schedule.

P groups of V stages each, M microbatches; g is the group, 0 the first; "in flight" counts forwards whose backward (or
input half of it) has not run yet, over the stages of a group.

| name        | source                                                | stages of group g | in flight on g        |
|-------------|-------------------------------------------------------|-------------------|-----------------------|
| gpipe       | Huang et al. 2019, GPipe, section 2.3                 | g                 | M                     |
| 1f1b        | Fan et al. 2021, DAPPLE, section 3 (early backward    | g                 | min(P - g, M)         |
|             | scheduling); PipeDream-flush in Narayanan et al.      |                   |                       |
|             | 2021, PipeDream-2BW, section 3.3                      |                   |                       |
| interleaved | Narayanan et al. 2021, Megatron-LM, section 2.2.2     | g, g + P, ...     | see interleaved.py    |
| zb-h1       | Qi et al. 2023, Zero Bubble, section 3.1              | g                 | min(P - g, M)         |
| zb-h2       | Qi et al. 2023, Zero Bubble, section 3.2              | g                 | min(2(P - g) - 1, M)  |
| zb-v        | Qi et al. 2024, Controllable Memory, section 4;       | g, 2P - 1 - g     | 2P, less for M < 2P-1 |
|             | ZB-V of Qi et al. 2023, section 6                     |                   |                       |
| pipedream   | without a flush, see pipedream.py                     | g                 | P - g                 |
| 2bw         | without a flush, see pipedream.py                     | g                 | P - g                 |
| forward     | evaluation: no backward                               | as trained        | 0                     |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from .instructions import Backward, Forward
from .interleaved import interleaved, interleaved_forwards, interleaved_in_flight
from .zero_bubble import (
    h1_deferred,
    h2_deferred,
    h2_in_flight,
    v_shaped_forwards,
    zero_bubble_h1,
    zero_bubble_h2,
    zero_bubble_v,
    zero_bubble_v_deferred,
    zero_bubble_v_in_flight,
)

ComputeOrder = Callable[..., Iterator]
Count = Callable[..., int]


@dataclass(frozen=True, slots=True)
class Schedule:
    """A compute order and the bounds it keeps. Functions take (group, num_groups, microbatches, virtual = 1).

    order: of a training step. forward: of an evaluation.
    in_flight: the most forwards of the group's stages that wait for their backward, or for the input half of it.
    deferred: the most input halves that wait for their weight half.
    virtual: stages per group; 0 means any number.
    delay: None where a step ends before the weights change; else batches go on without an end, and each uses the latest
        weights (0) or those before them (1).
    turns: whether the second half of the stages runs through the groups backwards (a V), instead of from the first again.
    """

    name: str
    order: ComputeOrder
    in_flight: Count
    forward: ComputeOrder
    deferred: Count = lambda group, num_groups, microbatches, virtual=1: 0
    virtual: int = 1
    turns: bool = False
    delay: int | None = None

    @property
    def flushes(self) -> bool:
        """Whether a step ends with all of its microbatches done, before the weights change."""
        return self.delay is None

    @property
    def splits_backward(self) -> bool:
        """Whether backwards come in two halves."""
        return self.deferred(0, 1, 1, max(self.virtual, 1)) > 0

    @property
    def may_shard(self) -> bool:
        """Whether the runtime shards parameters, gradients or optimizer state over data ranks under it."""
        return self.flushes and not self.splits_backward

    def group_of(self, stage: int, num_groups: int) -> int:
        """The group that runs a stage."""
        lap, place = divmod(stage, num_groups)
        return num_groups - 1 - place if self.turns and lap % 2 else place

    def check_microbatches(self, num_groups: int, microbatches: int) -> None:
        """ValueError where the schedule wants another number of microbatches in a batch."""
        if self.delay == 0 and microbatches != 1:
            raise ValueError(
                f"schedule {self.name!r} updates the weights after every microbatch, so a batch is one: set microbatches to 1 "
                f"(not {microbatches}) and pass smaller batches"
            )
        if self.delay and microbatches < num_groups:
            raise ValueError(
                f"schedule {self.name!r} needs at least as many microbatches as stages, {num_groups}, not {microbatches}: "
                "with fewer, two versions of the weights are not enough"
            )

    def check_stages(self, num_groups: int, num_stages: int) -> None:
        """ValueError unless so many stages can be laid over so many groups."""
        wanted = self.virtual
        if wanted and num_stages != wanted * num_groups:
            raise ValueError(
                f"schedule {self.name!r} runs {wanted} stage{'s' if wanted > 1 else ''} on each set of ranks, so "
                f"{num_groups} sets need {wanted * num_groups} stages, not {num_stages}"
            )
        if num_stages % num_groups:
            near = sorted({max(1, num_stages // num_groups) * num_groups, -(-num_stages // num_groups) * num_groups})
            raise ValueError(
                f"schedule {self.name!r} runs equally many stages on each set of ranks: {num_groups} sets cannot share "
                f"{num_stages} stages; the nearest counts are {' and '.join(map(str, near))}"
            )


def gpipe(group: int, num_groups: int, microbatches: int, virtual: int = 1) -> Iterator[Forward | Backward]:
    """All forwards, then all backwards."""
    for m in range(microbatches):
        yield Forward(group, m)
    for m in range(microbatches):
        yield Backward(group, m)


def one_forward_one_backward(
    group: int, num_groups: int, microbatches: int, virtual: int = 1
) -> Iterator[Forward | Backward]:
    """min(P - g, M) forwards to fill the pipeline, then one backward for each further forward, then the rest."""
    depth = min(num_groups - group, microbatches)
    for m in range(depth):
        yield Forward(group, m)
    for m in range(depth, microbatches):
        yield Backward(group, m - depth)
        yield Forward(group, m)
    for m in range(microbatches - depth, microbatches):
        yield Backward(group, m)


def forward_only(group: int, num_groups: int, microbatches: int, virtual: int = 1) -> Iterator[Forward]:
    """Evaluation of one stage per group."""
    for m in range(microbatches):
        yield Forward(group, m)


def _all(group: int, num_groups: int, microbatches: int, virtual: int = 1) -> int:
    return microbatches


def _depth(group: int, num_groups: int, microbatches: int, virtual: int = 1) -> int:
    return min(num_groups - group, microbatches)


SCHEDULES: Mapping[str, Schedule] = MappingProxyType(
    {
        schedule.name: schedule
        for schedule in (
            Schedule("gpipe", gpipe, _all, forward_only),
            Schedule("1f1b", one_forward_one_backward, _depth, forward_only),
            Schedule("interleaved", interleaved, interleaved_in_flight, interleaved_forwards, virtual=0),
            Schedule("zb-h1", zero_bubble_h1, _depth, forward_only, h1_deferred),
            Schedule("zb-h2", zero_bubble_h2, h2_in_flight, forward_only, h2_deferred),
            Schedule(
                "zb-v",
                zero_bubble_v,
                zero_bubble_v_in_flight,
                v_shaped_forwards,
                zero_bubble_v_deferred,
                virtual=2,
                turns=True,
            ),
            Schedule("pipedream", one_forward_one_backward, _depth, forward_only, delay=0),
            Schedule("2bw", one_forward_one_backward, _depth, forward_only, delay=1),
        )
    }
)


def schedule_named(name: str) -> Schedule:
    """The training schedule of that name; ValueError lists the names there are."""
    if name not in SCHEDULES:
        raise ValueError(f"schedule={name!r} is not known; choose one of {', '.join(sorted(SCHEDULES))}")
    return SCHEDULES[name]
