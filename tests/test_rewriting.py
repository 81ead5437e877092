"""Rewrites at the end of `auto`: where they are worth it, what pins them away, and that what they make is executed exactly."""

from __future__ import annotations

import random
from dataclasses import replace
from unittest import mock

import pytest
import torch
from test_parity import call, errors
from torch import nn

import autopar
from autopar.capture.rewrites import find_rewrites, rewritten
from autopar.cluster.presets import preset
from autopar.cost.model import CostModel
from autopar.planner import rewriting
from autopar.planner.auto import auto
from autopar.planner.chains import LayoutChains
from autopar.planner.problem import Constraints, Problem
from autopar.planner.rewriting import with_rewrites
from autopar.planner.rewriting_once import LEAST_SHARE, most_saved_s
from autopar.simulate import simulate


class Pairs(nn.Module):
    """Layers of two products of one input that are summed, which one product of summed weights computes too."""

    def __init__(self, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.ModuleList(
            nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2)) for _ in range(layers)
        )

    def forward(self, x):
        for a, b in self.layers:
            x = x + torch.relu(a(x) + b(x))
        return x.square().mean()


class Readers(nn.Module):
    """Layers that each take two products of one memory, as a decoder's layers do of what its encoder puts out."""

    def __init__(self, width: int = 32, layers: int = 4) -> None:
        super().__init__()
        self.width = width
        self.memory = nn.Linear(width, width)
        self.layers = nn.ModuleList(nn.ModuleList(nn.Linear(width, width) for _ in range(3)) for _ in range(layers))

    def forward(self, x):
        memory = torch.tanh(self.memory(x))
        for key, value, out in self.layers:
            x = x + out(torch.sigmoid(key(memory)) * value(memory) * x)
        return x.square().mean()


def pairs() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Pairs(), torch.randn(4096, 64)


@pytest.mark.parametrize("pins", [{}, {"data": 2}, {"pipeline": 2}])
def test_products_are_joined_where_that_is_faster(pins) -> None:
    graph, cluster = autopar.capture(*pairs()), preset("a100-40gb", 1, 2)
    plan = autopar.search(graph, cluster, progress=False, **pins)
    plain = autopar.search(graph, cluster, progress=False, rewrites=False, **pins)
    assert plan.rewrites and not plain.rewrites
    assert plan.prediction.step_time_s < plain.prediction.step_time_s
    plan.validate(graph, cluster)
    line = simulate(rewritten(graph, plan.rewrites), plan, cluster)
    assert line.step_time_s == pytest.approx(plan.prediction.step_time_s, rel=1e-9)
    assert max(line.peak_memory_bytes.values()) == plan.prediction.peak_memory_bytes
    assert [row.verdict for row in plan.candidates][0] == "chosen"
    # that of the rewritten graph, which has less to do
    assert plan.prediction.lower_bound_s <= min(plan.prediction.step_time_s, plain.prediction.lower_bound_s)


@pytest.mark.parametrize("seed", [3, 7, 8, 11, 14])
@pytest.mark.parametrize("hosts", [0, 2])
def test_never_worse_than_unity(seed: int, hosts: int) -> None:
    """The degrees that suit the rewritten graph may be others than those that suit the captured one."""
    draw = random.Random(seed)
    module = draw.choice([Pairs, Readers])(draw.choice([64, 128, 256]), draw.choice([2, 3]))
    graph = autopar.capture(module, torch.randn(draw.choice([256, 1024, 4096]), module.width))
    cluster = preset(draw.choice(["a100-40gb", "v100-16gb"]), hosts, 8) if hosts else preset("a100-40gb", 1, 2)
    slower = replace(
        cluster.intra, bandwidth_bytes_per_s=cluster.intra.bandwidth_bytes_per_s * 10 ** draw.uniform(-2.5, 0)
    )
    cluster = replace(cluster, intra=slower)
    ours, other = (autopar.search(graph, cluster, method=name, progress=False) for name in ("auto", "unity"))
    assert ours.prediction.step_time_s <= other.prediction.step_time_s * (1 + rewriting.LEAST_GAIN)


@pytest.mark.parametrize("pins", [{}, {"tensor": 2, "pipeline": 2}])
def test_on_many_devices_all_together_in_the_shape_of_the_plan(pins) -> None:
    """Small products gain; no more than the bound says."""
    graph, cluster = autopar.capture(*pairs()), preset("a100-40gb", 2, 8)
    plan = autopar.search(graph, cluster, progress=False, **pins)
    plain = autopar.search(graph, cluster, progress=False, rewrites=False, **pins)
    problem = Problem(graph, cluster, CostModel(graph, cluster), LayoutChains(), Constraints(**pins))
    gain_s = plain.prediction.step_time_s - plan.prediction.step_time_s
    assert plan.rewrites and 0.05 * plain.prediction.step_time_s < gain_s
    assert gain_s <= most_saved_s(problem, plain, find_rewrites(graph))
    plan.validate(graph, cluster)
    line = simulate(rewritten(graph, plan.rewrites), plan, cluster)
    assert line.step_time_s == pytest.approx(plan.prediction.step_time_s, rel=1e-9)
    assert max(line.peak_memory_bytes.values()) == plan.prediction.peak_memory_bytes
    assert plan.candidates[0].verdict.startswith("chosen") and any(
        "as it was captured" in row.verdict for row in plan.candidates
    )


