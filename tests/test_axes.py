"""Several model axes: how cuts of one dim nest, the paths between placements, and random plans through generated code.

First without processes (the loopback runs all ranks here), then a few plans on gloo through the whole runtime.
"""

from __future__ import annotations

import functools
import math
import random
from collections import Counter
from dataclasses import replace

import models
import pytest
import torch
import torch.distributed as dist
from loopback import run
from plan_cases import random_plan
from test_parity import call, graph_of, one_step
from torch import Tensor, nn

import autopar
from autopar.cluster.spec import Cluster
from autopar.graph import Graph, Op
from autopar.plan import Layout, Plan, Stage
from autopar.runtime.build import _with_reductions, parameter_specs
from autopar.runtime.collectives import convert
from autopar.runtime.groups import build_groups
from autopar.runtime.rewrite import Chunk
from autopar.runtime.stage import compile_stage
from autopar.runtime.storage import StageAxes, reduction_axis
from autopar.sharding.axes import absolute, changes, nests
from autopar.sharding.emulate import combine_all, dual, hand_out_all
from autopar.sharding.flow import Convert, Run, block_flow
from autopar.sharding.placement import PARTIAL, REPLICATED, SHARED, Placement, Split, conversion
from autopar.sharding.rule import divides
from autopar.sharding.strategies import strategies
from autopar.sharding.strategy import Strategy

SHAPE = (48, 72)
PLACEMENTS: tuple[Placement, ...] = (
    REPLICATED, PARTIAL, SHARED, Split(0), Split(0), Split(1), Split(0, 2), Split(0, 4), Split(1, 3)
)  # fmt: skip
DEGREES = [(2, 2), (2, 3), (3, 2), (2, 2, 2)]


def legal(draw: random.Random, degrees: tuple[int, ...]) -> tuple[Placement, ...]:
    while True:
        places = tuple(draw.choice(PLACEMENTS) for _ in degrees)
        if divides(SHAPE, list(zip(places, degrees, strict=True))):
            return places


def a_plan(degrees: tuple[int, ...], data: int = 1) -> Plan:
    world = data * math.prod(degrees)
    stage = Stage(0, 1, tuple(range(world)), data, degrees)
    return Plan("m", "f", world, 1, 1, "gpipe", (stage,))


@pytest.mark.parametrize("degrees", DEGREES)
def test_every_path_keeps_value_and_gradient(degrees: tuple[int, ...]) -> None:
    draw = random.Random(str(degrees))
    for _ in range(60):
        have, want = legal(draw, degrees), legal(draw, degrees)
        generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
        value, gradient = (torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(2))
        placed, wanted = list(zip(have, degrees, strict=True)), list(zip(want, degrees, strict=True))
        inputs = hand_out_all(value, placed)
        returned = hand_out_all(gradient, [(dual(p), n) for p, n in wanted])
        path = changes(SHAPE, have, want, degrees, 0)
        assert not path or (path[0].before, path[-1].after) == (absolute(have, degrees), absolute(want, degrees))

        def program(path=path, inputs=inputs, returned=returned) -> tuple[Tensor, Tensor]:
            groups = build_groups(a_plan(degrees))
            rank = dist.get_rank()
            x = out = inputs[rank].clone().requires_grad_()
            out = x * 1.0
            for change in path:
                out = convert(
                    out, groups.model[change.axes], change.have, change.want, change.have_blocks, change.want_blocks
                )
            out.backward(returned[rank])
            return out.detach(), x.grad

        results = run(program, math.prod(degrees))
        for rank, expected in enumerate(hand_out_all(value, wanted)):
            if PARTIAL not in want:
                torch.testing.assert_close(results[rank][0], expected, msg=f"{have} -> {want} by {path}")
        back = [(dual(p), n) for p, n in placed]
        torch.testing.assert_close(combine_all([out for out, _ in results], wanted), value)
        torch.testing.assert_close(combine_all([grad for _, grad in results], back), gradient)


def test_states_on_the_way_nest_and_no_detour_is_taken_without_need() -> None:
    draw = random.Random(0)
    for degrees in DEGREES:
        for _ in range(200):
            have, want = legal(draw, degrees), legal(draw, degrees)
            path = changes(SHAPE, have, want, degrees, 0)
            for change in path:
                assert nests(SHAPE, change.after, degrees)
            direct = sum(a != b for a, b in zip(absolute(have, degrees), absolute(want, degrees), strict=True))
            assert len(path) <= direct + len(degrees), (have, want, path)


