"""Model axes whose role is pinned: what they split, what they leave whole, and what a plan with them computes."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Iterator
from dataclasses import replace

import models
import pytest
import torch
from loopback_plans import parallel_step
from planner_cases import chain_graph, small_cluster
from torch import Tensor, nn

from autopar import capture
from autopar.cluster.presets import preset
from autopar.cluster.spec import Cluster
from autopar.cost.model import CostModel
from autopar.graph import Graph, Op
from autopar.plan import Plan, Stage
from autopar.planner.chains import LayoutChains
from autopar.planner.constraints import Constraints
from autopar.planner.judge import Judge
from autopar.planner.meshes import MeshLayouts
from autopar.planner.methods.exhaustive import exhaustive
from autopar.planner.mixes import Mixes
from autopar.planner.problem import Problem
from autopar.planner.roles import leaves, refusal
from autopar.planner.search import METHODS, search
from autopar.report.common_words import common_words
from autopar.sharding.flow import find_strategies
from autopar.sharding.placement import Split, parse_placement
from autopar.sharding.rows import stage_units
from autopar.sharding.strategies import strategies
from autopar.sharding.strategy import Strategy
from autopar.simulate import simulate

EXACT = (2e-6, 1e-5)
"""Relative errors of the loss and of a gradient against its norm."""


@functools.cache
def built(name: str) -> tuple[Graph, nn.Module, dict[str, Tensor]]:
    module, example, _ = getattr(models, f"build_{name}")()
    module = module if name == "experts" else models.Loss(module)
    return capture(module, example), module, example


def of_host(num_devices: int) -> Cluster:
    return preset("a100-80gb", 1, num_devices)


def runs_of(plan: Plan, graph: Graph, stage: Stage) -> Iterator[tuple[Op, tuple[Strategy, ...]]]:
    """Every op of a stage and its strategy on each model axis."""
    for block, layouts in zip(graph.blocks[stage.start : stage.stop], plan.layouts_of(stage), strict=True):
        for op, *keys in zip(graph.block_ops(block), *(one.strategies for one in layouts), strict=True):
            yield op, find_strategies(graph, op, keys, stage.axes, stage_units(plan, stage))


def roots_of(graph: Graph, name: str) -> set[str]:
    """The parameters that a tensor is made of through a line of ops on one tensor each, such as transposes."""
    while graph.tensors[name].role != "parameter":
        if name not in graph.producer or len(graph.producer[name].inputs) != 1:
            return set()
        (name,) = graph.producer[name].inputs
    return {name}


def cut_on(plan: Plan, graph: Graph, stage: Stage, axis: int) -> set[str]:
    """Parameters that an axis cuts, where they are used, as they are or made into something else, or at rest."""
    found = set()
    for op, chosen in runs_of(plan, graph, stage):
        for name, place in zip(op.inputs, chosen[axis].inputs, strict=True):
            found |= roots_of(graph, name) if isinstance(place, Split) else set()
    for block, layouts in zip(graph.blocks[stage.start : stage.stop], plan.layouts_of(stage), strict=True):
        at_rest = zip(block.parameters, layouts[axis].parameters, strict=True)
        found |= {n for n, token in at_rest if isinstance(parse_placement(token), Split)}
    return found


def check_context(plan: Plan, graph: Graph, stage: Stage, axis: int) -> None:
    assert not cut_on(plan, graph, stage, axis)
    for op, chosen in runs_of(plan, graph, stage):
        made, kind = chosen[axis].outputs[0], op.target.split(".")[1]
        if kind == "scaled_dot_product_attention":
            assert made in (Split(1), Split(2)), (op, made)
        elif kind in ("linear", "embedding") and len(graph.tensors[op.outputs[0]].shape) == 3:
            assert made == Split(1), (op, made)


def check_expert(plan: Plan, graph: Graph, stage: Stage, axis: int) -> None:
    routed = set()
    for op, chosen in runs_of(plan, graph, stage):
        if op.target == "autopar.routed_rows":
            places = dict(zip(op.inputs, chosen[axis].inputs, strict=True))
            weights = {name for name in places if roots_of(graph, name)}
            assert weights and {places[name] for name in weights} == {Split(0)}, (op, places)
            routed |= set().union(*(roots_of(graph, name) for name in weights))
    assert cut_on(plan, graph, stage, axis) == routed


CHECKS = {"context": check_context, "expert": check_expert}


@pytest.mark.parametrize("name", ["llama", "mixtral", "experts", "gpt2"])
@pytest.mark.parametrize("role", ["context", "expert"])
def test_what_a_role_leaves_of_the_strategies_of_an_op(name: str, role: str) -> None:
    """Whatever the prices are: no cut of a parameter, as it is or made into something else, but of the experts' weights."""
    graph, _, _ = built(name)
    experts = set()
    if role == "expert":
        routed = [op for op in graph.ops if op.target == "autopar.routed_rows"]
        experts = set().union(*(roots_of(graph, name) for op in routed for name in op.inputs))
    num_dropped = 0
    for op in graph.ops:
        found = strategies(graph, op, 2)
        left = leaves(role, graph, op, found)
        cuts = {
            strategy.key: set().union(
                *(roots_of(graph, n) for n, p in zip(op.inputs, strategy.inputs, strict=True) if isinstance(p, Split))
            )
            for strategy in found
        }
        assert left and all(cuts[strategy.key] <= experts for strategy in left), (op, left)
        num_dropped += len(found) - len(left)
    assert num_dropped > 10


