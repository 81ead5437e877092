"""Rows of published measurements, and what autopar makes of each: the model's graph, the cluster and the exact plan.

Everything is read off a row's columns; what names a software stack is its `source` column. Nothing depends on which row
it is beyond that.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from published_models import Decoder, graph_of

from autopar.cluster.presets import PRESETS, preset
from autopar.cluster.spec import Cluster
from autopar.cost.constants import FLOAT8
from autopar.graph import Graph
from autopar.plan import Layout, Plan, Stage, tensor_axes
from autopar.schedule.orders import SCHEDULES
from autopar.sharding.flow import find_strategies
from autopar.sharding.named_layouts import context_layouts, megatron_layouts
from autopar.sharding.strategies import strategies
from autopar.sharding.strategy import Strategy

# What a source's name says of the software: the first match counts. Where none does, ZeRO 3 is torch's and the rest
# Megatron's.
_SOFTWARE = (
    ("llm-foundry", "composer"),
    ("torchtitan", "torchtitan"),
    ("internevo", "internevo"),
    ("internlm", "internevo"),
    ("vtrain", "megatron-deepspeed"),
    ("bigscience", "megatron-deepspeed"),
    ("deepspeed", "megatron-deepspeed"),
    ("zero bubble", "megatron"),
    ("megatron", "megatron"),
    ("nemo", "megatron"),
    ("alpa", "alpa"),
)
_EXPLICIT_ATTENTION = ("megatron", "megatron-deepspeed", "alpa")
_SCHEDULES = (
    ("zb-2p", "zb-h2"),
    ("zb-1p", "zb-h1"),
    ("zb-v", "zb-v"),
    ("interleaved", "interleaved"),
    ("gpipe", "gpipe"),
)


class Unsupported(ValueError):
    """A row that asks for what plans cannot say yet."""


@dataclass(frozen=True)
class Row:
    """One measurement. file: its CSV; fields: its columns as text. step_time_s, memory_gib: None where not given."""

    file: str
    number: int
    fields: dict[str, str]

    @property
    def source(self) -> str:
        """Rows of one source are compared among each other: one file, one kind of device."""
        return f"{self.file.removesuffix('.csv')} {self.text('gpu')}"

    def text(self, name: str) -> str:
        return (self.fields.get(name) or "").strip()

    def count(self, name: str, default: int = 1) -> int:
        text = self.text(name)
        return int(float(text)) if text else default

    def number_of(self, name: str) -> float | None:
        text = self.text(name)
        return float(text) if re.fullmatch(r"[\d.eE+-]+", text) else None

    @property
    def step_time_s(self) -> float | None:
        return self.number_of("step_time_s")

    @property
    def memory_gib(self) -> float | None:
        return self.number_of("mem_GiB")

    @property
    def out_of_memory(self) -> bool:
        return "oom" in self.text("notes").lower().split(";")[0] and self.step_time_s is None

    @property
    def float8(self) -> bool:
        """Whether linear layers compute in float8; some sources say so in their notes alone."""
        return "fp8" in self.text("dtype").lower() or self.text("notes").lower().startswith("float8")

    @property
    def asynchronous_tensor(self) -> bool:
        """Whether products and the collectives beside them are cut up and overlap each other."""
        return "asynctp" in self.text("notes").lower().replace(" ", "")

    @property
    def software(self) -> str:
        source = self.text("source").lower()
        for words, name in _SOFTWARE:  # noqa: B007
            if words in source:
                break
        else:
            name = "torchtitan" if self.text("dp_mode").startswith("zero3") else "megatron"
        if name == "composer" and not self.text("dtype").startswith("amp_"):
            return "composer-torch1"  # precisions have been called "amp_..." since its version 0.11
        if name == "torchtitan":
            compiled = "torch-compile-async-tp" if self.asynchronous_tensor else "torch-compile"
            return compiled if self.text("compile").startswith("yes") else "torchtitan"
        return name


def read_rows(folder: Path, source: str = "") -> list[Row]:
    """All rows of the CSV files in `folder` whose file name or source column holds `source`."""
    rows = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="") as file:
            for number, fields in enumerate(csv.DictReader(file), 2):
                row = Row(path.name, number, {k: v for k, v in fields.items() if k})
                if source.lower() in f"{path.name} {row.text('source')}".lower():
                    rows.append(row)
    if not rows:
        raise ValueError(f"no row of {folder}/*.csv has a source with {source!r} in it")
    return rows


@dataclass(frozen=True)
class Case:
    """A row, rebuilt."""

    row: Row
    graph: Graph
    cluster: Cluster
    plan: Plan


def rebuild(row: Row) -> Case:
    """The graph, cluster and plan of a row. Unsupported where plans cannot say what it asks for."""
    graph = graph_of(decoder(row), global_rows(row))
    return Case(row, graph, cluster_of(row), plan_of(row, graph))


def degrees(row: Row) -> tuple[int, int, int]:
    """(data, tensor, pipeline); data is what the others leave of the devices where the row does not say."""
    tensor, pipeline = row.count("tp"), row.count("pp")
    rest = max(1, row.count("num_gpus") // (tensor * pipeline * row.count("cp")))
    return row.count("dp", rest), tensor, pipeline


def microbatch_rows(row: Row) -> tuple[int, int]:
    """(rows of a microbatch on one data rank, microbatches)."""
    data, _, pipeline = degrees(row)
    each = max(1, row.count("global_batch") // data)
    micro = min(row.count("micro_batch", max(1, each // (8 if pipeline > 1 else 1))), each)
    return micro, max(1, round(each / micro))


def global_rows(row: Row) -> int:
    """The batch, to the next whole number of microbatches."""
    micro, count = microbatch_rows(row)
    return degrees(row)[0] * micro * count


def decoder(row: Row) -> Decoder:
    name, hidden = row.text("model").lower(), row.count("hidden")
    heads = row.count("heads", max(1, hidden // 128))
    vocabulary = row.count("vocab", 50257)
    software = row.software
    if software.startswith("megatron"):  # it pads its vocabulary to a multiple of 128 per tensor rank
        every = 128 * row.count("tp")
        vocabulary = -(-vocabulary // every) * every
    llama = any(family in name for family in ("llama", "internlm", "mistral", "qwen", "baichuan", "yi-", "mixtral"))
    mpt = "mpt" in name
    return Decoder(
        layers=row.count("layers"),
        hidden=hidden,
        feed_forward=row.count("ffn_hidden", 4 * hidden),
        heads=heads,
        kv_heads=row.count("kv_heads", heads),
        vocabulary=vocabulary,
        length=row.count("seq_len"),
        norm="rms" if llama else "layer",
        bias=not (llama or mpt),
        gated=llama,
        rotary=llama,
        tied=not llama,
        dropout=0.1 if software in _EXPLICIT_ATTENTION else 0.0,
        explicit_attention=software in _EXPLICIT_ATTENTION and not llama and not _fused_by_engine(row),
    )


def _fused_by_engine(row: Row) -> bool:
    """On Hopper and after it Megatron's layers are Transformer Engine's, whose attention is one kernel."""
    return row.software == "megatron" and device_of(row.text("gpu")).startswith(("h100", "h200", "h800", "b200"))


_MEMORY = re.compile(r"(\d+)\s*g", re.IGNORECASE)


def device_of(gpu: str) -> str:
    """The preset that a row's `gpu` column names."""
    text = re.sub(r"[-_ ]|sxm\d?|nvidia|amd|geforce|tesla", "", gpu.lower())
    families = sorted({name.split("-")[0] for name in PRESETS if name != "cpu"}, key=len, reverse=True)
    family = next((f for f in families if f in text), "")
    found = [name for name in PRESETS if name.split("-")[0] == family]
    if not found:
        raise Unsupported(f"no preset for gpu {gpu!r}")
    memory = _MEMORY.search(text.split(family, 1)[1])
    if family == "h100" and memory and memory.group(1) == "96":
        return "h100hbm2e-96gb"
    exact = [name for name in found if memory and name.endswith(f"-{memory.group(1)}gb")]
    # Where the source does not say how much memory a part has, it is the larger.
    return (exact or found)[-1]


