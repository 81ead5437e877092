"""What must hold of the cost model on hardware and plans that no measurement speaks of: rates that are possible, and times
that never rise where hardware gets better."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from published_models import Decoder, graph_of  # noqa: E402

from autopar.cluster.presets import PRESETS, preset  # noqa: E402
from autopar.cluster.spec import Cluster, Link  # noqa: E402
from autopar.cost.constants import FLOAT8, SOFTWARE  # noqa: E402
from autopar.cost.model import CostModel  # noqa: E402
from autopar.graph import Graph  # noqa: E402
from autopar.plan import Plan, Stage  # noqa: E402
from autopar.schedule.step_time import step_time_s  # noqa: E402
from autopar.sharding.named_layouts import context_layouts, megatron_layouts  # noqa: E402

LLAMA = Decoder(8, 4096, 11008, 32, 32, 32000, 2048, norm="rms", bias=False, gated=True, rotary=True, tied=False)
GPUS = tuple(name for name in PRESETS if name != "cpu")
ROWS = 64

# name: (data, tensor, pipeline, microbatches, zero, recompute, sequence parallel, context parallel)
SHAPES = {
    "data": (16, 1, 1, 2, 0, "none", False, False),
    "zero 1": (16, 1, 1, 2, 1, "full", False, False),
    "zero 3": (16, 1, 1, 1, 3, "selective", False, False),
    "tensor": (2, 8, 1, 4, 0, "none", False, False),
    "tensor with sequences": (2, 8, 1, 4, 1, "selective", True, False),
    "tensor across hosts": (1, 16, 1, 2, 0, "none", False, False),
    "pipeline": (2, 2, 4, 8, 0, "full", False, False),
    "context": (2, 8, 1, 2, 3, "none", False, True),
}


@lru_cache(maxsize=1)
def graph() -> Graph:
    return graph_of(LLAMA, ROWS)


@cache
def plan(name: str, recompute: str = "") -> Plan:
    data, tensor, pipeline, microbatches, zero, chosen, sequence, context = SHAPES[name]
    blocks = len(graph().blocks)
    layouts = ()
    if tensor > 1:
        shards = data * microbatches
        layouts = (
            context_layouts(graph(), tensor, shards=shards)
            if context
            else megatron_layouts(graph(), tensor, sequence=sequence, shards=shards)
        )
    unique = tuple(dict.fromkeys(layouts))
    cuts = [round(i * blocks / pipeline) for i in range(pipeline + 1)]
    stages = []
    for s, (start, stop) in enumerate(zip(cuts, cuts[1:], strict=False)):
        ranks = tuple(range(s * data * tensor, (s + 1) * data * tensor))
        index = (tuple(unique.index(layout) for layout in layouts[start:stop]),) if layouts else ()
        again = (recompute or chosen,) * (stop - start)
        stages.append(Stage(start, stop, ranks, data, (tensor,) if layouts else (), index, again, zero))
    return Plan(
        graph().name, graph().fingerprint, 16, ROWS, microbatches, "1f1b", tuple(stages), unique, precision="bfloat16"
    )


@cache
def first_model() -> CostModel:
    return CostModel(graph(), preset("a100-80gb", 2, 8))


def step_s(cluster: Cluster, which: Plan) -> float:
    """The first model of a graph is shared by all others, as far as hardware does not matter to it."""
    model = first_model().on(cluster)
    costs = [model.stage(which, i) for i in range(len(which.stages))]
    return step_time_s(which.pipeline, which.microbatches, which.schedule, costs)


def utilisation(cluster: Cluster, which: Plan) -> float:
    parameters = 8 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096
    attention = 6 * 8 * 4096 * LLAMA.length
    flops = ROWS * LLAMA.length * (6 * parameters + attention)
    rates = cluster.device.flops_per_s
    # Parts before A100 have no tensor cores for bfloat16.
    precision = "bfloat16" if "bfloat16" in rates else "float16"
    return flops / (step_s(cluster, replace(which, precision=precision)) * which.world_size * rates[precision])


@pytest.mark.parametrize("name", SHAPES)
def test_utilisation_is_possible_on_every_preset(name: str) -> None:
    found = {gpu: utilisation(preset(gpu, 2, 8), plan(name)) for gpu in GPUS}
    print({gpu: f"{share:.1%}" for gpu, share in found.items()})
    slow = name in ("tensor across hosts", "context")
    for gpu, share in found.items():
        fast = preset(gpu).intra.bandwidth_bytes_per_s > 100e9
        assert (0.003 if slow else 0.15 if fast else 0.03) < share < 0.7, (gpu, share)


@pytest.mark.parametrize("software", [name for name in SOFTWARE if name] + ["torch-compile" + FLOAT8])
def test_no_stack_is_beyond_its_hardware(software: str) -> None:
    for gpu in ("a100-80gb", "h100-80gb"):
        share = utilisation(preset(gpu, 2, 8, software=software), plan("tensor with sequences"))
        assert 0.15 < share < (1.0 if FLOAT8 in software else 0.75), (gpu, share)


def faster(link: Link, bandwidth: float, latency: float) -> Link:
    rate = link.bandwidth_bytes_per_s * bandwidth
    return replace(link, bandwidth_bytes_per_s=rate, latency_s=link.latency_s * latency)


@pytest.mark.parametrize("name", SHAPES)
def test_better_hardware_is_never_slower(name: str) -> None:
    which = plan(name)
    for gpu in ("a100-80gb", "h100pcie-80gb", "v100-32gb"):
        cluster = preset(gpu, 2, 8)
        device = cluster.device
        base_s = step_s(cluster, which)
        for more in (1.1, 1.7, 4.0):
            better = {
                "intra bandwidth": replace(cluster, intra=faster(cluster.intra, more, 1.0)),
                "intra latency": replace(cluster, intra=faster(cluster.intra, 1.0, 1 / more)),
                "inter bandwidth": replace(cluster, inter=faster(cluster.inter, more, 1.0)),
                "inter latency": replace(cluster, inter=faster(cluster.inter, 1.0, 1 / more)),
                "flops": replace(
                    cluster,
                    device=replace(device, flops_per_s={k: v * more for k, v in device.flops_per_s.items()}),
                ),
                "memory": replace(cluster, device=replace(device, memory_bytes_per_s=device.memory_bytes_per_s * more)),
                "switches": replace(cluster, hosts_per_switch=0, oversubscription=1.0),
            }
            for what, other in better.items():
                assert step_s(other, which) <= base_s * (1 + 1e-9), (gpu, what, more)


@pytest.mark.parametrize("name", ["data", "zero 1", "zero 3", "tensor", "tensor with sequences", "pipeline"])
def test_recomputing_less_is_never_slower_and_keeps_more(name: str) -> None:
    cluster = preset("a100-80gb", 2, 8)
    model = CostModel(graph(), cluster)
    found = []
    for choice in ("none", "selective", "full"):
        which = plan(name, choice)
        costs = [model.stage(which, i) for i in range(len(which.stages))]
        found.append((sum(c.forward_s + c.backward_s for c in costs), sum(c.activation_bytes for c in costs)))
    times, kept = zip(*found, strict=True)
    assert times[0] < times[1] < times[2] and kept[0] > kept[1] > kept[2]
    # Computing a stage again takes its forward at most; the whole of it less what no backward reads.
    assert times[2] - times[0] < sum(c.forward_s for c in costs)
