"""What all published planners share: plans that run, time budgets, interrupts, dispatch by name."""

from __future__ import annotations

import time
from dataclasses import replace

import forked_parity
import pytest
from method_cases import captured_problem, small_problem
from models import build_llama

from autopar import capture
from autopar.cluster.presets import preset
from autopar.cost.model import CostModel
from autopar.planner.budget import Budget
from autopar.planner.chains import LayoutChains
from autopar.planner.methods import bench as bench_module
from autopar.planner.methods.bench import Bench, Part
from autopar.planner.problem import Problem
from autopar.planner.search import METHODS, search
from autopar.simulate import simulate

PUBLISHED = [name for name in METHODS if name not in ("auto", "exhaustive")]
# Those that look into blocks need a real cost model.
ON_OPS = ("flexflow", "tofu", "whale", "unity")


def problem_for(method: str, seed: int = 0, world: int = 4):
    return captured_problem("llama", world) if method in ON_OPS else small_problem(seed, world)


@pytest.mark.parametrize("method", PUBLISHED)
def test_time_is_up_after_the_first_plan(method):
    """With no time at all there is a plan all the same, and no search worth the name."""
    problem = problem_for(method, 5)
    start_s = time.process_time()
    plan = METHODS[method](replace(problem, budget=Budget(0.0)))
    assert time.process_time() - start_s < 15
    plan.validate(problem.graph, problem.cluster)
    assert plan.prediction is not None


@pytest.mark.parametrize("method", PUBLISHED)
def test_interrupted_with_the_best_plan_so_far(method, monkeypatch):
    """Ctrl-C in the middle of the third simulation: the better of the two before it is what there is."""
    problem = problem_for(method, 5)
    seen = []

    def simulate(*args, **kwargs):
        if len(seen) == 2:
            raise KeyboardInterrupt
        line = original(*args, **kwargs)
        seen.append(line.step_time_s)
        return line

    original = bench_module.simulate
    monkeypatch.setattr(bench_module, "simulate", simulate)
    plan = METHODS[method](problem)
    assert plan.prediction.step_time_s in seen
    plan.validate(problem.graph, problem.cluster)


@pytest.mark.parametrize("method", PUBLISHED)
def test_an_interrupt_before_any_plan_stays_one(method, monkeypatch):
    def simulate(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_module, "simulate", simulate)
    with pytest.raises(KeyboardInterrupt):
        METHODS[method](problem_for(method))


@pytest.mark.parametrize("method", PUBLISHED)
def test_what_does_not_fit_says_so(method):
    """A byte of memory: no plan fits, and the one that comes nearest is returned with what it lacks."""
    problem = problem_for(method)
    tight = replace(problem, constraints=replace(problem.constraints, memory_limit_bytes=1))
    plan = METHODS[method](tight)
    assert plan.prediction.peak_memory_bytes > 1
    assert f"the smallest of what {method} finds, but needs" in plan.candidates[0].verdict


@pytest.mark.parametrize("method", PUBLISHED)
def test_constraints_are_kept(method):
    pinned = {"data": 2, "tensor": 2, "pipeline": 1, "microbatches": 2}
    problem = captured_problem("llama", 4, **pinned) if method in ON_OPS else small_problem(1, 4, **pinned)
    plan = METHODS[method](problem)
    assert [(s.data, s.tensor) for s in plan.stages] == [(2, 2)] and plan.microbatches == 2


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zb-h1"])
def test_long_programs_are_judged_as_the_simulator_does(schedule):
    """Of more instructions than are walked for their figures: to rounding in time, and exactly in memory."""
    for seed in range(3):
        problem = small_problem(seed, 8, batch_size=512, schedule=schedule, pipeline=4, microbatches=256)
        bench = Bench(problem, "none")
        (shape, *_) = bench.shapes()
        plan = bench.equal_plan(shape, [1, 3, 4, 6], ["none", "full", "none", "full"])
        bench.offer(plan)
        line = simulate(problem.graph, plan, problem.cluster, model=problem.costs)
        assert bench.best.prediction.step_time_s == pytest.approx(line.step_time_s, rel=1e-9)
        assert bench.best.prediction.peak_memory_bytes == max(line.peak_memory_bytes.values())


def test_unknown_methods_name_the_nearest():
    problem = small_problem(0, 2)
    with pytest.raises(ValueError, match="did you mean pipedream"):
        search(problem.graph, problem.cluster, "pipdream")


def test_plans_of_all_methods_run():
    """On four ranks, in parity with the module on one: each method's plan for a small Llama, with two stages where the
    method knows stages."""
    module, example, _ = build_llama(layers=3)
    graph, cluster = capture(module, example), preset("cpu", 2, 2)
    costs = CostModel(graph, cluster)
    plans = {}
    for method in PUBLISHED:
        pins = {} if method in ON_OPS else {"pipeline": 2}
        plan = search(graph, cluster, method, model=costs, progress=False, **pins)
        plans.setdefault(replace(plan, prediction=None, candidates=()), method)
    expected = forked_parity.reference(module, example)
    for plan, method in plans.items():
        found = forked_parity.errors(module, example, plan.graph_of(graph), plan, expected)
        assert found.within(1e-5, 1e-4), (method, found)


def test_plans_of_unequal_stages_run():
    """Three devices for a front of three blocks and one for the rest: what PipeDream and DAPPLE make where they may."""
    module, example, _ = build_llama(layers=3)
    graph, cluster = capture(module, example), preset("cpu", 1, 4)
    problem = Problem(graph, cluster, CostModel(graph, cluster), LayoutChains())
    parts = [Part(0, 3, (0, 1, 2), 3, shares=(2, 1, 1)), Part(3, len(graph.blocks), (3,), 1)]
    plan = Bench(problem, "none").plan(parts, 2)
    expected = forked_parity.reference(module, example)
    found = forked_parity.errors(module, example, graph, plan, expected)
    assert found.within(1e-5, 1e-4), found
