"""Seconds of one op, one conversion and one block, per rank and microbatch. Blocks of one kind are priced once.

On a device that computes asynchronously a pass of a block takes the longer of what the device works and of what the
host needs to launch it; the difference stands as class "launch" among the compute seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..cluster.rates import FLOP_CLASSES
from ..cluster.spec import Cluster
from ..graph import Block, Graph, Op, Tensor
from ..plan import Recompute
from ..sharding.batch import batch_layout
from ..sharding.flow import Run, Step
from ..sharding.placement import Action, Placement, Split, conversion
from ..sharding.rows import Parts
from ..sharding.strategy import Strategy
from .borders import border_bytes, copies_input, copy_kernels
from .collectives import collective_s
from .compute import host_s, kernel_s, seconds_by_class
from .constants import Constants, constants_of
from .corrections import Corrections
from .kernels import Call, Kernel, kernels
from .local import LocalShapes
from .precision import computed_tensors
from .storage import Storages, storages

Both = tuple[float, float]
Table = dict[str, Both]

COLLECTIVE_ACTIONS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")


@dataclass(frozen=True, slots=True)
class OpSeconds:
    """(forward, backward) of one op on one rank: by compute class on the device, and on the host that launches it.

    weight_s: of the backward, what gradients of parameters take.
    """

    forward: Mapping[str, float]
    backward: Mapping[str, float]
    host: Both
    weight_s: float


@dataclass(frozen=True, slots=True)
class Again:
    """Seconds of the forward that is computed again: by class, by collective, and of launching all of it, or but what
    is not counted in flops."""

    compute: Mapping[str, float]
    collectives: Mapping[str, float]
    host_s: float
    cheap_host_s: float


@dataclass(frozen=True, slots=True)
class BlockSeconds:
    """compute: (forward, backward) seconds by class; collectives: by "<link>/<collective>", link "intra" or "inter";
    both of the device. host: seconds of launching. weight_s: of the backward, for gradients of parameters.
    again: of the forward, what computing the block again for its backward repeats.
    """

    compute: Mapping[str, Both]
    collectives: Mapping[str, Both]
    host: Both
    weight_s: float
    again: Again
    constants: Constants

    def passes(self, recompute: Recompute) -> tuple[Mapping[str, Both], Mapping[str, Both]]:
        """(compute, collectives) with what is computed again in the backward, exposed communication alone, and
        the class "launch" for the time that the device waits for the host."""
        compute, collectives, host = self.compute, self.collectives, self.host
        if recompute != "none":
            again = {name: s * self._again(name, recompute) for name, s in self.again.compute.items()}
            compute = {name: (f, b + again.get(name, 0.0)) for name, (f, b) in compute.items()}
            sent = {name: s * self._sent_again(name, recompute) for name, s in self.again.collectives.items()}
            collectives = {name: (f, b + sent.get(name, 0.0)) for name, (f, b) in collectives.items()}
            more_s = self.again.host_s if recompute == "full" else self.again.cheap_host_s
            host = (host[0], host[1] + more_s)
        else:
            compute = dict(compute)
        busy = [sum(pair[way] for pair in compute.values()) for way in (0, 1)]
        overlap = self.constants.tensor_overlap
        if overlap and collectives:
            total = [sum(pair[way] for pair in collectives.values()) for way in (0, 1)]
            seen = [1 - overlap * min(c, w) / c if c else 1.0 for c, w in zip(total, busy, strict=True)]
            collectives = {name: (f * seen[0], b * seen[1]) for name, (f, b) in collectives.items()}
        if any(host):
            total = [sum(pair[way] for pair in collectives.values()) + busy[way] for way in (0, 1)]
            waits = tuple(max(0.0, h - t) for h, t in zip(host, total, strict=True))
            if any(waits):
                compute["launch"] = (waits[0], waits[1])
        return compute, collectives

    def _again(self, compute_class: str, recompute: Recompute) -> float:
        """The share of a class's forward that the backward does again."""
        if recompute == "full" or compute_class not in FLOP_CLASSES:
            return 1.0
        return 1.0 - self.constants.selective_kept if compute_class == "matmul" else 0.0

    def _sent_again(self, collective: str, recompute: Recompute) -> float:
        """What is sent is as expensive as a product: selective recomputation keeps it, or all but what was gathered."""
        return float(recompute == "full" or (self.constants.selective_gathers and collective.endswith("all_gather")))


