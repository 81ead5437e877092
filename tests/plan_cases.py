"""Plans that no search would choose: legal in every part and random in all that is free."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Literal

from autopar.graph import Graph
from autopar.plan import Layout, Plan, Stage, same_recompute, tensor_axes
from autopar.sharding.strategies import strategies


def random_plan(
    graph: Graph,
    data: int,
    tensor: int,
    pipeline: int,
    microbatches: int,
    *,
    schedule: str = "1f1b",
    zero: Literal[0, 3] = 0,
    recompute: Literal["none", "full"] = "none",
    seed: int = 0,
) -> Plan:
    """A plan of these degrees with random stage cuts, a random strategy per op, and random placements at rest and between
    blocks."""
    return unequal_plan(
        graph,
        [(data, tensor)] * pipeline,
        microbatches,
        schedule=schedule,
        zero=zero,
        recompute=recompute,
        seed=seed,
    )


def unequal_plan(
    graph: Graph,
    meshes: Sequence[tuple[int, int]],
    microbatches: int,
    *,
    shares: Sequence[tuple[int, ...]] | Literal["random"] = (),
    schedule: str = "1f1b",
    zero: Literal[0, 3] = 0,
    recompute: Literal["none", "full"] = "none",
    seed: int = 0,
) -> Plan:
    """As `random_plan`, with a (data, tensor) mesh per stage, and shares per stage or random ones."""
    rng = random.Random(f"{seed}/{meshes}/{microbatches}/{shares}")
    cuts = [0, *sorted(rng.sample(range(1, len(graph.blocks)), len(meshes) - 1)), len(graph.blocks)]
    stages: list[Stage] = []
    layouts: list[Layout] = []
    first_rank = 0
    for s, (data, tensor) in enumerate(meshes):
        rows = graph.batch_size // microbatches
        own: tuple[int, ...] = ()
        if shares == "random" and data > 1:
            inner = sorted(rng.sample(range(1, rows), data - 1))
            own = tuple(b - a for a, b in zip([0, *inner], [*inner, rows], strict=True))
        elif shares and shares != "random":
            own = tuple(shares[s])
        stage = Stage(
            start=cuts[s],
            stop=cuts[s + 1],
            ranks=tuple(range(first_rank, first_rank + data * tensor)),
            data=data,
            axes=tensor_axes(tensor),
            layouts=(tuple(range(len(layouts), len(layouts) + cuts[s + 1] - cuts[s])),) if tensor > 1 else (),
            recompute=same_recompute(recompute, cuts[s + 1] - cuts[s]),
            zero=zero if data > 1 else 0,
            shares=own,
        )
        first_rank += data * tensor
        stages.append(stage)
        if tensor > 1:
            units = microbatches * (rows // math.gcd(*own) if own else data)
            layouts += random_layouts(graph, tensor, units, rng)[stage.start : stage.stop]
    return Plan(
        model=graph.name,
        fingerprint=graph.fingerprint,
        world_size=first_rank,
        batch_size=graph.batch_size,
        microbatches=microbatches,
        schedule=schedule,
        stages=tuple(stages),
        layouts=tuple(layouts),
    )


def random_layouts(graph: Graph, degree: int, shards: int, rng: random.Random) -> tuple[Layout, ...]:
    """One layout per block; blocks agree about what crosses between them and about parameters that they share."""
    crossing: dict[str, str] = {}
    at_rest: dict[str, str] = {}
    layouts = []
    for block in graph.blocks:
        keys: list[str] = []
        made: dict[str, str] = {}
        used: dict[str, list[str]] = {}
        for op in graph.block_ops(block):
            strategy = rng.choice(strategies(graph, op, degree, shards))
            keys.append(strategy.key)
            made.update(zip(op.outputs, map(str, strategy.outputs), strict=True))
            for name, placement in zip(op.inputs, strategy.inputs, strict=True):
                used.setdefault(name, []).append(str(placement))
        for name in block.parameters:
            at_rest.setdefault(name, rng.choice(["R", *(p for p in used[name] if p.startswith("S"))]))
        for name in block.outputs:
            as_made = made.get(name, "R")
            choices = ["R", as_made] if as_made.startswith("S") and name != graph.loss else ["R"]
            crossing.setdefault(name, rng.choice(choices))
        layouts.append(
            Layout(
                degree=degree,
                strategies=tuple(keys),
                inputs=tuple(crossing[name] for name in block.inputs),
                outputs=tuple(crossing[name] for name in block.outputs),
                parameters=tuple(at_rest[name] for name in block.parameters),
            )
        )
    return tuple(layouts)