def test_the_cheapest_path() -> None:
    def told(*pairs: tuple[Placement, Placement]) -> list[tuple[tuple[int, ...], str]]:
        have, want = zip(*pairs, strict=True)
        path = changes(SHAPE, have, want, (2,) * len(pairs), 0)
        return [(change.axes, conversion(change.have, change.want).forward) for change in path]

    # Axes that change alike are one.
    assert told((PARTIAL, REPLICATED), (PARTIAL, REPLICATED)) == [((0, 1), "all_reduce")]
    assert told((Split(0), REPLICATED), (Split(0), REPLICATED)) == [((0, 1), "all_gather")]
    # The inner cut is made coarser inside the outer one's place: the whole is never gathered over both axes.
    assert told((Split(0), REPLICATED), (Split(0), Split(0))) == [((0,), "all_gather"), ((1,), "all_to_all")]
    # What shrinks the tensor comes first.
    assert told((Split(1), REPLICATED), (PARTIAL, Split(0))) == [((1,), "reduce_scatter"), ((0,), "all_gather")]
    # An outer cut cannot be made of what an inner one has left, so that one goes first.
    assert told((REPLICATED, Split(0)), (Split(0), Split(1))) == [((1,), "all_to_all"), ((0,), "slice")]
    assert told((REPLICATED, Split(0)), (Split(1), Split(0))) == [((0,), "slice"), ((1,), "all_to_all")]


def take_part(name: str, plan: Plan) -> tuple[float, dict[str, float]]:
    """(summand of the loss, relative error of every gradient) of this rank; the module's own gradients are the oracle."""
    graph = graph_of(name)
    module, example, values, expected = case(name)
    groups = build_groups(plan)
    rank, stage = groups.rank, plan.stages[0]
    compiled = compile_stage(graph, plan, 0, groups.data.rank, groups.model, torch.device("cpu"))
    specs = {s.fqn: s for s in _with_reductions(graph, compiled, parameter_specs(graph, plan)[0], rank)}
    leaves = {
        t.name: specs[t.fqn].ownership.take(values[t.name], rank).requires_grad_(t.requires_grad)
        for t in graph.parameters
    }

    def read(names: tuple[str, ...], m: int) -> list[Tensor]:
        found = []
        for t in names:
            value = values[t]
            if compiled.batch_splits.get(t):
                value = value.unflatten(0, (plan.microbatches, stage.data, -1))[m, groups.data.rank]
            found.append(value)
        return found

    def chunk(m: int) -> Chunk:
        return Chunk(m * stage.data + groups.data.rank, stage.data * plan.microbatches, lambda key: None)

    whole: tuple[Tensor, ...] = ()
    if compiled.prologue_function is not None:
        parts = [
            compiled.prologue_function(chunk(m), read(compiled.prologue_batch, m), ()) for m in range(plan.microbatches)
        ]
        sums = [
            torch.stack(one).sum(0) if pending else one[0]
            for one, pending in zip(zip(*parts, strict=True), compiled.pending, strict=True)
        ]
        for value, pending in zip(sums, compiled.pending, strict=True):
            if pending and stage.data > 1:
                groups.data.all_reduce(value)
        whole = tuple(sums)
    total = 0.0
    for m in range(plan.microbatches):
        made = compiled.side_function(chunk(m), read(compiled.side_batch, m), whole)
        sides = dict(zip(compiled.sides, made, strict=True))
        activations: tuple[Tensor, ...] = ()
        for block in compiled.blocks:
            parameters = [leaves[t] for t, _ in block.parameters]
            activations = block.training(chunk(m), parameters, activations, [sides[t] for t in block.sides])
        loss = activations[compiled.blocks[-1].outputs.index(graph.loss)]
        loss.backward()
        total += loss.item()
    axes = StageAxes(groups.data, groups.tensor, groups.all_of_stage, rank, torch.device("cpu"), groups.lines)
    wrong = {}
    for t in graph.parameters:
        if t.requires_grad:
            spec = specs[t.fqn]
            gradient = torch.zeros_like(leaves[t.name]) if leaves[t.name].grad is None else leaves[t.name].grad
            axis = reduction_axis(spec, axes)
            if axis is not None and axis.size > 1:
                gradient = axis.all_reduce(gradient.clone())
            difference = gradient - spec.ownership.take(expected[t.fqn], rank)
            wrong[t.fqn] = float(difference.norm() / expected[t.fqn].norm())
    return total, wrong


@functools.cache
def case(name: str):
    module, example, loss = getattr(models, name)()
    graph = graph_of(name)
    value = call(module, example, loss)
    value.backward()
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    values = {t.name: state[t.fqn].detach() for t in graph.tensors.values() if t.role in ("parameter", "buffer")}
    values |= graph.constants
    for t, key in zip(graph.inputs, graph.input_keys, strict=True):
        entry = (example,) if isinstance(example, Tensor) else example
        for part in key if isinstance(key, tuple) else (key,):
            entry = entry[part]
        values[t] = entry
    gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return value.item(), example, values, gradients


