"""Plans that somebody has edited: `validate` refuses them before anything is built, by field and with what is legal, or
they run and are exact. There is nothing in between.
"""

from __future__ import annotations

import functools
import random
from dataclasses import replace
from typing import Any

import pytest
from loopback_plans import parallel_step
from random_models import random_model
from test_whole_plans import EXACT, graph_of, random_plan

from autopar.cluster.spec import Cluster
from autopar.graph import Graph
from autopar.plan import Plan
from autopar.schedule.orders import SCHEDULES

TOKENS = ("R", "P", "H", "S0", "S1", "S2", "S7", "S0/2", "Q", "")


def edited(plan: Plan, graph: Graph, draw: random.Random) -> tuple[str, Plan]:
    """(what was changed, the plan with one entry changed)."""
    s = draw.randrange(len(plan.stages))
    stage = plan.stages[s]

    def put(values: tuple, value: Any) -> tuple:
        place = draw.randrange(len(values))
        return (*values[:place], value, *values[place + 1 :])

    def with_stage(**changes: Any) -> Plan:
        return replace(plan, stages=(*plan.stages[:s], replace(stage, **changes), *plan.stages[s + 1 :]))

    def with_layout(field: str) -> Plan:
        places = [i for i, layout in enumerate(plan.layouts) if getattr(layout, field)]
        if not places:
            return plan
        i = draw.choice(places)
        others = [key for layout in plan.layouts for key in layout.strategies]
        value = draw.choice([*others, "z"] if field == "strategies" else TOKENS)
        layout = replace(plan.layouts[i], **{field: put(getattr(plan.layouts[i], field), value)})
        return replace(plan, layouts=(*plan.layouts[:i], layout, *plan.layouts[i + 1 :]))

    shares = tuple(draw.randrange(4) for _ in range(stage.data))
    changes = {
        "microbatches": lambda: replace(plan, microbatches=draw.choice([-1, 0, 1, 2, 3, 4, 8, 16])),
        "schedule": lambda: replace(plan, schedule=draw.choice([*SCHEDULES, "1f2b"])),
        "precision": lambda: replace(plan, precision=draw.choice(["float64", "bfloat16", "int8"])),
        "batch_size": lambda: replace(plan, batch_size=draw.choice([1, 2, 16])),
        "start": lambda: with_stage(start=stage.start + draw.choice([-1, 1])),
        "stop": lambda: with_stage(stop=stage.stop + draw.choice([-1, 1])),
        "ranks": lambda: with_stage(ranks=draw.choice([stage.ranks[::-1], stage.ranks[1:], put(stage.ranks, 0)])),
        "data": lambda: with_stage(data=draw.choice([0, 1, 2, 3, 8])),
        "axes": lambda: with_stage(axes=draw.choice([(), (2,), (2, 2), (1,), (3,), (0,)])),
        "shares": lambda: with_stage(shares=draw.choice([shares, (*shares, 1), (-1, *shares[1:])])),
        "zero": lambda: with_stage(zero=draw.choice([1, 3, 4, -1]), zero_group=draw.choice([0, 2, 3])),
        "recompute": lambda: with_stage(recompute=draw.choice([("full",), ("half",) * stage.num_blocks])),
        "index": lambda: with_stage(layouts=put(stage.layouts, (draw.randrange(99),) * stage.num_blocks)),
        "degree": lambda: replace(plan, layouts=put(plan.layouts, replace(plan.layouts[0], degree=3))),
        **{field: functools.partial(with_layout, field) for field in ("strategies", "inputs", "outputs", "parameters")},
    }
    needs_layouts = {"index", "degree", "strategies", "inputs", "outputs", "parameters"}
    # Half of the edits are in the layouts, where most can go wrong.
    kinds = [kind for kind in changes if kind not in needs_layouts]
    if plan.layouts and draw.random() < 0.5:
        kinds = [kind for kind in needs_layouts if kind != "index" or stage.layouts]
    kind = draw.choice(sorted(kinds))
    return kind, changes[kind]()


@pytest.mark.parametrize("model_seed", range(8))
def test_an_edited_plan_is_refused_or_exact(model_seed: int) -> None:
    graph = graph_of(model_seed)
    module, example = random_model(model_seed)
    draw = random.Random(model_seed)
    refused = ran = 0
    for number in range(40):
        plan = random_plan(graph, 100 * model_seed + number % 10)
        cluster = Cluster.preset("cpu", hosts=1, devices_per_host=plan.world_size)
        kind, other = edited(plan, graph, draw)
        try:
            other.validate(graph, cluster)
        except ValueError as error:
            assert str(error).startswith("plan."), (kind, error)
            refused += 1
            continue
        if other == plan or other.precision != "float32" or any(stage.zero for stage in other.stages):
            continue
        if not SCHEDULES[other.schedule].flushes or ran >= 4:
            continue
        errors = parallel_step(graph, module, example, other)
        assert errors[0] < EXACT[0] and errors[1] < EXACT[1], (kind, other, errors)
        ran += 1
    assert refused >= 10, refused


def test_an_op_that_cannot_be_split_so_is_named_with_what_it_can_do() -> None:
    named = 0
    for model_seed in range(8):
        graph = graph_of(model_seed)
        for seed in range(12):
            plan = random_plan(graph, seed)
            if not plan.layouts:
                continue
            draw = random.Random(seed)
            i = draw.randrange(len(plan.layouts))
            layout = plan.layouts[i]
            j = draw.randrange(len(layout.strategies))
            wrong = replace(layout, strategies=(*layout.strategies[:j], "z", *layout.strategies[j + 1 :]))
            other = replace(plan, layouts=(*plan.layouts[:i], wrong, *plan.layouts[i + 1 :]))
            with pytest.raises(ValueError) as caught:
                other.validate(graph, Cluster.preset("cpu", hosts=1, devices_per_host=plan.world_size))
            message = str(caught.value)
            block = next(
                graph.blocks[stage.start + place]
                for stage in plan.stages
                for row in stage.layouts
                for place, index in enumerate(row)
                if index == i
            )
            op = graph.op[block.ops[j]]
            assert f"plan.layouts[{i}].strategies[{j}] is 'z'" in message and op.target in message, message
            assert f"ranks only as {'-' if layout.strategies[j] == '-' else ''}" in message, message
            assert layout.strategies[j] in message.split("only as ")[1].split(", "), message
            named += 1
    assert named > 20
