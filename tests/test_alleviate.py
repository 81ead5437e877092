"""The last stage of `auto`: against the oracle over the wide space, each kind of move where it is the one that helps, memory,
constraints, determinism."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch
from models import ZOO, build_llama
from planner_cases import (
    MadeUpCosts,
    WholeLayouts,
    chain_graph,
    is_in_wide_space,
    limited,
    random_problem,
    simulated,
    small_cluster,
)
from torch import nn

from autopar import capture
from autopar.cluster.presets import preset
from autopar.cluster.spec import Cluster
from autopar.cost.model import CostModel
from autopar.planner.alleviate import Alleviation
from autopar.planner.auto import auto, exact_search
from autopar.planner.chains import LayoutChains
from autopar.planner.judge import Judge
from autopar.planner.moves import balanced
from autopar.planner.problem import Constraints, Problem
from autopar.planner.relief import CHOICES, Relief, with_recompute
from autopar.planner.search import search
from autopar.planner.sketch import Sketch
from autopar.planner.wide import count_wide_plans, every_wide_plan, is_small
from autopar.schedule.orders import SCHEDULES
from autopar.simulate import simulate

PINS = [
    {}, {"schedule": "1f1b"}, {"zero": 0}, {"zero": 3}, {"microbatches": 2}, {"recompute": "full"}, {"recompute": "none"},
    {"pipeline": 2}, {"tensor": 1}, {"pipeline": 2, "tensor": 1, "microbatches": 4}, {"data": 1},
]  # fmt: skip


def wide_problem(seed: int, most_plans: int, least_plans: int = 2) -> Problem:
    """A random problem whose wide space the oracle can walk, pinned at random."""
    draw = random.Random(seed)
    for _ in range(300):
        try:
            problem = random_problem(draw.randrange(10**6), most_blocks=5, **draw.choice(PINS))
            if least_plans <= count_wide_plans(problem) <= most_plans:
                return problem
        except ValueError:
            continue
    raise AssertionError("no such problem was drawn")


def check_plan(problem: Problem, plan) -> None:
    plan.validate(problem.graph, problem.cluster)
    line = simulate(problem.graph, plan, problem.cluster, model=problem.costs)
    assert plan.prediction.step_time_s == pytest.approx(line.step_time_s, rel=1e-9)
    assert max(line.peak_memory_bytes.values()) == plan.prediction.peak_memory_bytes <= problem.memory_limit_bytes
    assert [one.step_time_s for one in plan.candidates if one.verdict == "chosen"] == [plan.prediction.step_time_s]


@pytest.mark.parametrize("seed", range(10))
def test_auto_equals_exhaustive_over_the_wide_space(seed):
    """Or beats it with what the wide space does not have: recomputation of some blocks of a stage, ZeRO group by group."""
    free = wide_problem(seed, 500, 20)
    all_plans = simulated(free, every_wide_plan(free))
    peaks = sorted({peak for _, peak in all_plans})
    for share in (0.0, 0.02, 0.3, 1.0):
        problem = limited(free, peaks[int(share * (len(peaks) - 1))])
        plan = auto(problem)
        best_s = min(time_s for time_s, peak in all_plans if peak <= problem.memory_limit_bytes)
        check_plan(problem, plan)
        assert plan.prediction.step_time_s <= best_s * (1 + 1e-9)
        if is_in_wide_space(plan):
            assert plan.prediction.step_time_s == pytest.approx(best_s, rel=1e-9)


@pytest.mark.parametrize("schedule", ["interleaved", "zb-h1", "zb-h2", "zb-v", "pipedream", "2bw"])
@pytest.mark.parametrize("seed", range(3))
def test_pinned_schedules_that_only_moves_reach(schedule, seed):
    """The optimum of what the wide space has under the schedule, or better."""
    draw, checked = random.Random(seed), 0
    while checked < 3:
        try:
            problem = random_problem(draw.randrange(10**6), most_blocks=5, schedule=schedule)
            if not 2 <= count_wide_plans(problem) <= (500 if SCHEDULES[schedule].flushes else 60):
                continue
        except ValueError:
            continue
        fitting = [s for s, peak in simulated(problem, every_wide_plan(problem)) if peak <= problem.memory_limit_bytes]
        if not fitting:
            continue
        plan = auto(problem)
        check_plan(problem, plan)
        assert plan.schedule == schedule and plan.prediction.step_time_s <= min(fitting) * (1 + 1e-9)
        checked += 1


def test_a_pinned_schedule_on_many_devices():
    with torch.device("meta"):
        module = nn.Sequential(*(nn.Linear(256, 256) for _ in range(12)))
        graph = capture(module, torch.zeros(64, 256), loss=lambda out: out.sum())
    cluster = preset("v100-16gb", 2, 8)
    constraints = Constraints(schedule="zb-v", microbatches=8)
    problem = Problem(graph, cluster, CostModel(graph, cluster), LayoutChains(), constraints)
    plan = auto(problem)
    check_plan(problem, plan)
    assert plan.schedule == "zb-v" and plan.pipeline > 1


def pipeline_problem(kinds, world: int, batch: int, seed: int = 0, **pinned) -> Problem:
    graph, cluster = chain_graph(kinds, batch), small_cluster(world)
    costs = MadeUpCosts(graph, cluster, seed)
    return Problem(graph, cluster, costs, WholeLayouts(), Constraints(**pinned))


def test_few_microbatches_in_a_deep_pipeline_want_another_schedule():
    problem = pipeline_problem((1,) * 24, 8, 8, pipeline=8, microbatches=8)
    assert not is_small(problem)
    before, after = exact_search(problem), auto(problem)
    assert before.schedule in ("1f1b", "gpipe") and after.schedule in ("zb-h1", "zb-v", "interleaved")
    assert after.prediction.step_time_s < 0.9 * before.prediction.step_time_s
    check_plan(problem, after)
    assert any(one.verdict.endswith("before schedule changed") or "schedule" in one.verdict for one in after.candidates)


def test_scarce_memory_wants_recomputation_of_some_blocks():
    problem = pipeline_problem((1,) * 12, 2, 8, pipeline=2, microbatches=8, schedule="1f1b")
    whole = exact_search(problem)
    problem = limited(problem, int(whole.prediction.peak_memory_bytes * 0.7))
    before, after = exact_search(problem), auto(problem)
    assert any("full" in stage.recompute for stage in before.stages)
    chosen = [choice for stage in after.stages for choice in stage.block_recompute]
    assert (
        0
        < sum(choice != "none" for choice in chosen)
        < sum(choice != "none" for stage in before.stages for choice in stage.block_recompute)
    )
    assert after.prediction.step_time_s < before.prediction.step_time_s
    check_plan(problem, after)


def test_state_that_does_not_fit_whole_is_sharded_no_more_than_it_must():
    """ZeRO 1 keeps parameters where ZeRO 3 gathers them for every microbatch."""
    problem = pipeline_problem((1,) * 8, 4, 16, pipeline=1, tensor=1, microbatches=4, recompute="none")
    whole = exact_search(replace(problem, constraints=replace(problem.constraints, zero=0)))
    costs = problem.costs
    freed = [costs.stage(replace(whole, stages=(replace(whole.stages[0], zero=zero),)), 0) for zero in (0, 1)]
    problem = limited(
        problem, whole.prediction.peak_memory_bytes - (freed[0].optimizer_bytes - freed[1].optimizer_bytes)
    )
    before, after = exact_search(problem), auto(problem)
    assert before.stages[0].zero == 3 and after.stages[0].zero == 1
    check_plan(problem, after)


def test_hybrid_sharding_stays_inside_a_host_where_that_is_enough():
    graph = capture(*ZOO["gpt2"]())
    cluster = Cluster.preset("a100-80gb", hosts=2, devices_per_host=2)
    pinned = Constraints(tensor=1, pipeline=1, zero=3)
    problem = Problem(graph, cluster, CostModel(graph, cluster), LayoutChains(), pinned)
    before, after = exact_search(problem), auto(problem)
    assert before.stages[0].zero_group == 0 and after.stages[0].zero_group == 2
    assert after.prediction.step_time_s < before.prediction.step_time_s
    check_plan(problem, after)


def test_two_axes_where_hosts_are_far_apart():
    """One long sequence for eight devices of two hosts: neither data nor a pipeline can share it out."""
    sizes = dict(hidden_size=2048, intermediate_size=8192, num_attention_heads=16, num_key_value_heads=4)
    with torch.device("meta"):
        module, _, _ = build_llama(layers=2, max_position_embeddings=2048, vocab_size=65536, **sizes)
    ids = torch.zeros(1, 2048, dtype=torch.int64, device="meta")
    graph = capture(module, {"input_ids": ids, "labels": ids.clone()})
    cluster = Cluster.preset("v100-16gb", hosts=2, devices_per_host=4)
    pinned = Constraints(pipeline=1, data=1, microbatches=1, rewrites=False)
    problem = Problem(graph, cluster, CostModel(graph, cluster), LayoutChains(), pinned)
    before, after = exact_search(problem), auto(problem)
    assert len(before.stages[0].axes) == 1 and len(after.stages[0].axes) == 2
    assert after.prediction.step_time_s < 0.97 * before.prediction.step_time_s
    check_plan(problem, after)


@pytest.mark.parametrize("seed", range(10))
def test_never_worse_and_the_same_again(seed):
    draw = random.Random(seed)
    kinds = tuple(draw.randrange(3) for _ in range(draw.randrange(7, 14)))
    problem = pipeline_problem(kinds, draw.choice([4, 8, 12]), 24, seed, **draw.choice(PINS))
    free = exact_search(problem)
    problem = limited(problem, int(free.prediction.peak_memory_bytes * draw.uniform(0.6, 1.2)))
    try:
        before = exact_search(problem)
    except ValueError:
        return
    found = Alleviation(problem).run([before])
    assert Alleviation(problem).run([before]) == found
    if found is None:
        return
    line = simulate(problem.graph, found, problem.cluster, model=problem.costs)
    assert line.step_time_s < before.prediction.step_time_s
    assert max(line.peak_memory_bytes.values()) <= problem.memory_limit_bytes
    found.validate(problem.graph, problem.cluster)
    pinned = problem.constraints
    said = {
        "schedule": {found.schedule}, "microbatches": {found.microbatches}, "pipeline": {found.pipeline},
        "zero": {s.zero for s in found.stages}, "data": {s.data for s in found.stages},
        "tensor": {s.tensor for s in found.stages}, "recompute": {c for s in found.stages for c in s.block_recompute},
    }  # fmt: skip
    for name, values in said.items():
        assert getattr(pinned, name) is None or values == {getattr(pinned, name)}, name


def test_without_time_the_given_plan_stays():
    problem = pipeline_problem((1,) * 24, 8, 8, pipeline=8, microbatches=8)
    before = exact_search(problem)
    assert Alleviation(problem, 0.0).run([before]) is None


@pytest.mark.parametrize("seed", range(8))
def test_relief_recomputes_as_little_as_brute_force(seed):
    """One stage of one kind of block: of all assignments the cheapest that fits; two kinds: close to it."""
    draw = random.Random(seed)
    mixed = seed % 2
    problem = pipeline_problem(tuple(draw.randrange(1 + mixed) for _ in range(5)), 1, 4, seed, microbatches=2)
    judge = Judge(problem)
    (plan,) = [exact_search(problem)]
    plan = replace(plan, prediction=None, candidates=())
    every = []
    for choices in itertools.product(CHOICES, repeat=5):
        judged = judge(replace(plan, stages=(with_recompute(plan.stages[0], choices),)))
        every.append((judged.peaks_bytes[0], judged.time_s))
    peaks = sorted({peak for peak, _ in every})
    for limit in (peaks[0], peaks[len(peaks) // 3], peaks[2 * len(peaks) // 3], peaks[-1]):
        tight = limited(problem, limit)
        best_s = min(time_s for peak, time_s in every if peak <= limit)
        found = Relief(Judge(tight))(plan, float("inf"))
        assert found is not None and found.fits
        assert best_s * (1 - 1e-12) <= found.time_s <= best_s * 1.25
    assert Relief(Judge(limited(problem, peaks[0] - 1)))(plan, float("inf")) is None


def test_the_judge_prices_every_stage_as_the_cost_model_does():
    graph, cluster = capture(*ZOO["llama"]()), Cluster.preset("a100-80gb", hosts=2, devices_per_host=2)
    plan = search(graph, cluster, progress=False, pipeline=2, tensor=2, microbatches=2)
    problem = Problem(graph, cluster, CostModel(graph, cluster), LayoutChains(), Constraints(microbatches=2))
    judge = Judge(problem)
    draw = random.Random(1)
    sketch = Sketch.of(plan)
    for _ in range(40):
        stops = (*sorted(draw.sample(range(1, len(graph.blocks)), 1)), len(graph.blocks))
        other = replace(sketch, stops=stops, schedule="1f1b").plan(graph)
        stages = tuple(with_recompute(s, [draw.choice(CHOICES) for _ in range(s.num_blocks)]) for s in other.stages)
        other = replace(other, stages=stages)
        assert judge(other).costs == tuple(problem.costs.stage(other, s) for s in range(2))


@pytest.mark.parametrize("seed", range(10))
def test_balanced_cuts_are_the_best(seed):
    draw = random.Random(seed)
    weights = [draw.choice([0.0, 1.0, draw.random()]) for _ in range(8)]
    for parts in range(1, 9):
        stops = balanced(weights, parts)
        assert len(stops) == parts and stops[-1] == 8 and all(b > a for a, b in itertools.pairwise((0, *stops)))

        def heaviest(ends):
            return max(sum(weights[a:b]) for a, b in itertools.pairwise((0, *ends)))

        best = min(heaviest((*cuts, 8)) for cuts in itertools.combinations(range(1, 8), parts - 1))
        assert heaviest(stops) == pytest.approx(best, rel=1e-6, abs=1e-9)
