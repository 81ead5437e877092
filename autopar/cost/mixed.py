"""The cost of a stage whose ranks differ: each kind of rank is priced by its own device, the slowest counts.

A rank's price depends on its device, on its share of the rows, and on the links among its replica's ranks. Ranks that
agree in device and links are a class, of which the one with the most rows stands for all. Data ranks work in lockstep:
the next stage waits for all parts of a microbatch, a reduction for all gradients. So a stage's seconds are the most of
its classes', pass by pass; bytes are each class's own, to be held against its own memory.

Ignored: that ranks of the same class may have fewer rows, and that one class may be slower forward, another backward,
and make up for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from ..cluster.span import Span, span
from ..cluster.spec import Cluster
from ..plan import Stage
from .types import StageCost


@dataclass(frozen=True, slots=True)
class RankClass:
    """Ranks of a stage with one kind of device. device: which of `Cluster.devices`. data_rank: of those that they belong
    to, the one with the most rows."""

    device: int
    data_rank: int
    ranks: tuple[int, ...]


def rank_classes(cluster: Cluster, stage: Stage) -> tuple[RankClass, ...]:
    """The classes of a stage's ranks; a replica with devices of several kinds is in a class of each."""
    found: dict[tuple[int, Span], list[int]] = {}
    most: dict[tuple[int, Span], int] = {}
    shares = stage.shares or (1,) * stage.data
    for data_rank in range(stage.data):
        replica = stage.ranks[data_rank * stage.tensor : (data_rank + 1) * stage.tensor]
        where = span(cluster, replica)
        for rank in replica:
            key = cluster.device_number(rank), where
            found.setdefault(key, []).append(rank)
            if key not in most or shares[data_rank] > shares[most[key]]:
                most[key] = data_rank
    return tuple(RankClass(key[0], most[key], tuple(ranks)) for key, ranks in found.items())


def slowest(costs: Sequence[StageCost]) -> StageCost:
    """Field by field the most."""
    if len(costs) == 1:
        return costs[0]
    return StageCost(**{field.name: max(getattr(cost, field.name) for cost in costs) for field in fields(StageCost)})


def boundary_pairs(cluster: Cluster, sender: Iterable[int], receiver: Iterable[int]) -> list[tuple[int, int]]:
    """One pair of ranks for every two kinds of hosts of which one sends to the other."""
    firsts = [{cluster.run_of(rank): rank for rank in reversed(tuple(ranks))} for ranks in (sender, receiver)]
    return [(a, b) for a in firsts[0].values() for b in firsts[1].values()]
