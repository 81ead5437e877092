"""Parts of the cost model: products by waves, host against device time, ZeRO's traffic, precision, recompute per block."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from models import build_gpt2, build_llama

from autopar.capture.export import capture
from autopar.cluster.spec import Cluster
from autopar.cost.block import repeated_steps
from autopar.cost.constants import FLOAT8, SOFTWARE, Constants, constants_of, named_constants
from autopar.cost.data_axis import BlockLoad, data_traffic
from autopar.cost.model import CostModel
from autopar.cost.products import product_s
from autopar.cost.storage import base_name
from autopar.graph import Graph
from autopar.plan import Plan, Stage
from autopar.sharding.flow import block_flow

GPU = Cluster.preset("a100-80gb", hosts=2, devices_per_host=4)
CPU = Cluster.preset("cpu", hosts=2, devices_per_host=4)
PEAK = 312e12


@cache
def llama() -> Graph:
    return capture(*build_llama(layers=4))


def plan_of(graph: Graph, stage: Stage | None = None, microbatches: int = 1, **fields) -> Plan:
    stage = stage or Stage(0, len(graph.blocks), (0,), 1)
    return Plan(
        graph.name, graph.fingerprint, len(stage.ranks), graph.batch_size, microbatches, "1f1b", (stage,), **fields
    )


def cost(graph: Graph, cluster: Cluster, stage: Stage | None = None, microbatches: int = 1, **fields):
    return CostModel(graph, cluster).stage(plan_of(graph, stage, microbatches, **fields), 0)


# -- products


def test_a_product_pays_for_whole_waves() -> None:
    constants = constants_of(GPU)
    units = int(constants.multiprocessors)

    def seconds(m: int, n: int = 4096, k: int = 4096) -> float:
        return product_s(1, m, n, k, PEAK, constants)

    # One row more than fills the tiles begins another row of them.
    rows = [seconds(m) for m in range(256, 8192, 64)]
    assert rows == sorted(rows) and len(set(rows)) < len(rows) / 2
    for m, n, k in ((8192, 8192, 8192), (256, 256, 4096), (64, 64, 64)):
        work_s = 2.0 * m * n * k / (PEAK * constants.matmul_share)
        assert seconds(m, n, k) >= work_s
    assert seconds(8192, 8192, 8192) < 1.3 * 2 * 8192**3 / (PEAK * constants.matmul_share)
    # A lone tile uses one multiprocessor, unless its k is long enough to be split.
    assert seconds(64, 64, 256) > 2 * 64 * 64 * 256 / PEAK * units / 2
    assert product_s(units, 128, 128, 512, PEAK, constants) < 3 * product_s(1, 128, 128, 512, PEAK, constants)
    assert seconds(4096, 4096, 4095) > 1.2 * seconds(4096, 4096, 4096)


# -- host and device


def test_a_block_takes_the_longer_of_host_and_device() -> None:
    graph = llama()
    device = GPU.device
    slow, quick = (
        replace(GPU, device=replace(device, launch_s=s, backward_launch_s=s), software="") for s in (1e-3, 1e-9)
    )
    plan = plan_of(graph)
    bound, free = (CostModel(graph, c).breakdown(plan, 0) for c in (slow, quick))
    assert "launch" not in free.compute or max(free.compute["launch"]) < 1e-6
    for way in (0, 1):
        waiting = bound.compute["launch"][way]
        work = sum(pair[way] for name, pair in bound.compute.items() if name != "launch")
        assert work == pytest.approx(sum(pair[way] for name, pair in free.compute.items() if name != "launch"))
        assert waiting > 10 * work  # this model is tiny, its launches are not
    # Twice the launch cost is twice the time, where the host is what everything waits for.
    double = replace(slow, device=replace(slow.device, launch_s=2e-3, backward_launch_s=2e-3))
    assert cost(graph, double).forward_s == pytest.approx(2 * cost(graph, slow).forward_s, rel=0.05)


def test_software_is_known_by_name() -> None:
    for name in SOFTWARE:
        assert constants_of(Cluster.preset("h100-80gb", software=name)) == named_constants("h100-80gb", name)
        assert named_constants("h100-80gb", name + FLOAT8).products_in == "float8"
    with pytest.raises(ValueError, match="did you mean 'megatron'"):
        named_constants("a100-80gb", "megatro")
    with pytest.raises(ValueError, match="not known"):
        CostModel(llama(), replace(GPU, software="abacus"))


def test_kernels_written_for_hopper_are_those_of_its_stacks() -> None:
    for share in ("matmul_share", "attention_share", "attention_backward_share"):
        native, other = (getattr(named_constants("h100-80gb", name), share) for name in ("megatron", "composer"))
        assert 0 < other < native < 0.8
        assert getattr(named_constants("h200-141gb", "megatron" + FLOAT8), share) == native
        assert len({getattr(named_constants("a100-80gb", name), share) for name in ("megatron", "composer")}) == 1


def test_constants_leave_cpus_and_their_measured_rates_alone() -> None:
    """Whatever the software is called, a device that does not compute asynchronously has no constants of its own, but what
    autopar's runtime does there."""
    constants = constants_of(replace(CPU, software="megatron-deepspeed"))
    assert constants == Constants(
        wide_loss=False, scatter_each=True, slices_at_rest=True, gathers_ahead=True, scatter_hides=False
    )
    graph = llama()
    plain, named = cost(graph, CPU), cost(graph, replace(CPU, software="megatron-deepspeed"))
    assert plain == named


