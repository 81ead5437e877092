"""Seconds of one op, one conversion and one block, per rank and microbatch. Blocks of one kind are priced once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..cluster.spec import Cluster
from ..graph import Block, Graph, Op
from ..sharding.batch import batch_layout
from ..sharding.flow import Run, Step
from ..sharding.placement import Action, Placement, Split, conversion
from ..sharding.rows import Parts
from ..sharding.strategy import Strategy
from .collectives import collective_s
from .compute import seconds_by_class
from .corrections import Corrections
from .kernels import Call, Kernel, kernels
from .local import LocalShapes
from .storage import Storages, storages

Both = tuple[float, float]
Table = dict[str, Both]


@dataclass(frozen=True, slots=True)
class BlockSeconds:
    """compute: (forward, backward) seconds by class; collectives: by "<link>/<collective>", link "intra" or "inter"."""

    compute: Mapping[str, Both]
    collectives: Mapping[str, Both]

    @property
    def forward_s(self) -> float:
        return sum(f for f, _ in self.compute.values()) + sum(f for f, _ in self.collectives.values())

    @property
    def backward_s(self) -> float:
        return sum(b for _, b in self.compute.values()) + sum(b for _, b in self.collectives.values())


def add(table: Table, name: str, forward_s: float, backward_s: float) -> None:
    if forward_s or backward_s:
        f, b = table.get(name, (0.0, 0.0))
        table[name] = (f + forward_s, b + backward_s)


class Pricer:
    """Prices of ops and conversions of one graph on one cluster."""

    def __init__(self, graph: Graph, cluster: Cluster, corrections: Corrections) -> None:
        self.graph, self.cluster, self.corrections = graph, cluster, corrections
        self.storages: Storages = storages(graph)
        self._local: dict[int, LocalShapes] = {}
        self._ops: dict[tuple, tuple[dict[str, float], dict[str, float]]] = {}
        # Ops at the same position of isomorphic blocks have one price.
        first: dict[int, Block] = {}
        self._representative: dict[str, str] = {}
        for block in graph.blocks:
            model = first.setdefault(block.kind, block)
            self._representative.update(zip(block.ops, model.ops, strict=True))

    def local(self, shards: Parts) -> LocalShapes:
        if shards not in self._local:
            placements = batch_layout(self.graph, shards.numerator).placements if shards > 1 else {}
            self._local[shards] = LocalShapes(self.graph, shards, placements)
        return self._local[shards]

    def op_seconds(self, op: Op, strategy: Strategy | None, shards: int) -> tuple[dict[str, float], dict[str, float]]:
        """(forward, backward) seconds by compute class of `op` on one rank; collectives inside it do not count."""
        key = (self._representative.get(op.name, op.name), strategy, shards)
        found = self._ops.get(key)
        if found is None:
            # A special algorithm may do more than its share: a causal attention split over queries fills its square.
            more = strategy.work * strategy.degree if strategy is not None and strategy.degree > 1 else 1.0
            forward, backward = (
                [replace(kernel, amount=kernel.amount * more) for kernel in part]
                for part in kernels(self._call(op, strategy, shards))
            )
            device = self.cluster.device
            found = self._ops[key] = (
                seconds_by_class(device, forward, False, self.corrections),
                seconds_by_class(device, backward, True, self.corrections),
            )
        return found

    def inner_collective(self, op: Op, strategy: Strategy | None, shards: int, ranks: Sequence[int]) -> float:
        """Seconds of the small all-reduces inside a special algorithm, all in the forward."""
        if strategy is None or not strategy.collective_bytes:
            return 0.0
        size = strategy.collective_bytes / shards
        return collective_s(self.cluster, "all_reduce", size, tuple(ranks), self.corrections)

    def conversion_actions(
        self, tensor: str, have: Placement, want: Placement, shards: int
    ) -> tuple[tuple[Action, Placement, Placement], tuple[Action, Placement, Placement] | None, float]:
        """(forward action, backward action or None where no gradient flows, whole bytes of the tensor on the axis)."""
        actions = conversion(have, want)
        backward = (actions.backward, want, have) if self.graph.tensors[tensor].requires_grad else None
        return (actions.forward, have, want), backward, self.local(shards).size_bytes(tensor)

    def action_seconds(
        self, action: Action, source: Placement, target: Placement, size: float, ranks: tuple[int, ...], adjoint: bool
    ) -> tuple[float, float]:
        """(communication, local copies) of one action on a tensor of `size` whole bytes. adjoint: in the backward."""
        if action == "":
            return 0.0, 0.0
        moves = action in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
        wire_s = collective_s(self.cluster, action, size, ranks, self.corrections) if moves else 0.0
        copied = _copied_bytes(action, source, target, size, len(ranks))
        device = self.cluster.device
        seconds = seconds_by_class(device, [Kernel("copy", copied, copied, "", launches=3)], adjoint, self.corrections)
        return wire_s, sum(seconds.values())

    def block_seconds(
        self, steps: Sequence[Step], shards: int, ranks: tuple[int, ...], at_rest: frozenset[str]
    ) -> BlockSeconds:
        """The seconds of a block's steps, by class and collective.

        ranks: of the model axis. at_rest: parameters; the all-reduce of a replicated parameter's gradient happens once
        per step and is not part of a microbatch.
        """
        compute: Table = {}
        collectives: Table = {}
        link = "inter" if self.cluster.crosses_hosts(ranks) else "intra"
        for step in steps:
            if isinstance(step, Run):
                forward, backward = self.op_seconds(step.op, step.strategy, shards)
                for name, seconds in forward.items():
                    add(compute, name, seconds, 0.0)
                for name, seconds in backward.items():
                    add(compute, name, 0.0, seconds)
                inner_s = self.inner_collective(step.op, step.strategy, shards, ranks)
                add(collectives, f"{link}/all_reduce", inner_s, 0.0)
                continue
            forward_action, backward_action, size = self.conversion_actions(step.tensor, step.have, step.want, shards)
            wire_s, copy_s = self.action_seconds(*forward_action, size, ranks, False)
            add(collectives, f"{link}/{forward_action[0]}", wire_s, 0.0)
            add(compute, "copy", copy_s, 0.0)
            if backward_action is not None and not (step.tensor in at_rest and backward_action[0] == "all_reduce"):
                wire_s, copy_s = self.action_seconds(*backward_action, size, ranks, True)
                add(collectives, f"{link}/{backward_action[0]}", 0.0, wire_s)
                add(compute, "copy", 0.0, copy_s)
        return BlockSeconds(compute, collectives)

    def _call(self, op: Op, strategy: Strategy | None, shards: int) -> Call:
        local, tensors = self.local(shards), self.graph.tensors
        degree = axis_degree(strategy)
        in_places = strategy.inputs if strategy else (None,) * len(op.inputs)
        out_places = strategy.outputs if strategy else (None,) * len(op.outputs)
        return Call(
            op,
            tuple(tensors[name] for name in op.inputs),
            tuple(tensors[name] for name in op.outputs),
            tuple(local.shape(n, p, degree) for n, p in zip(op.inputs, in_places, strict=True)),
            tuple(local.shape(n, p, degree) for n, p in zip(op.outputs, out_places, strict=True)),
            op.name in self.storages.copies,
            tuple(len(self.graph.consumers[name]) for name in op.inputs),
        )


def axis_degree(strategy: Strategy | None) -> int:
    """The ranks that an op is split over."""
    return 1 if strategy is None else strategy.degree


def _copied_bytes(action: Action, source: Placement, target: Placement, size: float, ranks: int) -> float:
    """Bytes that an action reads and writes locally besides its collective.

    Collectives work on contiguous buffers with the ranks outermost, so a split of any dim but the first is rearranged;
    an all-reduce must not overwrite its input.
    """

    def rearranged(placement: Placement) -> bool:
        return isinstance(placement, Split) and (placement.dim > 0 or placement.blocks > 1)

    match action:
        case "all_reduce":
            return 2 * size
        case "all_gather":
            return 2 * size if rearranged(source) else 0.0
        case "reduce_scatter":
            return 2 * size if rearranged(target) else 0.0
        case "all_to_all":
            return 2 * size / ranks * (rearranged(source) + rearranged(target))
        case "slice":
            return 2 * size / ranks if rearranged(target) else 0.0
        case "pad":
            return size + 2 * size / ranks + (2 * size if rearranged(source) else 0)
        case "mask":
            return size
    return 0.0