# model: (devices, what is pinned, degrees of the model axes)
CASES = [
    ("llama", 2, dict(context=2), [2]),
    ("llama", 4, dict(context=4, tensor=1), [4]),
    ("llama", 4, dict(context=2, tensor=1, pipeline=2), [2]),
    ("llama", 4, dict(context=2, tensor=2), [2, 2]),
    ("llama", 8, dict(context=2, tensor=2, data=2), [2, 2]),
    ("mixtral", 2, dict(expert=2), [2]),
    ("mixtral", 2, dict(context=2), [2]),
    ("mixtral", 4, dict(expert=2, tensor=2), [2, 2]),
    ("mixtral", 4, dict(context=2, expert=2), [2, 2]),
    ("mixtral", 8, dict(expert=4, tensor=2), [4, 2]),
    ("experts", 4, dict(expert=2, tensor=1, pipeline=2), [2]),
    ("experts", 8, dict(context=2, expert=4), [2, 4]),
]


@pytest.mark.parametrize(("name", "num_devices", "pins", "axes"), CASES, ids=str)
def test_axes_have_their_roles_and_plans_are_exact(name: str, num_devices: int, pins: dict, axes: list[int]) -> None:
    graph, module, example = built(name)
    # the loopback has no ZeRO
    plan = search(graph, of_host(num_devices), progress=False, zero=0, schedule="1f1b", microbatches=2, **pins)
    plan.validate(graph, of_host(num_devices))
    roles = [role for role in ("context", "expert") if pins.get(role, 1) > 1]
    for stage in plan.stages:
        assert list(stage.axes) == axes
        for axis, role in enumerate(roles):
            CHECKS[role](plan, graph, stage, axis)
    assert plan.pipeline == pins.get("pipeline", plan.pipeline)
    for role in roles:
        words = {"context": f"(context {pins[role]} by|sequence split over)", "expert": f"experts over {pins[role]}"}
        assert re.search(words[role], common_words(plan, graph))
    errors = parallel_step(graph, module, example, plan)
    assert errors[0] < EXACT[0] and errors[1] < EXACT[1], errors


def test_the_axis_beside_may_be_a_tensor_axis() -> None:
    """Megatron's layouts inside, positions outside, with layouts pinned by name that only the inner axis can keep."""
    graph, module, example = built("llama")
    megatron = {"*mlp.up_proj": "column", "*mlp.down_proj": "row"}
    plan = search(graph, of_host(4), progress=False, context=2, tensor=2, zero=0, microbatches=1, layout=megatron)
    (stage,) = plan.stages
    check_context(plan, graph, stage, 0)
    # the pair is no optimum over both axes, so nothing is proved
    bound_s = plan.prediction.lower_bound_s
    assert bound_s is None or bound_s < plan.prediction.step_time_s
    names = {graph.tensors[name].fqn for name in cut_on(plan, graph, stage, 1)}
    assert sum("up_proj" in name for name in names) == sum("down_proj" in name for name in names) == 2
    assert "context 2 by" in common_words(plan, graph) and "tensor 2" in common_words(plan, graph)
    errors = parallel_step(graph, module, example, plan)
    assert errors[0] < EXACT[0] and errors[1] < EXACT[1], errors


