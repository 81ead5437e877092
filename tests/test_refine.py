"""Refinement: planted errors are found in synthetic measurements, and a running model learns that its network is slow."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import models
import pytest
import torch
from plan_cases import random_plan
from test_parity import call

import autopar
from autopar.cluster.rates import CLASSES
from autopar.cluster.spec import Cluster
from autopar.cost.collectives import collective_s
from autopar.cost.corrections import Corrections
from autopar.cost.model import CostModel
from autopar.cost.storage import base_name
from autopar.graph import Graph
from autopar.refine import Observation, correct
from autopar.runtime.recorder import CollectiveSample
from autopar.simulate import simulate


def observations(graph: Graph, plan: autopar.Plan, truth: CostModel) -> list[Observation]:
    """What ranks would measure if `truth` were the whole truth and the profiler slowed everything down twofold."""
    names = {truth.compute_class(op): base_name(op.target) for op in graph.ops}
    peaks = simulate(graph, plan, truth.cluster, truth).peak_memory_bytes
    found = []
    for index, stage in enumerate(plan.stages):
        breakdown = truth.breakdown(plan, index)
        seconds = {
            names[name]: tuple(2 * s * plan.microbatches for s in pair)
            for name, pair in breakdown.compute.items()
            if name in names
        }
        for rank in stage.ranks:
            samples = tuple(
                CollectiveSample(
                    kind, stage.ranks, size, collective_s(truth.cluster, kind, size, stage.ranks, truth.corrections)
                )
                for kind in ("all_reduce", "all_gather")
                for size in (10_000, 1_000_000)
            )
            found.append(Observation((index,), seconds, (2.0, 2.0), samples, peaks[rank]))
    return found


@pytest.mark.parametrize("seed", range(6))
def test_planted_factors_are_found(seed: int) -> None:
    rng = random.Random(seed)
    graph = autopar.capture(*models.build_llama(hidden_size=256, intermediate_size=512))
    cluster = Cluster.preset("cpu", hosts=1, devices_per_host=2)
    plan = random_plan(graph, data=2, tensor=1, pipeline=1, microbatches=2)
    planted = Corrections(
        compute={
            name: (rng.uniform(0.2, 5), rng.uniform(0.2, 5)) for name in CLASSES if name not in ("view", "optimizer")
        },
        links={("intra", kind): (f := rng.uniform(2, 60), 1 / f) for kind in ("all_reduce", "all_gather")},
        memory=rng.uniform(0.8, 1.4),
    )
    truth = CostModel(graph, cluster, planted)
    found, learned = correct(graph, plan, cluster, Corrections(), observations(graph, plan, truth))
    wrong = CostModel(graph, cluster).breakdown(plan, 0).compute
    for name in ("matmul", "attention", "pointwise"):
        for direction in (0, 1):
            if wrong[name][direction] > 0.02 * sum(pair[direction] for pair in wrong.values()):
                assert found.compute[name][direction] == pytest.approx(planted.compute[name][direction], rel=0.05), name
    for key, pair in planted.links.items():
        assert found.links[key] == pytest.approx(pair, rel=0.01)
    # What the plan does not use is corrected by what the measured ones have in common.
    common = (planted.links["intra", "all_reduce"][0] * planted.links["intra", "all_gather"][0]) ** 0.5
    assert found.links["intra", "send"][0] == pytest.approx(common, rel=0.01)
    assert found.memory == pytest.approx(planted.memory, rel=0.02)
    assert any("matmul" in line for line in learned) and any("all_reduce" in line for line in learned)
    # A second look at the same truth has nothing left to learn.
    again, _ = correct(graph, plan, cluster, found, observations(graph, plan, truth))
    assert again.links["intra", "all_reduce"] == pytest.approx(found.links["intra", "all_reduce"], rel=0.01)


def learns_of_a_slow_network() -> tuple[dict[str, Any], list[float], list[float]]:
    module, example, loss = models.build_llama(hidden_size=64, intermediate_size=128)
    true = Cluster.preset("cpu", hosts=1, devices_per_host=2)
    fast = replace(true.intra, latency_s=1e-9, bandwidth_bytes_per_s=1e14, collectives={})
    # A random layout converts nearly everything, which only a network that costs nothing would forgive.
    plan = random_plan(autopar.capture(module, example, loss), data=1, tensor=2, pipeline=1, microbatches=1, seed=5)
    model = autopar.parallelize(module, example, loss, plan=plan, cluster=replace(true, intra=fast))
    sides: tuple[list[float], list[float]] = ([], [])
    outcome: dict[str, Any] = {}
    for found, side, side_loss in ((sides[0], model, None), (sides[1], module, loss)):
        optimizer = torch.optim.AdamW(side.parameters(), lr=1e-2)
        for step in range(12):
            if step == 6 and side is model:
                before = id(optimizer)
                result = model.refine(optimizer, remaining_steps=10**6)
                outcome = {
                    "moved": result.moved,
                    "reason": result.reason,
                    "factor": model.corrections.link("intra", "all_reduce")[0],
                    "same optimizer": id(optimizer) == before,
                    "better": result.new_step_s < result.corrected_step_s,
                }
            value = call(side, example, side_loss)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(value.item())
    return outcome, *sides


@pytest.mark.alone
def test_a_running_model_learns_of_a_slow_network_and_goes_on(pool) -> None:
    results = pool.run(learns_of_a_slow_network, world_size=2, timeout_s=120)
    for outcome, found, expected in results:
        assert outcome == results[0][0]
        assert outcome["factor"] > 10, outcome
        assert outcome["moved"] and outcome["same optimizer"] and outcome["better"], outcome
        for step, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert abs(a - b) <= 1e-4 * abs(b), (step, found, expected)


def too_early() -> str:
    module, example, loss = models.build_mlp()
    model = autopar.parallelize(module, example, loss, cluster=Cluster.preset("cpu", hosts=1, devices_per_host=1))
    try:
        model.refine(torch.optim.SGD(model.parameters(), lr=0.1))
    except ValueError as error:
        return str(error)
    return ""


def test_refining_before_anything_is_measured(pool) -> None:
    assert "training steps" in pool.run(too_early, world_size=1)[0]