NUM_SEEDS = {
    "build_llama": 1, "build_gpt2": 1, "build_tied_lm": 1, "build_mlp": 3, "build_conv_net": 2, "build_two_inputs": 3
}  # fmt: skip


def check(name: str, plan: Plan, told: object) -> None:
    """Run all ranks of the plan's one stage in this process, and hold them against the module."""
    expected = case(name)[0]
    results = run(take_part, plan.world_size, name, plan)
    losses = [total for total, _ in results[:: plan.stages[0].tensor]]
    assert abs(sum(losses) - expected) < 1e-5 * abs(expected), (told, losses, expected)
    for rank, (_, wrong) in enumerate(results):
        assert max(wrong.values()) < 1e-4, (rank, told, wrong)


@pytest.mark.parametrize("name", NUM_SEEDS)
def test_random_plans_on_several_axes(name: str) -> None:
    graph = graph_of(name)
    meshes = ((1, (2, 2), 1), (1, (2, 2), 2), (2, (2, 2), 1), (1, (4, 2), 1), (1, (2, 2, 2), 2), (2, (2, 2), 2))
    for seed in range(NUM_SEEDS[name]):
        for data, degrees, microbatches in meshes:
            plan = random_plan(graph, data, degrees, 1, microbatches, seed=seed)
            plan.validate(graph, Cluster.preset("cpu", hosts=1, devices_per_host=plan.world_size))
            check(name, plan, (seed, data, degrees, microbatches))


def following(graph: Graph, degree: int, attention: str) -> tuple[Layout, ...]:
    """The sequence (dim 1) split everywhere but in attention, which runs as `attention` says: op by op, what asks for
    the fewest conversions."""
    placed: dict[str, Placement] = {}
    layouts = []
    for block in graph.blocks:
        chosen = []
        for op in graph.block_ops(block):
            options = strategies(graph, op, degree)
            if "attention" in op.target:
                options = [s for s in options if s.key == attention]

            def fit(
                strategy: Strategy, op: Op = op, placed: dict[str, Placement] = placed
            ) -> tuple[bool, int, bool, float]:
                pairs = list(zip(op.inputs, strategy.inputs, strict=True))
                matches = sum(placed.get(t) == p for t, p in pairs if isinstance(p, Split))
                weights = any(isinstance(p, Split) for t, p in pairs if graph.tensors[t].role == "parameter")
                return not weights, matches, strategy.outputs[0] == Split(1), -strategy.work

            best = max(options, key=fit)
            chosen.append(best.key)
            placed.update(zip(op.outputs, best.outputs, strict=True))
        placed |= {t: REPLICATED for t in (graph.loss,) if t in placed}
        edges = [tuple(str(placed[t]) for t in names) for names in (block.inputs, block.outputs)]
        layouts.append(Layout(degree, tuple(chosen), *edges, ("R",) * len(block.parameters)))
    return tuple(layouts)


@pytest.mark.parametrize("attention", ["q+k", "q", "d1"])
def test_context_parallel_and_ulysses(attention: str) -> None:
    """Ring attention, gathered keys and values, and heads exchanged for sequence by all-to-all."""
    graph = graph_of("build_llama")
    layouts = following(graph, 2, attention)
    count = len(graph.blocks)
    stage = Stage(0, count, (0, 1), 1, (2,), (tuple(range(count)),))
    plan = replace(random_plan(graph, 1, 2, 1, 1), stages=(stage,), layouts=layouts)
    plan.validate(graph, Cluster.preset("cpu", hosts=1, devices_per_host=2))
    steps = [
        step
        for block, layout in zip(graph.blocks, layouts, strict=True)
        for step in block_flow(graph, block, (layout,))
    ]
    of_layers = [
        conversion(step.have, step.want).forward
        for step in steps
        if isinstance(step, Convert) and graph.tensors[step.tensor].role == "activation"
    ]
    attentions = [step.op for step in steps if isinstance(step, Run) and "attention" in step.op.target]
    # Per attention: nothing | keys and values gathered | query, key, value and output exchanged.
    expected = {"q+k": {}, "q": {"all_gather": 2}, "d1": {"all_to_all": 4}}[attention]
    found = Counter(action for action in of_layers if action in ("all_gather", "all_to_all", "reduce_scatter"))
    assert len(attentions) == 2 and found == {k: v * 2 for k, v in expected.items()}, found
    check("build_llama", plan, attention)


