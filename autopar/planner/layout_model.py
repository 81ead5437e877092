"""The choices of one block and what they cost together, as plain data: what the integer program is built from.

A `Choice` picks one of its options: an op its strategy, a parameter its placement at rest, a block input how it
arrives, a block output how it leaves. A `Flow` joins the choice that places a tensor to those that require it: each
distinct conversion (have, want) of the tensor is paid once, however many of its uses want it. A `Keep` is a tensor
that autograd saves: each distinct storage of it is paid once, however many ops save it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from ..graph import Block, Graph, Op
from ..sharding.placement import REPLICATED, Placement, Split
from ..sharding.strategy import Strategy
from .layout_costs import LayoutCosts, storage

Price = tuple[float, float]  # (seconds, bytes)


@dataclass(frozen=True, slots=True)
class Choice:
    """One decision. prices[i] is what option i costs by itself: (seconds, bytes)."""

    role: Literal["op", "parameter", "input", "output"]
    name: str
    options: tuple[Strategy, ...] | tuple[Placement, ...]
    prices: tuple[Price, ...]


@dataclass(frozen=True, slots=True)
class Use:
    """Where a tensor meets a choice: placements[i] is the tensor's under option i of `choice`."""

    choice: int
    placements: tuple[Placement, ...]


@dataclass(frozen=True, slots=True)
class Flow:
    """From the choice that places `tensor` to those that require it; prices by (have, want), absent where free."""

    tensor: str
    source: Use
    sinks: tuple[Use, ...]
    prices: Mapping[tuple[Placement, Placement], Price]


@dataclass(frozen=True, slots=True)
class Keep:
    """`tensor` is saved by `holders`; memory_bytes by storage."""

    tensor: str
    holders: tuple[Use, ...]
    memory_bytes: Mapping[str, float]


@dataclass(frozen=True)
class BlockModel:
    """All of one block. `choices` lists ops, then parameters, inputs and outputs, each in the block's order.

    parameter_flows: those of parameters, also where every conversion is free. saved_parameters: whose converted copies
    autograd keeps.
    """

    choices: tuple[Choice, ...]
    activation_flows: tuple[Flow, ...]
    parameter_flows: tuple[Flow, ...]
    keeps: tuple[Keep, ...]
    saved_parameters: frozenset[str]

    @cached_property
    def flows(self) -> tuple[Flow, ...]:
        """Those with a conversion that costs something."""
        return tuple(flow for flow in (*self.activation_flows, *self.parameter_flows) if flow.prices)

    @cached_property
    def index(self) -> dict[tuple[str, str], int]:
        return {(choice.role, choice.name): i for i, choice in enumerate(self.choices)}

    def price(self, selection: Sequence[int]) -> Price:
        """(seconds, bytes) of picking option selection[i] of every choice i."""
        time_s = memory_bytes = 0.0
        for choice, option in zip(self.choices, selection, strict=True):
            time_s += choice.prices[option][0]
            memory_bytes += choice.prices[option][1]
        for flow in self.flows:
            have = flow.source.placements[selection[flow.source.choice]]
            for want in {sink.placements[selection[sink.choice]] for sink in flow.sinks}:
                seconds, size = flow.prices.get((have, want), (0.0, 0.0))
                time_s += seconds
                memory_bytes += size
        for keep in self.keeps:
            held = {storage(use.placements[selection[use.choice]]) for use in keep.holders}
            memory_bytes += sum(keep.memory_bytes[name] for name in held)
        return time_s, memory_bytes


def block_model(
    graph: Graph,
    block: Block,
    costs: LayoutCosts,
    inputs: Sequence[Sequence[Placement]],
    outputs: Sequence[Sequence[Placement]],
    shared_parameters: Mapping[str, Placement],
) -> BlockModel:
    """The choices of `block` when input i may arrive as any of inputs[i] and output i leave as any of outputs[i].

    shared_parameters: the placement at rest of every parameter that other blocks use too; its bytes at rest are not
    counted here (a stage holds it once, whatever number of its blocks use it). The loss leaves its block whole.
    """
    builder = _Builder(graph, block, costs)
    for op in graph.block_ops(block):
        builder.add_op(op)
    for name in block.parameters:
        builder.add_parameter(name, shared_parameters.get(name))
    for name, candidates in zip(block.inputs, inputs, strict=True):
        builder.add("input", name, tuple(candidates), [(0.0, costs.input_bytes(name, p)) for p in candidates])
    for name, candidates in zip(block.outputs, outputs, strict=True):
        builder.add("output", name, tuple(candidates), [(0.0, 0.0)] * len(candidates))
    if graph.loss in builder.sources and graph.loss not in (*block.inputs, *block.outputs):
        builder.add("output", graph.loss, (REPLICATED,), [(0.0, 0.0)])
    return builder.finish()


def repriced(model: BlockModel, costs: LayoutCosts, shared_parameters: Collection[str]) -> BlockModel:
    """`model` under `costs` that differ from its own in what parameters cost, at rest and to convert, and nowhere else."""
    choices = tuple(
        replace(choice, prices=_rest_prices(costs, choice.name, choice.options))
        if choice.role == "parameter" and choice.name not in shared_parameters
        else choice
        for choice in model.choices
    )
    flows = tuple(
        replace(flow, prices=_flow_prices(costs, flow, flow.tensor in model.saved_parameters))
        for flow in model.parameter_flows
    )
    return replace(model, choices=choices, parameter_flows=flows)


def _rest_prices(costs: LayoutCosts, name: str, candidates: Iterable[Placement]) -> tuple[Price, ...]:
    return tuple((costs.rest_s(name, p), costs.rest_bytes(name, p)) for p in candidates)


