"""Stages of different meshes and uneven shares, on gloo: exact against the module on one device, on other plans' terms too."""

from __future__ import annotations

import copy
import functools
import itertools
import random
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from plan_cases import plan_of, unequal_plan, world_of
from random_models import random_model
from test_model import Failing
from test_parity import call, errors, graph_of
from torch import nn
from torch.utils.data import Dataset

import autopar
from autopar.cluster.spec import Cluster
from autopar.cost.model import CostModel
from autopar.cost.types import StageCost
from autopar.graph import Graph
from autopar.runtime.failure import RankFailure
from autopar.simulate import simulate

FOUR = [
    dict(meshes=[(2, 1), (1, 2)], microbatches=2),
    dict(meshes=[(1, 2), (2, 1)], microbatches=4, schedule="gpipe"),
    dict(meshes=[(3, 1), (1, 1)], microbatches=1, shares=[(5, 2, 1), ()]),
    dict(meshes=[(1, 1), (2, 1), (1, 1)], microbatches=2, shares=[(), (3, 1), ()], recompute="full"),
    dict(meshes=[(1, 1), (3, 1)], microbatches=2, shares=[(), (2, 1, 1)], zero=3),
    dict(meshes=[(2, 2)], microbatches=2, shares=[(3, 1)]),
    dict(meshes=[(1, 2), (2, 1)], microbatches=2, shares=[(), (1, 3)]),
]
TWO = [dict(meshes=[(2, 1)], microbatches=m, shares=[(3 * k, k)], zero=z) for m, k, z in ((2, 1, 3), (1, 2, 0))]


@functools.cache
def random_graph(seed: int) -> Graph:
    return autopar.capture(*random_model(seed))


def parallel_of(module: nn.Module, example: Any, loss: Any, plan: autopar.Plan) -> autopar.Model:
    cluster = Cluster.preset("cpu", hosts=1, devices_per_host=plan.world_size)
    return autopar.parallelize(module, example, loss, plan=plan, cluster=cluster)


def one_step(module: nn.Module, example: Any, loss: Any, plan: autopar.Plan) -> tuple[float, float, float]:
    """(loss error, gradient error, evaluation error)."""
    model = parallel_of(module, example, loss, plan)
    value = call(model, example)
    value.backward()
    module.zero_grad()
    expected = call(module, example, loss)
    expected.backward()
    with torch.no_grad():
        evaluated = call(model.eval(), example)
    relative = [abs(v.item() - expected.item()) / abs(expected.item()) for v in (value, evaluated)]
    return relative[0], errors(model, module), relative[1]


def steps(name: str, plans: list[dict[str, Any]]) -> list[tuple[float, float, float]]:
    return [one_step(*getattr(models, name)(), plan_of(graph_of(name), plan)) for plan in plans]


@pytest.mark.parametrize("name", ["build_llama", "build_conv_net", "build_tied_lm", "build_two_inputs"])
@pytest.mark.parametrize("plans", [TWO, FOUR], ids=["two", "four"])
def test_loss_and_gradients(pool, name: str, plans: list[dict[str, Any]]) -> None:
    plans = [plan | {"seed": i} for i, plan in enumerate(plans)]
    for rank, found in enumerate(pool.run(steps, name, plans, world_size=world_of(plans[0]), timeout_s=240)):
        for plan, (loss, gradient, evaluated) in zip(plans, found, strict=True):
            assert loss < 1e-6 and evaluated < 1e-6 and gradient < 1e-5, (rank, plan, loss, evaluated, gradient)


