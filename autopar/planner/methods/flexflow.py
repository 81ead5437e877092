"""FlexFlow: Markov chain Monte Carlo over how each op is split (sample, operator, attribute and parameter dims).

A configuration picks for every op one of its strategies on an axis of T ranks: a dim of the batch (sample), of the
output (attribute), of the parameters, or no split. From data parallelism on, a step draws an op and a strategy at
random and is kept with probability                                                          `anneal`

    min(1, exp(-ALPHA (time(new) - time(old)) / time(best)))

and every hundredth of the budget the chain goes back to the best configuration. time(.) is a simulation of the task
graph (`task_graph`: compute of each op forward and backward, conversions between neighbours, gradient reductions; the
ranks do the same things, so one stands for all) in which a step re-simulates what it changes (`delta_simulation`).
Ops at one position of isomorphic blocks change together.

Reference: Jia, Zaharia and Aiken, MLSys 2019, sections 4 to 6. It has no pipelines, and ignores memory.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ...graph import Op
from ...plan import Plan
from ...sharding.placement import REPLICATED, Placement
from ...sharding.strategies import strategies
from ...sharding.strategy import Strategy
from ..axis_prices import AxisPrices
from ..pricing import Piece, assemble
from ..problem import Problem, Shape
from .bench import Bench
from .delta_simulation import Simulation, Task
from .op_layouts import at_rest, chain_of, crossing

# What a worse step costs: one of 5% is taken with probability 1/e.
ALPHA = 20.0
STEPS = 1_500
RETURNS = 100
# Tasks simulated in all; a large graph gets fewer steps.
MAX_SIMULATED = 2_000_000


def flexflow(problem: Problem, seed: int = 0, steps: int = STEPS) -> Plan:
    """The best configuration found, over the degrees of the axis and the numbers of microbatches. Seeded."""
    with Bench(problem, "flexflow") as bench:
        shapes = bench.shapes(lambda s: s.pipeline == 1, lambda s: s.zero == 0)
        searched: set[tuple[int, int]] = set()
        for shape in sorted(shapes, key=lambda s: (-s.tensor, s.microbatches)):
            # microbatches only cost time without a pipeline; a plan that does not fit may need them
            if bench.spent or (shape.data, shape.tensor) in searched:
                continue
            if shape.pipeline > 1 or shape.tensor == 1:
                cuts = [bench.num_blocks * (s + 1) // shape.pipeline for s in range(shape.pipeline)]
                plan = bench.equal_plan(shape, cuts)
                fits = min(bench.offer(plan), bench.offer(bench.relieved(plan))) < math.inf
            else:
                fits = _search(bench, shape, random.Random(f"{seed} {shape}"), steps)
            if fits:
                searched.add((shape.data, shape.tensor))
        return bench.best_plan()
    return bench.best_plan()


def _search(bench: Bench, shape: Shape, draw: random.Random, steps: int) -> bool:
    """Search one shape, if its start fits in memory; whether it does."""
    model = OpTasks(bench.problem, shape)
    groups = [group for group in model.groups if len(model.options[group[0]]) > 1]

    def offer() -> bool:
        chain = chain_of(bench.problem.graph, shape.tensor, model.chosen)
        whole = [Piece(0, bench.num_blocks, bench.problem.recompute_choices[0])]
        plan = assemble(bench.problem, shape, chain, whole)
        return min(bench.offer(plan), bench.offer(bench.relieved(plan))) < math.inf

    def change(number: int) -> tuple[float, Callable[[], None]]:
        group = groups[number]
        option = draw.randrange(len(model.options[group[0]]))
        before = {name: model.chosen[name] for name in group}
        undo = simulation.update(model.change({name: model.options[name][option] for name in group}))

        def take_back() -> None:
            model.change(before)
            simulation.update(undo)

        return simulation.finish_s, take_back

    if not offer():
        return False
    simulation = Simulation(model.all_tasks())
    if groups:
        steps = min(steps, max(1, MAX_SIMULATED // len(simulation.tasks)))
        anneal(simulation.finish_s, len(groups), change, draw, steps, lambda: bench.spent)
        offer()
    return True


def anneal(
    start_s: float,
    num: int,
    change: Callable[[int], tuple[float, Callable[[], None]]],
    draw: random.Random,
    steps: int,
    stop: Callable[[], bool] = lambda: False,
) -> float:
    """Least time found; the state is left there.

    change(i): draw another configuration for i of `num` ops; the new time, and how to take the change back.
    """
    now_s = best_s = start_s
    # what has been done since the best configuration, latest last
    since: list[Callable[[], None]] = []
    for step in range(steps):
        if stop():
            break
        new_s, take_back = change(draw.randrange(num))
        if new_s <= now_s or draw.random() < math.exp(-ALPHA * (new_s - now_s) / best_s):
            now_s = new_s
            since.append(take_back)
            if now_s < best_s:
                best_s = now_s
                since.clear()
        else:
            take_back()
        if (step + 1) % max(1, steps // RETURNS) == 0:
            while since:
                since.pop()()
            now_s = best_s
    while since:
        since.pop()()
    return best_s


@dataclass
class OpTasks:
    """The task graph of one rank under a strategy per op; `chosen` starts as data parallelism on the axis."""

    problem: Problem
    shape: Shape
    chosen: dict[str, Strategy] = field(default_factory=dict)
    options: dict[str, Sequence[Strategy]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        graph = self.graph = self.problem.graph
        self.prices = _AllStrategies(self.problem, self.shape, False)
        self.ops = [op for block in graph.blocks for op in graph.block_ops(block)]
        self.position = {op.name: i for i, op in enumerate(self.ops)}
        # ids: per op its conversions, then itself; conversions behind it; the same backwards, mirrored
        self._width = max(len(op.inputs) for op in self.ops) + 3
        at: dict[tuple[int, int], list[str]] = {}
        for block in graph.blocks:
            for i, name in enumerate(block.ops):
                at.setdefault((block.kind, i), []).append(name)
        self.groups = list(at.values())
        self._leaving = {name for block in graph.blocks for name in block.outputs}
        self._tasks: dict[str, dict[int, Task]] = {}
        self._op_s: dict[tuple, tuple[float, float]] = {}
        self._conversions_s: dict[tuple, tuple[float, float]] = {}
        for op in self.ops:
            found = strategies(graph, op, self.shape.tensor, self.shape.shards)
            self.options[op.name] = self.problem.allowed_strategies(op, found)
            self.chosen[op.name] = self._sample(op)

    def _sample(self, op: Op) -> Strategy:
        """The op split along the batch, if it can be; else not split."""
        for strategy in self.options[op.name]:
            if self.prices.cuts_batch(op, strategy):
                return strategy
        return self.options[op.name][0]

    def all_tasks(self) -> dict[int, Task]:
        self._tasks = {op.name: self._of(op) for op in self.ops}
        return {i: task for tasks in self._tasks.values() for i, task in tasks.items()}

    def change(self, strategy: Mapping[str, Strategy]) -> dict[int, Task | None]:
        """Choose anew; what that changes in the task graph."""
        self.chosen.update(strategy)
        touched = {name: None for name in strategy}
        for name in strategy:
            op = self.graph.op[name]
            for tensor in (*op.inputs, *op.outputs):
                touched |= {other.name: None for other in self.graph.consumers[tensor] if other.name in self.position}
                producer = self.graph.producer.get(tensor)
                if producer is not None and producer.name in self.position:
                    touched[producer.name] = None
        changes: dict[int, Task | None] = {}
        for name in touched:
            new, old = self._of(self.graph.op[name]), self._tasks[name]
            changes |= {i: None for i in old if i not in new}
            changes |= {i: task for i, task in new.items() if old.get(i) != task}
            self._tasks[name] = new
        return changes

    # -- tasks of one op

    def _of(self, op: Op) -> dict[int, Task]:
        at, chosen = self.position[op.name], self.chosen[op.name]
        forward, backward = self._ids(at)
        key = (op.name, chosen.key)
        if key not in self._op_s:
            self._op_s[key] = self.prices.op_s(op, chosen)
        op_s = self._op_s[key]
        tasks: dict[int, Task] = {}
        waits = []
        for j, (tensor, want) in enumerate(zip(op.inputs, chosen.inputs, strict=True)):
            have = self._have(tensor)
            owner = self._owner(tensor, want)
            both = self._conversion_s(tensor, have, want)
            # what takes no time is no task: it would only put others in another order
            if owner == (at, j):
                for i, seconds, after in (
                    (forward + j, both[0], self._made(tensor) or self._before(at)),
                    (backward + 1 + j, both[1], (backward,)),
                ):
                    if seconds:
                        tasks[i] = Task(seconds, "link", after)
            waits += (self._ids(owner[0])[0] + owner[1],) if both[0] else self._made(tensor)
        last = forward + self._width - 2
        tasks[last] = Task(op_s[0], "compute", tuple(dict.fromkeys(waits)))
        tasks[backward] = Task(op_s[1], "compute", self._gradients(op, last))
        for name, made in zip(op.outputs, chosen.outputs, strict=True):
            between = crossing(self.graph, self.chosen, name)
            if name in self._leaving and made != between:
                both = self._conversion_s(name, made, between)
                tasks[last + 1] = Task(sum(both), "link", (last,))
        for name in dict.fromkeys(op.inputs):
            if self.graph.tensors[name].role == "parameter" and self._first_use(name) == op.name:
                rest = at_rest(self.graph, self.chosen, name)
                once_s = self.prices.rest_s(name, rest) * self.shape.microbatches
                tasks[backward + self._width - 1] = Task(once_s, "link", (backward,))
        return tasks

    def _conversion_s(self, tensor: str, have: Placement, want: Placement) -> tuple[float, float]:
        key = (tensor, have, want)
        if key not in self._conversions_s:
            self._conversions_s[key] = self.prices.conversion_s(tensor, have, want)
        return self._conversions_s[key]

    def _ids(self, at: int) -> tuple[int, int]:
        """First forward and first backward id of the op at a position."""
        num = len(self.ops)
        return at * self._width, (2 * num - 1 - at) * self._width

    def _have(self, tensor: str) -> Placement:
        op = self.graph.producer.get(tensor)
        if op is None or op.name not in self.position:
            return at_rest(self.graph, self.chosen, tensor) if self._is_parameter(tensor) else REPLICATED
        if tensor in self._leaving:
            return crossing(self.graph, self.chosen, tensor)
        return self.chosen[op.name].outputs[op.outputs.index(tensor)]

    def _is_parameter(self, tensor: str) -> bool:
        return self.graph.tensors[tensor].role == "parameter"

    def _made(self, tensor: str) -> tuple[int, ...]:
        """The task after which a tensor is there."""
        op = self.graph.producer.get(tensor)
        if op is None or op.name not in self.position:
            return ()
        last = self._ids(self.position[op.name])[0] + self._width - 2
        made = self.chosen[op.name].outputs[op.outputs.index(tensor)]
        converted = tensor in self._leaving and made != crossing(self.graph, self.chosen, tensor)
        return (last + converted,)

    def _owner(self, tensor: str, want: Placement) -> tuple[int, int]:
        """(position, input) of the first op that wants a tensor so: the conversion is done once."""
        for op in self.graph.consumers[tensor]:
            if op.name in self.position:
                for j, (name, place) in enumerate(zip(op.inputs, self.chosen[op.name].inputs, strict=True)):
                    if name == tensor and place == want:
                        return self.position[op.name], j
        raise AssertionError(f"nothing wants {tensor} as {want}")

    def _before(self, at: int) -> tuple[int, ...]:
        """What a conversion of a parameter waits for: it is done one op ahead, not all at the start."""
        return (self._ids(at - 1)[0] + self._width - 2,) if at else ()

    def _gradients(self, op: Op, last: int) -> tuple[int, ...]:
        """What the backward of an op waits for: its own forward, and the backwards of its consumers."""
        waits = [last]
        for name in op.outputs:
            have = self._have(name)
            for other in self.graph.consumers[name]:
                if other.name not in self.position:
                    continue
                for tensor, want in zip(other.inputs, self.chosen[other.name].inputs, strict=True):
                    if tensor == name:
                        at, j = self.position[other.name], -1
                        if self._conversion_s(name, have, want)[1]:
                            at, j = self._owner(name, want)
                        waits.append(self._ids(at)[1] + 1 + j)
        return tuple(dict.fromkeys(waits))

    def _first_use(self, parameter: str) -> str:
        return next(op.name for op in self.graph.consumers[parameter] if op.name in self.position)


class _AllStrategies(AxisPrices):
    """Prices that leave the batch to the axis too."""

    def cuts_batch(self, op: Op, strategy: Strategy) -> bool:
        return self._cuts_batch(op, strategy)
