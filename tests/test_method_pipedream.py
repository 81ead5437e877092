"""PipeDream: the authors' plans from their profiles, brute force, levels of bandwidth, and its reader."""

from __future__ import annotations

import itertools
import json
import math
import random

import numpy as np
import pytest
from method_cases import peer, small_problem

from autopar.planner.inputs.pipedream_text import ProfiledGraph, ProfiledNode, read_pipedream
from autopar.planner.methods import pipedream_heads
from autopar.planner.methods.pipedream import pipedream
from autopar.planner.methods.pipedream_heads import chain_heads, heads_of
from autopar.planner.methods.pipedream_levels import (
    Level,
    Replicated,
    best_cuts,
    pipedream_levels,
    stages_time_s,
)

# 25 Gb/s: the network of the larger of the paper's clusters (SOSP 2019, section 5.1: 10 and 25 Gb/s).
BANDWIDTH = 25e9 / 8


AUTHORS_PLANS = [
    "gnmt_12gpus", "gnmt_4gpus", "gnmt_large_16gpus", "gnmt_large_4gpus", "resnet50_16gpus", "resnet50_2gpus",
    "resnet50_4gpus", "resnet50_8gpus", "vgg16_16gpus", "vgg16_2gpus", "vgg16_4gpus", "vgg16_8gpus",
]  # fmt: skip


@pytest.mark.parametrize("name", AUTHORS_PLANS)
def test_no_worse_than_the_authors_plans(name):
    """Their objective for their replicas, cut where that is best for them, against ours, with and without transfers."""
    model = name.rpartition("_")[0]
    heads = heads_of(read_pipedream(peer(f"pipedream/profiles/{model}.txt")))
    plan = json.loads(peer(f"pipedream/author_plans/{name}.json").read_text())
    replicas = [len(ranks) for ranks in plan["stage_to_rank_map"].values()]
    devices = sum(replicas)
    for transfers in (False, True):
        for bandwidth in (1e9, BANDWIDTH):
            theirs = best_cuts(heads, replicas, bandwidth, transfers)
            assert math.isfinite(theirs.time_s)
            assert stages_time_s(heads, theirs.stages, bandwidth, transfers) == pytest.approx(theirs.time_s)
            ours = pipedream_levels(heads, [Level(devices, bandwidth)], transfers=transfers)
            assert stages_time_s(heads, ours.stages, bandwidth, transfers) == pytest.approx(ours.time_s)
            assert ours.time_s <= theirs.time_s * (1 + 1e-12)
    if model == "vgg16":
        # the replicated front and the one device for the fully connected layers
        assert replicas == [devices - 1, 1]
    if model in ("vgg16", "gnmt_large"):
        assert [stage.replicas for stage in ours.stages] == replicas


@pytest.mark.parametrize("model", ["densenet121", "inception_v3", "resnext50"])
def test_the_other_profiles_are_planned(model):
    """Inception has 221,565 heads: parts of it with too many stay whole."""
    graph = read_pipedream(peer(f"pipedream/profiles/{model}.txt"))
    heads, whole_s = heads_of(graph), sum(n.forward_s + n.backward_s for n in graph.nodes)
    plan = pipedream_levels(heads, [Level(4, 1e12)])
    assert stages_time_s(heads, plan.stages, 1e12) == pytest.approx(plan.time_s)
    assert whole_s / 4 <= plan.time_s < whole_s / 4 * 1.1


