"""Plans that a configuration of vs_torch.py prescribes beyond what a search can be held to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import autopar
from autopar.graph import Graph
from autopar.plan import Plan, Stage
from autopar.schedule.orders import schedule_named
from benchmarks.torch_sides import layers_named


def searched(graph: Graph, cluster: autopar.Cluster, constraints: Mapping[str, Any], stage: Mapping[str, Any]) -> Plan:
    """What the search finds, with these fields of its stages put in place of its own."""
    plan = autopar.search(graph, cluster, progress=False, **constraints)
    return replace(plan, stages=tuple(replace(one, **stage) for one in plan.stages))


def staged(graph: Graph, schedule: str, num_ranks: int, microbatches: int) -> Plan:
    """A pipeline of one rank per set, two stages each where the schedule runs several, cut into equally many blocks."""
    order = schedule_named(schedule)
    num_stages = num_ranks * (order.virtual or 2)
    order.check_stages(num_ranks, num_stages)
    cuts = [round(s * len(graph.blocks) / num_stages) for s in range(num_stages + 1)]
    stages = tuple(Stage(cuts[s], cuts[s + 1], (order.group_of(s, num_ranks),), 1) for s in range(num_stages))
    return Plan(
        graph.name, graph.fingerprint, num_ranks, graph.batch_size, microbatches, schedule, stages,
        precision=graph.precision,
    )  # fmt: skip


def layers_by_stage(graph: Graph, plan: Plan) -> list[range]:
    """The layers that each stage holds; one that two stages share counts where most of it is."""
    sizes: list[dict[int, int]] = []
    for stage in plan.stages:
        found: dict[int, int] = {}
        for name in {name for block in graph.blocks[stage.start : stage.stop] for name in block.parameters}:
            tensor = graph.tensors[name]
            for layer in layers_named([tensor.fqn]):
                found[layer] = found.get(layer, 0) + tensor.numel
        sizes.append(found)
    counts = [0] * len(sizes)
    for layer in {layer for found in sizes for layer in found}:
        counts[max(range(len(sizes)), key=lambda s: sizes[s].get(layer, 0))] += 1
    starts = [sum(counts[:s]) for s in range(len(counts) + 1)]
    return [range(starts[s], starts[s + 1]) for s in range(len(counts))]