def test_auto_is_no_worse_than_the_oracle() -> None:
    graph, _, _ = built("llama")
    cluster = of_host(4)
    costs = CostModel(graph, cluster)
    pins = Constraints(context=2, microbatches=2, schedule="1f1b", zero=0, recompute="none")
    problem = Problem(graph, cluster, costs, LayoutChains(), pins)
    best = exhaustive(problem)
    assert {stage.axes for stage in best.stages} <= {(2,), (2, 2)} and not refusal(pins.roles, graph, best)
    plan = METHODS["auto"](replace(problem, chains=LayoutChains()))
    assert not refusal(pins.roles, graph, plan)
    times_s = [simulate(graph, one, cluster, model=costs).step_time_s for one in (plan, best)]
    assert times_s[0] <= times_s[1] * (1 + 1e-9)


def test_one_asks_for_nothing() -> None:
    graph, _, _ = built("experts")
    free = search(graph, of_host(2), progress=False, tensor=2)
    assert search(graph, of_host(2), progress=False, tensor=2, context=1, expert=1) == free


def test_a_plan_without_the_role_is_refused() -> None:
    """As those of a method would be that paid no heed."""
    graph, _, _ = built("mixtral")
    plan = search(graph, of_host(2), progress=False, expert=2, microbatches=1)
    assert not refusal((("expert", 2),), graph, plan)
    assert "context= asks for" in refusal((("context", 2),), graph, plan)
    assert "of 4 ranks that expert=" in refusal((("expert", 4),), graph, plan)
    column = search(graph, of_host(2), progress=False, tensor=2, microbatches=1, layout={"*o_proj": "column"})
    for role in ("context", "expert"):
        assert f"of 2 ranks that {role}=" in refusal(((role, 2),), graph, column)


IMPOSSIBLE = {
    "product": (
        "llama", 8, dict(data=2, tensor=2, context=2, pipeline=2),
        "data=2 x tensor=2 x pipeline=2 x context=2 = 16, but the cluster has 8 devices",
    ),
    "both roles are all axes": (
        "mixtral", 8, dict(data=1, pipeline=1, context=2, expert=2),
        "data=1 x pipeline=1 x context=2 x expert=2 = 4, but the cluster has 8 devices",
    ),
    "part": ("llama", 8, dict(context=3), "context=3, which does not divide the cluster's 8 devices"),
    "three axes": (
        "mixtral", 8, dict(context=2, expert=2, tensor=2),
        "context=2 and expert=2 and tensor=2 are 3 model axes, and searches make 2 at most",
    ),
    "positions": (
        "llama", 32, dict(context=32),
        "context=32: the positions of Loss cannot be split 32 ways .*8 x 4 x 16 x 8.* context could be 1 or 2 or 4 or 8",
    ),
    "experts": (
        "mixtral", 8, dict(expert=8),
        "expert=8: the experts of Loss cannot be split 8 ways; expert could be 1 or 2 or 4",
    ),
    "no experts": ("llama", 2, dict(expert=2), "expert=2: Loss has no experts"),
    "data": (
        "llama", 8, dict(context=4, pipeline=2, zero=3),
        "pipeline=2 and zero=3 and context=4 contradict each other.*context could be 1 or 2",
    ),
    "tensor beside": (
        "llama", 8, dict(context=2, tensor=2, pipeline=2, zero=3),
        "tensor=2 and pipeline=2 and zero=3 and context=2 contradict each other.*tensor could be 1, .*context could be 1",
    ),
    "layout": (
        "llama", 2, dict(context=2, layout={"*q_proj": "column"}),
        r"context=2 and layout\['\*q_proj'\]='column' contradict each other.*context could be 1",
    ),
    "method": ("llama", 2, dict(context=2, method="alpa"), "context=2: method='alpa' .* use method='auto' or 'exhaustive'"),
}  # fmt: skip


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_cannot_be_is_explained(case: str) -> None:
    name, num_devices, pins, words = IMPOSSIBLE[case]
    with pytest.raises(ValueError, match=words):
        search(built(name)[0], of_host(num_devices), progress=False, **pins)


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="context=2: Chain has no sequence to split"):
        search(chain_graph((0, 1, 1, 0), 8), small_cluster(2), progress=False, context=2)


