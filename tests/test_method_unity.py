"""Unity: each rewrite preserves numbers, joint search beats rewriting first, and rewritten plans run."""

from __future__ import annotations

import random
from dataclasses import replace

import forked_parity
import pytest
import torch
from torch import nn

from autopar import Plan, capture
from autopar.capture.interpret import interpret
from autopar.capture.rewrites import RULES, find_rewrites, rewritten
from autopar.cluster.presets import preset
from autopar.cost.model import CostModel
from autopar.planner.chains import LayoutChains
from autopar.planner.methods.alpa import alpa
from autopar.planner.methods.unity import unity
from autopar.planner.problem import Constraints, Problem
from autopar.simulate import simulate

WIDTH = 8


class Patterns(nn.Module):
    """Layers drawn at random from what the rules look for, and from what only looks like it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        torch.manual_seed(seed)
        self.kinds = [draw.randrange(6) for _ in range(4)]
        self.first = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=draw.random() < 0.5) for _ in self.kinds)
        self.second = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=draw.random() < 0.5) for _ in self.kinds)
        self.wide = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH, bias=draw.random() < 0.5) for _ in self.kinds)
        self.plain = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        for kind, a, b, wide in zip(self.kinds, self.first, self.second, self.wide, strict=True):
            if kind == 0:
                x = a(x) + b(x)
            elif kind == 1:
                x = self.plain(x) + self.plain(torch.tanh(x))
            elif kind == 2:
                x = torch.tanh(x) + a(x).mean(1, keepdim=True)
            elif kind == 3:
                x = torch.tanh(a(x)) * torch.sigmoid(b(x))
            elif kind == 4:
                x = wide(torch.cat([x, torch.tanh(x)], -1))
            else:
                # the first product is used twice, and a mean over the features is no business of the linear's
                y = a(x)
                x = y + b(x) + y.mean(-1, keepdim=True)
            x = torch.relu(x)
        return (self.first[0](x).mean(1) ** 2).sum()


@pytest.mark.parametrize("seed", range(12))
def test_each_rewrite_preserves_numbers(seed):
    """Loss and all gradients, in double precision, after every rewrite alone and after as many as there is place for."""
    module = Patterns(seed).double()
    x = torch.randn(6, 4, WIDTH, dtype=torch.float64)
    graph = capture(module, x)
    state = dict(module.named_parameters())

    def numbers(some) -> list[torch.Tensor]:
        loss = interpret(some, {some.inputs[0]: x}, state)[some.loss]
        used = [state[p.fqn] for p in some.parameters]
        return [loss, *torch.autograd.grad(loss, used, allow_unused=True)]

    expected = numbers(graph)
    done, now = (), graph
    for _ in range(6):
        found = find_rewrites(now)
        for more in found:
            other = rewritten(graph, (*done, *more))
            assert other.fingerprint != now.fingerprint
            assert [p.fqn for p in other.parameters] == [p.fqn for p in graph.parameters]
            for ours, theirs in zip(numbers(other), expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
        if not found:
            break
        done = (*done, *found[0])
        now = rewritten(graph, done)


def test_every_rule_is_met():
    rules = set()
    for seed in range(12):
        graph = capture(Patterns(seed), torch.randn(6, 4, WIDTH))
        rules |= {name.partition(":")[0] for group in find_rewrites(graph) for name in group}
    assert rules == set(RULES)


def test_isomorphic_blocks_are_rewritten_together():
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x):
            return torch.relu(self.c(torch.tanh(self.a(x)) * self.b(x)))

    graph = capture(nn.Sequential(*(Layer() for _ in range(3))), torch.randn(4, WIDTH), lambda out: out.sum())
    groups = find_rewrites(graph)
    assert [len(group) for group in groups] in ([3], [2, 1], [1, 2]), groups
    other = rewritten(graph, tuple(name for group in groups for name in group))
    assert sum(op.target == "aten.linear.default" for op in other.ops) == 6


def test_a_rewrite_without_a_place_is_refused():
    graph = capture(Patterns(0), torch.randn(6, 4, WIDTH))
    with pytest.raises(ValueError, match="has no place in Patterns"):
        rewritten(graph, ["add-weights:linear,linear_1,nothing"])


class TwoBranches(nn.Module):
    """Two branches, joined and mapped back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(width, 4 * width, bias=False) for _ in range(2))
        self.back = nn.Linear(8 * width, width, bias=False)

    def forward(self, x):
        return self.back(torch.cat([torch.relu(self.a(x)), torch.tanh(self.b(x))], -1)).sum()


def problem_of(module, x, devices: int, **pinned) -> Problem:
    graph, cluster = capture(module, x), preset("a100-80gb", 1, devices)
    return Problem(graph, cluster, CostModel(graph, cluster), LayoutChains(), Constraints(**pinned))


def test_joint_search_beats_rewriting_first():
    """One device does best with the two products in front as one. On a model axis the joined product cannot be shared
    out in such a way that each half stays with what follows; a search that rewrites first has committed to it."""
    with torch.device("meta"):
        problem = problem_of(TwoBranches(1024), torch.zeros(512, 1024), 4, tensor=4, microbatches=1)
    joint, stepwise = unity(problem), unity(problem, jointly=False)
    assert [name.partition(":")[0] for name in stepwise.rewrites] == ["merge-parallel"] and not joint.rewrites
    assert joint.prediction.step_time_s < 0.9 * stepwise.prediction.step_time_s


def test_what_is_saved_is_found():
    """A linear over all positions whose mean is all that counts: reduced first, it is done once per row."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(1024, 4096)

        def forward(self, x):
            return (self.head(x).mean(1) ** 2).sum()

    with torch.device("meta"):
        problem = problem_of(Pooled(), torch.zeros(64, 128, 1024), 4)
    plan = unity(problem)
    assert [name.partition(":")[0] for name in plan.rewrites] == ["reduce-first"]
    assert plan.prediction.step_time_s < 0.7 * max(one.step_time_s for one in plan.candidates)
    line = simulate(problem.graph, plan, problem.cluster)
    assert line.step_time_s == pytest.approx(plan.prediction.step_time_s)
    assert Plan.from_json(plan.to_json()) == plan
    assert "Rewritten first: reduce-first" in plan.explain(problem.graph)


class WithLoss(Patterns):
    """The same, for a caller that wants an object with a loss."""

    def forward(self, x):
        from transformers.modeling_outputs import CausalLMOutput

        return CausalLMOutput(loss=super().forward(x))


@pytest.mark.parametrize("pins", [{"data": 2, "tensor": 2}, {"data": 1, "tensor": 4}, {"data": 4, "tensor": 1}])
def test_rewritten_plans_run(pins):
    """In parity with the untouched module, on four ranks, for every rewrite of two random modules."""
    for seed in (3, 6):
        module, example = WithLoss(seed), {"x": torch.randn(8, 4, WIDTH)}
        graph, cluster = capture(module, example), preset("cpu", 1, 4)
        expected = forked_parity.reference(module, example)
        for rewrites in find_rewrites(graph)[:2]:
            other = rewritten(graph, rewrites)
            problem = Problem(
                other, cluster, CostModel(other, cluster), LayoutChains(), Constraints(**pins, pipeline=1)
            )
            plan = replace(alpa(problem), rewrites=rewrites)
            plan.validate(graph, cluster)
            found = forked_parity.errors(module, example, plan.graph_of(graph), plan, expected)
            assert found.within(1e-5, 1e-4), (rewrites, found)
