"""Random small graphs with hand-made strategies and prices, for tests of the layout solver."""

from __future__ import annotations

import functools
import itertools
import random
import re
from dataclasses import dataclass, field

import torch

from autopar.graph import Block, Graph, Op, Ref, Tensor
from autopar.plan import Layout
from autopar.planner.layout_model import rest_candidates
from autopar.sharding.placement import PARTIAL, REPLICATED, SHARED, Split
from autopar.sharding.strategy import Strategy

PLACEMENTS = (REPLICATED, SHARED, PARTIAL, Split(0), Split(1), Split(0, 3))


@functools.cache
def _position(name: str) -> str:
    """The name without the number of its block."""
    return re.sub(r"^([bw])\d+", r"\1", name)


@dataclass
class TableCosts:
    """Prices drawn once per question from a seeded generator; the same question always gets the same answer."""

    seed: int
    options: dict[str, tuple[Strategy, ...]]
    integral: bool = False
    forbid: float = 0.0
    by_position: bool = False  # names that differ in the number of their block only are priced alike
    _known: dict = field(default_factory=dict)

    def _draw(self, *question) -> float:
        if self.by_position:
            question = tuple(_position(q) if isinstance(q, str) else q for q in question)
        if question not in self._known:
            generator = random.Random(repr((self.seed, question)))
            self._known[question] = float(generator.randrange(4)) if self.integral else generator.random()
        return self._known[question]

    def strategies(self, op):
        return self.options[op.name]

    def op_s(self, op, strategy):
        return (1e-4 * self._draw("f", op.name, strategy.key), 2e-4 * self._draw("b", op.name, strategy.key))

    def conversion_s(self, tensor, have, want):
        if have == want:
            return (0.0, 0.0)
        if self._draw("forbid", tensor, have, want) < self.forbid:
            return (float("inf"), float("inf"))
        return (3e-4 * self._draw("cf", tensor, have, want), 1e-4 * self._draw("cb", tensor, have, want))

    def rest_s(self, parameter, placement):
        return 1e-4 * self._draw("rs", parameter, placement)

    def rest_bytes(self, parameter, placement):
        return 1e6 * self._draw("rb", parameter, placement)

    def saved_bytes(self, tensor, placement):
        # R and SHARED are one storage, so they must have one size.
        return 1e6 * self._draw("sb", tensor, REPLICATED if placement == SHARED else placement)

    def saved_extra_bytes(self, op, strategy):
        return 1e5 * self._draw("se", op.name, strategy.key)

    def input_bytes(self, tensor, placement):
        return 1e5 * self._draw("ib", tensor, placement)