def test_on_many_devices_large_products_are_left_as_they_are() -> None:
    """Without making the rewritten graph."""
    with torch.device("meta"):
        graph = autopar.capture(Pairs(8192, 2), torch.randn(65536, 8192))
    cluster = preset("a100-80gb", 2, 8)
    problem = Problem(graph, cluster, CostModel(graph, cluster), LayoutChains())
    plan = auto(replace(problem, constraints=Constraints(rewrites=False)))
    groups = [group for group in find_rewrites(graph) if group[0].startswith("merge-parallel")]
    assert groups and most_saved_s(problem, plan, groups) < LEAST_SHARE * plan.prediction.step_time_s
    with (
        mock.patch.object(rewriting, "find_rewrites", lambda graph: groups),
        mock.patch.object(rewriting, "rewritten") as made,
    ):
        assert with_rewrites(problem, plan, auto, 1.0) is plan
    made.assert_not_called()


def test_what_is_pinned_by_name_keeps_its_graph() -> None:
    graph, cluster = autopar.capture(*pairs()), preset("a100-40gb", 1, 2)
    plan = autopar.search(graph, cluster, progress=False, tensor=2, layout={"layers.0.*": "column"})
    assert not plan.rewrites
    with pytest.raises(ValueError, match="rewrites=True: expected False to keep the graph"):
        autopar.search(graph, cluster, rewrites=True)


def run_searched() -> tuple[bool, float, float, bool]:
    module, example = pairs()
    cluster = preset("a100-40gb", 1, 2)
    model = autopar.parallelize(module, example, cluster=cluster)
    value, expected = call(model, example), call(module, example)
    value.backward()
    expected.backward()
    found = abs(value.item() - expected.item()) / abs(expected.item()), errors(model, module)
    # A plan that was saved runs again, in a process that captures the graph anew.
    again = autopar.parallelize(module, example, plan=model.plan, cluster=cluster)
    same = call(again, example).item() == value.item()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(6):
        call(model, example).backward()
        optimizer.step()
        optimizer.zero_grad()
    rewrites = model.plan.rewrites
    model.refine(optimizer, remaining_steps=10**6)
    same = same and model.plan.rewrites == rewrites
    same = same and call(model, example).item() == pytest.approx(value.item(), rel=1e-6)
    return bool(rewrites), *found, same


def test_they_run_and_stay_when_the_plan_is_refined(pool) -> None:
    for rewrites, loss_error, gradient_error, same in pool.run(run_searched):
        assert rewrites and loss_error < 1e-6 and gradient_error < 1e-5 and same


def test_products_are_joined_within_layers() -> None:
    """Joined over all of them, they would be one block."""
    graph = autopar.capture(Readers(layers=6), torch.randn(8, 32))
    found = [name for group in find_rewrites(graph) for name in group]
    assert len(found) == 6 and all(name.count(",") == 1 for name in found)
    kinds = [block.kind for block in rewritten(graph, found).blocks]
    assert max(kinds.count(kind) for kind in kinds) >= 3
    # Each still has its place when all the others are done, those of layers first too.
    layers = max(find_rewrites(graph), key=len)
    others = [name for name in found if name not in layers]
    assert others and len(rewritten(graph, (*layers, *others)).ops) == len(rewritten(graph, found).ops)


class Twice(nn.Module):
    """Layers of two pairs of products, the second wider."""

    def __init__(self, width: int = 32, layers: int = 3) -> None:
        super().__init__()
        sizes = (width, width, 2 * width, 2 * width)
        self.layers = nn.ModuleList(nn.ModuleList(nn.Linear(width, size) for size in sizes) for _ in range(layers))

    def forward(self, x):
        for a, b, c, d in self.layers:
            x = x + torch.tanh(a(x)) * b(x)
            x = x + (torch.sigmoid(c(x)) * d(x)).unflatten(-1, (2, -1)).sum(-2)
        return x.square().mean()


def test_what_is_best_alone_is_found_where_all_together_is_better_than_nothing() -> None:
    graph, cluster = autopar.capture(Twice(), torch.randn(8, 32)), preset("a100-40gb", 1, 1)
    plan = autopar.search(graph, cluster, progress=False, rewrites=False)
    problem = Problem(graph, cluster, CostModel(graph, cluster), LayoutChains(), Constraints())

    def search(own: Problem):
        """As if joining the first pairs saved a tenth, and the second ones cost a twentieth."""
        widths = [own.graph.tensors[op.outputs[0]].shape[0] for op in own.graph.ops if op.name.startswith("weights")]
        time_s = 1.0 - 0.1 * (64 in widths) + 0.05 * (128 in widths)
        row = replace(plan.candidates[0], step_time_s=time_s, verdict="chosen")
        return replace(plan, prediction=replace(plan.prediction, step_time_s=time_s), candidates=(row,))

    found = with_rewrites(problem, search(problem), search, 0.0)
    assert found.prediction.step_time_s == pytest.approx(0.9)
    made = rewritten(graph, found.rewrites)
    assert {made.tensors[op.outputs[0]].shape[0] for op in made.ops if op.name.startswith("weights")} == {64}
