"""A convolution net at a batch too small for data parallelism: what each layer is split along, and what that is worth.

After FlexFlow (HPCA 2017), where each convolution mixes parallelism of feature maps (here output channels), of neurons
(height and width) and of synapses (input channels). Taps of a kernel may be split too, where the ranks divide them.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from conv_models import Vgg
from models import build_vgg
from test_parity import call
from test_space import spatial_plan

import autopar
from autopar.cluster.spec import Cluster
from autopar.cost.collectives import collective_s
from autopar.cost.model import CostModel
from autopar.graph import Graph, Op
from autopar.plan import Plan, Stage
from autopar.planner.axis_prices import AxisPrices
from autopar.planner.chains import LayoutChains
from autopar.planner.layout_chain import ChainSolution, chain_layouts
from autopar.planner.layout_options import layout_options
from autopar.planner.problem import Chain, Constraints, Problem, Shape
from autopar.sharding.strategies import strategies
from autopar.sharding.strategy import Strategy

DEGREE, BATCH = 4, 2
NVLINK = Cluster.preset("a100-80gb", 1, DEGREE)
LINKS = {
    "nvlink": NVLINK,
    "25 GB/s": replace(NVLINK, intra=replace(NVLINK.intra, bandwidth_bytes_per_s=25e9, latency_s=1e-5)),
    "5 GB/s": replace(NVLINK, intra=replace(NVLINK.intra, bandwidth_bytes_per_s=5e9, latency_s=1e-5)),
}
KINDS = {"feature maps": "o", "neurons": "s", "synapses": "i"}


@functools.cache
def vgg() -> Graph:
    """VGG's widths on images of 256 x 256."""
    with torch.device("meta"):
        module = Vgg((64, 128, 256, 512, 512), 256, 4096, 1000)
        example = (torch.zeros(BATCH, 4, 256, 256), torch.zeros(BATCH, dtype=torch.long))
    return autopar.capture(module, example, F.cross_entropy)


def is_convolution(op: Op) -> bool:
    return op.target.startswith("aten.conv")


@dataclass(frozen=True)
class OneKind(AxisPrices):
    """The axis's prices, where convolutions may be split along names that begin so ("": along any); other ops are free."""

    kind: str = ""

    def strategies(self, op: Op) -> tuple[Strategy, ...]:
        found = super().strategies(op)
        if not self.kind or not is_convolution(op):
            return found
        return tuple(s for s in found if s.degree > 1 and s.key.startswith(self.kind))


def best(cluster: Cluster, kind: str = "") -> ChainSolution:
    graph = vgg()
    problem = Problem(graph, cluster, CostModel(graph, cluster), LayoutChains(), Constraints())
    prices = OneKind(problem, Shape(1, 1, DEGREE, 1, "1f1b", 0), False, kind=kind)
    return chain_layouts(layout_options(graph, DEGREE, prices), 0, len(graph.blocks))


def plan_of(found: ChainSolution) -> Plan:
    graph, chain = vgg(), Chain.of(found.layouts)
    stage = Stage(0, len(graph.blocks), tuple(range(DEGREE)), 1, (DEGREE,), (chain.index,))
    return Plan(graph.name, graph.fingerprint, DEGREE, BATCH, 1, "1f1b", (stage,), layouts=chain.unique)


def of_layers(found: ChainSolution) -> list[str]:
    """What each convolution is split along, from the first on."""
    graph = vgg()
    return [
        key
        for block, layout in zip(graph.blocks, found.layouts, strict=True)
        for op, key in zip(graph.block_ops(block), layout.strategies, strict=True)
        if is_convolution(op)
    ]


