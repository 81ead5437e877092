"""The bound that holds for every plan there is, against plans of all kinds."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
from method_cases import half_as_fast
from models import build_experts, build_gpt2, build_llama
from planner_cases import whole_layout

from autopar import capture
from autopar.cluster.spec import Cluster
from autopar.cost.model import CostModel
from autopar.graph import Graph
from autopar.plan import Plan, Stage
from autopar.planner.auto import auto
from autopar.planner.chains import LayoutChains
from autopar.planner.least_work import work_bound_s
from autopar.planner.problem import Problem
from autopar.planner.wide import every_wide_plan
from autopar.planner.wide_mixes import every_mixed_plan
from autopar.simulate import simulate

BUILDERS = {"llama": build_llama, "gpt2": build_gpt2, "experts": build_experts}
CLUSTERS = {
    "cpu": Cluster.preset("cpu", 1, 4), "h100": Cluster.preset("h100-80gb", 2, 2)
}  # fmt: skip


def problem_of(name: str, cluster: Cluster) -> Problem:
    graph = capture(*BUILDERS[name]())
    return Problem(graph, cluster, CostModel(graph, cluster), LayoutChains())


@pytest.mark.parametrize(
    ("name", "cluster"),
    [("llama", "cpu"), pytest.param("gpt2", "h100", marks=pytest.mark.slow), ("experts", "cpu"), ("experts", "h100")],
)
def test_no_plan_is_faster(name: str, cluster: str) -> None:
    problem = problem_of(name, CLUSTERS[cluster])
    draw, ratios = random.Random(0), []
    every = itertools.islice(itertools.chain(every_wide_plan(problem), every_mixed_plan(problem)), 200_000)
    for plan in draw.sample(list(itertools.islice(every, 0, None, 97)), 60):
        line = simulate(problem.graph, plan, problem.cluster, model=problem.costs)
        ratios.append(work_bound_s(problem, plan) / line.step_time_s)
    assert max(ratios) <= 1 and min(ratios) > 0
    found = auto(problem)
    assert work_bound_s(problem, found) <= found.prediction.step_time_s
    assert found.prediction.lower_bound_s is not None


def one_after_the_other(graph: Graph, cluster: Cluster) -> Iterator[Plan]:
    """A stage for each host, in every split into data and tensor ranks, cut in the middle."""
    hosts = [[r for r in range(cluster.world_size) if cluster.host(r) == h] for h in range(cluster.num_hosts)]
    middle, num = len(graph.blocks) // 2, len(graph.blocks)
    for tensors in itertools.product((1, 2), repeat=2):
        stages, layouts = [], []
        for (start, stop), ranks, tensor in zip(((0, middle), (middle, num)), hosts, tensors, strict=True):
            rows = (tuple(range(len(layouts), len(layouts) + stop - start)),) if tensor > 1 else ()
            layouts += [whole_layout(block, tensor) for block in graph.blocks[start:stop] if tensor > 1]
            axes = (tensor,) if tensor > 1 else ()
            stages.append(Stage(start, stop, tuple(ranks), len(ranks) // tensor, axes, rows))
        for count in (1, 2, 4):
            yield Plan(
                graph.name, graph.fingerprint, cluster.world_size, graph.batch_size, count, "1f1b", tuple(stages),
                tuple(layouts),
            )  # fmt: skip


@pytest.mark.parametrize("name", BUILDERS)
def test_no_plan_of_unequal_devices_is_faster(name: str) -> None:
    cpu = Cluster.preset("cpu", 1, 2)
    problem = problem_of(name, Cluster.join(cpu, half_as_fast(cpu, 3.0)))
    bound_s = None
    for plan in one_after_the_other(problem.graph, problem.cluster):
        plan.validate(problem.graph, problem.cluster)
        bound_s = work_bound_s(problem, plan)
        assert bound_s <= simulate(problem.graph, plan, problem.cluster, model=problem.costs).step_time_s
    found = auto(problem)
    assert found.prediction.lower_bound_s == pytest.approx(min(bound_s, found.prediction.step_time_s))
    assert found.prediction.step_time_s < 6 * bound_s  # so that it says something