def _flow_prices(costs: LayoutCosts, flow: Flow, saved_parameter: bool) -> dict[tuple[Placement, Placement], Price]:
    wanted = dict.fromkeys(p for sink in flow.sinks for p in sink.placements)
    prices = {}
    for have in dict.fromkeys(flow.source.placements):
        for want in wanted:
            if have == want:
                continue
            size = 0.0
            if saved_parameter and storage(have) != storage(want):
                size = costs.saved_bytes(flow.tensor, want)
            price = (sum(costs.conversion_s(flow.tensor, have, want)), size)
            if price != (0.0, 0.0):
                prices[have, want] = price
    return prices


class _Builder:
    def __init__(self, graph: Graph, block: Block, costs: LayoutCosts) -> None:
        self.graph, self.block, self.costs = graph, block, costs
        self.choices: list[Choice] = []
        self.sources: dict[str, Use] = {}
        self.sinks: dict[str, list[Use]] = {}
        self.holders: dict[str, list[Use]] = {}

    def add(self, role, name: str, options, prices) -> None:
        use = Use(len(self.choices), tuple(options))
        if role == "output":
            self.sinks.setdefault(name, []).append(use)
        else:
            self.sources[name] = use
        self.choices.append(Choice(role, name, use.placements, tuple(prices)))

    def add_op(self, op: Op) -> None:
        inputs = op.inputs
        options, prices = self._undominated(op, len(inputs))
        index = len(self.choices)
        self.choices.append(Choice("op", op.name, options, prices))
        for position, name in enumerate(inputs):
            use = Use(index, tuple(s.inputs[position] for s in options))
            sinks = self.sinks.setdefault(name, [])
            if use not in sinks:
                sinks.append(use)
                if name in op.saves:
                    self.holders.setdefault(name, []).append(use)
        for position, name in enumerate(op.outputs):
            use = Use(index, tuple(s.outputs[position] for s in options))
            self.sources[name] = use
            if name in op.saves:
                self.holders.setdefault(name, []).append(use)

    def _undominated(self, op: Op, num_inputs: int) -> tuple[tuple[Strategy, ...], tuple[Price, ...]]:
        """Of strategies with equal placements, those that no other beats in both time and memory."""
        kept: dict[tuple, list[tuple[Strategy, Price]]] = {}
        for strategy in self.costs.strategies(op):
            assert len(strategy.inputs) == num_inputs and len(strategy.outputs) == len(op.outputs), (op, strategy)
            price = (sum(self.costs.op_s(op, strategy)), self.costs.saved_extra_bytes(op, strategy))
            rivals = kept.setdefault((strategy.inputs, strategy.outputs), [])
            if any(other[0] <= price[0] and other[1] <= price[1] for _, other in rivals):
                continue
            rivals[:] = [r for r in rivals if not (price[0] <= r[1][0] and price[1] <= r[1][1])]
            rivals.append((strategy, price))
        pairs = [pair for rivals in kept.values() for pair in rivals]
        assert pairs, f"{op.name} ({op.target}) has no strategy"
        return tuple(s for s, _ in pairs), tuple(p for _, p in pairs)

    def add_parameter(self, name: str, fixed: Placement | None) -> None:
        if fixed is not None:
            self.add("parameter", name, (fixed,), [(0.0, 0.0)])
            return
        candidates = rest_candidates(p for use in self.sinks.get(name, ()) for p in use.placements)
        self.add("parameter", name, candidates, _rest_prices(self.costs, name, candidates))

    def finish(self) -> BlockModel:
        for name in self.sinks:
            if name not in self.sources:  # a side tensor or a batch input: every rank has the whole of it
                tensor = self.graph.tensors[name]
                producer = self.graph.producer.get(name)
                assert tensor.role != "activation" or producer.name in self.graph.side_ops, (
                    f"{name} reaches block {self.block.index} but is not among its inputs"
                )
                self.add("input", name, (REPLICATED,), [(0.0, 0.0)])
        flows = [self._flow(name, tuple(sinks)) for name, sinks in self.sinks.items()]
        keeps = [self._keep(name, tuple(uses)) for name, uses in self.holders.items() if self._is_activation(name)]
        return BlockModel(
            tuple(self.choices),
            tuple(flow for flow in flows if flow.prices and not self._is_parameter(flow.tensor)),
            tuple(flow for flow in flows if self._is_parameter(flow.tensor)),
            tuple(keeps),
            frozenset(name for name in self.holders if self._is_parameter(name)),
        )

    def _is_parameter(self, name: str) -> bool:
        return self.graph.tensors[name].role == "parameter"

    def _is_activation(self, name: str) -> bool:
        """Whether saving `name` takes memory of its own: parameters and side tensors are there anyway."""
        producer = self.graph.producer.get(name)
        return producer is not None and producer.name not in self.graph.side_ops

    def _flow(self, name: str, sinks: tuple[Use, ...]) -> Flow:
        flow = Flow(name, self.sources[name], sinks, {})
        saved_parameter = self._is_parameter(name) and name in self.holders
        return replace(flow, prices=_flow_prices(self.costs, flow, saved_parameter))

    def _keep(self, name: str, holders: tuple[Use, ...]) -> Keep:
        placements = {storage(p): p for use in holders for p in use.placements}
        return Keep(name, holders, {key: self.costs.saved_bytes(name, p) for key, p in placements.items()})


def rest_candidates(wanted: Iterable[Placement]) -> tuple[Placement, ...]:
    """Where a parameter may lie at rest: replicated, or split as some use of it can want."""
    return tuple(dict.fromkeys([REPLICATED, *(p for p in wanted if isinstance(p, Split))]))
