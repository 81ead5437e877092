"""Reader of Piper's input: profiled layers of a DAG, their configurations per tensor degree, and a machine.

Format: README of github.com/msr-fiddle/piper (Tarnawski, Narayanan and Phanishayee, "Piper: Multidimensional Planner
for DNN Parallelization", NeurIPS 2021, section 3 names the quantities).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .layer_dag import Choice, Edge, Layer, LayerAt, LayerDag, LayerMachine, topological_order
from .text import member, number, read_json

_EXPECTED = "a Piper input (an object with nodes and edges)"


def read_piper(path: str | Path) -> tuple[LayerDag, LayerMachine]:
    """The model and the machine of a Piper file.

    ValueError, with the file and the node or edge, where it is truncated, foreign or inconsistent: an edge between
    unknown nodes, a cycle, a missing synchronisation time, or configurations of one node and degree that differ in
    what they synchronise (the planner charges that per node and degree).
    """
    document = read_json(path, _EXPECTED)
    machine = LayerMachine(
        num_devices=_count(path, document, "maxDevices"),
        memory_bytes=number(path, "maxMemoryPerDevice", member(path, "the file", document, "maxMemoryPerDevice"), 1),
        bandwidth_bytes_per_s=number(path, "bandwidth", member(path, "the file", document, "bandwidth"), 1e-9),
        samples=_count(path, document, "mbsInBatch"),
    )
    nodes = member(path, "the file", document, "nodes", list)
    if not nodes:
        raise ValueError(f"{path}: nodes is empty, expected layers")
    index: dict[int, int] = {}
    for node in nodes:
        key = member(path, "a node", node, "id")
        if not isinstance(key, int) or key in index:
            raise ValueError(f"{path}: a node has id {key!r}, expected whole numbers, each once")
        index[key] = len(index)
    edges = _edges(path, member(path, "the file", document, "edges", list), index)
    layers = tuple(_layer(path, node, index, edges) for node in nodes)
    if len(topological_order(len(layers), edges)) < len(layers):
        raise ValueError(f"{path}: the edges form a cycle; expected a DAG")
    return LayerDag(layers, edges), machine


def _count(path: str | Path, document: Any, key: str) -> int:
    value = number(path, key, member(path, "the file", document, key), 1)
    if value != int(value):
        raise ValueError(f"{path}: {key} is {value}, expected a whole number")
    return int(value)


def _edges(path: str | Path, found: list, index: dict[int, int]) -> tuple[Edge, ...]:
    edges, seen = [], set()
    for i, edge in enumerate(found):
        ends = tuple(member(path, f"edges[{i}]", edge, key) for key in ("sourceId", "destId"))
        for end in ends:
            if not isinstance(end, int) or end not in index:
                raise ValueError(f"{path}: edges[{i}] joins {ends}, but no node has id {end!r}")
        if ends in seen:
            raise ValueError(f"{path}: edges[{i}] joins {ends}, which an edge before it does too")
        seen.add(ends)
        size = number(path, f"communicationCost of edges[{i}]", member(path, f"edges[{i}]", edge, "communicationCost"))
        edges.append(Edge(index[ends[0]], index[ends[1]], size))
    return tuple(edges)


def _layer(path: str | Path, node: dict, index: dict[int, int], edges: tuple[Edge, ...]) -> Layer:
    where = f"node {node['id']}"
    at = {}
    for degree, found in member(path, where, node, "TMPCs", dict).items():
        place = f"TMPCs[{degree!r}] of {where}"
        if not degree.isdecimal() or int(degree) < 1:
            raise ValueError(f"{path}: {where} has configurations for {degree!r} devices, expected a positive number")
        if not isinstance(found, list) or not found:
            raise ValueError(f"{path}: {place} is empty, expected configurations")
        at[int(degree)] = _layer_at(path, place, found, index[node["id"]], index, edges)
    if not at:
        raise ValueError(f"{path}: {where} has no configuration")
    return Layer(str(node.get("name", node["id"])), at)


def _layer_at(
    path: str | Path, place: str, found: list, me: int, index: dict[int, int], edges: tuple[Edge, ...]
) -> LayerAt:
    choices, shared = [], []
    for i, one in enumerate(found):
        where = f"{place}[{i}]"
        values = {
            key: number(path, f"{key} of {where}", member(path, where, one, key))
            for key in ("timePerSample", "memoryUsageA", "memoryUsageB", "parameterSize")
        }
        name = member(path, where, one, "id", str)
        choices.append(Choice(name, values["timePerSample"], values["memoryUsageA"], values["memoryUsageB"]))
        synced = {
            "syncTimeFw": _synced(path, where, one, "syncTimeFw", index),
            "syncTimeBw": _synced(path, where, one, "syncTimeBw", index),
        }
        per_edge = {}
        for e, edge in enumerate(edges):
            for end, other, key in ((edge.target, edge.source, "syncTimeFw"), (edge.source, edge.target, "syncTimeBw")):
                if end == me:
                    if other not in synced[key]:
                        raise ValueError(f"{path}: {key} of {where} lacks the edge with node {_id(index, other)}")
                    per_edge[e] = synced[key][other]
        shared.append((values["parameterSize"], per_edge))
    if any(one != shared[0] for one in shared):
        raise ValueError(
            f"{path}: the configurations of {place} differ in parameterSize or sync times; expected one value of these "
            f"per node and degree"
        )
    if len(choices) != len({choice.name for choice in choices}):
        raise ValueError(f"{path}: two configurations of {place} have one id")
    return LayerAt(tuple(choices), *shared[0])


def _synced(path: str | Path, where: str, one: dict, key: str, index: dict[int, int]) -> dict[int, float]:
    found = {}
    for other, value in member(path, where, one, key, dict).items():
        if not other.lstrip("-").isdecimal() or int(other) not in index:
            raise ValueError(f"{path}: {key} of {where} names node {other!r}, which is not there")
        found[index[int(other)]] = number(path, f"{key}[{other}] of {where}", value)
    return found


def _id(index: dict[int, int], position: int) -> int:
    return next(key for key, at in index.items() if at == position)
