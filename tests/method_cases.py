"""What the tests of the published planners share: small problems, random inputs, and where the authors' data lies."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import build_llama
from planner_cases import MadeUpCosts, WholeLayouts, chain_graph, small_cluster
from torch import nn

from autopar import capture
from autopar.cluster.presets import preset
from autopar.cluster.spec import Cluster
from autopar.cost.model import CostModel
from autopar.graph import Graph
from autopar.planner.chains import LayoutChains
from autopar.planner.problem import Constraints, Problem


def peer(path: str) -> Path:
    """A file of the planners' own data; the test is skipped where it is absent."""
    for parent in Path(__file__).resolve().parents:
        if (found := parent / "shared" / "peers" / path).exists():
            return found
    pytest.skip(f"no {path} of the planners' own data here")


def small_problem(seed: int, world_size: int = 4, num_blocks: int = 6, batch_size: int = 8, **pinned) -> Problem:
    """Made-up costs that keep what costs are like; two hosts where the number of devices is even."""
    draw = random.Random(seed)
    graph = chain_graph(tuple(draw.randrange(3) for _ in range(num_blocks)), batch_size)
    per_host = world_size // 2 if world_size % 2 == 0 and draw.random() < 0.5 else world_size
    cluster = small_cluster(world_size, per_host)
    costs = MadeUpCosts(graph, cluster, seed, slow_network=draw.choice([0.1, 1, 10]))
    return Problem(graph, cluster, costs, WholeLayouts(), Constraints(**pinned))


class Classifier(nn.Module):
    """A small body under a classifier that holds most parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
        self.head = nn.Linear(256, 65536, bias=False)

    def forward(self, x):
        return self.head(self.body(x)).sum()


@functools.cache
def captured(model: str) -> Graph:
    if model in ("llama", "deep"):
        return capture(*build_llama(layers=2 if model == "llama" else 4))
    with torch.device("meta"):
        if model == "classifier":
            return capture(Classifier(), torch.zeros(512, 256))
        if model == "stack":
            stack = nn.Sequential(*(nn.Linear(256, 256) for _ in range(32)))
            return capture(stack, torch.zeros(1024, 256), loss=lambda out: out.sum())
        rows = 1536 if model == "rows" else 16
        wide = nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512))
        return capture(wide, torch.zeros(rows, 512), loss=lambda out: out.sum())


def captured_problem(model: str, world_size: int, **pinned) -> Problem:
    """A captured model ("llama", "mlp" or "classifier") on devices of one host, by the real cost model."""
    graph, cluster = captured(model), preset("a100-80gb", 1, world_size)
    return Problem(graph, cluster, CostModel(graph, cluster), LayoutChains(), Constraints(**pinned))


def half_as_fast(cluster: Cluster, factor: float = 2.0, memory: float = 1.0) -> Cluster:
    """The same hosts with devices that take `factor` times as long for everything, and this share of the memory."""
    device = cluster.device
    return replace(
        cluster,
        device=replace(
            device,
            kind=f"{device.kind} / {factor:g}",
            memory_bytes=int(memory * device.memory_bytes),
            flops_per_s={dtype: flops / factor for dtype, flops in device.flops_per_s.items()},
            memory_bytes_per_s=device.memory_bytes_per_s / factor,
            launch_s=device.launch_s * factor,
            backward_launch_s=device.backward_launch_s * factor,
        ),
    )


def unequal_problem(model: str, clusters: Sequence[Cluster], **pinned) -> Problem:
    """A captured model on the hosts of these clusters, by the real cost model."""
    graph, cluster = captured(model), Cluster.join(*clusters)
    return Problem(graph, cluster, CostModel(graph, cluster), LayoutChains(), Constraints(**pinned))
