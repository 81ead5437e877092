"""Seconds by op of one step, from torch's profiler: forward calls, and the backward nodes that belong to them.

The profiler numbers every forward call that autograd records and repeats the number on the backward node that came of
it, so a node's time can be charged to the op that the model called.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch.autograd.profiler_util import FunctionEvent

_NODE = "autograd::engine::evaluate_function: "
OpSeconds = Mapping[str, tuple[float, float]]
"""(forward, backward) seconds by op name without namespace and overload: "linear", "scaled_dot_product_attention"."""


def op_seconds(profile: torch.profiler.profile) -> OpSeconds:
    """Seconds that each op of the profiled region took in all, as the host (CPU) or the device (CUDA) spent them."""
    forward: dict[str, float] = {}
    backward: dict[str, float] = {}
    op_of_number: dict[int, str] = {}
    nodes: list[FunctionEvent] = []
    for event in profile.events():
        if event.name.startswith(_NODE):
            nodes.append(event)
            continue
        top = _outermost(event)
        if top is None:
            continue
        name = top.name.removeprefix("aten::")
        if event.sequence_nr >= 0:
            op_of_number.setdefault(event.sequence_nr, name)
        if event is top:
            forward[name] = forward.get(name, 0.0) + _seconds(event)
    for node in nodes:
        name = op_of_number.get(node.sequence_nr)
        if name is not None:
            backward[name] = backward.get(name, 0.0) + _seconds(node)
    names = {**forward, **backward}
    return MappingProxyType({name: (forward.get(name, 0.0), backward.get(name, 0.0)) for name in names})


def _outermost(event: FunctionEvent) -> FunctionEvent | None:
    """The ATen call that the model made, of which `event` is a part; None inside a backward and for other events."""
    if not event.name.startswith("aten::"):
        return None
    top = event
    parent = event.cpu_parent
    while parent is not None:
        if parent.name.startswith(_NODE):
            return None
        if parent.name.startswith("aten::"):
            top = parent
        parent = parent.cpu_parent
    return top


def _seconds(event: FunctionEvent) -> float:
    microseconds = event.device_time_total or event.cpu_time_total
    return microseconds / 1e6
