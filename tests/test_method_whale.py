"""Whale: its balance on a 2:1 cluster, and what the annotations do to a plan."""

from __future__ import annotations

import random

import pytest
from method_cases import captured_problem

from autopar.planner.methods.whale import suggested, whale
from autopar.planner.methods.whale_balance import batch_shares, idle_s, shard_sizes, stage_order


def test_idle_time_falls_against_the_even_split():
    """Two fast devices and two half as fast: in proportion, nobody waits."""
    rates = [2.0, 2.0, 1.0, 1.0]
    shares = batch_shares(24, rates, [100] * 4)
    assert shares == (8, 8, 4, 4)
    assert idle_s(shares, rates, 1.0) == 0 < idle_s([6] * 4, rates, 1.0)


@pytest.mark.parametrize("seed", range(40))
def test_balance_is_never_worse_than_even_and_keeps_memory(seed):
    draw = random.Random(seed)
    num = draw.randrange(1, 6)
    rates = [draw.choice([1.0, 2.0, 3.5]) for _ in range(num)]
    even = draw.randrange(2, 20)
    rows = num * even
    most = [draw.randrange(even, 3 * rows + 1) for _ in range(num)]
    shares = batch_shares(rows, rates, most)
    assert sum(shares) == rows and all(1 <= share <= m for share, m in zip(shares, most, strict=True))
    assert max(s / r for s, r in zip(shares, rates, strict=True)) <= max(even / r for r in rates) + 1 / min(rates)
    assert shard_sizes(rows, rates, most) == shares


def test_load_leaves_devices_that_run_out_of_memory():
    assert batch_shares(12, [2.0, 1.0, 1.0], [3, 100, 100]) in ((3, 5, 4), (3, 4, 5))
    with pytest.raises(ValueError, match="the devices hold"):
        batch_shares(12, [1.0, 1.0], [5, 6])


def test_larger_memory_comes_first():
    assert stage_order([16e9, 80e9, 32e9, 80e9]) == (1, 3, 2, 0)


def strategies_of(problem, plan) -> dict[str, str]:
    chosen = {}
    for stage in plan.stages:
        for row, block in zip(stage.layouts[0], problem.graph.blocks[stage.start : stage.stop], strict=True):
            chosen |= dict(zip(block.ops, plan.layouts[row].strategies, strict=True))
    return chosen


def test_replicate_here_and_split_there():
    """The classifier's weight is split, the body's are whole while its work is shared out by rows."""
    problem = captured_problem("classifier", 4, tensor=4)
    plan = whale(problem, annotations={"head": "split", "*": "replicate"})
    plan.validate(problem.graph, problem.cluster)
    (stage,) = plan.stages
    at_rest = {}
    for row, block in zip(stage.layouts[0], problem.graph.blocks, strict=True):
        names = (problem.graph.tensors[name].fqn for name in block.parameters)
        at_rest |= dict(zip(names, plan.layouts[row].parameters, strict=True))
    assert at_rest["head.weight"].startswith("S") and at_rest["body.0.weight"] == "R"
    everywhere = whale(problem, annotations={"*": "replicate"})
    assert "S" not in {place[0] for layout in everywhere.layouts for place in layout.parameters}


def test_the_large_classifier_is_split_without_being_told():
    problem = captured_problem("classifier", 4)
    assert suggested(problem.graph) == {"head": "split", "*": "replicate"}
    assert suggested(captured_problem("llama", 4).graph) == {"*": "replicate"}
    plan = whale(problem)
    plan.validate(problem.graph, problem.cluster)
    assert plan.stages[0].tensor == 4


def test_annotations_that_make_no_sense():
    problem = captured_problem("classifier", 4)
    with pytest.raises(ValueError, match="expected 'replicate' or 'split'"):
        whale(problem, annotations={"head": "slice"})
    with pytest.raises(ValueError, match="no module"):
        whale(problem, annotations={"tail": "split"})
