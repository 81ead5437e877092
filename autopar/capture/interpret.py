"""Run a Graph op by op on one device: the reference that every parallel execution is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch

from ..graph import DEVICE, Graph, Op, Ref
from ..ops import resolve


def interpret(
    graph: Graph, inputs: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Every tensor of the graph, by name; autograd records as the eager module would.

    inputs: batch tensors by name (`Graph.inputs`). state: parameters and buffers by fully qualified name.
    """
    values = {name: inputs[name] for name in graph.inputs}
    values.update({t.name: state[t.fqn] for t in graph.tensors.values() if t.role in ("parameter", "buffer")})
    device = next(iter(values.values())).device
    values.update({name: value.to(device) for name, value in graph.constants.items()})
    for op in graph.ops:
        values.update(zip(op.outputs, run_op(op, values, device, graph.opaque_modules), strict=True))
    return values


def run_op(
    op: Op, values: Mapping[str, torch.Tensor], device: torch.device, opaque_modules: Mapping[str, torch.nn.Module]
) -> tuple[torch.Tensor, ...]:
    """The op's outputs, with `values` for its tensors and `device` for `DEVICE`."""

    def fill(value: Any) -> Any:
        if isinstance(value, Ref):
            return values[value.name]
        if value is DEVICE:
            return device
        return tuple(fill(v) for v in value) if isinstance(value, tuple) else value

    with torch.no_grad() if op.no_grad else nullcontext():
        out = resolve(op.target, opaque_modules)(*fill(op.args), **{name: fill(value) for name, value in op.kwargs})
    return tuple(out) if isinstance(out, tuple | list) else (out,)
