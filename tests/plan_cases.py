"""Plans that no search would choose: legal in every part and random in all that is free."""

from __future__ import annotations

import random
from typing import Literal, get_args

from autopar.graph import Graph
from autopar.plan import Layout, Plan, Recompute, Stage, same_recompute, tensor_axes
from autopar.sharding.strategies import strategies


def random_plan(
    graph: Graph,
    data: int,
    tensor: int,
    pipeline: int,
    microbatches: int,
    *,
    schedule: str = "1f1b",
    zero: Literal[0, 1, 2, 3] = 0,
    zero_group: int = 0,
    recompute: Literal["none", "selective", "full", "mixed"] = "none",
    seed: int = 0,
) -> Plan:
    """A plan of these degrees with random stage cuts, a random strategy per op, and random placements at rest and between
    blocks."""
    rng = random.Random(f"{seed}/{data}/{tensor}/{pipeline}/{microbatches}")
    cuts = [0, *sorted(rng.sample(range(1, len(graph.blocks)), pipeline - 1)), len(graph.blocks)]
    layouts = random_layouts(graph, tensor, data * microbatches, rng) if tensor > 1 else ()
    width = data * tensor
    stages = tuple(
        Stage(
            start=cuts[s],
            stop=cuts[s + 1],
            ranks=tuple(range(s * width, (s + 1) * width)),
            data=data,
            axes=tensor_axes(tensor),
            layouts=(tuple(range(cuts[s], cuts[s + 1])),) if tensor > 1 else (),
            recompute=_recompute(recompute, cuts[s + 1] - cuts[s], rng),
            zero=zero if data > 1 else 0,
            zero_group=zero_group if data > 1 else 0,
        )
        for s in range(pipeline)
    )
    return Plan(
        model=graph.name,
        fingerprint=graph.fingerprint,
        world_size=width * pipeline,
        batch_size=graph.batch_size,
        microbatches=microbatches,
        schedule=schedule,
        stages=stages,
        layouts=layouts,
    )


def _recompute(choice: str, num_blocks: int, rng: random.Random) -> tuple[Recompute, ...]:
    if choice == "mixed":
        return tuple(rng.choice(get_args(Recompute)) for _ in range(num_blocks))
    return same_recompute(choice, num_blocks)


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