def _again(compute: Table, collectives: Table, host_s: float, cheap_host_s: float) -> Again:
    return Again(
        {n: f for n, (f, _) in compute.items()}, {n: f for n, (f, _) in collectives.items()}, host_s, cheap_host_s
    )


def repeated_steps(steps: Sequence[Step]) -> int:
    """How many of a block's steps run again if that ends as soon as all is there that the backward reads: what comes
    after the last op that saves something does not, nor that op where it saves nothing of its own making."""
    for index in range(len(steps) - 1, -1, -1):
        step = steps[index]
        if isinstance(step, Run) and (step.op.saves or step.op.saved_extra_bytes):
            made = step.op.saved_extra_bytes or any(name in step.op.outputs for name in step.op.saves)
            return index + bool(made)
    return 0


def add(table: Table, name: str, forward_s: float, backward_s: float) -> None:
    if forward_s or backward_s:
        f, b = table.get(name, (0.0, 0.0))
        table[name] = (f + forward_s, b + backward_s)


class Structure:
    """What prices of a graph rest on and constants do not change: storages, local shapes, kernels of ops."""

    def __init__(self, graph: Graph, precision: str) -> None:
        self.graph = graph
        self.tensors = computed_tensors(graph, precision)
        self.storages: Storages = storages(graph)
        self.local: dict[int, LocalShapes] = {}
        self.kernels: dict[tuple, tuple[list[Kernel], list[Kernel]]] = {}
        # Ops at the same position of isomorphic blocks have one price.
        first: dict[int, Block] = {}
        self.representative: dict[str, str] = {}
        for block in graph.blocks:
            model = first.setdefault(block.kind, block)
            self.representative.update(zip(block.ops, model.ops, strict=True))