def normed(plan: dict[str, Any]) -> tuple[tuple[float, float, float], float]:
    """Batch norm, whose statistics are those of all rows; errors of a step, and of the running mean after it."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    example = (torch.randn(8, 16), torch.randint(0, 4, (8,)))
    loss = nn.functional.cross_entropy
    graph = autopar.capture(module, example, loss)
    model = parallel_of(module, example, loss, plan_of(graph, plan))
    value = call(model, example)
    value.backward()
    expected = call(module, example, loss)
    expected.backward()
    model.share_buffers()
    mean = dict(model.named_buffers())["1.running_mean"]
    difference = abs(value.item() - expected.item()) / abs(expected.item())
    return (difference, errors(model, module), 0.0), float((mean - module[1].running_mean).abs().max())


def test_batch_norm_weighs_ranks_by_their_rows(pool) -> None:
    plan = dict(meshes=[(3, 1)], microbatches=1, shares=[(5, 2, 1)])
    for (loss, gradient, _), mean in pool.run(normed, plan, world_size=3):
        assert loss < 1e-6 and gradient < 1e-5 and mean < 1e-6


def random_options(seed: int, world_size: int) -> dict[str, Any]:
    """Meshes that take all ranks, in 1 to 3 stages."""
    draw = random.Random(seed)
    while True:
        meshes = [(draw.choice([1, 2, 3]), draw.choice([1, 1, 2])) for _ in range(draw.randint(1, 3))]
        options = dict(meshes=meshes, microbatches=draw.choice([1, 2]), seed=seed)
        if world_of(options) == world_size:
            break
    return options | {
        "shares": draw.choice([(), "random"])
        if all(8 // options["microbatches"] % d == 0 for d, _ in meshes)
        else "random",
        "schedule": draw.choice(["gpipe", "1f1b"]),
        "zero": draw.choice([0, 3]),
        "recompute": draw.choice(["none", "full"]),
    }


def random_steps(seeds: range, world_size: int) -> list[tuple[float, float, float]]:
    found = []
    for seed in seeds:
        module, example = random_model(seed)
        options = random_options(seed, world_size)
        if len(random_graph(seed).blocks) >= len(options["meshes"]):
            found.append(one_step(module, example, None, plan_of(random_graph(seed), options)))
    return found


@pytest.mark.parametrize(
    ("world_size", "seeds"),
    [
        (3, range(6)),
        (4, range(12, 20)),
        pytest.param(3, range(6, 12), marks=pytest.mark.slow),
        pytest.param(4, range(20, 30), marks=pytest.mark.slow),
    ],
)
def test_random_plans_of_random_models(pool, world_size: int, seeds: range) -> None:
    results = pool.run(random_steps, seeds, world_size, world_size=world_size, timeout_s=240)
    assert len(results[0]) > len(seeds) * 0.8
    for found in results:
        for seed, (loss, gradient, evaluated) in zip(seeds, found, strict=False):
            assert loss < 2e-6 and evaluated < 2e-6 and gradient < 1e-5, (seed, loss, gradient, evaluated)


def moves(plans: list[dict[str, Any]], path: str) -> tuple[list[float], list[float], list[float]]:
    """Losses with a move after every second step, those of the module, and those after a checkpoint of the middle."""
    module, example, loss = models.build_tied_lm()
    graph = graph_of("build_tied_lm")
    model = parallel_of(module, example, loss, plan_of(graph, plans[0]))
    optimizers = [torch.optim.AdamW(side.parameters(), lr=1e-2) for side in (model, module)]

    def train(side: nn.Module, optimizer: torch.optim.Optimizer, side_loss: Any, num_steps: int) -> list[float]:
        losses = []
        for _ in range(num_steps):
            value = call(side, example, side_loss)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(value.item())
        return losses

    costs = CostModel(graph, model.cluster)
    found = train(model, optimizers[0], None, 2)
    for i, plan in enumerate(plans[1:]):
        model.move(plan_of(graph, plan), optimizers[0], costs)
        found += train(model, optimizers[0], None, 2)
        if i == 0:
            autopar.save(path, model, optimizers[0])
    expected = train(module, optimizers[1], loss, 2 * len(plans))
    # Back to the end of the second plan's steps, under the first one.
    model.move(plan_of(graph, plans[0]), optimizers[0], costs)
    autopar.load(path, model, optimizers[0])
    return found, expected, train(model, optimizers[0], None, 2 * len(plans) - 4)


def test_moves_and_checkpoints_between_unequal_plans(pool, tmp_path: Path) -> None:
    """A tied parameter lies on stages of different meshes."""
    plans = [FOUR[0], FOUR[3], dict(data=2, tensor=1, pipeline=2, microbatches=1), FOUR[4]]
    results = pool.run(moves, copy.deepcopy(plans), str(tmp_path / "saved"), world_size=4, timeout_s=240)
    for found, expected, again in results:
        assert found == pytest.approx(expected, rel=1e-4)
        assert again == pytest.approx(expected[4:], rel=1e-4)


def test_a_stage_costs_what_its_fullest_rank_costs() -> None:
    graph = graph_of("build_llama")
    cluster = Cluster.preset("a100-80gb", hosts=1, devices_per_host=2)

    def cost(shares: tuple[int, ...]) -> StageCost:
        plan = unequal_plan(graph, [(2, 1)], 1, shares=[shares])
        return CostModel(graph, cluster).stage(plan, 0)

    costs = [cost(shares) for shares in ((), (4, 4), (3, 5), (2, 6), (7, 1))]
    assert costs[0] == costs[1]
    for less, more in itertools.pairwise(costs[1:]):
        assert less.forward_s < more.forward_s and less.activation_bytes < more.activation_bytes
    assert cost((5, 3)) == cost((3, 5))


def test_unequal_plans_in_words() -> None:
    graph = graph_of("build_llama")
    plan = unequal_plan(graph, [(2, 1), (1, 2)], 2, shares=[(3, 1), ()])
    text = plan.explain(graph)
    for words in (
        "pipeline 2 x (data 2 shared 3:1 x tensor 1 in stages 0 and data 1 x tensor 2 in stages 1)",
        "data 2 in stages 0: the data ranks have 3, 1 of the 4 rows of each microbatch",
        "tensor 2 in stages 1:",
        "2 microbatches of 4 rows per step",
    ):
        assert words in text, f"{words!r} is not in\n{text}"
    # "in short" sums up the same degrees, with the layouts' names where the graph is given.
    with_graph, without = (
        "\n".join(line for line in words.splitlines() if "in short" not in line) for words in (text, plan.explain())
    )
    assert without.count("tensor 2") == with_graph.count("tensor 2")
    line = simulate(graph, plan, Cluster.preset("cpu", hosts=1, devices_per_host=4))
    assert set(line.peak_memory_bytes) == set(range(4))


def one_rank_fails() -> str:
    torch.manual_seed(0)
    module, example = Failing(), torch.randn(8, 8)
    graph = autopar.capture(module, example)
    model = parallel_of(module, example, None, unequal_plan(graph, [(2, 1), (1, 1)], 1, shares=[(5, 3), ()]))
    try:
        for _ in range(5):
            model(example).backward()
    except (RankFailure, ArithmeticError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing failed"


def test_one_rank_fails_and_all_stop(pool) -> None:
    found = pool.run(one_rank_fails, world_size=3)
    assert [rank for rank, text in enumerate(found) if text.startswith("ArithmeticError")] == [1], found
    assert all("the third call was one too many" in text for text in found), found


class Rows(Dataset):
    def __init__(self, example: dict[str, Any]) -> None:
        self.example = example

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {key: value[index % 8] for key, value in self.example.items()}


def fed_by_loader(seed: int) -> tuple[list[int], list[float], float]:
    """Rows per batch of this rank, losses of the batches, and that of the global batch, which the dataset has twice."""
    module, example = random_model(seed)
    plan = unequal_plan(random_graph(seed), [(3, 1), (1, 1)], 1, shares=[(5, 2, 1), ()])
    model = parallel_of(module, example, None, plan)
    with torch.no_grad():
        expected = model(**example).item()
        batches = list(model.loader(Rows(example), batch_size=8))
        return [len(batch["ids"]) for batch in batches], [model(**batch).item() for batch in batches], expected


def test_the_loader_gives_each_rank_its_share(pool) -> None:
    results = pool.run(fed_by_loader, 3, world_size=4)
    assert [rows for rows, _, _ in results] == [[5, 5], [2, 2], [1, 1], [8, 8]]
    for _, losses, expected in results:
        assert losses == [expected, expected]
