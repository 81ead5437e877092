"""benchmarks/executed.py on two ranks and a tiny model, and its arithmetic."""

from __future__ import annotations

import argparse
from dataclasses import replace

import pytest
import torch
from method_cases import captured_problem

import autopar
from autopar.cluster.spec import Cluster
from autopar.planner.search import search
from benchmarks.executed import LOSS_TOLERANCE, Executed, build, execute, pairs_apart, verdict
from benchmarks.executed_plans import Found, Search, bare, distinct

SIZES = dict(vocabulary=64, layers=1, hidden=64, heads=2, kv_heads=1, feed_forward=128, sequence=32, batch=16)
FAST = Search("auto", dict(data=2, tensor=1, pipeline=1, microbatches=1, zero=0, recompute="none"))
SLOW = Search("auto", dict(data=2, tensor=1, pipeline=1, microbatches=8, zero=3, recompute="full"))
OTHERS = [
    Search("tofu", dict(data=1, tensor=2, pipeline=1)),
    Search("pipedream", dict(pipeline=2, data=1, microbatches=2, schedule="2bw")),
]


def run() -> list[Executed]:
    module, batches = build(argparse.Namespace(**SIZES), torch.device("cpu"))
    cluster = Cluster.preset("cpu", hosts=1, devices_per_host=2)
    plans = distinct(autopar.capture(module, batches[0]), cluster, [FAST, SLOW, *OTHERS], time_limit_s=20)
    return execute(plans, module, batches, cluster, warm_up=3, rounds=4)


@pytest.mark.alone
def test_plans_in_one_process_agree_in_their_losses_and_a_slow_one_is_slow(pool) -> None:
    found, _ = pool.run(run, world_size=2, timeout_s=120)
    assert len(found) == 2 + len(OTHERS) and all(len(one.times_s) == 4 for one in found)
    assert all(one.loss_error < LOSS_TOLERANCE for one in found), [(one.found.words, one.loss_error) for one in found]
    (fast,) = [one for one in found if FAST in one.found.searches]
    (slow,) = [one for one in found if SLOW in one.found.searches]
    assert fast.found.predicted_s < slow.found.predicted_s
    assert fast.median_s < slow.median_s


def test_a_plan_found_twice_is_run_once() -> None:
    problem = captured_problem("llama", 2)
    pins = dict(data=2, tensor=1, pipeline=1, zero=0, recompute="none", microbatches=1)
    found = distinct(problem.graph, problem.cluster, [Search("auto", pins), Search("dapple", pins)], 20)
    assert [one.names for one in found] == [
        "auto(data=2, zero=0, recompute=none, microbatches=1), dapple(data=2, zero=0, recompute=none, microbatches=1)"
    ]
    plan = found[0].plan
    assert bare(replace(plan, schedule="gpipe")) == bare(plan), "one microbatch has one order"
    assert bare(replace(plan, microbatches=2, schedule="gpipe")) != bare(replace(plan, microbatches=2))
    said: list[str] = []
    assert not distinct(problem.graph, problem.cluster, [Search("auto", dict(data=3))], 20, said.append)
    assert len(said) == 1 and said[0].startswith("auto(data=3) finds no plan: ")


def test_pairs_that_are_apart() -> None:
    assert pairs_apart([1.00, 1.02, 2.00], [3.0, 1.0, 2.0], 0.03) == (2, [(0, 2)])


def test_the_verdict_names_what_is_swapped() -> None:
    plan = search(captured_problem("llama", 2).graph, captured_problem("llama", 2).cluster, progress=False)
    times = [(0.100, 0.100), (0.150, 0.300), (0.200, 0.200)]
    found = [
        Executed(Found(plan, (Search("auto" if i == 1 else "dapple"),), p, ""), (m,) * 3, 0.0)
        for i, (p, m) in enumerate(times)
    ]
    text = verdict(found)
    assert "step times: 0.333 (3 plans)" in text
    assert "over the 3 pairs predicted more than 3% apart: 0.333 (1 in the other order)" in text
    assert "most in the wrong order: 2 before 3 (measured 1.50x)" in text
    assert "auto's plan takes 3.000 times the fastest with steps" in text
