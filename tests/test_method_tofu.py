"""Tofu: derived splits checked with numbers, the recursion against the full search, and bytes on a model."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from method_cases import captured_problem

from autopar.planner.axis_prices import AxisPrices
from autopar.planner.methods.tofu import BytePrices, _least_bytes, tofu
from autopar.planner.methods.tofu_recursion import Described, halved, moved_bytes, split_two, tofu_recursion, ways
from autopar.planner.problem import Shape


@pytest.mark.parametrize("description", ["bi,io->bo", "bqd,bkd->bqk", "bi,bi->bi", "bio->bo", "bhi,hio->bho"])
def test_derived_splits_compute_the_op(description):
    """Halving any derived index: slices of the inputs that carry it, and halves joined, or summed where it is summed."""
    draw = np.random.default_rng(0)
    sizes = {name: 4 for name in description if name.isalpha()}
    left, out = description.split("->")
    inputs = [draw.normal(size=[sizes[n] for n in part]) for part in left.split(",")]
    whole = np.einsum(description, *inputs)
    op = Described.of(description, [f"x{i}" for i in range(len(inputs))], "y", sizes)
    assert set(ways(op)) == set(sizes)
    for index in ways(op):
        halves = []
        for worker in range(2):
            cut = [
                np.take(x, range(2 * worker, 2 * worker + 2), part.index(index)) if index in part else x
                for x, part in zip(inputs, left.split(","), strict=True)
            ]
            halves.append(np.einsum(description, *cut))
        joined = np.concatenate(halves, out.index(index)) if index in out else halves[0] + halves[1]
        np.testing.assert_allclose(joined, whole)
    odd = Described.of(description, op.inputs, "y", {name: 3 for name in sizes})
    assert ways(odd) == ()


def test_bytes_of_one_op_by_hand():
    op = Described.of("bi,io->bo", ["x", "w"], "y", {"b": 8, "i": 4, "o": 2})
    assert moved_bytes(op, "b", {"x": 0, "w": 0, "y": 0}) == 8
    assert moved_bytes(op, "b", {"x": 1, "w": 1, "y": 1}) == 16 + 8 + 8
    assert moved_bytes(op, "o", {"x": 0, "w": 1, "y": 1}) == 32
    assert moved_bytes(op, "i", {"x": 1, "w": 0, "y": 0}) == 16


def random_ops(draw: random.Random, num: int) -> list[Described]:
    """A chain of matrix products and elementwise ops, some with a second use of an earlier tensor."""
    ops, value, width = [], "x0", 8
    for k in range(num):
        wide = draw.choice([4, 8, 16])
        batch = 8
        if draw.random() < 0.6:
            ops.append(Described.of("bi,io->bo", [value, f"w{k}"], f"x{k + 1}", {"b": batch, "i": width, "o": wide}))
            width = wide
        else:
            ops.append(Described.of("bi,bi->bi", [value, f"r{k}"], f"x{k + 1}", {"b": batch, "i": width}))
        value = f"x{k + 1}"
    return ops


def all_splits(ops):
    """(tensor dims, op indices) of every way to halve."""
    tensors = {t: op for op in ops for t in (*op.inputs, op.output)}
    names = list(tensors)
    for places in itertools.product((0, 1), repeat=len(names)):
        dims = dict(zip(names, places, strict=True))
        for chosen in itertools.product(*(ways(op) for op in ops)):
            yield dims, chosen


@pytest.mark.parametrize("seed", range(10))
def test_two_workers_exactly(seed):
    ops = random_ops(random.Random(seed), 3)
    best = min(
        sum(moved_bytes(op, index, dims) for op, index in zip(ops, chosen, strict=True))
        for dims, chosen in all_splits(ops)
    )
    assert split_two(ops).moved == best


@pytest.mark.parametrize("seed", range(8))
def test_the_recursion_equals_the_full_search(seed):
    """Four workers: every first halving followed by the best second one, against the recursion's greedy first."""
    ops = random_ops(random.Random(seed), 2)
    steps = tofu_recursion(ops, 4)
    found = sum(step.moved for step in steps)
    best = float("inf")
    tails: dict[tuple, float] = {}
    for dims, chosen in all_splits(ops):
        first = sum(moved_bytes(op, index, dims) for op, index in zip(ops, chosen, strict=True))
        if first >= best:
            continue
        if chosen not in tails:
            split = type(steps[0])(chosen, dims, first)
            rest = split_two(halved(ops, split))
            tails[chosen] = 2 * rest.moved if rest else float("inf")
        best = min(best, first + tails[chosen])
    assert found == pytest.approx(best)


def test_only_powers_of_two():
    with pytest.raises(ValueError, match="power of two"):
        tofu_recursion(random_ops(random.Random(0), 2), 6)


@pytest.mark.parametrize("model", ["llama", "mlp"])
def test_moves_fewer_bytes_than_data_parallel_alone(model):
    problem = captured_problem(model, 4)
    plan = tofu(problem)
    plan.validate(problem.graph, problem.cluster)
    moved = {
        (s.data, s.tensor): _least_bytes(problem, s)[1]
        for s in problem.shapes
        if s.pipeline == 1 and s.microbatches == 1
    }
    stage = plan.stages[0]
    assert moved[stage.data, stage.tensor] == min(moved.values()) <= moved[4, 1]
    if model == "mlp":
        assert moved[stage.data, stage.tensor] < moved[4, 1]


def test_bytes_do_not_depend_on_the_links():
    problem = captured_problem("mlp", 4)
    shape = Shape(1, 1, 4, 1, "1f1b", 0)
    prices = BytePrices(problem, shape, False)
    assert isinstance(prices, AxisPrices)
    weight = next(p for p in problem.graph.parameters)
    assert all(s.work < 1 for op in problem.graph.consumers[weight.name] for s in prices.strategies(op))