@pytest.mark.parametrize("seed", range(20))
def test_fewer_heads_are_heads(seed, monkeypatch):
    """Whatever the limit: heads from none to all layers, all of which contain what their members need."""
    draw = random.Random(seed)
    num = draw.randrange(4, 12)
    edges = [(u, v) for v in range(1, num) for u in range(v) if draw.random() < 1.5 / (v + 1)]
    graph = ProfiledGraph(tuple(ProfiledNode(str(v), "", 2.0**v, 0.0, 1.0, 0.0) for v in range(num)), tuple(edges))
    members = [int(time_s) for time_s in heads_of(graph).time_s]
    for limit in (len(members) - 1, len(members) // 2, 3):
        monkeypatch.setattr(pipedream_heads, "MAX_HEADS", limit)
        try:
            fewer = [int(time_s) for time_s in heads_of(graph).time_s]
        except ValueError as error:
            assert "in a row" in str(error)
            continue
        assert fewer[0] == 0 and fewer[-1] == 2**num - 1
        assert set(fewer) <= set(members) and len(set(fewer)) == len(fewer) <= limit
        assert not any(head >> v & 1 and not head >> u & 1 for head in fewer for u, v in edges)


def random_heads(draw: random.Random, num: int):
    return chain_heads(*([draw.uniform(0.1, 3) for _ in range(num)] for _ in range(4)))


@pytest.mark.parametrize("seed", range(20))
def test_equals_brute_force(seed):
    """All cuts and all shares of the devices, under the memory that the recursion counts."""
    draw = random.Random(seed)
    num, devices = draw.randrange(2, 7), draw.randrange(1, 6)
    heads, bandwidth = random_heads(draw, num), draw.choice([0.5, 2.0, 20.0])
    cap = draw.choice([math.inf, 12.0, 6.0])
    stash = heads.activation_bytes + heads.parameter_bytes
    best_s = math.inf
    for count in range(1, min(num, devices) + 1):
        for cuts in itertools.combinations(range(1, num), count - 1):
            for shares in itertools.product(range(1, devices + 1), repeat=count):
                if sum(shares) != devices:
                    continue
                edges = [0, *cuts, num]
                stages = [Replicated(a, b, m) for (a, b), m in zip(itertools.pairwise(edges), shares, strict=True)]
                used = np.cumsum(shares)
                fits = all(
                    math.ceil((devices - used[s]) / stage.replicas) * (stash[stage.stop] - stash[stage.start]) <= cap
                    for s, stage in enumerate(stages)
                )
                if fits:
                    best_s = min(best_s, stages_time_s(heads, stages, bandwidth))
    found = pipedream_levels(heads, [Level(devices, bandwidth)], cap)
    assert (found.time_s if found else math.inf) == pytest.approx(best_s)


@pytest.mark.parametrize("seed", range(10))
def test_one_level_is_the_compute_time_of_the_next(seed):
    """Two levels against the two recursions done by hand: the hosts' stages are the devices' pipelines."""
    draw = random.Random(seed)
    heads = random_heads(draw, 5)
    inner, outer = Level(2, 8.0), Level(2, 1.0)
    found = pipedream_levels(heads, [inner, outer])
    assert sum(stage.replicas for stage in found.stages) == 4
    last = 5

    def pipeline_s(i: int, j: int) -> float:
        ways = [stages_time_s(heads, [Replicated(i, j, 2)], 8.0, transfers=False)]
        for k in range(i + 1, j):
            sent_s = 2 * heads.output_bytes[k] / 8.0
            ways.append(max(sent_s, *(heads.time_s[b] - heads.time_s[a] for a, b in ((i, k), (k, j)))))
        return min(ways)

    weights = heads.parameter_bytes
    ways = [(pipeline_s(0, last) + 4 * 0.5 * weights[last] / 1.0) / 2]
    ways += [max(pipeline_s(0, k), pipeline_s(k, last), 2 * heads.output_bytes[k] / 1.0) for k in range(1, last)]
    assert found.time_s == pytest.approx(min(ways))


@pytest.mark.parametrize("seed", range(8))
def test_plans_of_captured_graphs_run(seed):
    problem = small_problem(seed, [2, 4, 6, 8][seed % 4], **[{}, {"zero": 0}, {"tensor": 2}][seed % 3])
    plan = pipedream(problem)
    plan.validate(problem.graph, problem.cluster)
    assert {stage.zero for stage in plan.stages} == {0}
    assert {stage.tensor for stage in plan.stages} == {2 if problem.constraints.tensor else 1}


NODE = "forward_compute_time=1.0, backward_compute_time=2.0, activation_size={}, parameter_size=4.0"
SMALL = (
    f"node1 -- Input0 -- {NODE.format('8.0')}\n"
    f"node2 -- Linear(2, 2) -- {NODE.format('[8.0; 4.0]')}\n"
    f"node3 -- ReLU -- {NODE.format('8.0')}\n"
    "\tnode1 -- node2\n\tnode2 -- node3\n"
)


def test_reads_what_the_format_says(tmp_path):
    path = tmp_path / "graph.txt"
    path.write_text(SMALL)
    graph = read_pipedream(path)
    assert [node.name for node in graph.nodes] == ["node2", "node3"] and graph.edges == ((0, 1),)
    assert (graph.nodes[0].forward_s, graph.nodes[0].activation_bytes) == (1e-3, 12.0)
    heads = heads_of(graph)
    assert heads.time_s.tolist() == pytest.approx([0, 3e-3, 6e-3]) and heads.output_bytes.tolist() == [0, 12, 0]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("backward_compute_time=2.0, ", "", "no backward_compute_time"),
        ("forward_compute_time=1.0", "forward_compute_time=soon", "forward_compute_time of node1"),
        ("parameter_size=4.0", "parameter_size=-4.0", "at least 0"),
        ("\tnode2 -- node3", "\tnode2 -- node9", "names 'node9'"),
        ("\tnode2 -- node3", "\tnode2 -- node3\n\tnode3 -- node2", "cycle"),
        ("\tnode2 -- node3", "\tnode2", "1 ends"),
        ("node3 -- ReLU", "node2 -- ReLU", "described twice"),
        ("\tnode1 -- node2\n\tnode2 -- node3\n", "", "no edges"),
        (SMALL, "op_name,forward\nlinear,1.0\n", "has 1 parts"),
        (SMALL, "", "empty"),
    ],
)
def test_foreign_files_are_one_clear_error(tmp_path, old, new, message):
    path = tmp_path / "graph.txt"
    path.write_text(SMALL.replace(old, new))
    with pytest.raises(ValueError, match=message) as caught:
        read_pipedream(path)
    assert str(path) in str(caught.value)
