"""Plans that no search would choose: legal in every part and random in all that is free."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, get_args

from autopar.graph import Graph, Op
from autopar.plan import Layout, Plan, Recompute, Stage, same_recompute, tensor_axes
from autopar.schedule.orders import schedule_named
from autopar.sharding.axes import Places
from autopar.sharding.batch import batch_layout
from autopar.sharding.flow import Run
from autopar.sharding.placement import REPLICATED, SHARED, Placement, Split, Whole
from autopar.sharding.rule import divides
from autopar.sharding.strategies import strategies
from autopar.sharding.strategy import Strategy

Mesh = tuple[int, int | tuple[int, ...]]
"""Data degree, and the degree of one model axis or those of several."""


def random_plan(
    graph: Graph,
    data: int,
    tensor: int | tuple[int, ...],
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
    blocks. tensor: of one model axis, or of several. Schedules that run several stages on a set of ranks get as many as
    they want, or 2."""
    meshes: list[Mesh] = [(data, tensor)] * pipeline
    options = dict(schedule=schedule, zero=zero, zero_group=zero_group, recompute=recompute, seed=seed)
    return unequal_plan(graph, meshes, microbatches, **options)


def unequal_plan(
    graph: Graph,
    meshes: Sequence[Mesh],
    microbatches: int,
    *,
    shares: Sequence[tuple[int, ...]] | Literal["random"] = (),
    schedule: str = "1f1b",
    zero: Literal[0, 1, 2, 3] = 0,
    zero_group: int = 0,
    recompute: Literal["none", "selective", "full", "mixed"] = "none",
    seed: int = 0,
) -> Plan:
    """As `random_plan`, with a mesh per set of ranks, and shares for each or random ones."""
    rng = random.Random(f"{seed}/{meshes}/{microbatches}/{shares}")
    chosen = schedule_named(schedule)
    num_stages = len(meshes) * (chosen.virtual or 2)
    cuts = [0, *sorted(rng.sample(range(1, len(graph.blocks)), num_stages - 1)), len(graph.blocks)]
    rows = graph.batch_size // microbatches
    stages: list[Stage] = []
    layouts: list[Layout] = []
    drawn_of: dict[int, Sequence[Sequence[Layout]]] = {}
    all_axes = [tensor if isinstance(tensor, tuple) else tensor_axes(tensor) for _, tensor in meshes]
    given = [random_shares(rows, data, rng) for data, _ in meshes] if shares == "random" else [*map(tuple, shares)]
    widths = [data * math.prod(axes) for (data, _), axes in zip(meshes, all_axes, strict=True)]
    for s in range(num_stages):
        group = chosen.group_of(s, len(meshes))
        data, axes, width = meshes[group][0], all_axes[group], widths[group]
        first_rank = sum(widths[:group])
        start, stop = cuts[s], cuts[s + 1]
        own = given[group] if given and data > 1 else ()
        units = microbatches * (rows // math.gcd(*own) if own else data)
        if group not in drawn_of:
            drawn_of[group] = random_layouts(graph, axes, units, rng)
        drawn = [row[start:stop] for row in drawn_of[group]]
        stages.append(
            Stage(
                start=start,
                stop=stop,
                ranks=tuple(range(first_rank, first_rank + width)),
                data=data,
                axes=axes,
                layouts=tuple(
                    tuple(range(len(layouts) + a * (stop - start), len(layouts) + (a + 1) * (stop - start)))
                    for a in range(len(axes))
                ),
                recompute=_recompute(recompute, stop - start, rng),
                zero=zero if data > 1 else 0,
                zero_group=zero_group if data > zero_group else 0,
                shares=own,
            )
        )
        layouts += [layout for row in drawn for layout in row]
    return Plan(
        model=graph.name,
        fingerprint=graph.fingerprint,
        world_size=sum(widths),
        batch_size=graph.batch_size,
        microbatches=microbatches,
        schedule=schedule,
        stages=tuple(stages),
        layouts=tuple(layouts),
    )


def plan_of(graph: Graph, options: Mapping[str, Any]) -> Plan:
    """`unequal_plan` of options that name meshes, `random_plan` of others."""
    return (unequal_plan if "meshes" in options else random_plan)(graph, **options)


def world_of(options: Mapping[str, Any]) -> int:
    """Ranks of `plan_of`."""
    meshes = options.get("meshes") or [(options["data"], options["tensor"])] * options["pipeline"]
    return sum(data * (math.prod(tensor) if isinstance(tensor, tuple) else tensor) for data, tensor in meshes)


def _recompute(choice: str, num_blocks: int, rng: random.Random) -> tuple[Recompute, ...]:
    if choice == "mixed":
        return tuple(rng.choice(get_args(Recompute)) for _ in range(num_blocks))
    return same_recompute(choice, num_blocks)


def random_shares(rows: int, data: int, rng: random.Random) -> tuple[int, ...]:
    """At least one row for each data rank."""
    inner = sorted(rng.sample(range(1, rows), data - 1))
    return tuple(b - a for a, b in zip([0, *inner], [*inner, rows], strict=True))


def random_strategies(
    graph: Graph, op: Op, degrees: Sequence[int], shards: int, rng: random.Random, without: Collection[str] = ()
) -> tuple[Strategy, ...]:
    """One strategy per model axis, each fitting into those before it. without: special algorithms not to draw."""
    chosen: tuple[Strategy, ...] = ()
    for degree in degrees:
        options = strategies(graph, op, degree, shards, tuple(zip(chosen, degrees, strict=False)))
        chosen += (rng.choice([s for s in options if s.special not in without]),)
    return chosen


def random_layouts(graph: Graph, axes: Sequence[int], shards: int, rng: random.Random) -> list[list[Layout]]:
    """Per model axis one layout per block; blocks agree about what crosses between them and about parameters that they
    share."""
    crossing: dict[str, Places] = {}
    at_rest: dict[str, Places] = {}
    whole = (REPLICATED,) * len(axes)
    on_batch = batch_layout(graph, shards).placements if shards > 1 else {}
    rows: list[list[Layout]] = [[] for _ in axes]

    def fits(name: str, places: Places) -> bool:
        cuts = [(on_batch.get(name, REPLICATED), shards), *zip(places, axes, strict=True)]
        return divides(graph.tensors[name].shape, cuts)

    def draw(name: str, options: Sequence[Sequence[Placement]], kinds: tuple[type, ...] = (Split,)) -> Places:
        """Replicated or one of the splits (or of other kinds), on each axis, so that together they fit."""
        choices = itertools.product(*([REPLICATED, *(p for p in one if isinstance(p, kinds))] for one in options))
        return rng.choice([places for places in choices if fits(name, places)])

    for block in graph.blocks if axes else ():
        keys: list[tuple[str, ...]] = []
        made: dict[str, Places] = {}
        used: dict[str, list[Places]] = {}
        for op in graph.block_ops(block):
            run = Run(op, random_strategies(graph, op, axes, shards, rng))
            keys.append(tuple(s.key for s in run.strategies))
            made.update(zip(op.outputs, run.outputs, strict=True))
            for name, places in zip(op.inputs, run.inputs, strict=True):
                used.setdefault(name, []).append(places)
        for name in block.parameters:
            if name not in at_rest:
                at_rest[name] = draw(name, [list(one) for one in zip(*used[name], strict=True)])
        for name in block.outputs:
            as_made = made.get(name, whole)
            if name not in crossing:
                summed = (SHARED,) if graph.tensors[name].requires_grad else ()
                options = [(place, *summed) for place in as_made]
                crossing[name] = draw(name, options, (Split, Whole)) if name != graph.loss else whole
        for a, degree in enumerate(axes):
            rows[a].append(
                Layout(
                    degree=degree,
                    strategies=tuple(key[a] for key in keys),
                    inputs=tuple(str(crossing[name][a]) for name in block.inputs),
                    outputs=tuple(str(crossing[name][a]) for name in block.outputs),
                    parameters=tuple(str(at_rest[name][a]) for name in block.parameters),
                )
            )
    return rows