def test_more_ranks_than_key_value_heads() -> None:
    """4 query heads over 2 key-value heads on 2 x 2 ranks: the second axis splits the query heads of a group."""
    graph = graph_of("build_llama")
    attention = next(op for op in graph.ops if "attention" in op.target)
    heads = next(s for s in strategies(graph, attention, 2) if s.key == "d1")
    inside = {s.key: s for s in strategies(graph, attention, 2, 1, ((heads, 2),))}
    assert inside["d1"].inputs[0] == Split(1)
    key = graph.producer[
        graph.producer[attention.inputs[1]].inputs[0]
    ]  # the heads of keys, each as often as it is used
    outer = next(s for s in strategies(graph, key, 2) if s.key == "d1")
    options = [s.key for s in strategies(graph, key, 2, 1, ((outer, 2),))]
    assert "d1" not in options and "d2" in options
    only = Grouped(8, 2, 4)
    graph = autopar.capture(only, torch.randn(4, 6, 32))
    (attention,) = (op for op in graph.ops if "attention" in op.target)
    assert {"d1", "r"} <= {s.key for s in strategies(graph, attention, 2)}
    heads = next(s for s in strategies(graph, attention, 2) if s.key == "d1")
    within = next(s for s in strategies(graph, attention, 2, 1, ((heads, 2),)) if s.key == "r")
    assert within.inputs == (Split(1, 2), SHARED, SHARED)


def test_refused_layouts_of_the_second_axis() -> None:
    graph = graph_of("build_mlp")
    cluster = Cluster.preset("cpu", hosts=1, devices_per_host=4)
    plan = random_plan(graph, 1, (2, 2), 1, 1)
    count = len(graph.blocks)
    (stage,) = plan.stages
    with pytest.raises(ValueError, match=r"stages\[0\].layouts has 1 entries, expected 2: one per model axis"):
        replace(plan, stages=(replace(stage, layouts=stage.layouts[:1]),)).validate(graph, cluster)
    with pytest.raises(ValueError, match=rf"stages\[0\].layouts\[1\] has {count - 1} entries"):
        replace(plan, stages=(replace(stage, layouts=(stage.layouts[0], stage.layouts[1][:-1])),)).validate(
            graph, cluster
        )
    plan = random_plan(graph, 1, (4, 4), 1, 1)
    cluster = Cluster.preset("cpu", hosts=1, devices_per_host=16)
    for index, layout in enumerate(plan.layouts[count:], count):
        block = graph.blocks[index - count]
        for i, op in enumerate(graph.block_ops(block)):
            outer = next(s for s in strategies(graph, op, 4) if s.key == plan.layouts[index - count].strategies[i])
            inside = {s.key for s in strategies(graph, op, 4, 1, ((outer, 4),))}
            for lost in {s.key for s in strategies(graph, op, 4)} - inside:
                keys = (*layout.strategies[:i], lost, *layout.strategies[i + 1 :])
                wrong = replace(layout, strategies=keys)
                layouts = (*plan.layouts[:index], wrong, *plan.layouts[index + 1 :])
                with pytest.raises(ValueError, match=r"inside '.*' on the axes before, can run on 4 ranks only as"):
                    replace(plan, layouts=layouts).validate(graph, cluster)
                return
    raise AssertionError("no op lost a strategy to the first axis")


class Grouped(nn.Module):
    def __init__(self, heads: int, groups: int, size: int) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, size
        self.q = nn.Linear(heads * size, heads * size, bias=False)
        self.kv = nn.Linear(heads * size, 2 * groups * size, bias=False)
        self.o = nn.Linear(heads * size, heads * size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, self.size)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2 * self.groups, self.size)).transpose(1, 2).chunk(2, 1)
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(out.transpose(1, 2).flatten(2)).square().mean()


GLOO = [
    ("build_llama", dict(data=1, tensor=(2, 2), pipeline=1, microbatches=2)),
    ("build_gpt2", dict(data=1, tensor=(2, 2), pipeline=1, microbatches=1, recompute="full")),
    ("build_tied_lm", dict(data=1, tensor=(2, 2), pipeline=2, microbatches=2)),
    ("build_llama", dict(data=2, tensor=(2, 2), pipeline=1, microbatches=2, zero=3)),
    ("build_mlp", dict(data=2, tensor=(2, 2), pipeline=1, microbatches=1, zero=0)),
]


@pytest.mark.parametrize("world_size", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_plans_on_processes(pool, world_size: int) -> None:
    for name, plan in GLOO:
        if plan["data"] * 4 * plan["pipeline"] != world_size:
            continue
        for rank, found in enumerate(pool.run(one_step, name, [plan], world_size=world_size, timeout_s=240)):
            ((loss, gradient, evaluated),) = found
            assert loss < 1e-6 and evaluated < 1e-6, (rank, name, plan, loss, evaluated)
            assert gradient < 1e-5, (rank, name, plan, gradient)
