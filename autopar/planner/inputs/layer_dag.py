"""A model as Piper sees it: a DAG of layers, each with its ways to run at every tensor degree. Plain data."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to run a layer on one sample (or microbatch): with recomputation, say, or without.

    time_s: forward and backward; forward_s: the forward alone, None where the profile does not tell. A stage that holds y
    samples in flight needs y * each_bytes + rest_bytes for it; forward_peak_bytes, backward_peak_bytes: what comes and goes
    besides while one sample's forward (backward) runs, 0 where the profile does not tell or rest_bytes has it.
    """

    name: str
    time_s: float
    each_bytes: float
    rest_bytes: float
    forward_s: float | None = None
    forward_peak_bytes: float = 0.0
    backward_peak_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class LayerAt:
    """A layer at one tensor degree: its choices, its parameters' bytes on a device, and per edge (its index in
    `LayerDag.edges`) the bytes that the device synchronises besides when the edge's other end is on another stage."""

    choices: tuple[Choice, ...]
    parameter_bytes: float
    edge_bytes: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Layer:
    name: str
    at: Mapping[int, LayerAt]


@dataclass(frozen=True, slots=True)
class Edge:
    """The output of layers[source], of `size_bytes` a sample, is an input of layers[target]."""

    source: int
    target: int
    size_bytes: float


@dataclass(frozen=True, slots=True)
class LayerDag:
    layers: tuple[Layer, ...]
    edges: tuple[Edge, ...]


@dataclass(frozen=True, slots=True)
class LayerMachine:
    """num_devices equal devices, each with one link to all others; `samples` (microbatches) make a batch."""

    num_devices: int
    memory_bytes: float
    bandwidth_bytes_per_s: float
    samples: int


def topological_order(num_layers: int, edges: Sequence[Edge]) -> list[int]:
    """The layers, each before all that it leads to and else in their own order; without those on cycles or behind one."""
    waiting = [0] * num_layers
    for edge in edges:
        waiting[edge.target] += 1
    ready = [v for v, count in enumerate(waiting) if not count]
    order = []
    while ready:
        order.append(heapq.heappop(ready))
        for edge in edges:
            if edge.source == order[-1]:
                waiting[edge.target] -= 1
                if not waiting[edge.target]:
                    heapq.heappush(ready, edge.target)
    return order
