"""How fast the replicas of a stage are where devices differ: the base of layer splits and of uneven shares of a batch."""

from __future__ import annotations

from collections.abc import Sequence

from ..cost.types import StageCost
from ..plan import Plan, Stage
from .problem import Chain, Problem


def replica_cost(problem: Problem, ranks: tuple[int, ...], chain: Chain, parts: int) -> StageCost:
    """The whole model on one replica, of one of `parts` equal parts of the batch. chain: of layouts for its ranks."""
    graph = problem.graph
    stage = Stage(0, len(graph.blocks), ranks, 1, chain.axes, chain.rows())
    plan = Plan(
        graph.name, graph.fingerprint, len(ranks), graph.batch_size, parts, "1f1b", (stage,), chain.unique,
        precision=graph.precision,
    )  # fmt: skip
    return problem.costs.stage(plan, 0)


def replica_speeds(problem: Problem, ranks: Sequence[int], chain: Chain, tensor: int, parts: int) -> list[float]:
    """Parts of the batch per second of each replica, `tensor` ranks after another of `ranks`."""
    found: dict[tuple, float] = {}
    speeds = []
    for first in range(0, len(ranks), tensor):
        replica = tuple(ranks[first : first + tensor])
        key = tuple(problem.cluster.run_of(rank) for rank in replica), problem.cluster.crosses_hosts(replica)
        if key not in found:
            cost = replica_cost(problem, replica, chain, parts)
            found[key] = 1.0 / max(cost.forward_s + cost.backward_s, 1e-30)
        speeds.append(found[key])
    return speeds