def cluster_of(row: Row) -> Cluster:
    """The row's hosts; its nominal bandwidths replace the preset's where it has any."""
    num, per_host = row.count("num_gpus"), row.count("gpus_per_node", 8)
    hosts = math.ceil(num / per_host)
    bandwidths = [row.number_of(name) for name in ("intra_bw_GBps", "inter_bw_GBps")]
    return preset(
        device_of(row.text("gpu")),
        hosts,
        min(per_host, num) if hosts == 1 else per_host,
        software=row.software + (FLOAT8 if row.float8 else ""),
        intra_bytes_per_s=bandwidths[0] and bandwidths[0] * 1e9,
        inter_bytes_per_s=bandwidths[1] and bandwidths[1] * 1e9,
    )


def plan_of(row: Row, graph: Graph) -> Plan:
    data, tensor, pipeline = degrees(row)
    if row.count("ep") > 1:
        raise Unsupported("expert parallelism")
    context = row.count("cp")
    rows, (_, microbatches) = global_rows(row), microbatch_rows(row)
    schedule = next((name for words, name in _SCHEDULES if words in row.text("schedule").lower()), "1f1b")
    if schedule not in SCHEDULES:
        raise Unsupported(f"schedule {schedule}")
    zero, group = _zero(row.text("dp_mode"), data, tensor, row.count("gpus_per_node", 8))
    shards = data * microbatches
    axes: list[tuple[Layout, ...]] = []
    outer: dict[str, tuple[tuple[Strategy, int], ...]] = {}
    if context > 1:
        # FSDP shards over the data and the context axis together.
        sharded = _zero(row.text("dp_mode"), data * context, tensor, row.count("gpus_per_node", 8))[0] == 3
        axes.append(context_layouts(graph, context, shards=shards, gathered=sharded))
        for block, layout in zip(graph.blocks, axes[0], strict=True):
            for op, key in zip(graph.block_ops(block), layout.strategies, strict=True):
                outer[op.name] = ((find_strategies(graph, op, (key,), (context,), shards)[0], context),)
    if tensor > 1:
        sequence = row.count("sp", 0) > 0
        axes.append(
            megatron_layouts(
                graph, tensor, sequence=sequence, shards=shards,
                options=lambda op: strategies(graph, op, tensor, shards, outer.get(op.name, ())),
            )
        )  # fmt: skip
    order = {layout: i for i, layout in enumerate(dict.fromkeys(layout for axis in axes for layout in axis))}
    index = [tuple(order[layout] for layout in axis) for axis in axes]
    recompute = {"": "none", "no": "none", "none": "none", "selective": "selective"}.get(row.text("recompute"), "full")
    # Only layers are computed again: no framework wraps the embedding or the head.
    kinds = [block.kind for block in graph.blocks]
    layer = max(set(kinds), key=kinds.count)
    stages = []
    width = data * context * tensor
    for s, (start, stop) in enumerate(_cuts(row, graph, pipeline, schedule)):
        group_ranks = _group(s, pipeline, schedule)
        stages.append(
            Stage(
                start, stop, tuple(range(group_ranks * width, (group_ranks + 1) * width)), data,
                (*tensor_axes(context), *tensor_axes(tensor)), tuple(axis[start:stop] for axis in index),
                tuple(recompute if kinds[b] == layer else "none" for b in range(start, stop)), zero, group,
            )
        )  # fmt: skip
    return Plan(
        graph.name, graph.fingerprint, width * pipeline, rows, microbatches, schedule, tuple(stages), tuple(order),
        precision=_precision(row.text("dtype")),
    )  # fmt: skip


