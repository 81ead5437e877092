"""A `Problem` made of measured tables of layers, so that every search of stages runs on the input of another system's planner.

Each layer of a `LayerDag` is a block, in a topological order; `table_costs` says what stages of them cost. The graph and its
layouts are stand-ins, in which no op uses the model axis: profiles do not say how ops were split, and their times hold the
collectives of the model axis. So methods that look into blocks have nothing to choose there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from ...cluster.spec import Cluster, Device, Link
from ...graph import Block, Graph, Op, Ref, Tensor
from ...plan import Layout
from ..constraints import Constraints, Space
from ..problem import Problem
from ..shapes import Chain, Shape
from .aceso_tables import AcesoProfile, aceso_layers
from .layer_dag import LayerDag, LayerMachine, topological_order
from .pipedream_text import ProfiledGraph, pipedream_layers
from .table_costs import CHOICES, Points, TableCosts, in_words

_FREE = Constraints()


@dataclass
class WholeBlocks:
    """The layouts of a `TableProblem`: one chain, in which no op uses the model axis.

    A `planner.problem.ChainSource`, with what planner/broad.py asks besides.
    """

    costs: TableCosts
    _chains: dict[int, Chain] = field(default_factory=dict, repr=False)

    def of(self, problem: Problem, shape: Shape) -> tuple[Chain, ...]:
        return (self.smallest(problem, shape),)

    def without_recompute(self, problem: Problem, shape: Shape) -> tuple[Chain, ...]:
        return self.of(problem, shape)

    def smallest(self, problem: Problem, shape: Shape) -> Chain:
        tensor = shape.tensor
        if tensor not in self._chains:
            layouts = [whole_layout(block, tensor) for block in problem.graph.blocks]
            self._chains[tensor] = Chain.of(layouts) if tensor > 1 else Chain()
        return self._chains[tensor]

    def serve(self, problem: Problem, tensor: int, shards: int, others: int) -> bool:
        return True

    def pass_s(self, problem: Problem, tensor: int, shards: int) -> list[float]:
        rows = problem.graph.batch_size // shards
        found = []
        for b in range(self.costs.num_blocks):
            ways = [self.costs.block(b, tensor, choice, rows) for choice in problem.recompute_choices]
            found.append(min(way.forward_s + way.backward_s for way in ways))
        return found

    def least_s(self, problem: Problem, shape: Shape, most_bytes: float, enough_s: float) -> float:
        return sum(self.pass_s(problem, shape.tensor, shape.shards))


class TableProblem(Problem):
    """A problem whose tensor degrees are those that were profiled."""

    def splits(self, tensor: int, data: int) -> bool:
        return tensor in self.costs.degrees


def table_problem(
    tables: Mapping[int, LayerDag],
    cluster: Cluster,
    batch_size: int,
    constraints: Constraints = _FREE,
    *,
    collectives: Mapping[tuple[str, int], Points] | None = None,
    name: str = "profiled model",
) -> TableProblem:
    """The problem of training the profiled layers on `cluster` with `batch_size` rows a step.

    tables: by the rows of the microbatch that was profiled, the same layers and edges each time; bytes and seconds are
        those of that microbatch.
    collectives: measured (bytes, seconds), bytes ascending, by ("all_reduce", number of devices of one host).
    Recomputation is offered where all layers have a second choice. ZeRO is pinned to 0.
    ValueError: no tables, or sizes or a batch that are no whole numbers; other layers or edges at one size than at another;
        edges that form a cycle; layers without a choice, or not profiled on one device alone; a cluster of several kinds of
        hosts; constraints that tables cannot keep, such as a tensor degree that was not profiled.
    """
    if not tables or not all(_is_count(size) for size in tables):
        raise ValueError(f"tables of {list(tables)} rows: expected at least one, by a whole number of rows")
    if not _is_count(batch_size):
        raise ValueError(f"batch_size={batch_size!r}: expected a whole number of rows of at least 1")
    if cluster.hosts:
        raise ValueError(
            "the cluster has several kinds of hosts, and tables are of one kind of device; plan each alone"
        )
    costs = TableCosts({size: _ordered(tables[size]) for size in sorted(tables)}, cluster, collectives or {})
    _check_alike(costs)
    pinned = _pinned(costs, constraints)
    graph = _graph(costs, name, batch_size)
    return TableProblem(graph, cluster, costs, WholeBlocks(costs), pinned, space=Space(recompute=tuple(CHOICES)))


def aceso_problem(
    profile: AcesoProfile, num_layers: int, cluster: Cluster, batch_size: int, constraints: Constraints = _FREE
) -> TableProblem:
    """Of Aceso's op tables, for so many transformer layers, with its measured all-reduces. ValueError as `table_problem`."""
    sizes = {size for size, _, _ in profile.tables}
    tables = {size: aceso_layers(profile, num_layers, size) for size in sizes}
    return table_problem(tables, cluster, batch_size, constraints, collectives=profile.collectives)


