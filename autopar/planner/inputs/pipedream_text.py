"""Reader of PipeDream's profiles: a graph as text, one line per node, then one per edge.

    node4 -- Linear(...) -- forward_compute_time=1.2, backward_compute_time=2.1, activation_size=8.0, parameter_size=4.0
    <tab>node4 -- node5

Times are milliseconds of one minibatch on one device, sizes bytes; an activation may be a list, "[8.0; 4.0]".
Format: profiler and optimizer of github.com/msr-fiddle/pipedream (Narayanan et al., SOSP 2019).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from .layer_dag import Choice, Edge, Layer, LayerAt, LayerDag
from .text import number, read_text

_EXPECTED = "a PipeDream graph (lines 'node -- description -- forward_compute_time=..., ...', then edges)"
_FIELDS = ("forward_compute_time", "backward_compute_time", "activation_size", "parameter_size")


@dataclass(frozen=True, slots=True)
class ProfiledNode:
    """seconds of one minibatch on one device; the bytes of its output for that minibatch, and of its parameters."""

    name: str
    description: str
    forward_s: float
    backward_s: float
    activation_bytes: float
    parameter_bytes: float


@dataclass(frozen=True, slots=True)
class ProfiledGraph:
    """nodes in a topological order; edges as pairs of indices."""

    nodes: tuple[ProfiledNode, ...]
    edges: tuple[tuple[int, int], ...]


def read_pipedream(path: str | Path) -> ProfiledGraph:
    """The profile of a file, without the nodes that only stand for the model's inputs and for unused items of tuples.

    ValueError, with the file and line, where it is truncated, foreign, names an unknown node or has a cycle.
    """
    nodes: dict[str, ProfiledNode] = {}
    edges: list[tuple[str, str]] = []
    for at, line in enumerate(read_text(path, _EXPECTED).splitlines(), 1):
        if not line.strip():
            continue
        parts = line.strip().split(" -- ")
        if line.startswith("\t"):
            edges.append(_edge(path, at, parts, nodes))
        else:
            node = _node(path, at, line, parts)
            if node.name in nodes:
                raise ValueError(f"{path}:{at}: {node.name} is described twice")
            nodes[node.name] = node
    if not edges:
        raise ValueError(f"{path}: no edges (truncated?), expected {_EXPECTED}")
    targets, sources = {t for _, t in edges}, {s for s, _ in edges}
    left_out = {name for name, n in nodes.items() if n.description.startswith("Input") and name not in targets}
    left_out |= {name for name, n in nodes.items() if n.description.startswith("__getitem__") and name not in sources}
    kept = [edge for edge in edges if not left_out.intersection(edge)]
    order = _ordered(path, [name for name in nodes if name not in left_out], kept)
    index = {name: i for i, name in enumerate(order)}
    return ProfiledGraph(tuple(nodes[name] for name in order), tuple((index[s], index[t]) for s, t in kept))


def pipedream_layers(graph: ProfiledGraph, state_per_parameter_byte: float) -> LayerDag:
    """The profile as layers for one device and one minibatch, whose outputs are what is kept and sent.

    state_per_parameter_byte: bytes at rest per byte of parameters: 3 for a weight, its gradient and the momentum of SGD, 4
    with Adam's two moments.
    """
    layers = []
    for node in graph.nodes:
        time_s, rest_bytes = node.forward_s + node.backward_s, state_per_parameter_byte * node.parameter_bytes
        choice = Choice("keep", time_s, node.activation_bytes, rest_bytes, node.forward_s)
        layers.append(Layer(node.name, {1: LayerAt((choice,), node.parameter_bytes, {})}))
    edges = tuple(Edge(s, t, graph.nodes[s].activation_bytes) for s, t in graph.edges)
    return LayerDag(tuple(layers), edges)


def _node(path: str | Path, at: int, line: str, parts: list[str]) -> ProfiledNode:
    if len(parts) < 3:
        raise ValueError(f"{path}:{at}: {line.strip()[:60]!r} has {len(parts)} parts, expected {_EXPECTED}")
    found = dict(re.findall(r"(\w+)=(\[[^\]]*\]|[^,\s]+)", parts[-1]))
    values = []
    for field in _FIELDS:
        if field not in found:
            raise ValueError(f"{path}:{at}: {parts[0]} has no {field} (truncated?), expected {_EXPECTED}")
        items = found[field].strip("[]").split(";")
        values.append(sum(number(path, f"{field} of {parts[0]} (line {at})", item.strip()) for item in items))
    return ProfiledNode(parts[0], " -- ".join(parts[1:-1]), values[0] / 1e3, values[1] / 1e3, values[2], values[3])


def _edge(path: str | Path, at: int, parts: list[str], nodes: dict[str, ProfiledNode]) -> tuple[str, str]:
    if len(parts) != 2:
        raise ValueError(f"{path}:{at}: an edge has {len(parts)} ends, expected '<tab>node1 -- node2'")
    for name in parts:
        if name not in nodes:
            raise ValueError(f"{path}:{at}: an edge names {name!r}, which no line before it describes")
    return parts[0], parts[1]


def _ordered(path: str | Path, names: list[str], edges: list[tuple[str, str]]) -> list[str]:
    waiting = dict.fromkeys(names, 0)
    following: dict[str, list[str]] = {name: [] for name in names}
    for source, target in edges:
        waiting[target] += 1
        following[source].append(target)
    ready = [name for name in names if not waiting[name]]
    for name in ready:
        for target in following[name]:
            waiting[target] -= 1
            if not waiting[target]:
                ready.append(target)
    if len(ready) < len(names):
        raise ValueError(f"{path}: the edges form a cycle; expected a DAG")
    return ready