@pytest.mark.parametrize("links", LINKS)
def test_early_layers_choose_space_and_late_ones_channels(links: str) -> None:
    graph, cluster = vgg(), LINKS[links]
    mix = best(cluster)
    kinds = ["space" if key[0] == "s" else "channels" if key[0] in "oi" else key for key in of_layers(mix)]
    assert [kind for kind, _ in itertools.groupby(kinds)] == ["space", "channels"], kinds
    singles = {name: best(cluster, kind) for name, kind in KINDS.items()}
    for name, single in singles.items():
        assert {key[0] for key in of_layers(single)} == {KINDS[name]}
        assert mix.time_s < single.time_s, (name, mix.time_s, single.time_s)
    # The same by the simulator, of whole plans.
    simulated = {name: autopar.simulate(graph, plan_of(one), cluster).step_time_s for name, one in singles.items()}
    ours = autopar.simulate(graph, plan_of(mix), cluster).step_time_s
    assert ours <= min(simulated.values()), (ours, simulated)
    table = ", ".join(f"{name} {1e3 * time_s:.2f} ms" for name, time_s in simulated.items())
    print(f"{links}: mix {1e3 * ours:.2f} ms ({' '.join(of_layers(mix))}), {table}")


def test_slower_links_leave_more_layers_to_space() -> None:
    """Borders are what travels least; weights of wide layers, whose gradients would travel, stay split."""
    counts = [sum(key[0] == "s" for key in of_layers(best(cluster))) for cluster in LINKS.values()]
    assert counts == sorted(counts) and counts[0] < counts[-1], counts


def test_search_finds_the_mix() -> None:
    graph, cluster = vgg(), LINKS["25 GB/s"]
    plan = autopar.search(graph, cluster, data=1, tensor=DEGREE, progress=False)
    plan.validate(graph, cluster)
    assert plan.prediction.step_time_s <= autopar.simulate(graph, plan_of(best(cluster)), cluster).step_time_s * 1.0001
    split = {key for layout in plan.layouts for key in layout.strategies}
    assert {"s0", "o", "i"} <= split, split
    words = plan.explain(graph)
    assert "conv2d on a slice of dim 2, with borders of its neighbours" in words, words
    assert "leaves split along dim 2 (space)" in words and "leaves split along dim 1 (channels)" in words
    assert "mixed (space-split" in words and "(sequence parallel)" not in words, words


def test_borders_cost_a_message_each_way() -> None:
    graph, cluster = vgg(), LINKS["5 GB/s"]
    model = CostModel(graph, cluster)
    first, second = [op for op in graph.ops if is_convolution(op)][:2]
    for op, learns in ((first, False), (second, True)):
        strategy = next(s for s in strategies(graph, op, DEGREE) if s.key == "s0")
        tensor = graph.tensors[op.inputs[0]]
        assert strategy.border_bytes == 2 * tensor.size_bytes // tensor.shape[2], "a row from either side"
        message_s = collective_s(cluster, "send", strategy.border_bytes, tuple(range(DEGREE)))
        paid = model.op_s(op, strategy, shards=1)
        free = model.op_s(op, replace(strategy, border_bytes=0), shards=1)
        # What remains is a copy that is a few rows longer.
        assert paid[0] - free[0] == pytest.approx(message_s, rel=0.05)
        assert paid[1] - free[1] == pytest.approx(message_s if learns else 0.0, rel=0.05)
    pooled = next(op for op in graph.ops if "max_pool" in op.target)
    assert next(s for s in strategies(graph, pooled, DEGREE) if s.key == "s0").border_bytes == 0


def peaks() -> tuple[int, int]:
    """(predicted, measured) bytes at the peak of this rank."""
    module, example, loss = build_vgg()
    plan = spatial_plan(autopar.capture(module, example, loss), (2,), (2,))
    cluster = Cluster.preset("cpu", hosts=1, devices_per_host=2)
    model = autopar.parallelize(module, example, loss, plan=plan, cluster=cluster)
    for _ in range(5):
        call(model, example).backward()
        model.zero_grad()
    predicted = autopar.simulate(model.graph, plan, cluster).peak_memory_bytes
    rank = model.runtime.groups.rank
    return predicted[rank], model.timeline.peak_memory_bytes[rank]


def test_memory_with_borders(pool) -> None:
    for predicted, measured in pool.run(peaks, world_size=2):
        assert measured <= predicted * 1.05 and predicted <= measured * 1.3, (predicted, measured)
