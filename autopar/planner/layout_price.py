"""What one given layout of a block costs, by walking the graph: shares no code with the solver that chose it.

The solver checks its answers with this, the tests price hand-made layouts with it, and it defines what is charged:

    time   =  sum over ops of their compute  +  sum over tensors of each distinct conversion (have, want), once
              + what follows from the bytes at rest of each parameter
    memory =  parameters at rest  +  each distinct storage of each saved activation, once  +  what ops keep besides
              + kept block inputs  +  converted copies of parameters that autograd keeps

Ignored: storages that different tensors share as views of one another are counted once per tensor that is saved; side
tensors (every rank has them anyway); the peak inside the block, which the cost model's stage figures bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..graph import Block, Graph
from ..plan import Layout
from ..sharding.placement import REPLICATED, Placement, parse_placement
from .layout_costs import LayoutCosts, storage


@dataclass(frozen=True, slots=True)
class LayoutPrice:
    """forward_s, backward_s: per microbatch and rank, conversions included; rest_s: what follows from bytes at rest.

    conversions: (tensor, have, want, seconds) of every conversion that is done, in graph order.
    """

    forward_s: float
    backward_s: float
    rest_s: float
    memory_bytes: float
    conversions: tuple[tuple[str, Placement, Placement, float], ...]

    @property
    def time_s(self) -> float:
        return self.forward_s + self.backward_s + self.rest_s


def price_layout(
    graph: Graph, block: Block, layout: Layout, costs: LayoutCosts, shared_parameters: Sequence[str] = ()
) -> LayoutPrice:
    """The price of `layout` on `block`; parameters in `shared_parameters` are at rest for free (see layout_model).

    ValueError: the layout does not fit the block (a wrong number of entries, or a key that no strategy has).
    """
    for field, names in (
        ("strategies", block.ops), ("inputs", block.inputs), ("outputs", block.outputs),
        ("parameters", block.parameters),
    ):  # fmt: skip
        if len(getattr(layout, field)) != len(names):
            raise ValueError(
                f"layout of block {block.index}: {field} has {len(getattr(layout, field))} entries, "
                f"expected {len(names)}"
            )
    have: dict[str, Placement] = {}
    wants: dict[str, list[Placement]] = {}
    saved: dict[str, set[str]] = {}
    forward_s = backward_s = rest_s = memory_bytes = 0.0

    for name, token in zip(block.inputs, layout.inputs, strict=True):
        have[name] = parse_placement(token)
        memory_bytes += costs.input_bytes(name, have[name])
    for name, token in zip(block.parameters, layout.parameters, strict=True):
        have[name] = parse_placement(token)
        if name not in shared_parameters:
            rest_s += costs.rest_s(name, have[name])
            memory_bytes += costs.rest_bytes(name, have[name])

    by_storage: dict[tuple[str, str], Placement] = {}
    for op_name, key in zip(block.ops, layout.strategies, strict=True):
        op = graph.op[op_name]
        strategies = {s.key: s for s in costs.strategies(op)}
        if key not in strategies:
            raise ValueError(f"{op_name} ({op.target}) has no strategy {key!r}; expected one of {sorted(strategies)}")
        strategy = strategies[key]
        seconds = costs.op_s(op, strategy)
        forward_s, backward_s = forward_s + seconds[0], backward_s + seconds[1]
        memory_bytes += costs.saved_extra_bytes(op, strategy)
        have.update(zip(op.outputs, strategy.outputs, strict=True))
        held = list(zip(op.inputs, strategy.inputs, strict=True))
        for name, placement in held:
            wants.setdefault(name, []).append(placement)
        for name, placement in held + list(zip(op.outputs, strategy.outputs, strict=True)):
            if name in op.saves:
                saved.setdefault(name, set()).add(storage(placement))
                by_storage[name, storage(placement)] = placement
    for name, token in zip(block.outputs, layout.outputs, strict=True):
        wants.setdefault(name, []).append(parse_placement(token))
    if graph.loss in have and graph.loss not in block.inputs:
        wants.setdefault(graph.loss, []).append(REPLICATED)  # the loss is whole on every rank

    conversions = []
    for name, placements in wants.items():
        source = have.get(name, REPLICATED)  # side tensors and batch inputs
        for want in sorted(set(placements) - {source}, key=str):
            seconds = costs.conversion_s(name, source, want)
            forward_s, backward_s = forward_s + seconds[0], backward_s + seconds[1]
            conversions.append((name, source, want, sum(seconds)))
            is_parameter = graph.tensors[name].role == "parameter"
            if is_parameter and name in saved and storage(want) != storage(source):
                memory_bytes += costs.saved_bytes(name, want)
    for name, storages in saved.items():
        producer = graph.producer.get(name)
        if producer is not None and producer.name not in graph.side_ops:
            memory_bytes += sum(costs.saved_bytes(name, by_storage[name, key]) for key in storages)
    return LayoutPrice(forward_s, backward_s, rest_s, memory_bytes, tuple(conversions))
