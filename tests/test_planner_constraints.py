"""What `search` says of constraints, of impossible ones, and of the plans that lost."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest
import torch
from planner_cases import MadeUpCosts, WholeLayouts, chain_graph, limited, small_cluster, small_enough
from torch import nn

from autopar import capture
from autopar.cluster.spec import Cluster
from autopar.planner.auto import auto, exact_search
from autopar.planner.methods.exhaustive import every_plan
from autopar.planner.problem import Constraints, Problem
from autopar.planner.search import METHODS, search


def small_graph():
    return chain_graph((0, 1, 1, 0), 8)


@pytest.mark.parametrize("seed", range(30))
def test_constraints_are_kept(seed):
    """Pins taken from a random plan of the free space are satisfiable together, and the answer keeps them."""
    problem = small_enough(300 + seed, 250)
    draw = random.Random(seed)
    plan = draw.choice(list(every_plan(problem)))
    first = plan.stages[0]
    pins = {
        "data": first.data, "tensor": first.tensor, "pipeline": plan.pipeline, "microbatches": plan.microbatches,
        "schedule": plan.schedule, "zero": first.zero, "context": 1, "expert": 1,
    }  # fmt: skip
    pins = {name: pins[name] for name in draw.sample(list(pins), 4)}
    found = auto(replace(problem, constraints=Constraints(**pins)))
    said = {
        "data": found.stages[0].data, "tensor": found.stages[0].tensor, "pipeline": found.pipeline,
        "microbatches": found.microbatches, "schedule": found.schedule, "zero": found.stages[0].zero,
        "context": 1, "expert": 1,
    }  # fmt: skip
    assert {name: said[name] for name in pins} == pins
    for choice in ("none", "full"):
        pinned = auto(replace(problem, constraints=Constraints(recompute=choice)))
        assert {said for stage in pinned.stages for said in stage.block_recompute} == {choice}


IMPOSSIBLE = {
    "product": (
        {"data": 2, "tensor": 2, "pipeline": 1},
        "data=2 x tensor=2 x pipeline=1 = 4, but the cluster has 8 devices",
    ),
    "part": ({"data": 4, "tensor": 4}, "data=4 x tensor=4 = 16, which does not divide the cluster's 8 devices"),
    "one": (
        {"pipeline": 3, "method": "alpa"},
        "pipeline=3, which does not divide the cluster's 8 devices; the product could be 2 or 4",
    ),
    "blocks": ({"pipeline": 8}, "pipeline=8, but Chain has 4 blocks"),
    "batch": ({"data": 3}, "data=3 does not divide the batch of 8 rows; data could be 2 or 4"),
    "microbatches": ({"data": 2, "microbatches": 3}, "does not divide the 4 rows of each data rank.* could be 2 or 4"),
    "zero": ({"zero": 3, "data": 1}, "zero=3 shards parameters over the data axis, but data=1"),
    "no data": (
        {"zero": 3, "tensor": 4, "pipeline": 2},
        "tensor=4 and pipeline=2 and zero=3 contradict each other .* tensor could be 1 or 2, .*pipeline could be 1, .*zero "
        "could be 0",
    ),
    "zero value": ({"zero": 5}, "zero=5: expected one of 0, 1, 2, 3"),
    "schedule": ({"schedule": "1f2b"}, "schedule='1f2b': expected one of 'gpipe', '1f1b', .*; did you mean '1f1b'"),
    "method's schedule": (
        {"schedule": "pipedream", "method": "tofu"},
        "schedule='pipedream': method='tofu' makes .* use method='auto' or 'exhaustive' or ",
    ),
    "recompute": ({"recompute": "ful"}, "recompute='ful': expected one of 'none', .*'full'; did you mean 'full'"),
    "reserve": ({"memory_reserve": 1.0}, "memory_reserve=1.0: expected a share"),
    "whole reserve": ({"memory_reserve": 10**12}, "memory_reserve=1000000000000 leaves nothing"),
    "both": ({"memory_reserve": 0.2, "memory_limit_bytes": 5}, "say the same thing twice"),
    "no module": (
        {"layout": {"*.q_porj": "column"}},
        r"layout\['\*.q_porj'\]='column': no module or parameter of Chain",
    ),
    "word": ({"layout": {"layers.1": "colum"}}, "did you mean 'column'"),
    "unfit word": ({"layout": {"layers.1": "heads"}}, "none of the 2 ops .* what suits them is 'column' or 'row' or "),
    "no such stage": (
        {"stage": {"layers.3": 3}, "pipeline": 2},
        "pipeline=2 and stage.*contradict each other.*pipeline could be 4",
    ),
    "twice": ({"stage": {"layers.1": 0, "layers.*": 1}}, "block 1 of Chain, .*is pinned to stage 0 too"),
    "backwards": (
        {"stage": {"layers.1": 1, "layers.2": 0}},
        r"stage\['layers.1'\]=1 and stage\['layers.2'\]=0 contradict",
    ),
    "shape of layout": ({"layout": "column"}, "layout='column': expected patterns"),
    "degree": ({"data": 0}, "data=0: expected a positive integer"),
    "type": ({"tensor": "2"}, "tensor='2': expected a positive integer"),
    "bool": ({"pipeline": True}, "pipeline=True: expected a positive integer"),
    "context": ({"context": 2}, "context=2: Chain has no sequence to split"),
    "expert": ({"expert": 4}, "expert=4: Chain has no experts"),
    "name": ({"tensr": 2}, "unknown constraint tensr=.*did you mean tensor"),
    "memory": ({"memory_limit_bytes": 10}, "fits in 10 bytes .* the smallest found .* needs .* too many"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_constraints_are_explained(case):
    pinned, words = IMPOSSIBLE[case]
    with pytest.raises(ValueError, match=words):
        search(small_graph(), small_cluster(8), progress=False, **pinned)


def test_a_tensor_degree_that_nothing_divides_names_the_dims():
    with pytest.raises(
        ValueError, match="tensor=5: no op of Chain .* split 5 ways; its parameters' dims are 24; .* 1 on 5"
    ):
        search(small_graph(), small_cluster(5), progress=False, tensor=5)
    with pytest.raises(ValueError, match="no such degree divides the batch of 8 rows"):
        search(small_graph(), small_cluster(61), progress=False)


def test_streams_are_in_float32():
    graph = replace(small_graph(), precision="bfloat16")
    with pytest.raises(ValueError, match="schedule='2bw' computes .* in float32, but precision is 'bfloat16'"):
        search(graph, small_cluster(4), progress=False, schedule="2bw")


def test_unknown_methods_name_the_nearest():
    with pytest.raises(
        ValueError, match="method='exhastive': expected one of auto, exhaustive, .*; did you mean exhaustive"
    ):
        search(small_graph(), small_cluster(2), "exhastive")
    assert set(METHODS) >= {"auto", "exhaustive"}


def test_exhaustive_refuses_large_spaces():
    graph = chain_graph((0, *[1] * 30, 2), 64)
    with pytest.raises(ValueError, match=r"would simulate \d+ plans"):
        search(graph, small_cluster(8), "exhaustive", progress=False)


def test_rows_that_meet_forbid_microbatches():
    """Data ranks can share the statistics of a batch norm; microbatches, one after the other, cannot."""
    module = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    graph = capture(module, (torch.randn(8, 8), torch.randn(8, 8)), nn.functional.mse_loss)
    cluster = Cluster.preset("a100-80gb", hosts=1, devices_per_host=2)
    plan = search(graph, cluster, progress=False)
    assert plan.microbatches == 1
    with pytest.raises(ValueError, match="rows of Sequential's batch depend on each other: .*batch_norm"):
        search(graph, cluster, progress=False, microbatches=4)
    wrong = replace(plan, microbatches=2)
    with pytest.raises(ValueError, match="plan.microbatches is 2, but the rows .* depend on each other"):
        wrong.validate(graph, cluster)


def test_candidates_say_why_they_lost():
    graph = chain_graph((0, *[1] * 6, 2), 32)
    cluster = small_cluster(8)
    costs = MadeUpCosts(graph, cluster, 3)
    problem = Problem(graph, cluster, costs, WholeLayouts())
    roomy = exact_search(problem)
    tight = exact_search(limited(problem, roomy.prediction.peak_memory_bytes // 8))
    for plan in (roomy, tight):
        assert 5 <= len(plan.candidates) <= 20
        for one in plan.candidates:
            assert re.fullmatch(
                r"chosen|\d+\.\d\dx slower: (bubbles|recomputation|gradient reduction|optimizer) \d+%|"
                r"\d+\.\d\dx slower: each device works \d+\.\d\dx as long|needs .* more than .*",
                one.verdict,
            ), one.verdict
            assert re.match(r"pipeline \d+ x data \d+ x tensor \d+, \d+ microbatch(es)?, (1f1b|gpipe), zero", one.name)
    assert any(one.verdict.startswith("needs") for one in tight.candidates)
    assert tight.prediction.step_time_s >= roomy.prediction.step_time_s
