"""Published measurements: models lengthened as captured, rows rebuilt into plans, judgements and their summary."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from published import judge_all, summary  # noqa: E402
from published_models import Decoder, _captured, graph_of  # noqa: E402
from published_rows import Row, Unsupported, device_of, read_rows, rebuild  # noqa: E402

from autopar.cluster.presets import PRESETS  # noqa: E402
from autopar.cluster.spec import Cluster  # noqa: E402
from autopar.cost.model import CostModel  # noqa: E402
from autopar.graph import Graph  # noqa: E402
from autopar.plan import Plan, Stage  # noqa: E402
from autopar.sharding.named_layouts import megatron_layouts  # noqa: E402
from autopar.simulate import simulate  # noqa: E402

GPT = Decoder(5, 64, 256, 4, 4, 512, 32, dropout=0.1, explicit_attention=True)
LLAMA = Decoder(5, 64, 176, 4, 2, 512, 32, norm="rms", bias=False, gated=True, rotary=True, tied=False)

COLUMNS = dict(
    source="NVIDIA/Megatron-LM", model="gpt", layers="4", hidden="64", ffn_hidden="256", heads="4", kv_heads="4", vocab="512",
    seq_len="32", gpu="A100-SXM-80GB", gpus_per_node="8", num_gpus="8", intra_bw_GBps="300", inter_bw_GBps="25",
    dtype="bf16", dp="2", dp_mode="ddp", tp="2", sp="0", pp="2", vpp="1", cp="1", ep="1", micro_batch="1", global_batch="8",
    recompute="none", schedule="1f1b", compile="no", step_time_s="0.05", mem_GiB="", notes="",
)  # fmt: skip


def row(**changes: str) -> Row:
    return Row("some.csv", 2, {**COLUMNS, **changes})


@pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gpt", "llama"])
def test_a_lengthened_graph_costs_what_the_captured_one_does(config: Decoder) -> None:
    short, long = graph_of(config, 8), _captured(config, 8)
    assert len(short.blocks) == len(long.blocks) and len(short.ops) == len(long.ops)
    assert [b.kind for b in short.blocks] == [b.kind for b in long.blocks]
    assert sorted(t.shape for t in short.parameters) == sorted(t.shape for t in long.parameters)
    assert len({t.fqn for t in short.parameters}) == len(short.parameters)
    cluster = Cluster.preset("a100-80gb", hosts=1, devices_per_host=4)
    costs = []
    for graph in (short, long):
        cut = 3
        stages = (Stage(0, cut, (0, 1), 2), Stage(cut, len(graph.blocks), (2, 3), 2))
        plan = Plan(graph.name, graph.fingerprint, 4, 8, 2, "1f1b", stages, precision="bfloat16")
        costs.append([CostModel(graph, cluster).stage(plan, i) for i in (0, 1)])
    assert costs[0] == costs[1]


def test_a_row_becomes_its_plan() -> None:
    case = rebuild(row())
    plan = case.plan
    assert [(s.data, s.tensor, len(s.ranks)) for s in plan.stages] == [(2, 2, 4), (2, 2, 4)]
    assert (plan.microbatches, plan.schedule, plan.precision, plan.world_size) == (4, "1f1b", "bfloat16", 8)
    assert plan.stages[0].stop == plan.stages[1].start and plan.stages[1].stop == len(case.graph.blocks)
    assert case.cluster.inter.bandwidth_bytes_per_s == pytest.approx(25e9 * 0.8)
    sharded = rebuild(row(dp="4", tp="1", dp_mode="zero3", recompute="full")).plan
    assert all(s.zero == 3 and set(s.recompute) == {"none", "full"} for s in sharded.stages)
    hybrid = rebuild(row(dp="16", tp="1", pp="1", num_gpus="16", dp_mode="zero1-intra-node(8)", global_batch="16")).plan
    assert (hybrid.stages[0].zero, hybrid.stages[0].zero_group) == (1, 8)
    interleaved = rebuild(row(pp="2", vpp="2", schedule="interleaved-1f1b")).plan
    assert len(interleaved.stages) == 4 and interleaved.pipeline == 2
    assert interleaved.stages[0].ranks == interleaved.stages[2].ranks
    changes = dict(
        source="pytorch/torchtitan", model="llama3-8b", kv_heads="2", dp_mode="zero3", schedule="zb-2p(zb-h2)"
    )
    context = rebuild(row(tp="2", cp="2", dp="1", **changes)).plan
    assert context.schedule == "zb-h2" and all(s.axes == (2, 2) and len(s.layouts) == 2 for s in context.stages)
    attention = {strategy for i in context.stages[0].layouts[0] for strategy in context.layouts[i].strategies}
    assert len(attention) > 1  # along the sequence, and over heads
    # Layers alone are computed again.
    again = rebuild(row(recompute="full")).plan
    assert again.stages[0].recompute[0] == "none" == again.stages[1].recompute[-1]
    assert [stage.recompute.count("full") for stage in again.stages] == [2, 2]


def test_a_torch_pipeline_keeps_what_zero_3_gathers_whole() -> None:
    """Of each parameter its copy in the computing type and its gradient in float32, whatever else shards it."""
    shape = dict(
        source="pytorch/torchtitan", model="llama3", compile="yes", dp_mode="zero3", layers="8", hidden="256", tp="1",
        ffn_hidden="512", num_gpus="8",
    )  # fmt: skip
    for degrees in (dict(dp="4", cp="1"), dict(dp="2", cp="2"), dict(dp="1", cp="4")):
        case = rebuild(row(**shape | degrees, pp="2"))
        graph, stage = case.graph, case.plan.stages[1]
        cost = CostModel(graph, case.cluster).stage(case.plan, 1)
        names = {name for block in graph.blocks[stage.start : stage.stop] for name in block.parameters}
        elements = sum(graph.tensors[name].numel for name in names)
        assert case.plan.microbatches > 1 and cost.gradient_bytes == 4 * elements
        assert cost.optimizer_bytes == 8 * elements / 4
        assert cost.parameter_bytes == pytest.approx(2 * elements + 4 * elements / 4, rel=0.01)  # and the batch
        alone = rebuild(row(**shape | degrees | dict(pp="1", num_gpus="4")))
        assert CostModel(alone.graph, alone.cluster).stage(alone.plan, 0).gradient_bytes < 4 * elements


def test_what_a_tensor_axis_holds_whole_is_sent_in_parts() -> None:
    shape = dict(hidden="1024", heads="8", kv_heads="8", seq_len="1024", num_gpus="16", dp="1", tp="8")

    def send_s(scattered: bool, **changes: str) -> float:
        case = rebuild(row(**shape, **changes))
        model = CostModel(case.graph, case.cluster)
        model = model.with_constants(replace(model.constants, scatter_sends=scattered))
        return model.stage(case.plan, 0).send_s

    assert send_s(True) < send_s(False)
    assert send_s(True, sp="1") == send_s(False, sp="1")  # it is split already


def test_what_cannot_be_rebuilt_says_why() -> None:
    for changes, words in (({"ep": "2"}, "expert"), ({"gpu": "TPUv4"}, "TPUv4"), ({"pp": "8", "tp": "1"}, "8 stages")):
        with pytest.raises(Unsupported, match=words):
            rebuild(row(**changes))


def test_gpu_names_find_their_presets() -> None:
    for gpu, name in (
        ("A100-SXM-80GB", "a100-80gb"), ("A100", "a100-80gb"), ("V100-SXM-16GB", "v100-16gb"), ("A800-80GB", "a800-80gb"),
        ("H100-SXM-96GB-HBM2e(500W)", "h100hbm2e-96gb"), ("H100-SXM-80GB", "h100-80gb"), ("A100-SXM-40GB", "a100-40gb"),
        ("A100-PCIE-40GB", "a100pcie-40gb"), ("NVIDIA H100 PCIe", "h100pcie-80gb"), ("GeForce RTX 4090", "rtx4090-24gb"),
    ):  # fmt: skip
        assert device_of(gpu) == name and name in PRESETS


def test_judgements_are_summed_up(tmp_path: Path) -> None:
    lines = [",".join(COLUMNS)]
    for changes in ({}, {"micro_batch": "2"}, {"step_time_s": "", "notes": "OOM; too large"}, {"ep": "2"}):
        lines.append(",".join({**COLUMNS, **changes}.values()))
    (tmp_path / "made_up.csv").write_text("\n".join(lines) + "\n")
    judged = judge_all(read_rows(tmp_path), quiet=True)
    assert [j.reason for j in judged] == ["", "", "", "expert parallelism"]
    assert judged[0].time_error == judged[0].step_time_s / 0.05 - 1
    assert judged[2].row.out_of_memory and judged[2].fits
    text = summary(judged)
    assert "| made_up A100-SXM-80GB | 2 |" in text and "of 1 that ran out of memory, 0 are judged not to" in text
    with pytest.raises(ValueError, match="nowhere"):
        read_rows(tmp_path, "nowhere")


def wide_plan(data: int) -> tuple[Graph, Plan]:
    """Pipeline 8 x data x tensor 8."""
    tensor, pipeline, microbatches = 8, 8, 32
    config = Decoder(16, 64, 256, 8, 8, 512, 32)
    graph = graph_of(config, data * microbatches)
    layouts = megatron_layouts(graph, tensor, sequence=False, shards=data * microbatches)
    unique = tuple(dict.fromkeys(layouts))
    width = data * tensor
    cuts = [0, *(range(3, len(graph.blocks) - 2, 2)), len(graph.blocks)]
    stages = tuple(
        Stage(
            start, stop, tuple(range(s * width, (s + 1) * width)), data, (tensor,),
            (tuple(unique.index(layout) for layout in layouts[start:stop]),), zero=1,
        )
        for s, (start, stop) in enumerate(zip(cuts, cuts[1:], strict=False))
    )  # fmt: skip
    assert len(stages) == pipeline
    plan = Plan(
        graph.name, graph.fingerprint, width * pipeline, graph.batch_size, microbatches, "1f1b", stages, unique,
        precision="bfloat16",
    )  # fmt: skip
    return graph, plan


def test_sixteen_thousand_ranks_cost_what_their_stages_cost() -> None:
    """One rank of each stage is walked, whatever the data degree: 64 ranks or 16,384, by the real cost model."""
    events, seconds = [], []
    for data in (1, 256):
        graph, plan = wide_plan(data)
        cluster = Cluster.preset("h100-80gb", hosts=8 * data)
        model = CostModel(graph, cluster)
        for index in range(plan.pipeline):
            model.stage(plan, index)
        takes_s = []
        for _ in range(3):  # the least of three: a collection of the whole session's garbage may fall into one
            begin_s = time.process_time()
            line = simulate(graph, plan, cluster, model)
            takes_s.append(time.process_time() - begin_s)
        events.append(len(line.events))
        seconds.append(min(takes_s))
        assert len(line.peak_memory_bytes) == plan.world_size and len(line.by_rank()) == plan.pipeline
    assert events[0] == events[1]
    assert seconds[1] < min(1.0, 4 * seconds[0] + 0.2)