# -- precision


def test_narrow_types_halve_what_is_kept_and_speed_products_up() -> None:
    graph = capture(*build_gpt2(layers=3))
    wide, narrow = (cost(graph, GPU, precision=p) for p in ("float32", "bfloat16"))
    assert 0.45 < narrow.activation_bytes / wide.activation_bytes < 0.85  # masks and statistics stay as they are
    model = CostModel(graph, replace(GPU, device=replace(GPU.device, launch_s=0, backward_launch_s=0), software=""))
    matmul = [model.breakdown(plan_of(graph, precision=p), 0).compute["matmul"] for p in ("float32", "bfloat16")]
    assert matmul[1][0] < matmul[0][0]
    # Parameters and their moments rest in float32; a copy to compute with lies beside them.
    elements = sum(t.numel for t in graph.parameters)
    assert narrow.optimizer_bytes == wide.optimizer_bytes == 8 * elements
    assert narrow.parameter_bytes - wide.parameter_bytes == 2 * elements
    with pytest.raises(ValueError, match="float4"):
        cost(graph, GPU, precision="float4")


# -- recompute per block


def test_recompute_is_chosen_block_by_block() -> None:
    graph = llama()
    count = len(graph.blocks)
    found = []
    for full in range(count + 1):
        choice = ("full",) * full + ("none",) * (count - full)
        found.append(cost(graph, CPU, Stage(0, count, (0,), 1, recompute=choice)))
    times = [c.backward_s for c in found]
    assert times == sorted(times) and times[0] < times[-1]
    held = [c.activation_bytes for c in found]
    assert held[-1] < held[count // 2] < held[0]
    selective = cost(graph, CPU, Stage(0, count, (0,), 1, recompute=("selective",) * count))
    assert times[0] < selective.backward_s < times[-1]
    assert held[-1] < selective.activation_bytes < held[0]


# -- the data axis


def test_zero_levels_shard_more_and_more() -> None:
    graph = llama()
    count, size = len(graph.blocks), sum(t.size_bytes for t in graph.parameters)
    costs = [cost(graph, CPU, Stage(0, count, (0, 1, 2, 3), 4, zero=zero)) for zero in range(4)]
    assert [c.optimizer_bytes for c in costs] == [2 * size, size // 2, size // 2, size // 2]
    # With one microbatch nothing is to be summed up whole, so that ZeRO 1 scatters like ZeRO 2.
    assert [c.gradient_bytes for c in costs] == [size, size // 4, size // 4, size // 4]
    twice = [cost(graph, CPU, Stage(0, count, (0, 1, 2, 3), 4, zero=zero), microbatches=2) for zero in range(4)]
    assert [c.gradient_bytes for c in twice] == [size, size, size // 4, size // 4]
    assert [c.has_gradient_buffers for c in costs] == [True, False, False, False]
    batch = costs[0].parameter_bytes - size
    # Between steps levels 1 and 2 hold slices too, beside which a step gathers the whole.
    assert [c.parameter_bytes - batch for c in costs] == [size, size + size // 4, size + size // 4, size // 4]
    assert costs[1].optimizer_s < costs[0].optimizer_s
    hybrid = cost(graph, CPU, Stage(0, count, (0, 1, 2, 3), 4, zero=3, zero_group=2))
    assert hybrid.optimizer_bytes == size and hybrid.parameter_bytes - batch == size // 2


def test_traffic_of_each_zero_level_by_hand() -> None:
    """All-reduce, reduce-scatter and all-gather of n bytes over d ranks take 2, 1 and 1 seconds per byte here."""
    weights = {"all_reduce": 2.0, "reduce_scatter": 1.0, "all_gather": 1.0}

    def seconds(kind: str, size: float, ranks: tuple[int, ...]) -> float:
        return weights[kind] * size * len(ranks) if len(ranks) > 1 else 0.0

    loads = [BlockLoad(10.0, 5.0, 100.0, 200.0)] * 3
    constants = replace(constants_of(CPU), scatter_hides=True)
    stage = Stage(0, 3, tuple(range(4)), 4)

    def traffic(overlap: float, **changes):
        return data_traffic(replace(stage, **changes), loads, overlap, constants, seconds)

    zero0 = traffic(0.0)
    assert (zero0.reduce_s, zero0.reduce_overlap_s, zero0.after_s) == (2 * 15 * 4, 0.0, 0.0)
    zero1 = traffic(0.0, zero=1)
    assert (zero1.reduce_s, zero1.after_s) == (15 * 4, 30 * 4)
    zero2 = traffic(0.0, zero=2)
    assert (zero2.backward_s, zero2.reduce_s, zero2.after_s) == (15 * 4, 0.0, 30 * 4)
    zero3 = traffic(0.0, zero=3)
    assert (zero3.forward_s, zero3.backward_s, zero3.reduce_s) == (30 * 4, 45 * 4, 0.0)
    # All but the first block's gathers and scatters hide behind the block before.
    hidden = traffic(1.0, zero=3)
    assert (hidden.forward_s, hidden.backward_s, hidden.reduce_s) == (10 * 4, 15 * 4, 0.0)
    # On hosts a rank waits for what it scatters.
    constants = constants_of(CPU)
    hidden = traffic(1.0, zero=3)
    assert (hidden.forward_s, hidden.backward_s, hidden.reduce_s) == (10 * 4, 10 * 4 + 15 * 4, 0.0)
    large = [BlockLoad(2.0**27, 2.0**27, 1e9, 1e9)] * 3
    reductions = [data_traffic(replace(stage, zero=level), large, 1.0, constants, seconds) for level in (0, 1)]
    assert reductions[0].reduce_overlap_s > 0 and reductions[1].reduce_overlap_s == 0
    # Other stacks scatter once per step.
    constants = replace(constants, scatter_hides=True)
    constants = replace(constants, scatter_each=False)
    zero3 = traffic(0.0, zero=3)
    assert (zero3.forward_s, zero3.backward_s, zero3.reduce_s) == (30 * 4, 30 * 4, 15 * 4)
    hidden = traffic(1.0, zero=3)
    assert (hidden.forward_s, hidden.backward_s, hidden.reduce_overlap_s) == (10 * 4, 10 * 4, 10 * 4)
    halves = traffic(0.0, zero=1, zero_group=2)
    assert halves.reduce_s == 15 * 2 + 2 * 15 / 2 * 2 and halves.after_s == 30 * 2
    assert data_traffic(replace(stage, data=1, ranks=(0,)), loads, 0.5, constants, seconds).reduce_s == 0.0


def test_equal_ranks_fold() -> None:
    """What one data replica costs, every other costs too: one stands for all."""
    graph = capture(*build_gpt2(layers=3))
    count = len(graph.blocks)
    cluster = Cluster.preset("a100-80gb", hosts=4, devices_per_host=2)
    ranks = tuple(range(8))
    turned = [tuple(ranks[(i + first) % 8] for i in range(8)) for first in range(8)]
    for zero in (0, 3):
        costs = {cost(graph, cluster, Stage(0, count, order, 8, zero=zero)) for order in turned}
        spread = [math.fsum((c.forward_s, c.backward_s, c.reduce_s)) for c in costs]
        assert max(spread) == pytest.approx(min(spread), rel=1e-12)


class _Mlp(torch.nn.Module):
    """Two equal layers whose last product nothing in the backward reads the result of."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict({"up": torch.nn.Linear(64, 256), "down": torch.nn.Linear(256, 64)}) for _ in range(4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer["down"](torch.nn.functional.gelu(layer["up"](x)))
        return x.square().mean()


def test_what_is_computed_again_ends_where_torchs_checkpoint_ends() -> None:
    module, x = _Mlp(), torch.randn(8, 64)
    graph = capture(module, (x,))
    calls: dict[str, int] = {"up": 0, "down": 0}
    layer = module.layers[0]
    for name in calls:
        layer[name].register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))

    def run(x: torch.Tensor) -> torch.Tensor:
        return x + layer["down"](torch.nn.functional.gelu(layer["up"](x)))

    torch.utils.checkpoint.checkpoint(run, x.requires_grad_(), use_reentrant=False).sum().backward()
    assert calls == {"up": 2, "down": 1}
    kinds = [block.kind for block in graph.blocks]
    block = next(b for b in graph.blocks if kinds.count(b.kind) > 2)
    steps = block_flow(graph, block, ())
    again = [base_name(step.op.target) for step in steps[: repeated_steps(steps)]]
    assert again == ["linear", "gelu"] and len(steps) > len(again)
    # In seconds: the whole forward less that of the last product and of the sum.
    stage = Stage(block.index, block.index + 1, (0,), 1)
    for software, skipped in (("torch", True), ("megatron", False)):
        cluster = Cluster.preset("a100-80gb", software=software)
        constants = replace(constants_of(cluster), launch_s=1e-12, backward_launch_s=1e-12)
        model = CostModel(graph, cluster, constants=constants)
        plain, full = (
            model.breakdown(plan_of(graph, replace(stage, recompute=(choice,))), 0).compute
            for choice in ("none", "full")
        )
        more_s = sum(full[name][1] - plain[name][1] for name in plain)
        late_s = sum(model.op_s(step.op, None, shards=1)[0] for step in steps[len(again) :])
        assert more_s == pytest.approx(sum(f for f, _ in plain.values()) - skipped * late_s, rel=1e-6)


def test_scores_that_no_fused_kernel_takes_cost_several() -> None:
    class Scores(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(16))

        def forward(self, q: torch.Tensor) -> torch.Tensor:
            q = q * self.scale
            return torch.softmax(q @ q.transpose(-1, -2), -1).square().mean()

    found = {}
    for heads in (2, 4):
        graph = capture(Scores(), (torch.randn(1, heads, 512, 16),))
        op = next(op for op in graph.ops if base_name(op.target) == "softmax")
        for software in ("megatron", "torch"):
            cluster = Cluster.preset("a100-80gb", software=software)
            found[software, heads] = CostModel(graph, cluster).op_s(op, None, shards=1, precision="bfloat16")[0] / heads
    assert found["megatron", 2] > 2 * found["megatron", 4]
    assert found["torch", 2] < 2 * found["torch", 4]


def test_products_share_the_cast_of_what_they_share() -> None:
    class Gated(torch.nn.Module):
        def __init__(self, shared: bool) -> None:
            super().__init__()
            self.shared = shared
            self.up, self.gate = torch.nn.Linear(512, 512), torch.nn.Linear(512, 512)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            x, y = x * 2, y * 2
            return (self.up(x) * self.gate(x if self.shared else y)).square().mean()

    casts = {}
    for shared in (True, False):
        graph = capture(Gated(shared), (torch.randn(4096, 512), torch.randn(4096, 512)))
        model = CostModel(graph, Cluster.preset("h100-80gb", software="torch" + FLOAT8))
        casts[shared] = model.breakdown(plan_of(graph, precision="bfloat16"), 0).compute["copy"][0]
    assert 0.5 < casts[True] / casts[False] < 0.7
