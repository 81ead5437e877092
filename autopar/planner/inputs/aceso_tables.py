"""Reader of Aceso's profiles: one table of ops per (microbatch size, tensor degree, split algorithm), and collectives.

`<model>_mbs<b>_tp<t>_algo<a>.csv` has a row per op of one transformer layer, with what stands in front of the layers
and behind them: times in microseconds, sizes in MB (2**20 bytes). `prim_<model>_<collective>_<n>gpus.csv` has the time
in milliseconds by MB; `p2p_intra_node.csv` has, in columns by MB, a bandwidth in GB/s.

Format: the profiler of the Aceso branch of github.com/microsoft/SuperScaler (Liu et al., EuroSys 2024).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .layer_dag import Choice, Edge, Layer, LayerAt, LayerDag
from .text import number, read_text

MB = 2**20
_COLUMNS = (
    "forward-compute", "backward-compute", "input_size", "output_size", "weights", "activations", "fwd_reserved",
    "bwd_reserved",
)  # fmt: skip
_EXPECTED = f"an Aceso op table (columns op_name, {', '.join(_COLUMNS)})"
# AdamW in mixed precision, as Aceso counts it: float16 weight and gradient, float32 copy and two moments, per element
# of a float16 weight: 16 bytes for 2.
STATE_PER_WEIGHT_BYTE = 8


@dataclass(frozen=True, slots=True)
class ProfiledOp:
    """One op on one of `tensor` devices, for one microbatch."""

    name: str
    forward_s: float
    backward_s: float
    input_bytes: float
    output_bytes: float
    weight_bytes: float
    activation_bytes: float
    forward_reserved_bytes: float
    backward_reserved_bytes: float


@dataclass(frozen=True, slots=True)
class AcesoProfile:
    """tables: ops by (microbatch size, tensor degree, algorithm). collectives: (bytes, seconds) points by (name, number
    of devices)."""

    tables: Mapping[tuple[int, int, int], tuple[ProfiledOp, ...]]
    collectives: Mapping[tuple[str, int], tuple[tuple[float, float], ...]]


def read_aceso_table(path: str | Path) -> tuple[ProfiledOp, ...]:
    """The ops of one table, in order. ValueError, with file and row, where it is truncated or foreign."""
    rows = list(csv.reader(read_text(path, _EXPECTED).splitlines()))
    if rows[0] != ["op_name", *_COLUMNS]:
        raise ValueError(f"{path}: the first line is {','.join(rows[0])[:60]!r}, expected {_EXPECTED}")
    ops = []
    for at, row in enumerate(rows[1:], 2):
        if len(row) != len(rows[0]):
            raise ValueError(f"{path}:{at}: {len(row)} columns (truncated?), expected {len(rows[0])}")
        values = [
            number(path, f"{name} of {row[0]} (line {at})", value)
            for name, value in zip(_COLUMNS, row[1:], strict=True)
        ]
        ops.append(ProfiledOp(row[0], values[0] * 1e-6, values[1] * 1e-6, *(value * MB for value in values[2:])))
    if not ops:
        raise ValueError(f"{path}: no ops (truncated?), expected {_EXPECTED}")
    return tuple(ops)


def read_aceso(folder: str | Path, model: str) -> AcesoProfile:
    """All tables of one model ("gpt_1_3B") in a folder. ValueError where there is none, or one is foreign."""
    tables, collectives = {}, {}
    for path in sorted(Path(folder).glob(f"*{model}_*.csv")):
        if found := re.fullmatch(rf"{re.escape(model)}_mbs(\d+)_tp(\d+)_algo(\d+)", path.stem):
            size, tensor, algorithm = map(int, found.groups())
            tables[size, tensor, algorithm] = read_aceso_table(path)
        elif found := re.fullmatch(rf"prim_{re.escape(model)}_(\w+)_(\d+)gpus", path.stem):
            collectives[found.group(1), int(found.group(2))] = _collective(path)
    if not tables:
        raise ValueError(f"{folder}: no table {model}_mbs<b>_tp<t>_algo<a>.csv; expected a folder of Aceso profiles")
    return AcesoProfile(tables, collectives)


def _collective(path: Path) -> tuple[tuple[float, float], ...]:
    rows = list(csv.reader(read_text(path, "collective times").splitlines()))
    if rows[0] != ["data_size(MB)", "time(ms)"]:
        raise ValueError(f"{path}: the first line is {','.join(rows[0])[:60]!r}, expected data_size(MB),time(ms)")
    points = []
    for at, row in enumerate(rows[1:], 2):
        if len(row) != 2:
            raise ValueError(f"{path}:{at}: {len(row)} columns, expected 2")
        size, time = (number(path, f"line {at}", value) for value in row)
        points.append((size * MB, time / 1e3))
    return tuple(sorted(points))


def aceso_layers(profile: AcesoProfile, num_layers: int, microbatch_size: int) -> LayerDag:
    """The profiled model with so many transformer layers, as a chain of layers for a microbatch of that size.

    The first row stands in front of the layers, the last two behind them. At each tensor degree a layer takes, op by
    op, the faster of the algorithms; its second choice recomputes its forward. Transient memory (what ops reserve while
    they run, the activations of the one layer that is computed again) is in the peaks of a choice alone: for a planner that
    looks at each_bytes and rest_bytes only, take it off the machine's memory. ValueError for a size that was not profiled.
    """
    sizes = sorted({size for size, _, _ in profile.tables})
    if microbatch_size not in sizes:
        raise ValueError(f"microbatches of {microbatch_size} were not profiled; expected one of {sizes}")
    if num_layers < 1:
        raise ValueError(f"{num_layers} layers; expected at least 1")
    at: list[dict[int, LayerAt]] = [{} for _ in range(num_layers + 2)]
    boundary = 0.0
    for tensor in sorted({t for size, t, _ in profile.tables if size == microbatch_size}):
        ways = [ops for (size, t, _), ops in profile.tables.items() if (size, t) == (microbatch_size, tensor)]
        best = [min(rows, key=lambda op: op.forward_s + op.backward_s) for rows in zip(*ways, strict=True)]
        boundary = max(boundary, ways[0][0].output_bytes)
        runs = [best[:1], *([best[1:-2]] * num_layers), best[-2:]]
        for layer, ops in enumerate(runs):
            edges = {e: 0.0 for e in (layer - 1, layer) if 0 <= e <= num_layers}
            at[layer][tensor] = _layer_at(ops, edges)
    names = ["front", *(f"layer {i}" for i in range(num_layers)), "back"]
    layers = tuple(Layer(name, found) for name, found in zip(names, at, strict=True))
    return LayerDag(layers, tuple(Edge(i, i + 1, boundary) for i in range(num_layers + 1)))


def _layer_at(ops: list[ProfiledOp], edges: dict[int, float]) -> LayerAt:
    forward_s, backward_s = sum(op.forward_s for op in ops), sum(op.backward_s for op in ops)
    weights = sum(op.weight_bytes for op in ops)
    activations = sum(op.activation_bytes for op in ops)
    kept = min(ops[0].input_bytes, activations)
    rest = STATE_PER_WEIGHT_BYTE * weights
    forward_peak = max(op.forward_reserved_bytes for op in ops)
    backward_peak = max(op.backward_reserved_bytes for op in ops)
    again_peak = activations - kept + max(forward_peak, backward_peak)
    choices = (
        Choice("keep", forward_s + backward_s, activations, rest, forward_s, forward_peak, backward_peak),
        Choice("recompute", 2 * forward_s + backward_s, kept, rest, forward_s, forward_peak, again_peak),
    )
    return LayerAt(choices, weights, edges)
