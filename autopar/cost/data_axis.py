"""What the data axis adds to a stage: gradient reductions and ZeRO's traffic, and what of it hides behind compute.

    ZeRO 0  all-reduce of the gradients in buckets, once per step, behind the last backward
    ZeRO 1  reduce-scatter instead, and an all-gather of the updated parameters after the optimizer
    ZeRO 2  the same, but the reduce-scatter comes with every microbatch, because no rank keeps whole gradients
    ZeRO 3  all-gather of each block's parameters before its forward and before its backward, a block ahead; the
            reduce-scatter block by block, after the last microbatch or after each (`Constants.scatter_each`)

Reference: Rajbhandari et al. 2020, ZeRO, section 7. With a zero_group, what is sharded is sharded inside groups of
consecutive data ranks, and gradients are summed over the copies too.

A transfer of c seconds beside compute of w seconds: together they take w + c - overlap min(c, w), so 1 - overlap is
what the transfer costs the compute that it hides behind (it takes multiprocessors and memory bandwidth).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..plan import Stage
from .constants import Constants

# DistributedDataParallel's default bucket (Li et al., VLDB 2020, section 3.2).
BUCKET_BYTES = 25 * 2**20


class Collective(Protocol):
    def __call__(self, kind: str, size_bytes: float, ranks: tuple[int, ...]) -> float: ...


@dataclass(frozen=True, slots=True)
class DataTraffic:
    """Seconds. forward_s, backward_s: seen in every microbatch. reduce_s, of which reduce_overlap_s may hide behind the
    last backward; after_s: after the optimizer, never hidden."""

    forward_s: float = 0.0
    backward_s: float = 0.0
    reduce_s: float = 0.0
    reduce_overlap_s: float = 0.0
    after_s: float = 0.0


@dataclass(frozen=True, slots=True)
class BlockLoad:
    """Like blocks in a row on one rank. Of one of them: bytes of its parameters as used and of its gradients as reduced;
    (forward, backward) seconds of computing it. count: how many there are."""

    parameter_bytes: float
    gradient_bytes: float
    forward_s: float
    backward_s: float
    count: int = 1


def data_traffic(
    stage: Stage, loads: Sequence[BlockLoad], overlap: float, constants: Constants, collective_s: Collective
) -> DataTraffic:
    """The traffic of a stage. overlap: share of a transfer that hides, by link and software."""
    if stage.data == 1:
        return DataTraffic()
    ranks = stage.ranks[:: stage.tensor]
    copies: tuple[int, ...] = ()
    group = stage.zero_group
    if stage.zero and 0 < group < stage.data:
        ranks, copies = ranks[:group], ranks[::group]
    gradient = sum(load.gradient_bytes * load.count for load in loads)
    backward_s = sum(load.backward_s * load.count for load in loads)
    # Summing the shards of the copies is part of every reduction of a hybrid.
    over_copies_s = collective_s("all_reduce", gradient / len(ranks), copies) if copies else 0.0
    if stage.zero == 3:
        return _sharded(loads, ranks, over_copies_s, overlap, constants, collective_s)
    kind = "reduce_scatter" if stage.zero else "all_reduce"
    buckets = max(1, round(gradient / BUCKET_BYTES))
    one_s = collective_s(kind, gradient / buckets, ranks)
    reduce_s = buckets * one_s + over_copies_s
    # The last bucket is full only when the backward has ended, so nothing hides it.
    hidden_s = overlap * min(reduce_s - one_s, backward_s) if constants.scatter_hides or not stage.zero else 0.0
    after_s = 0.0
    if stage.zero:
        parameters = sum(load.parameter_bytes * load.count for load in loads)
        after_s = collective_s("all_gather", parameters, ranks) * (1 - constants.update_overlap)
    if stage.zero == 2:
        return DataTraffic(backward_s=reduce_s - hidden_s, after_s=after_s)
    return DataTraffic(reduce_s=reduce_s, reduce_overlap_s=hidden_s, after_s=after_s)


def _sharded(
    loads: Sequence[BlockLoad],
    ranks: tuple[int, ...],
    over_copies_s: float,
    overlap: float,
    constants: Constants,
    collective_s: Collective,
) -> DataTraffic:
    """ZeRO 3. While a block computes, the next one's parameters arrive and the last one's gradients leave."""
    forward_s = backward_s = reduce_s = hidden_s = 0.0
    before: BlockLoad | None = None
    gathered: dict[float, tuple[float, float]] = {}
    for load in loads:
        if load.parameter_bytes == 0:
            before = load
            continue
        if load.parameter_bytes not in gathered:
            gathered[load.parameter_bytes] = (
                collective_s("all_gather", load.parameter_bytes, ranks),
                collective_s("reduce_scatter", load.gradient_bytes, ranks) if load.gradient_bytes else 0.0,
            )
        gather_s, scatter_s = gathered[load.parameter_bytes]
        for beside, times in ((before, 1), (load, load.count - 1)):
            computing = (beside.forward_s, beside.backward_s) if beside is not None else (0.0, 0.0)
            forward_s += times * (gather_s - overlap * min(gather_s, computing[0]))
            if not constants.scatter_hides:
                backward_s += times * (gather_s - overlap * min(gather_s, computing[1]) + scatter_s)
            elif constants.scatter_each:
                both_s = gather_s + scatter_s
                backward_s += times * (both_s - overlap * min(both_s, computing[1]))
            else:
                backward_s += times * (gather_s - overlap * min(gather_s, computing[1]))
                reduce_s += times * scatter_s
                hidden_s += times * overlap * min(scatter_s, max(0.0, computing[1] - gather_s))
        before = load
    if constants.scatter_each:
        return DataTraffic(forward_s, backward_s + over_copies_s)
    return DataTraffic(forward_s, backward_s, reduce_s + over_copies_s, hidden_s)