KINDS = Cluster.join(preset("a100-80gb", 1, 4), preset("v100-16gb", 1, 2))


@pytest.mark.parametrize(
    ("name", "pins", "axes"),
    [
        ("llama", dict(context=2, tensor=1), {(2,)}), ("llama", dict(context=2, pipeline=2), {(2,), (2, 2)}),
        ("mixtral", dict(expert=2, tensor=1, schedule="zb-h1"), {(2,)}), ("llama", dict(context=2, data=1), {(2,), (2, 2)}),
    ],
)  # fmt: skip
def test_axes_have_their_roles_among_unequal_devices(name: str, pins: dict, axes: set[tuple[int, ...]]) -> None:
    """Stages of several numbers of devices, in parity with the module."""
    graph, module, example = built(name)
    plan = search(graph, KINDS, progress=False, zero=0, microbatches=2, **pins)
    plan.validate(graph, KINDS)
    role = "expert" if "expert" in pins else "context"
    for stage in plan.stages:
        assert stage.axes in axes
        CHECKS[role](plan, graph, stage, 0)
    errors = parallel_step(graph, module, example, plan)
    assert errors[0] < EXACT[0] and errors[1] < EXACT[1], errors


def test_degrees_that_not_all_stages_can_have_are_refused() -> None:
    with pytest.raises(ValueError, match="tensor=2 x context=2 = 4, which does not divide the cluster's 6 devices"):
        search(built("llama")[0], KINDS, progress=False, context=2, tensor=2)


@pytest.mark.parametrize("pins", [dict(context=2, tensor=1), dict(context=2)], ids=str)
def test_stages_of_unlike_meshes_have_the_roles_too(pins: dict) -> None:
    """As they are proposed on six equal devices, such as two and four of them."""
    graph, module, example = built("llama")
    cluster = of_host(6)
    problem = Problem(graph, cluster, CostModel(graph, cluster), LayoutChains(), Constraints(**pins))
    proposed = Mixes(problem, Judge(problem), MeshLayouts(problem), 2).sketches((0,), "1f1b")
    plans = [sketch.plan(graph) for _, sketch in proposed]
    unlike = [plan for plan in plans if len({(stage.data, stage.axes) for stage in plan.stages}) > 1]
    assert len(unlike) > 1
    for plan in unlike[:2]:
        plan.validate(graph, cluster)
        for stage in plan.stages:
            check_context(plan, graph, stage, 0)
        errors = parallel_step(graph, module, example, plan)
        assert errors[0] < EXACT[0] and errors[1] < EXACT[1], errors


def llama_3_8b(layers: int) -> Graph:
    """Dubey et al., 2024, table 3, with fewer layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192,
    )  # fmt: skip
    with torch.device("meta"):
        module, ids = LlamaForCausalLM(config).bfloat16(), torch.zeros(256, 8192, dtype=torch.int64)
    return capture(module, {"input_ids": ids, "labels": ids.clone()})


def test_many_devices_take_seconds() -> None:
    graph, cluster = llama_3_8b(4), Cluster.preset("h100-80gb", hosts=8, devices_per_host=8)
    for pins, axes in ((dict(context=2, tensor=1), (2,)), (dict(context=2, tensor=4), (2, 4))):
        begin_s = time.process_time()
        plan = search(graph, cluster, progress=False, **pins)
        # about 2 s when this was written; bounded loosely because machines differ
        assert time.process_time() - begin_s < 20
        plan.validate(graph, cluster)
        for stage in plan.stages:
            assert stage.axes == axes
            check_context(plan, graph, stage, 0)