def _precision(dtype: str) -> str:
    text = dtype.lower()
    if "fp8" in text or "bf16" in text:
        return "float16" if text.startswith("fp16") else "bfloat16"
    return "float16" if "fp16" in text else "float32"


def _zero(mode: str, data: int, tensor: int, per_host: int) -> tuple[int, int]:
    """(ZeRO level, group) of a row's dp_mode."""
    found = re.search(r"(zero|fsdp)-?(\d?)", mode.lower())  # "ddp/zero1?" too
    if found is None or data == 1:
        return 0, 0
    level = int(found.group(2) or 3)
    if "intra" in mode or "hsdp" in mode:
        group = min(data, max(1, per_host // tensor))
        return (level, group if 1 < group < data else 0) if group > 1 else (0, 0)
    return level, 0


def _cuts(row: Row, graph: Graph, pipeline: int, schedule: str) -> Iterator[tuple[int, int]]:
    """Blocks of each stage: equal numbers of layers, the embedding with the first and the head with the last."""
    kinds = [block.kind for block in graph.blocks]
    layer = max(set(kinds), key=kinds.count)
    first = kinds.index(layer)
    layers = kinds.count(layer)
    spared = "one layer fewer" in row.text("notes")
    chunks = row.count("vpp", 0) or (1 if schedule != "interleaved" else (layers + (2 if spared else 0)) // pipeline)
    if schedule == "zb-v":
        chunks = 2
    count = pipeline * (chunks if schedule in ("interleaved", "zb-v") else 1)
    # Where the outer stages have a layer fewer, the cut is made as if there were two layers more.
    pad = 1 if spared else 0
    if count > layers + 2 * pad:
        raise Unsupported(f"{count} stages of {layers} layers")
    edges = [min(max(round(i * (layers + 2 * pad) / count) - pad, 0), layers) for i in range(count + 1)]
    for s in range(count):
        start = 0 if s == 0 else first + edges[s]
        stop = len(kinds) if s == count - 1 else first + edges[s + 1]
        if start < stop:
            yield start, stop


def _group(stage: int, pipeline: int, schedule: str) -> int:
    """Which group of ranks runs a stage."""
    if schedule == "zb-v":
        return stage if stage < pipeline else 2 * pipeline - 1 - stage
    return stage % pipeline