class Pricer:
    """Prices of ops and conversions of one graph on one cluster, computed in one precision.

    structure: of a pricer of the same graph and precision, to share.
    """

    def __init__(
        self,
        graph: Graph,
        cluster: Cluster,
        corrections: Corrections,
        constants: Constants | None = None,
        precision: str = "float32",
        structure: Structure | None = None,
    ) -> None:
        self.graph, self.cluster, self.corrections = graph, cluster, corrections
        self.constants = constants or constants_of(cluster)
        self.structure = structure or Structure(graph, precision)
        self._ops: dict[tuple, OpSeconds] = {}

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """As the blocks compute them."""
        return self.structure.tensors

    @property
    def storages(self) -> Storages:
        return self.structure.storages

    def local(self, shards: Parts) -> LocalShapes:
        found = self.structure.local
        if shards not in found:
            placements = batch_layout(self.graph, shards.numerator).placements if shards > 1 else {}
            found[shards] = LocalShapes(self.graph, shards, placements, self.tensors)
        return found[shards]

    def op_seconds(self, op: Op, strategies: tuple[Strategy, ...], shards: int) -> OpSeconds:
        """Seconds of `op` on one rank, with a strategy per model axis; collectives inside it do not count."""
        key = (self.structure.representative.get(op.name, op.name), strategies, shards)
        found = self._ops.get(key)
        if found is None:
            forward, backward = self._kernels(op, strategies, shards, key)
            device, corrections, constants = self.cluster.device, self.corrections, self.constants
            found = self._ops[key] = OpSeconds(
                seconds_by_class(device, forward, False, corrections, constants),
                seconds_by_class(device, backward, True, corrections, constants),
                (host_s(device, forward, False, constants), host_s(device, backward, True, constants)),
                sum(kernel_s(device, k, True, corrections, constants) for k in backward if k.weight),
            )
        return found

    def _kernels(
        self, op: Op, strategies: tuple[Strategy, ...], shards: int, key: tuple
    ) -> tuple[list[Kernel], list[Kernel]]:
        if key not in self.structure.kernels:
            forward, backward = kernels(self._call(op, strategies, shards))
            # A special algorithm may do more than its share: a causal attention split over queries fills its square.
            more = math.prod(strategy.work * strategy.degree for strategy in strategies if strategy.degree > 1)
            # The kernels take a part of the groups for a part of the rows; with an exchange all rows of the part are here.
            more *= math.prod(s.degree for s in strategies if s.special == "exchanged_groups")
            if more != 1:
                forward, backward = (
                    [replace(kernel, amount=kernel.amount * more) for kernel in part] for part in (forward, backward)
                )
            if copies_input(strategies):
                tensor = self.tensors[op.inputs[0]]
                places, degrees = [s.inputs[0] for s in strategies], [s.degree for s in strategies]
                part_bytes = self.local(shards).held_bytes(tensor.name, places, degrees)
                copies = copy_kernels(strategies, tensor, part_bytes)
                forward, backward = [*forward, *copies[0]], [*backward, *copies[1]]
            self.structure.kernels[key] = forward, backward
        return self.structure.kernels[key]

    def collective_s(self, kind: str, size_bytes: float, ranks: Sequence[int]) -> float:
        return collective_s(self.cluster, kind, size_bytes, tuple(ranks), self.corrections, self.constants)

    def inner_seconds(
        self, op: Op, strategies: Sequence[Strategy], axis: int, shards: int, ranks: Sequence[int]
    ) -> dict[str, Both]:
        """By collective, (forward, backward) seconds of what a special algorithm sends on one axis, of these ranks: small
        all-reduces, all of them in the forward, and borders of neighbours."""
        strategy = strategies[axis]
        found: dict[str, Both] = {}
        if strategy.collective_bytes:
            each = strategy.collective_bytes / strategy.collectives / shards
            found["all_reduce"] = strategy.collectives * self.collective_s("all_reduce", each, ranks), 0.0
        if strategy.border_bytes:
            seconds = self.collective_s("send", border_bytes(op, strategies, axis, shards), ranks)
            found["send"] = seconds, seconds if self.graph.tensors[op.inputs[0]].requires_grad else 0.0
        return found

    def conversion_actions(
        self, tensor: str, have: Placement, want: Placement
    ) -> tuple[tuple[Action, Placement, Placement], tuple[Action, Placement, Placement] | None]:
        """(forward action, backward action or None where no gradient flows)."""
        actions = conversion(have, want)
        backward = (actions.backward, want, have) if self.graph.tensors[tensor].requires_grad else None
        return (actions.forward, have, want), backward

    def action_seconds(
        self, action: Action, source: Placement, target: Placement, size: float, ranks: tuple[int, ...], adjoint: bool
    ) -> tuple[float, float]:
        """(communication, local copies) of one action on a tensor of `size` whole bytes. adjoint: in the backward."""
        if action == "":
            return 0.0, 0.0
        wire_s = self.collective_s(action, size, ranks) if action in COLLECTIVE_ACTIONS else 0.0
        copied = _copied_bytes(action, source, target, size, len(ranks))
        if not copied and self.cluster.device.asynchronous:
            return wire_s, 0.0
        copy = [Kernel("copy", copied, copied, "", launches=1 if self.cluster.device.asynchronous else 3)]
        seconds = seconds_by_class(self.cluster.device, copy, adjoint, self.corrections, self.constants)
        return wire_s, sum(seconds.values())

    def block_seconds(
        self, steps: Sequence[Step], shards: int, axes: ModelAxes, at_rest: frozenset[str]
    ) -> BlockSeconds:
        """The seconds of a block's steps, by class and collective.

        at_rest: parameters; the all-reduce of a replicated parameter's gradient happens once per step and is not part
        of a microbatch.
        """
        compute: Table = {}
        collectives: Table = {}
        host = [0.0, 0.0]
        weight_s = cheap_host_s = 0.0
        again: Again | None = None
        repeated = repeated_steps(steps) if self.constants.recompute_stops else len(steps)
        launch_s = self.constants.collective_launch_s if self.cluster.device.asynchronous else 0.0
        local = self.local(shards)
        for index, step in enumerate(steps):
            if index == repeated:
                again = _again(compute, collectives, host[0], cheap_host_s)
            if isinstance(step, Run):
                op = self.op_seconds(step.op, step.strategies, shards)
                for name, seconds in op.forward.items():
                    add(compute, name, seconds, 0.0)
                for name, seconds in op.backward.items():
                    add(compute, name, 0.0, seconds)
                host[0] += op.host[0]
                host[1] += op.host[1]
                weight_s += op.weight_s
                if not any(name in FLOP_CLASSES for name in op.forward):
                    cheap_host_s += op.host[0]
                for axis, strategy in enumerate(step.strategies):
                    ranks = axes.ranks_of((axis,))
                    for name, both in self.inner_seconds(step.op, step.strategies, axis, shards, ranks).items():
                        add(collectives, f"{self._link(ranks)}/{name}", *both)
                        host[0] += launch_s * (strategy.collectives if name == "all_reduce" else 1)
                        host[1] += launch_s if both[1] else 0.0
                continue
            ranks = axes.ranks_of(step.axes)
            link = self._link(ranks)
            forward_action, backward_action = self.conversion_actions(step.tensor, step.have, step.want)
            # What the other axes leave of the tensor is the whole of what moves on these.
            others = [i for i in range(len(axes.degrees)) if i not in step.axes]
            size = local.held_bytes(step.tensor, [step.before[i] for i in others], [axes.degrees[i] for i in others])
            wire_s, copy_s = self.action_seconds(*forward_action, size, ranks, False)
            add(collectives, f"{link}/{forward_action[0]}", wire_s, 0.0)
            add(compute, "copy", copy_s, 0.0)
            host[0] += launch_s if wire_s else 0.0
            if backward_action is not None and not (step.tensor in at_rest and backward_action[0] == "all_reduce"):
                wire_s, copy_s = self.action_seconds(*backward_action, size, ranks, True)
                add(collectives, f"{link}/{backward_action[0]}", 0.0, wire_s)
                add(compute, "copy", 0.0, copy_s)
                host[1] += launch_s if wire_s else 0.0
        return BlockSeconds(
            compute,
            collectives,
            (host[0], host[1]),
            weight_s,
            again or _again(compute, collectives, host[0], cheap_host_s),
            self.constants,
        )

    def _link(self, ranks: tuple[int, ...]) -> str:
        return "inter" if self.cluster.crosses_hosts(ranks) else "intra"

    def _call(self, op: Op, strategies: tuple[Strategy, ...], shards: int) -> Call:
        local, tensors = self.local(shards), self.tensors
        degrees = [strategy.degree for strategy in strategies]
        return Call(
            op,
            tuple(tensors[name] for name in op.inputs),
            tuple(tensors[name] for name in op.outputs),
            tuple(local.held_shape(n, [s.inputs[i] for s in strategies], degrees) for i, n in enumerate(op.inputs)),
            tuple(local.held_shape(n, [s.outputs[i] for s in strategies], degrees) for i, n in enumerate(op.outputs)),
            op.name in self.storages.copies,
            tuple(len(self.graph.consumers[name]) for name in op.inputs),
            self.constants.products_in,
            self.constants.fused_loss,
            self.constants.wide_loss,
            self.constants.softmax_multiple,
            self.constants.softmax_longest,
            self.constants.loss_metrics,
        )


@dataclass(frozen=True, slots=True)
class ModelAxes:
    """The model axes of a stage: their degrees, outermost first, and the global ranks of one replica, row-major."""

    degrees: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()

    def ranks_of(self, axes: Sequence[int]) -> tuple[int, ...]:
        """The first rank's group on these axes together."""
        if len(axes) == len(self.degrees):
            return self.ranks
        found = [0]
        for axis in axes:
            stride = math.prod(self.degrees[axis + 1 :])
            found = [at + i * stride for at in found for i in range(self.degrees[axis])]
        return tuple(self.ranks[at] for at in found)


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
