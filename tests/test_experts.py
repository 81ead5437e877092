"""Mixtures of experts: recognised at capture, and split by tokens, by experts with and without exchange, and inside."""

from __future__ import annotations

import random
from dataclasses import replace

import models
import pytest
import torch
from emulated_graph import BACKWARD_MEETS, reference, run_emulated
from plan_cases import random_plan, random_strategies
from test_axes import check
from test_parity import errors, graph_of
from torch import nn

import autopar
from autopar.cluster.spec import Cluster
from autopar.graph import Graph
from autopar.plan import Plan
from autopar.sharding.strategies import strategies

NAMES = ["build_experts", "build_uneven_experts", "build_one_expert", "build_mixtral"]


def routed(graph: Graph) -> list:
    return [op for op in graph.ops if op.target == "autopar.routed_rows"]


@pytest.mark.parametrize("name", NAMES)
def test_recognised_and_equal_to_the_module(name: str) -> None:
    graph, values, loss, gradients = reference(*getattr(models, name)())
    assert len(routed(graph)) == (1 if name in ("build_mixtral", "build_one_expert") else 2)
    assert not any("sort" in op.target or "grouped_mm" in op.target for op in graph.ops)
    draw = random.Random(name)
    for shards, degrees in ((1, (2,)), (2, (2,)), (4, (1,)), (1, (2, 2))):
        chosen = {op.name: random_strategies(graph, op, degrees, shards, draw, BACKWARD_MEETS) for op in graph.ops}
        found, found_gradients = run_emulated(graph, values, shards, degrees, chosen)
        torch.testing.assert_close(found, loss, rtol=1e-9, atol=1e-9)
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(found_gradients[parameter], gradient, rtol=1e-7, atol=1e-9, msg=parameter)


def with_keys(graph: Graph, plan: Plan, keys: tuple[str, ...]) -> Plan:
    """The plan with its routed ops run as `keys` say, one per model axis."""
    layouts = list(plan.layouts)
    for stage in plan.stages:
        for key, row in zip(keys, stage.layouts, strict=True):
            for index, block in zip(row, graph.blocks[stage.start : stage.stop], strict=True):
                chosen = tuple(
                    key if graph.op[name].target == "autopar.routed_rows" else old
                    for name, old in zip(block.ops, layouts[index].strategies, strict=True)
                )
                layouts[index] = replace(layouts[index], strategies=chosen)
    return replace(plan, layouts=tuple(layouts))


@pytest.mark.parametrize("name", NAMES)
def test_every_split(name: str) -> None:
    graph = graph_of(name)
    op = routed(graph)[0]
    singles = [s.key for s in strategies(graph, op, 2)]
    assert {"n", "e", "i", "n+e"} <= set(singles)
    cases = [(1, (2,), (key,)) for key in singles] + [(1, (4,), ("e",)), (1, (4,), ("n+e",)), (2, (2,), ("n+e",))]
    for first in ("n", "e", "i", "n+e"):
        (outer,) = (s for s in strategies(graph, op, 2) if s.key == first)
        inside = [s.key for s in strategies(graph, op, 2, 1, ((outer, 2),))]
        cases += [(1, (2, 2), (first, second)) for second in inside if second in ("n", "e", "i", "n+e")]
    assert (1, (2, 2), ("n+e", "i")) in cases and (1, (2, 2), ("e", "i")) in cases
    for data, degrees, keys in cases if name != "build_mixtral" else cases[::3]:
        plan = with_keys(graph, random_plan(graph, data, degrees, 1, 1, seed=len(keys)), keys)
        check(name, plan, (keys, degrees, data))


def test_on_processes(pool) -> None:
    """Experts over one axis with all-to-all, tensor parallel inside them over the other."""
    for name in ("build_experts", "build_uneven_experts"):
        results = pool.run(experts_step, name, world_size=4, timeout_s=120)
        for rank, (loss, gradient, evaluated) in enumerate(results):
            assert loss < 1e-6 and evaluated < 1e-6 and gradient < 1e-5, (rank, name, loss, gradient, evaluated)


def experts_step(name: str) -> tuple[float, float, float]:
    """(loss error, gradient error, evaluation error)"""
    module, example, _ = getattr(models, name)()
    graph = graph_of(name)
    plan = with_keys(graph, random_plan(graph, 1, (2, 2), 1, 2), ("n+e", "i"))
    cluster = Cluster.preset("cpu", hosts=1, devices_per_host=4)
    model = autopar.parallelize(module, example, plan=plan, cluster=cluster)
    loss, expected = model(**example), module(**example)
    loss.backward()
    expected.backward()
    with torch.no_grad():
        evaluated = model.eval()(**example)
    found = [abs(v.item() - expected.item()) / abs(expected.item()) for v in (loss, evaluated)]
    return found[0], errors(model, module), found[1]


class Unlike(nn.Module):
    """Looks like a mixture of experts, but for one thing."""

    def __init__(self, thing: str):
        super().__init__()
        self.inner = models.Experts(layers=1, bias=False)
        self.thing = thing

    def forward(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        from transformers.integrations import moe

        assert moe
        product = torch.ops.transformers.grouped_mm_fallback
        flat, count = x.flatten(0, 1), chosen.shape[-1]
        groups, order = torch.sort(chosen.reshape(-1), descending=self.thing == "descending")
        rows = flat[order // count]
        bins = 4
        ends = torch.histc(groups.float(), bins=bins, min=0, max=bins - 1 + (self.thing == "bins")).cumsum(0).int()
        made = product(rows, self.inner.up[0], ends)
        if self.thing == "mean over rows":
            made = made - made.mean(0, keepdim=True)
        if self.thing == "shift":
            made = made.roll(1, 0)
        gate, value = made.chunk(2, -1)
        made = product(gate.relu() * value, self.inner.down[0], ends)
        extra = made.square().mean() if self.thing == "used elsewhere" else 0.0
        back = order if self.thing == "not put back" else order.argsort()
        return made[back].square().mean() + extra


@pytest.mark.parametrize(
    "thing", ["", "descending", "bins", "mean over rows", "shift", "used elsewhere", "not put back"]
)
def test_what_only_looks_like_it_stays_as_it_is(thing: str) -> None:
    _, example, _ = models.build_experts()
    graph = autopar.capture(Unlike(thing), example)
    assert len(routed(graph)) == (not thing)
