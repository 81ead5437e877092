"""Time limits, stops and interrupts of every search method, by clocks that the tests wind themselves."""

from __future__ import annotations

import itertools
import math
import random
import signal
import threading
import time
from dataclasses import replace

import pytest
from method_cases import captured, captured_problem, small_problem
from planner_cases import MadeUpCosts, WholeLayouts, chain_graph, small_cluster

from autopar.cluster.presets import preset
from autopar.cost.model import CostModel
from autopar.planner.auto import exact_search
from autopar.planner.budget import Budget
from autopar.planner.chains import LayoutChains
from autopar.planner.problem import Constraints, Problem
from autopar.planner.search import METHODS, search

# Those that look into blocks need a real cost model.
ON_OPS = ("flexflow", "tofu", "whale", "unity")


def problem_for(method: str, seed: int) -> Problem:
    return captured_problem("mlp", 2) if method in ON_OPS else small_problem(seed, 4, num_blocks=4, batch_size=4)


class Ticks:
    """A clock on which every look takes a second."""

    def __init__(self) -> None:
        self.count = itertools.count()

    def __call__(self) -> float:
        return float(next(self.count))


class Asked:
    """An event that is set from the n-th time on that it is asked about."""

    def __init__(self, n: int) -> None:
        self.left = n

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=pytest.mark.slow) if m == "exhaustive" else m for m in METHODS]
)
def test_more_time_never_finds_a_worse_plan_and_enough_finds_what_no_limit_does(method):
    problem = problem_for(method, 5)
    free = METHODS[method](problem)
    assert "cut short" not in free.candidates[0].verdict
    times_s, cut = [], []
    for limit_s in (0, 5, 20, 10**9):
        plan = METHODS[method](replace(problem, budget=Budget(limit_s, clock=Ticks())))
        plan.validate(problem.graph, problem.cluster)
        assert plan.prediction.peak_memory_bytes <= problem.memory_limit_bytes
        times_s.append(plan.prediction.step_time_s)
        cut.append("cut short by time_limit_s" in next(c for c in plan.candidates if "chosen" in c.verdict).verdict)
    assert times_s == sorted(times_s, reverse=True)
    assert times_s[-1] == free.prediction.step_time_s and not cut[-1]
    # one that was not cut short found all that there is
    assert all(c or t == times_s[-1] for c, t in zip(cut, times_s, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_hundredths_of_a_second_are_enough_for_a_plan(method):
    problem = problem_for(method, 7)
    start_s = time.process_time()
    plan = METHODS[method](replace(problem, budget=Budget(0.03)))
    assert time.process_time() - start_s < 15
    plan.validate(problem.graph, problem.cluster)


def large_problem(method: str) -> Problem:
    """Many devices, microbatches and blocks, so that a single step of a method, or a look at a single plan, takes long."""
    if method in (*ON_OPS, "auto"):
        # For the others so little memory that no plan fits.
        graph, cluster = captured("stack"), preset("a100-80gb", 8, 4)
        pinned = Constraints(memory_limit_bytes=None if method == "auto" else 3 * 2**20)
        return Problem(graph, cluster, CostModel(graph, cluster), LayoutChains(), pinned)
    graph = chain_graph(tuple(random.Random(3).randrange(3) for _ in range(48)), 1024)
    cluster = small_cluster(256, 8)
    return Problem(graph, cluster, MadeUpCosts(graph, cluster, 3), WholeLayouts())


@pytest.mark.parametrize("method", [m for m in METHODS if m != "exhaustive"])
def test_a_limit_holds_within_steps(method):
    """To a fifth, and a second for the first plan; in processor time, which other processes do not change."""
    problem, limit_s = large_problem(method), 0.2
    begin_s = time.process_time()
    plan = METHODS[method](replace(problem, budget=Budget(limit_s, clock=time.process_time)))
    assert time.process_time() - begin_s < 1.2 * limit_s + 1
    plan.validate(problem.graph, problem.cluster)


@pytest.mark.parametrize("method", METHODS)
def test_stopped_before_any_plan_is_an_error_and_later_the_best_so_far(method):
    problem = problem_for(method, 5)
    stop = threading.Event()
    stop.set()
    with pytest.raises(ValueError, match=f"method='{method}' ended when it was asked to stop, before it had found any"):
        METHODS[method](replace(problem, budget=Budget(stop=stop)))
    found = []
    for n in (5, 30, 200):
        try:
            plan = METHODS[method](replace(problem, budget=Budget(stop=Asked(n))))
        except ValueError:
            found.append(math.inf)
        else:
            plan.validate(problem.graph, problem.cluster)
            found.append(plan.prediction.step_time_s)
    assert found == sorted(found, reverse=True) and found[-1] < math.inf


def tight_problem(seed: int) -> Problem:
    """With 60% of the memory that the best plan would use: auto then looks at many partial plans."""
    problem = small_problem(seed, 8, num_blocks=9, batch_size=16)
    peak_bytes = METHODS["auto"](problem).prediction.peak_memory_bytes
    return replace(problem, constraints=Constraints(memory_limit_bytes=int(0.6 * peak_bytes)))


def test_how_much_may_be_lost_is_told_and_true():
    """Of a search that was cut short: no plan of the core's space is faster than its bound says."""
    told = 0
    for seed in (4, 10):
        problem = tight_problem(seed)
        best_s = exact_search(problem).prediction.step_time_s
        for limit_s in (0, 1, 10, 30):
            plan = METHODS["auto"](replace(problem, budget=Budget(limit_s, clock=Ticks())))
            verdict = next(c.verdict for c in plan.candidates if c.verdict.startswith("chosen"))
            short = float(verdict.partition("more than ")[2].partition("%")[0] or 0) / 100
            told += short > 0
            assert plan.prediction.step_time_s * (1 - short - 1e-3) <= best_s
    assert told > 2


class Alarm(Ticks):
    """A clock whose n-th look is interrupted by Ctrl-C."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def __call__(self) -> float:
        now = super().__call__()
        if now == self.n:
            raise KeyboardInterrupt
        return now


def test_an_interrupt_of_auto_returns_its_best_plan():
    problem = tight_problem(10)
    best_s = METHODS["auto"](problem).prediction.step_time_s
    for n in range(1, 60, 5):
        plan = METHODS["auto"](replace(problem, budget=Budget(1e9, clock=Alarm(n))))
        plan.validate(problem.graph, problem.cluster)
        assert plan.prediction.step_time_s >= best_s * (1 - 1e-9)
        assert problem.budget.cut_short == "" and "cut short by an interrupt" in str(plan.candidates)
    with pytest.raises(KeyboardInterrupt):
        # the first look starts the clock, and a search without a plan does not look at it; so ask about a stop
        METHODS["auto"](replace(problem, budget=Budget(stop=Refusing())))


class Refusing:
    def is_set(self) -> bool:
        raise KeyboardInterrupt


@pytest.mark.parametrize("limit_s", [-1, "10", True, math.nan])
def test_limits_that_are_none(limit_s):
    with pytest.raises(ValueError, match="time_limit_s="):
        search(captured_problem("llama", 4).graph, captured_problem("llama", 4).cluster, time_limit_s=limit_s)


def test_search_takes_a_limit_and_a_stop():
    graph, cluster = captured_problem("llama", 4).graph, captured_problem("llama", 4).cluster
    stop = threading.Event()
    plan = search(graph, cluster, time_limit_s=0.01, stop=stop, progress=False)
    plan.validate(graph, cluster)
    stop.set()
    with pytest.raises(ValueError, match="asked to stop"):
        search(graph, cluster, stop=stop, progress=False)


class PressedCtrlC:
    """A real SIGINT to this process at the n-th question."""

    def __init__(self, n: int) -> None:
        self.left = n

    def is_set(self) -> bool:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)
        return False


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_sigint_in_the_middle_returns_a_plan_or_stays_an_interrupt(method):
    problem, told = problem_for(method, 5), 0
    best_s = METHODS[method](problem).prediction.step_time_s
    for n in (1, 3, 6, 12, 40):
        asked = PressedCtrlC(n)
        try:
            plan = METHODS[method](replace(problem, budget=Budget(stop=asked)))
        except KeyboardInterrupt:
            continue
        plan.validate(problem.graph, problem.cluster)
        assert plan.prediction.step_time_s >= best_s * (1 - 1e-9)
        if "cut short by an interrupt" in str(plan.candidates):
            told += 1
        else:
            # proved before, or over before
            assert asked.left > 0 or plan.prediction.step_time_s == best_s
    assert told or method in ("auto", "tofu", "whale", "flexflow", "unity", "uniap")
