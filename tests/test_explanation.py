"""What a plan says of itself: terms, memory, bounds, common words, what would change the choice; against the simulator."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from method_cases import captured, captured_problem, small_problem
from models import build_experts
from test_constraints import pinned_problem
from torch import nn

import autopar
from autopar.cluster.presets import preset
from autopar.cost.model import CostModel
from autopar.plan import Plan
from autopar.planner.chains import LayoutChains
from autopar.planner.constraints import Constraints
from autopar.planner.explanation import FACTORS, changes, explained, perturbed
from autopar.planner.problem import Problem
from autopar.planner.search import METHODS, search
from autopar.report.common_words import common_words
from autopar.report.words import plan_in_words
from autopar.simulate import simulate


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pins", [{}, {"pipeline": 2}], ids=str)
def test_terms_sum_to_the_step_and_memory_to_the_peak(method, pins):
    on_ops = method in ("flexflow", "tofu", "whale", "unity")
    devices = 2 if method == "exhaustive" else 4
    problem = captured_problem("mlp", 2) if on_ops else small_problem(3, devices, num_blocks=4, batch_size=4)
    if on_ops and pins:
        return
    problem = pinned_problem(problem, **pins)
    plan = explained(problem, METHODS[method](problem), what_if=False)
    prediction = plan.prediction
    assert sum(term.seconds for term in prediction.terms) == pytest.approx(prediction.step_time_s, rel=1e-6)
    assert all(term.seconds >= 0 for term in prediction.terms)
    line = simulate(problem.graph, plan, problem.cluster, model=None if plan.rewrites else problem.costs)
    for stage, memory in zip(plan.stages, prediction.memory, strict=True):
        assert memory.total == line.peak_memory_bytes[stage.ranks[0]]
        assert min(memory.parameters, memory.gradients, memory.optimizer, memory.activations, memory.working) >= 0
    assert Plan.from_json(plan.to_json()) == plan
    text = plan.explain(problem.graph)
    assert "Where the step goes" in text and "Memory of a device at its peak" in text
    if method in ("auto", "exhaustive"):
        # a plan that auto found outside of the space of its proof has the bound of all plans
        is_proved = prediction.lower_bound_s == pytest.approx(prediction.step_time_s)
        assert is_proved or (method == "auto" and prediction.lower_bound_s < prediction.step_time_s)
        assert ("proved to be the best" in text) == is_proved and ("of the bound" in text) != is_proved


def test_a_gap_is_told_as_a_share_of_the_bound():
    problem = small_problem(3, 4)
    plan = METHODS["auto"](problem)
    open_plan = replace(plan, prediction=replace(plan.prediction, lower_bound_s=plan.prediction.step_time_s / 1.018))
    assert "within 1.8% of the bound" in open_plan.explain()


@pytest.mark.parametrize(
    ("name", "share"), [("a100-80gb", 0.3), pytest.param("v100-16gb", 1.0, marks=pytest.mark.slow)]
)
def test_what_would_change_the_choice_does(name: str, share: float):
    """Each claim, priced again on the cluster that it names."""
    with torch.device("meta"):
        layers = [m for _ in range(4) for m in (nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024))]
        graph = autopar.capture(nn.Sequential(*layers), torch.zeros(4096, 1024), loss=lambda out: out.sum())
    claims = 0
    cluster = preset(name, 2, 2)
    inter = replace(cluster.inter, bandwidth_bytes_per_s=cluster.inter.bandwidth_bytes_per_s * share)
    cluster = replace(cluster, inter=inter)
    for limit_bytes in (None, 2330 * 2**20):
        constraints = Constraints(memory_limit_bytes=limit_bytes)
        problem = Problem(graph, cluster, CostModel(graph, cluster), LayoutChains(), constraints, unequal_stages=False)
        plan = METHODS["auto"](problem)
        by_name = {plan_in_words(one): one for one in problem.kept}
        for said in changes(problem, plan, problem.kept):
            if said.startswith("nothing"):
                continue
            what, _, rest = said.partition(": ")
            other = by_name[rest.rpartition(", ")[0]]
            claims += 1
            if "memory" in what:
                assert other.prediction.step_time_s < plan.prediction.step_time_s
                assert other.prediction.peak_memory_bytes > problem.memory_limit_bytes
                continue
            (on,) = [
                make(factor)
                for words, make in perturbed(cluster)
                for factor in FACTORS
                if what == f"with {words.format(f'{factor:g}')}"
            ]
            model = CostModel(graph, on)
            ours, theirs = (simulate(graph, one, on, model=model).step_time_s for one in (plan, other))
            assert theirs < ours
    assert claims >= 1


def test_common_words_name_what_layouts_do():
    base = captured_problem("llama", 4)
    cases = [
        ({"tensor": 2, "layout": {"*attn": "heads", "*q_proj": "column", "*o_proj": "row"}}, r"tensor 2"),
        ({"tensor": 2, "data": 2, "zero": 3, "layout": {"*attn": "sequence"}}, r"data 2 with ZeRO 3; .*context 2 by "),
        ({"tensor": 2, "layout": {"*attn": "heads", "*_proj": "sequence"}}, r"context 2 by all-to-all of heads"),
        (
            {"data": 2, "tensor": 1, "pipeline": 2, "recompute": "full"},
            r"pipeline 2 \((1F1B|GPipe|ZB-H1)\); data 2; full recomputation",
        ),
    ]
    for pins, words in cases:
        problem = Problem(base.graph, base.cluster, base.costs, LayoutChains(), Constraints(**pins))
        plan = METHODS["auto"](problem)
        assert re.search(words, common_words(plan, base.graph)), common_words(plan, base.graph)
        assert f"in short: {common_words(plan, base.graph)}" in plan.explain(base.graph)


def test_experts_are_named():
    module, example, *loss = build_experts()
    graph = autopar.capture(module, example, *loss)
    cluster = preset("a100-80gb", 1, 2)
    plan = search(graph, cluster, tensor=2, layout={"*": "expert"}, progress=False)
    assert "experts over 2" in common_words(plan, graph)


def test_rows_split_on_a_model_axis_are_named():
    """Rows that data ranks could split: auto leaves them alone, FlexFlow splits them on any axis."""
    base = captured_problem("llama", 2)
    plan = search(base.graph, base.cluster, "flexflow", progress=False, data=1, tensor=2, pipeline=1)
    assert "batch-split" in plan.explain(base.graph)
    assert common_words(plan, base.graph) == "batch over 2 of a model axis"


def test_one_device():
    plan = search(
        captured("mlp"), preset("a100-80gb", 1, 1), progress=False, what_if=True, recompute="none", microbatches=1
    )
    assert common_words(plan, captured("mlp")) == "one device, nothing split"
