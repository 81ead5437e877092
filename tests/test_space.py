"""Height and width split over ranks: what windows need of neighbours, every op over windows, and whole nets."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import window_cases
from opinfo_cases import check_sample, one_op_graph
from plan_cases import random_plan, world_of
from test_axes import check
from test_more_models import two_steps
from test_parity import graph_of, one_step

from autopar.cluster.spec import Cluster
from autopar.graph import Graph
from autopar.plan import Layout, Plan, Stage
from autopar.sharding.flow import Convert, Run, block_flow
from autopar.sharding.placement import REPLICATED, Placement, Split, conversion
from autopar.sharding.strategies import strategies
from autopar.sharding.window import Window

NETS = ("build_vgg", "build_unet", "build_residual_net")


def random_window(draw: random.Random) -> tuple[Window, list[set[int]]]:
    """A convolution's window, or a transposed one's, and the inputs that each output reads, tap by tap."""
    size, kernel, dilation = draw.choice([6, 8, 12, 16, 24]), draw.randint(1, 7), draw.randint(1, 3)
    stride, extent = draw.randint(1, 3), dilation * (kernel - 1) + 1
    padding = draw.randint(0, extent // 2)
    if draw.random() < 0.5 or extent < stride:
        out = max(0, size + 2 * padding - extent) // stride + 1
        reads = [{y * stride - padding + dilation * k for k in range(kernel)} for y in range(out)]
        return Window(size, out, stride, -padding, extent - 1 - padding), reads
    out = (size - 1) * stride - 2 * padding + extent
    pairs = [(x * stride - padding + dilation * k, x) for x in range(-extent, size + extent) for k in range(kernel)]
    return Window(size, out, 1, padding - extent + 1, padding, stride), [
        {x for at, x in pairs if at == y} for y in range(out)
    ]


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_parts_hold_what_outputs_read(num_ranks: int) -> None:
    draw = random.Random(num_ranks)
    offered = refused = 0
    for _ in range(600):
        window, reads = random_window(draw)
        parts = window.parts(num_ranks)
        if window.size % num_ranks or window.out % num_ranks:
            assert parts is None
            continue
        own, made = window.size // num_ranks, window.out // num_ranks
        needed = [set().union(*reads[r * made : (r + 1) * made]) & set(range(window.size)) for r in range(num_ranks)]
        near = [set(range((r - 1) * own, (r + 2) * own)) for r in range(num_ranks)]
        if parts is None:
            refused += 1
            # A strategy is kept back only where a rank needs more than its neighbours have, or nothing that is there.
            runs = [
                set(range(*window.needs(r * made, (r + 1) * made))) & set(range(window.size)) for r in range(num_ranks)
            ]
            assert any(not run <= n or not run for run, n in zip(runs, near, strict=True)), window
            continue
        offered += 1
        for rank, part in enumerate(parts):
            first = rank * own
            here = set(range(first + part.start, first + part.stop))
            here |= set(range(first - part.from_previous, first))
            here |= set(range(first + own, first + own + part.from_next))
            assert needed[rank] <= here, (window, rank)
            assert part.length == len(range(*window.needs(rank * made, (rank + 1) * made)))
            assert part.to_next == (parts[rank + 1].from_previous if rank + 1 < num_ranks else 0)
            assert part.to_previous == (parts[rank - 1].from_next if rank else 0)
        if window.apart:
            assert window.border(num_ranks) == 0
    assert offered > 100 and (refused > 10 or num_ranks == 2), (offered, refused)


@pytest.mark.parametrize("samples", ["convolutions", "pools", "resizings", "norms"])
def test_every_split_of_space(samples: str) -> None:
    """On 2 and 3 ranks, outputs and gradients against the whole op; space is split wherever it can be."""
    torch.manual_seed(0)
    wrong: list[str] = []
    cases: Counter[str] = Counter()
    for sample in getattr(window_cases, samples)():
        wrong += check_sample(sample)[1]
        graph, _ = one_op_graph(*sample)
        for degree in (2, 3):
            cases.update(s.special or "apart" for s in strategies(graph, graph.ops[0], degree) if s.key[:1] in "sdx")
    assert not wrong, "\n".join(wrong[:20])
    used = ("batch_norm", "group_norm", "instance_norm") if samples == "norms" else ("halo",)
    assert all(cases[name] >= 4 for name in used), cases


def test_taps_of_a_kernel() -> None:
    """A kernel cut in 2, 3 and 4: each rank sums over its own taps."""
    torch.manual_seed(0)
    count, wrong = 0, []
    for sample in window_cases.kernels():
        wrong += check_sample(sample, (2, 3, 4))[1]
        graph, _ = one_op_graph(*sample)
        count += sum(s.special == "taps" for n in (2, 3, 4) for s in strategies(graph, graph.ops[0], n))
    assert not wrong, "\n".join(wrong[:20])
    assert count >= 12


def test_what_is_not_offered() -> None:
    """A 7x7 window over 16 places: 8 ranks of 2 places would need more than their neighbours have."""
    graph = graph_of("build_residual_net")
    stem = graph.ops[0]
    assert {n for n in (2, 4, 8) if any(s.key == "s0" for s in strategies(graph, stem, n))} == {2, 4}
    outer = next(s for s in strategies(graph, stem, 4) if s.key == "s0")
    inside = {s.key for s in strategies(graph, stem, 2, 1, ((outer, 4),))}
    assert "s0" not in inside and "s1" in inside
    grouped = next(op for op in graph.ops if any(s.key == "g" for s in strategies(graph, op, 2)))
    outer = next(s for s in strategies(graph, grouped, 2) if s.key == "g")
    assert "g" not in {s.key for s in strategies(graph, grouped, 2, 1, ((outer, 2),))}, "there are two groups"


def test_refusals_name_op_dim_and_what_is_near() -> None:
    graph = graph_of("build_residual_net")
    plan = random_plan(graph, 1, 8, 1, 1)
    cluster = Cluster.preset("cpu", hosts=1, devices_per_host=8)
    layout = plan.layouts[plan.stages[0].layouts[0][0]]

    def refused(key: str) -> str:
        wrong = replace(layout, strategies=(key, *layout.strategies[1:]))
        layouts = tuple(wrong if one is layout else one for one in plan.layouts)
        with pytest.raises(ValueError) as error:
            replace(plan, layouts=layouts).validate(graph, cluster)
        return str(error.value)

    message = refused("s0")
    assert "aten.conv2d.default in stem" in message and "can run on 8 ranks only as" in message
    assert "s0 (dim 2 of " in message and "which is 16 long) has windows that reach beyond the neighbours" in message
    assert message.endswith("the nearest degrees for it are 2, 4"), message
    message = refused("k0")
    assert "k0 (dim 2 of stem.weight, which is 7 long) does not split into so many parts" in message, message
    assert message.endswith("the nearest degrees for it are 7")


@pytest.mark.parametrize("name", NETS)
def test_random_plans(name: str) -> None:
    """Layouts drawn at random, on one axis and on two, all ranks in this process."""
    graph = graph_of(name)
    for seed in range(3):
        for axes in (2, 4, (2, 2)):
            check(name, random_plan(graph, 1, axes, 1, 1, seed=seed), (seed, axes))


def spatial(graph: Graph, degree: int, dim: int) -> tuple[Layout, ...]:
    """`dim` of every image split, whatever else; the ops behind the images as they come."""
    placed: dict[str, Placement] = {}
    layouts = []
    for block in graph.blocks:
        keys = []
        for op in graph.block_ops(block):
            wide = any(len(graph.tensors[t].shape) == 4 for t in op.inputs if graph.tensors[t].role != "parameter")
            options = strategies(graph, op, degree)
            fits = [
                s
                for s in options
                if wide
                and all(
                    p == Split(dim) for t, p in zip(op.inputs, s.inputs, strict=True) if placed.get(t) == Split(dim)
                )
                and (any(p == Split(dim) for p in (*s.inputs, *s.outputs)))
            ]
            chosen = fits[0] if fits else options[0]
            keys.append(chosen.key)
            placed.update(zip(op.outputs, chosen.outputs, strict=True))
        placed |= {t: REPLICATED for t in (graph.loss,) if t in placed}
        edges = [tuple(str(placed[t]) for t in names) for names in (block.inputs, block.outputs)]
        layouts.append(Layout(degree, tuple(keys), *edges, ("R",) * len(block.parameters)))
    return tuple(layouts)


def spatial_plan(graph: Graph, degrees: Sequence[int], dims: Sequence[int]) -> Plan:
    rows = [spatial(graph, degree, dim) for degree, dim in zip(degrees, dims, strict=True)]
    count = len(graph.blocks)
    plan = random_plan(graph, 1, tuple(degrees), 1, 1)
    indices = tuple(tuple(range(a * count, (a + 1) * count)) for a in range(len(rows)))
    stage = Stage(0, count, tuple(range(plan.world_size)), 1, tuple(degrees), indices)
    return replace(plan, stages=(stage,), layouts=tuple(layout for row in rows for layout in row))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(("degrees", "dims"), [((2,), (2,)), ((4,), (3,)), ((2, 2), (2, 3)), ((2, 2), (3, 3))])
def test_space_all_the_way(name: str, degrees: tuple[int, ...], dims: tuple[int, ...]) -> None:
    """Rows, columns, rows by columns: images are never put together, borders alone travel."""
    graph = graph_of(name)
    plan = spatial_plan(graph, degrees, dims)
    plan.validate(graph, Cluster.preset("cpu", hosts=1, devices_per_host=plan.world_size))
    stage = plan.stages[0]
    halos = 0
    for i, block in enumerate(graph.blocks):
        for step in block_flow(graph, block, [plan.layouts[row[i]] for row in stage.layouts]):
            if isinstance(step, Run):
                halos += sum(s.special == "halo" for s in step.strategies)
            elif isinstance(step, Convert) and len(graph.tensors[step.tensor].shape) == 4:
                tensor = graph.tensors[step.tensor]
                pooled = tensor.shape[2:] == (1, 1)
                assert tensor.role != "activation" or pooled or not conversion(step.have, step.want).forward, step
    assert halos >= 4 * len(degrees)
    check(name, plan, (degrees, dims))


GLOO = [
    dict(data=1, tensor=2, pipeline=1, microbatches=1, seed=5),
    dict(data=1, tensor=2, pipeline=1, microbatches=1, seed=6, recompute="full"),
    dict(data=1, tensor=4, pipeline=1, microbatches=1, seed=7, recompute="selective"),
    dict(data=1, tensor=(2, 2), pipeline=1, microbatches=1, seed=8),
    dict(data=2, tensor=2, pipeline=1, microbatches=1, seed=9),
    dict(data=1, tensor=2, pipeline=2, microbatches=1, seed=10),
]


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_plans_on_processes(pool, world_size: int) -> None:
    plans = [p for p in GLOO if world_of(p) == world_size]
    for name in ("build_vgg", "build_unet"):
        for rank, found in enumerate(pool.run(one_step, name, plans, world_size=world_size, timeout_s=240)):
            for plan, errors in zip(plans, found, strict=True):
                assert max(errors) < 1e-5, (rank, name, plan, errors)
    for rank, found in enumerate(
        pool.run(two_steps, "build_residual_net", plans, world_size=world_size, timeout_s=240)
    ):
        for plan, worst in zip(plans, found, strict=True):
            assert max(worst) < 1e-5, (rank, plan, worst)
