"""FlexFlow: delta simulation equals full simulation exactly; the chain is seeded and never worse than its start."""

from __future__ import annotations

import functools
import math
import random

import pytest
from method_cases import captured_problem

from autopar.planner.methods.delta_simulation import Simulation, Task, simulate_fully
from autopar.planner.methods.flexflow import OpTasks, anneal, flexflow
from autopar.planner.methods.op_layouts import chain_of
from autopar.planner.problem import Shape


def random_task(draw: random.Random, i: int, known: list[int]) -> Task:
    lower = sorted(k for k in known if k < i)[-8:]
    after = tuple(draw.sample(lower, min(len(lower), draw.randrange(1, 4))))
    # few distinct durations, none at all among them: many ties
    return Task(draw.choice([0.0, 1.0, 1.0, 0.25, draw.random()]), draw.randrange(3), after)


@pytest.mark.parametrize("seed", range(15))
def test_delta_equals_full_on_random_graphs(seed):
    """After each of many random changes, additions and removals, to the last bit; and taken back again."""
    draw = random.Random(seed)
    ids = draw.sample(range(200), 60)
    tasks = {i: random_task(draw, i, ids) for i in ids}
    simulation = Simulation(tasks)
    assert simulation.ends == simulate_fully(tasks)
    fewer = 0
    for _ in range(40):
        before = dict(simulation.ends)
        removed = draw.sample(sorted(simulation.tasks), draw.randrange(2))
        left = [i for i in simulation.tasks if i not in removed]
        added = draw.sample(range(200), 1)
        changes = {i: random_task(draw, i, left) for i in draw.sample(left, 1) + added}
        for i in left:
            after = tuple(b for b in simulation.tasks[i].after if b not in removed)
            if i not in changes and after != simulation.tasks[i].after:
                changes[i] = Task(simulation.tasks[i].duration_s, simulation.tasks[i].resource, after)
        undo = simulation.update(changes | {i: None for i in removed if i not in changes})
        assert simulation.ends == simulate_fully(simulation.tasks)
        fewer += simulation.num_updated < len(simulation.tasks)
        if draw.random() < 0.5:
            simulation.update(undo)
            assert simulation.ends == before
    assert fewer > 15


@functools.cache
def problem():
    return captured_problem("llama", 4)


def test_delta_equals_full_on_a_model():
    """A hundred random strategies on a captured Llama; on average much of the graph is left alone."""
    model = OpTasks(problem(), Shape(1, 1, 4, 1, "1f1b", 0))
    simulation = Simulation(model.all_tasks())
    draw = random.Random(0)
    shares = []
    for _ in range(100):
        group = draw.choice(model.groups)
        number = draw.randrange(len(model.options[group[0]]))
        simulation.update(model.change({name: model.options[name][number] for name in group}))
        assert simulation.ends == simulate_fully(simulation.tasks) == simulate_fully(model.all_tasks())
        shares.append(simulation.num_updated / len(simulation.tasks))
    assert sum(shares) / len(shares) < 0.85
    plan_chain = chain_of(problem().graph, 4, model.chosen)
    assert len(plan_chain.index) == len(problem().graph.blocks)


def test_same_seed_same_plan_and_no_worse_than_data_parallel():
    plan = flexflow(problem(), seed=1, steps=150)
    assert plan == flexflow(problem(), seed=1, steps=150)
    assert plan.prediction.step_time_s <= max(one.step_time_s for one in plan.candidates)
    start = flexflow(problem(), seed=1, steps=0)
    assert plan.prediction.step_time_s <= start.prediction.step_time_s
    plan.validate(problem().graph, problem().cluster)


def test_the_chain_finds_the_optimum_of_a_small_space():
    """Eight switches whose effects are not independent: the chain reaches the best of all 256 settings."""
    draw = random.Random(5)
    weights = [[draw.uniform(-1, 1) for _ in range(8)] for _ in range(8)]
    state = [0] * 8

    def time_s(setting) -> float:
        return 20 + sum(weights[i][j] * setting[i] * setting[j] for i in range(8) for j in range(8))

    def change(i: int):
        state[i] ^= 1
        return time_s(state), lambda: state.__setitem__(i, state[i] ^ 1)

    best_s = min(time_s([n >> i & 1 for i in range(8)]) for n in range(256))
    found_s = anneal(time_s(state), 8, change, random.Random(0), 400)
    assert found_s == pytest.approx(best_s) == pytest.approx(time_s(state))
    assert math.isfinite(found_s)