def piper_problem(dag: LayerDag, machine: LayerMachine, constraints: Constraints = _FREE) -> TableProblem:
    """Of Piper's input: a row is a sample, and all of the machine's memory is for the plan unless the constraints say
    otherwise. ValueError as `table_problem`."""
    # Times are all in the tables, so the device's own rates stand for nothing.
    device = Device("profiled", int(machine.memory_bytes), {"float32": 1.0}, 1.0, 0.0, 0.0, asynchronous=False)
    link = Link(0.0, machine.bandwidth_bytes_per_s)
    if constraints.memory_limit_bytes is None and constraints.memory_reserve is None:
        constraints = replace(constraints, memory_reserve=0)
    cluster = Cluster(device, 1, machine.num_devices, link, link, "Piper's machine")
    return table_problem({1: dag}, cluster, machine.samples, constraints)


def pipedream_problem(
    graph: ProfiledGraph,
    minibatch_size: int,
    cluster: Cluster,
    batch_size: int,
    constraints: Constraints = _FREE,
    state_per_parameter_byte: float = 3.0,
) -> TableProblem:
    """Of PipeDream's profile of a minibatch of so many rows; see `pipedream_layers`. ValueError as `table_problem`."""
    dag = pipedream_layers(graph, state_per_parameter_byte)
    return table_problem({minibatch_size: dag}, cluster, batch_size, constraints)


def _pinned(costs: TableCosts, given: Constraints) -> Constraints:
    """The constraints, with what tables leave no choice of. ValueError for what they cannot keep."""
    degrees = costs.degrees
    if 1 not in degrees:
        raise ValueError(
            f"tensor degrees that all layers have: {in_words(degrees)}; expected 1, and any others besides"
        )
    if given.tensor is not None and given.tensor not in degrees:
        raise ValueError(f"tensor={given.tensor} was not profiled; expected one of {in_words(degrees)}")
    if given.zero not in (None, 0):
        raise ValueError(f"zero={given.zero}: tables say nothing of sharded state; expected 0 or None")
    if given.roles or given.layout:
        raise ValueError("context=, expert= and layout= say how ops are split, and tables do not; leave them out")
    counts = {
        len(at.choices) for b in range(costs.num_blocks) for degree in degrees for _, at in costs.layer(b, degree)
    }
    choices = tuple(CHOICES)[: min(counts)]
    if not choices:
        raise ValueError("a layer has no choice at a tensor degree; expected one, or a second with recomputation")
    if given.recompute not in (None, *choices):
        raise ValueError(f"recompute={given.recompute!r}: the layers' choices are {in_words(choices)}")
    return replace(given, zero=0, recompute=choices[0] if len(choices) == 1 else given.recompute)


def _check_alike(costs: TableCosts) -> None:
    """ValueError unless the tables of all sizes are of the same layers and edges."""
    form = None
    for size, dag in costs.tables.items():
        found = ([layer.name for layer in dag.layers], [(edge.source, edge.target) for edge in dag.edges])
        form = form or found
        if found != form:
            raise ValueError(
                f"the table of {size} rows has other layers or edges ({len(found[0])} and {len(found[1])}) than that of "
                f"{next(iter(costs.tables))} ({len(form[0])} and {len(form[1])}); expected tables of one model"
            )
    if not form[0]:
        raise ValueError("the tables have no layers; expected at least one")


def _ordered(dag: LayerDag) -> LayerDag:
    """The same with layers in a topological order, the given one as far as may be; edges keep their indices."""
    order = topological_order(len(dag.layers), dag.edges)
    if len(order) < len(dag.layers):
        raise ValueError("the edges between the layers form a cycle; expected a DAG")
    place = {v: i for i, v in enumerate(order)}
    edges = tuple(replace(edge, source=place[edge.source], target=place[edge.target]) for edge in dag.edges)
    return LayerDag(tuple(dag.layers[v] for v in order), edges)


def _graph(costs: TableCosts, name: str, batch_size: int) -> Graph:
    """A stand-in: per block one linear layer of one weight, rows [batch_size, 1] between them, and a loss at the end."""
    tensors = {"x0": Tensor("x0", (batch_size, 1), torch.float32, "input")}
    ops, blocks = [], []
    last = costs.num_blocks - 1
    for b, (kind, layer) in enumerate(zip(costs.kinds(), costs.layers, strict=True)):
        entered, left, weight, module = f"x{b}", f"x{b + 1}", f"w{b}", f"{b}.{layer.name}"
        tensors[weight] = Tensor(weight, (1, 1), torch.float32, "parameter", True, f"{module}.weight")
        tensors[left] = Tensor(left, (batch_size, 1), torch.float32, "activation", True)
        mine = [Op(f"linear{b}", "aten.linear.default", (Ref(entered), Ref(weight)), (), (left,), module)]
        if b == last:
            tensors["loss"] = Tensor("loss", (), torch.float32, "activation", True)
            mine.append(Op("sum", "aten.sum.default", (Ref(left),), (), ("loss",)))
        ops += mine
        names, before, behind = tuple(op.name for op in mine), (entered,) if b else (), (left,) if b < last else ()
        blocks.append(Block(b, kind, names, before, behind, (weight,)))
    return Graph(
        name, tensors, tuple(ops), ("x0",), (0,), "loss", (), (), frozenset(), tuple(blocks), batch_size,
    )  # fmt: skip


def whole_layout(block: Block, tensor: int) -> Layout:
    """In which no op uses the model axis."""
    whole = (("R",) * len(names) for names in (block.inputs, block.outputs, block.parameters))
    return Layout(tensor, ("-",) * len(block.ops), *whole)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