def random_case(seed: int, num_ops: int = 5, num_blocks: int = 1, **costs) -> tuple[Graph, TableCosts]:
    """A graph of `num_blocks` blocks with fan-out, skips, shared conversions, side tensors and shared parameters."""
    draw = random.Random(seed)
    tensors: dict[str, Tensor] = {}
    ops, side, blocks, options = [], set(), [], {}

    def tensor(name, role):
        tensors[name] = Tensor(name, (6, 6), torch.float32, role, requires_grad=role != "input")
        return name

    tensor("batch", "input")
    ops.append(Op("side", "aten.neg.default", (Ref("batch"),), (), (tensor("mask", "activation"),)))
    side.add("side")
    weights = [tensor(f"w{i}", "parameter") for i in range(1 + num_blocks)]
    stream: list[str] = []  # activations that the next block may read
    for index in range(num_blocks):
        inputs = tuple(stream)
        local = list(inputs)
        names, used = [], []
        for number in range(num_ops):
            pool = local[-4:] + ["batch", "mask"] + weights
            chosen = [draw.choice(local)] if local and draw.random() < 0.8 else []
            chosen += [draw.choice(pool) for _ in range(draw.choice([0, 1, 1, 2]))]
            chosen = chosen or ["batch"]
            name = f"b{index}o{number}"
            outputs = tuple(tensor(f"{name}t{j}", "activation") for j in range(draw.choice([1, 1, 1, 2])))
            saves = tuple(t for t in dict.fromkeys((*chosen, *outputs)) if draw.random() < 0.4)
            ops.append(Op(name, "aten.mul.Tensor", tuple(map(Ref, chosen)), (), outputs, saves=saves))
            places = draw.sample(PLACEMENTS, 3)

            def random_strategy(number: int, places=places, chosen=chosen, outputs=outputs) -> Strategy:
                wanted, made = (tuple(draw.choice(places) for _ in names) for names in (chosen, outputs))
                return Strategy(f"k{number}", wanted, made, work=1.0)

            options[name] = tuple(random_strategy(i) for i in range(draw.choice([1, 2, 3])))
            local.extend(outputs)
            names.append(name)
            used += [c for c in chosen if c in weights]
        last = index == num_blocks - 1
        count = 1 if last else draw.choice([1, 1, 2])
        main = ops[-1].outputs[0]
        stream = [main, *draw.sample([t for t in local if t != main], k=len(local) - 1)][:count]
        blocks.append(Block(index, index, tuple(names), inputs, tuple(stream), tuple(dict.fromkeys(used))))
    graph = Graph("random", tensors, tuple(ops), ("batch",), (0,), stream[0], (), (), frozenset(side), tuple(blocks), 6)
    return graph, TableCosts(seed, options, **costs)


def parameter_candidates(graph: Graph, block: Block, costs: TableCosts, name: str):
    uses = ((s, op) for op in graph.block_ops(block) for s in costs.strategies(op))
    return rest_candidates(p for s, op in uses for p, used in zip(s.inputs, op.inputs, strict=True) if used == name)


def all_layouts(graph: Graph, block: Block, costs: TableCosts, inputs, outputs, shared):
    """Every layout of `block` with the given boundary."""
    keys = [[s.key for s in costs.strategies(op)] for op in graph.block_ops(block)]
    rests = [
        [shared[name]] if name in shared else parameter_candidates(graph, block, costs, name)
        for name in block.parameters
    ]
    for strategies in itertools.product(*keys):
        for rest in itertools.product(*rests):
            yield Layout(2, strategies, tuple(map(str, inputs)), tuple(map(str, outputs)), tuple(map(str, rest)))


def repeated_case(seed: int, num_blocks: int) -> tuple[Graph, TableCosts]:
    """`num_blocks` copies of one random block of one input and one output, with equal strategies and prices."""
    draw = random.Random(seed)
    tensors = {"batch": Tensor("batch", (6, 6), torch.float32, "input")}
    ops, blocks, options = [], [], {}
    pattern = [
        tuple(
            Strategy(f"k{i}", (draw.choice(PLACEMENTS), draw.choice(PLACEMENTS)), (draw.choice(PLACEMENTS),), 1.0)
            for i in range(3)
        )
        for _ in range(4)
    ]
    stream = ()
    for index in range(num_blocks):
        weight = f"w{index}"
        tensors[weight] = Tensor(weight, (6, 6), torch.float32, "parameter", requires_grad=True)
        last, names = stream[0] if stream else "batch", []
        for number, strategies in enumerate(pattern):
            name = f"b{index}o{number}"
            tensors[f"{name}t"] = Tensor(f"{name}t", (6, 6), torch.float32, "activation", requires_grad=True)
            ops.append(Op(name, "aten.mul.Tensor", (Ref(last), Ref(weight)), (), (f"{name}t",)))
            options[name], last = strategies, f"{name}t"
            names.append(name)
        kind = 0 if index == 0 else 2 if index == num_blocks - 1 else 1
        blocks.append(Block(index, kind, tuple(names), stream, (last,), (weight,)))
        stream = (last,)
    graph = Graph("repeated", tensors, tuple(ops), ("batch",), (0,), stream[0], (), (), frozenset(), tuple(blocks), 6)
    return graph, TableCosts(seed, options, by_position=True)
