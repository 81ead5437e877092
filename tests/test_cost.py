"""The cost model: flops and memory against torch's own counters, algebra of collectives, stages that add up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from models import RANDOM_ZOO, ZOO, build_gpt2, build_llama, eager_loss
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from autopar.capture.export import capture
from autopar.cluster.ring import COLLECTIVES
from autopar.cluster.spec import Cluster, Link
from autopar.cost.block import Pricer
from autopar.cost.collectives import collective_s
from autopar.cost.compute import roofline_s
from autopar.cost.constants import constants_of
from autopar.cost.corrections import Corrections
from autopar.cost.kernels import Kernel, kernels
from autopar.cost.model import CostModel
from autopar.graph import Graph
from autopar.plan import Plan, Stage, same_recompute
from autopar.sharding.placement import PARTIAL, REPLICATED, SHARED, Split
from autopar.sharding.strategies import strategies
from autopar.torch_private import allocation_deltas

CPU = Cluster.preset("cpu", hosts=2, devices_per_host=4)
GPU = Cluster.preset("a100-80gb", hosts=2, devices_per_host=4)


@cache
def graph_of(name: str) -> Graph:
    return capture(*{**ZOO, **RANDOM_ZOO}[name]())


def one_stage(graph: Graph, **changes: Any) -> Plan:
    stage = Stage(0, len(graph.blocks), (0,), 1)
    data = changes.pop("data", 1)
    microbatches = changes.pop("microbatches", 1)
    changes["recompute"] = same_recompute(changes.pop("recompute", "none"), stage.num_blocks)
    stage = replace(stage, data=data, ranks=tuple(range(data)), **changes)
    return Plan(graph.name, graph.fingerprint, data, graph.batch_size, microbatches, "gpipe", (stage,))


def pipeline(graph: Graph, cut: int, **changes: Any) -> Plan:
    stages = tuple(
        replace(Stage(a, b, (i,), 1), **changes) for i, (a, b) in enumerate([(0, cut), (cut, len(graph.blocks))])
    )
    return Plan(graph.name, graph.fingerprint, 2, graph.batch_size, 1, "gpipe", stages)


# -- collectives


@pytest.mark.parametrize("ranks", [(0, 1), (0, 1, 2, 3), (0, 4)])
@pytest.mark.parametrize("size", [0, 1e3, 1e8])
def test_collectives_follow_the_ring(ranks: tuple[int, ...], size: float) -> None:
    n, link = len(ranks), CPU.inter if max(ranks) >= 4 else CPU.intra
    ring_s = (n - 1) * (link.latency_s + size / n / link.bandwidth_bytes_per_s)
    assert collective_s(CPU, "all_gather", size, ranks) == pytest.approx(ring_s)
    assert collective_s(CPU, "reduce_scatter", size, ranks) == pytest.approx(ring_s)
    assert collective_s(CPU, "all_reduce", size, ranks) == pytest.approx(2 * ring_s)
    exchanged = (n - 1) * (link.latency_s + size / n / n / link.bandwidth_bytes_per_s)
    assert collective_s(CPU, "all_to_all", size, ranks) == pytest.approx(exchanged)


def test_measured_collectives_and_corrections_count() -> None:
    cluster = replace(CPU, intra=Link(1e-5, 1e9, 0.0, {"all_reduce": (3e-5, 5e8)}))
    assert collective_s(cluster, "all_reduce", 1e6, (0, 1)) == pytest.approx(2 * 3e-5 + 1e6 / 5e8)
    assert collective_s(cluster, "all_gather", 1e6, (0, 1)) == pytest.approx(1e-5 + 0.5e6 / 1e9)
    learnt = Corrections(links={("intra", "all_reduce"): (2.0, 0.5)})
    assert collective_s(cluster, "all_reduce", 1e6, (0, 1), learnt) == pytest.approx(2 * 6e-5 + 2 * 1e6 / 5e8)
    assert collective_s(cluster, "all_reduce", 1e6, (3, 4), learnt) == collective_s(cluster, "all_reduce", 1e6, (3, 4))
    for kind in COLLECTIVES:
        assert collective_s(cluster, kind, 1e6, (5,)) == 0.0
    with pytest.raises(ValueError, match="gossip"):
        collective_s(cluster, "gossip", 1, (0, 1))


# -- work, against torch's flop counter


@pytest.mark.parametrize("name", sorted(ZOO))
def test_flops_agree_with_torch(name: str) -> None:
    module, example, loss = ZOO[name]()
    graph = graph_of(name)
    with FlopCounterMode(display=False) as forward:
        value = eager_loss(module, example, loss)
    with FlopCounterMode(display=False) as backward:
        value.backward()
    pricer = Pricer(graph, CPU, Corrections())
    found = [0.0, 0.0]
    for op in graph.ops:
        for way, part in enumerate(kernels(pricer._call(op, (), 1))):
            found[way] += sum(k.amount for k in part if k.compute_class in ("matmul", "convolution"))

    def counted(counter: FlopCounterMode) -> int:
        counts = counter.get_flop_counts().get("Global", {})
        return sum(flops for target, flops in counts.items() if "attention" not in str(target))

    assert found[0] == counted(forward)
    # torch counts no product for the gradient of a model's input, and neither may we.
    assert found[1] == counted(backward)


def test_attention_counts_its_causal_half() -> None:
    graph = graph_of("llama")
    pricer = Pricer(graph, CPU, Corrections())
    op = next(op for op in graph.ops if "scaled_dot_product" in op.target)
    (forward,), backward = kernels(pricer._call(op, (), 1))
    batch, heads, length, width = graph.tensors[op.outputs[0]].shape
    causal = "is_causal" in dict(op.kwargs) and dict(op.kwargs)["is_causal"] or True in op.args
    assert forward.amount == 4 * batch * heads * length**2 * width / (2 if causal else 1)
    assert backward[0].amount == forward.amount and backward[0].adjoint


def test_an_embedding_writes_its_whole_gradient() -> None:
    small, large = (capture(*build_llama(vocab_size=v)) for v in (64, 64 + 4096))
    amounts = []
    for graph in (small, large):
        op = next(op for op in graph.ops if op.target.startswith("aten.embedding"))
        _, (kernel,) = kernels(Pricer(graph, CPU, Corrections())._call(op, (), 1))
        amounts.append(kernel.amount)
    assert amounts[1] - amounts[0] == 4096 * 32 * 4


# -- prices


@pytest.mark.parametrize("name", ["llama", "gpt2", "conv_net", "tied_lm"])
def test_every_strategy_has_a_price_and_splits_save(name: str) -> None:
    graph = graph_of(name)
    model = CostModel(graph, CPU)
    checked = 0
    for op in graph.ops:
        if op.name in graph.side_ops:
            continue
        whole = sum(model.op_s(op, None, shards=1))
        for strategy in strategies(graph, op, 2):
            forward_s, backward_s = model.op_s(op, strategy, shards=1)
            assert 0 < forward_s < math.inf and 0 <= backward_s < math.inf
            if not strategy.collective_bytes and strategy.special != "halo":
                assert forward_s + backward_s <= whole * (1 + 1e-9), (op.name, strategy)
            checked += 1
    assert checked >= 50


@pytest.mark.parametrize("cluster", [CPU, GPU], ids=["cpu", "gpu"])
def test_half_the_batch_takes_about_half(cluster: Cluster) -> None:
    graph = graph_of("llama")
    fast = replace(cluster, device=replace(cluster.device, launch_s=0.0, backward_launch_s=0.0, asynchronous=False))
    whole, half = (CostModel(graph, fast).stage(one_stage(graph, microbatches=m), 0) for m in (1, 2))
    assert half.forward_s == pytest.approx(whole.forward_s / 2, rel=0.05)
    assert whole.backward_s / 2 < half.backward_s < whole.backward_s * 0.75
    assert half.activation_bytes == pytest.approx(whole.activation_bytes / 2, rel=0.1)
    assert half.parameter_bytes == whole.parameter_bytes


def test_conversions_cost_their_collectives() -> None:
    graph = graph_of("llama")
    model = CostModel(graph, CPU)
    block = graph.blocks[1]
    name = block.inputs[0]
    size = graph.tensors[name].size_bytes
    ranks = (0, 1, 2, 3)

    def seconds(have, want) -> tuple[float, float]:
        return model.conversion_s(name, have, want, shards=1, ranks=ranks)

    all_reduce_s = collective_s(CPU, "all_reduce", size, ranks)
    assert seconds(REPLICATED, REPLICATED) == (0.0, 0.0)
    forward_s, backward_s = seconds(PARTIAL, REPLICATED)
    assert forward_s >= all_reduce_s and backward_s == 0.0
    forward_s, backward_s = seconds(REPLICATED, SHARED)
    assert forward_s == 0.0 and backward_s >= all_reduce_s
    gather, scatter = (collective_s(CPU, kind, size, ranks) for kind in ("all_gather", "reduce_scatter"))
    forward_s, backward_s = seconds(Split(1), SHARED)
    assert forward_s >= gather and backward_s >= scatter
    assert seconds(Split(0), SHARED)[0] < forward_s  # no rearranging of the outermost dim
    side = next(t for op in graph.ops if op.name in graph.side_ops for t in op.outputs if graph.tensors[t].shape)
    assert model.conversion_s(side, PARTIAL, SHARED, shards=1, ranks=ranks)[1] == 0.0


def test_a_roofline_stays_below_the_peak_and_grows_with_size() -> None:
    device, constants = GPU.device, constants_of(GPU)

    def rate(kernel: Kernel) -> float:
        return kernel.amount / roofline_s(device, kernel, constants)

    for name in ("matmul", "convolution", "attention"):
        rates = [rate(Kernel(name, 10.0**e, 10.0**e, "bfloat16")) for e in range(6, 15)]
        assert rates == sorted(rates) and rates[-1] < device.flops_per_s["bfloat16"]
    sides = [2**i for i in range(6, 15)]
    rates = [rate(Kernel("matmul", 2.0 * n**3, 2.0 * n**3, "bfloat16", shape=(1, n, n, n))) for n in sides]
    assert rates == sorted(rates) and 0.5 * 312e12 < rates[-1] < 312e12
    odd = rate(Kernel("matmul", 2.0 * 8191**3, 2.0 * 8191**3, "bfloat16", shape=(1, 8191, 8191, 8191)))
    assert odd < 0.8 * rates[7]
    thin = Kernel("matmul", 2e9, 2e9, "bfloat16", moved_bytes=2e9)
    assert rate(thin) <= device.memory_bytes_per_s
    assert rate(Kernel("copy", 1e9, 1e9, "")) < device.memory_bytes_per_s


# -- memory, against torch's profiler


def peak_bytes(call: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    live = peak = 0
    for delta in allocation_deltas(profiled):
        live += delta
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt2_dropout", "tied_lm", "conv_net"])
def test_activation_memory_agrees_with_the_profiler(name: str) -> None:
    module, example, loss = {**ZOO, **RANDOM_ZOO}[name]()
    graph = graph_of(name)
    eager_loss(module, example, loss).backward()  # gradients are there from here on, and do not count
    measured = peak_bytes(lambda: eager_loss(module, example, loss).backward())
    cost = CostModel(graph, CPU).stage(one_stage(graph), 0)
    predicted = cost.activation_bytes + max(cost.forward_peak_bytes, cost.backward_peak_bytes)
    print(f"{name}: predicted {predicted}, measured {measured}, {predicted / measured - 1:+.1%}")
    assert predicted == pytest.approx(measured, rel=0.1)


def test_parameters_gradients_and_moments_lie_at_rest() -> None:
    graph = graph_of("gpt2")
    size = sum(t.size_bytes for t in graph.parameters)
    batch = sum(graph.tensors[name].size_bytes for name in graph.inputs)
    model = CostModel(graph, CPU)
    whole = model.stage(one_stage(graph, data=2), 0)
    assert (whole.parameter_bytes, whole.gradient_bytes, whole.optimizer_bytes) == (size + batch // 2, size, 2 * size)
    cut = model.stage(one_stage(graph, data=2, zero=3), 0)
    assert (cut.parameter_bytes, cut.gradient_bytes, cut.optimizer_bytes) == (size // 2 + batch // 2, size // 2, size)
    assert cut.unsharded_bytes > 0 == whole.unsharded_bytes
    several = model.stage(one_stage(graph, data=2, zero=3, microbatches=2), 0)
    assert several.unsharded_bytes == cut.unsharded_bytes < size  # each microbatch's gradients are scattered
    assert cut.forward_s > whole.forward_s and cut.optimizer_s < whole.optimizer_s


def test_recompute_trades_memory_for_time() -> None:
    graph = capture(*build_llama(layers=4))
    model = CostModel(graph, CPU)
    none, full = (model.stage(one_stage(graph, recompute=r), 0) for r in ("none", "full"))
    assert full.activation_bytes < none.activation_bytes / 3
    sides_s = sum(model.op_s(op, None, shards=1)[0] for op in graph.ops if op.name in graph.side_ops)
    again_s = full.backward_s - none.backward_s
    # All but what no backward reads (test_cost_parts.py says exactly what that is).
    assert 0.8 * (none.forward_s - sides_s) <= again_s < none.forward_s
    assert full.forward_s == none.forward_s
    peak = [c.activation_bytes + max(c.forward_peak_bytes, c.backward_peak_bytes) for c in (none, full)]
    assert peak[1] < peak[0]


# -- stages


@pytest.mark.parametrize("name", ["llama", "gpt2", "tied_lm", "conv_net"])
def test_stages_add_up(name: str) -> None:
    graph = graph_of(name)
    model = CostModel(graph, CPU)
    whole = model.stage(one_stage(graph), 0)
    sides_s = sum(model.op_s(op, None, shards=1)[0] for op in graph.ops if op.name in graph.side_ops)
    for cut in range(1, len(graph.blocks)):
        plan = pipeline(graph, cut)
        parts = [model.stage(plan, i) for i in (0, 1)]
        total_s = sum(p.forward_s for p in parts)
        assert whole.forward_s <= total_s + 1e-12 and total_s <= whole.forward_s + sides_s + 1e-12
        assert sum(p.backward_s for p in parts) == pytest.approx(whole.backward_s, rel=1e-9)
        tied = sum(graph.tensors[t].size_bytes for t in graph.shared_parameters)
        assert sum(p.gradient_bytes for p in parts) - whole.gradient_bytes in (0, tied)
        boundary = sum(graph.tensors[t].size_bytes for t in graph.blocks[cut - 1].outputs)
        assert parts[0].boundary_bytes == boundary and parts[1].boundary_bytes == 0
        assert parts[0].send_s == pytest.approx(collective_s(CPU, "send", boundary, (0, 1)))
        assert (parts[0].reduce_model_s > 0) == (sum(p.gradient_bytes for p in parts) > whole.gradient_bytes)


def test_a_breakdown_is_the_whole() -> None:
    graph = graph_of("gpt2")
    for recompute in ("none", "full"):
        plan = one_stage(graph, recompute=recompute)
        model = CostModel(graph, CPU)
        cost, parts = model.stage(plan, 0), model.breakdown(plan, 0)
        pairs = [*parts.compute.values(), *parts.collectives.values()]
        assert sum(f for f, _ in pairs) == pytest.approx(cost.forward_s)
        assert sum(b for _, b in pairs) == pytest.approx(cost.backward_s)


def test_reduction_over_data_hides_behind_the_backward() -> None:
    graph = capture(*build_gpt2(layers=4))
    eager, hiding = (replace(GPU, intra=replace(GPU.intra, overlap=o)) for o in (0.0, 1.0))
    plan = one_stage(graph, data=4)
    without, hidden = (CostModel(graph, c).stage(plan, 0) for c in (eager, hiding))
    assert without.reduce_s == hidden.reduce_s > 0
    assert without.reduce_overlap_s == 0.0 <= hidden.reduce_overlap_s <= min(hidden.reduce_s, hidden.backward_s)
    sharded = one_stage(graph, data=4, zero=3)
    without, hidden = (CostModel(graph, c).stage(sharded, 0) for c in (eager, hiding))
    assert hidden.forward_s < without.forward_s and hidden.backward_s < without.backward_s


# -- corrections


def test_corrections_scale_their_own_part() -> None:
    graph = graph_of("llama")
    plan = one_stage(graph)
    plain = CostModel(graph, CPU)
    parts = plain.breakdown(plan, 0).compute
    for name, (forward_s, backward_s) in parts.items():
        model = CostModel(graph, CPU, Corrections(compute={name: (3.0, 2.0)}))
        assert model.stage(plan, 0).forward_s - plain.stage(plan, 0).forward_s == pytest.approx(2 * forward_s)
        assert model.stage(plan, 0).backward_s - plain.stage(plan, 0).backward_s == pytest.approx(backward_s)
    double = CostModel(graph, CPU, Corrections(memory=2.0)).stage(plan, 0)
    assert double.activation_bytes == 2 * plain.stage(plan, 0).activation_bytes
    assert double.parameter_bytes == plain.stage(plan, 0).parameter_bytes


def test_corrections_round_trip_and_refuse_nonsense() -> None:
    learnt = Corrections({"matmul": (1.5, 0.5)}, {("inter", "all_gather"): (2.0, 0.1)}, 1.1)
    assert Corrections.from_json(learnt.to_json()) == learnt
    for call in (
        lambda: Corrections({"magic": (1.0, 1.0)}),
        lambda: Corrections(links={("intra", "gossip"): (1.0, 1.0)}),
        lambda: Corrections(memory=0.0),
        lambda: Corrections({"matmul": (1.0, -1.0)}),
        lambda: Corrections.from_json("{}"),
        lambda: Corrections.from_json("not json"),
    ):
        with pytest.raises(ValueError):
            call()


def test_a_search_can_ask_often() -> None:
    """Answers are remembered: asking for every stage again prices no block again."""
    graph = capture(*build_llama(layers=6))
    model = CostModel(graph, GPU)
    plans = [pipeline(graph, cut) for cut in range(1, len(graph.blocks))]
    first = [model.stage(plan, i) for plan in plans for i in (0, 1)]
    model._price_block = None  # type: ignore[method-assign]
    assert [model.stage(plan, i) for plan in plans for i in (0, 1)] == first
    assert len(model._blocks) == len({block.kind for block in graph.blocks})
