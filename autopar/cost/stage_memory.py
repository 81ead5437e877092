"""Bytes of a stage per rank: what lies at rest, what a microbatch keeps, and the peaks while it runs.

The caching allocator of a GPU keeps freed blocks and rounds sizes up, so what a program holds of the device exceeds its
tensors by a share of what comes and goes (`Constants.allocator_share`), and by the driver's context, library workspaces
and communication buffers (`context_bytes`). Both are 0 on CPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..graph import Block, Graph
from ..plan import Plan, Recompute, Stage
from ..sharding.rows import stage_parts
from .constants import Constants
from .gathered import Gathered, Sizes, gathered, scatters_each
from .local import LocalShapes
from .memory import BlockMemory

# AdamW keeps two moments in float32 per parameter element.
OPTIMIZER_BYTES_PER_ELEMENT = 8


class Priced(Protocol):
    @property
    def memory(self) -> BlockMemory: ...


@dataclass(frozen=True, slots=True)
class StageMemory:
    """As `StageCost`; local_bytes, trainable_bytes: of each (trainable) parameter as used, before data sharding, by
    name; held_elements: of each parameter, after it, that this rank's optimizer updates."""

    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    unsharded_bytes: int
    activation_bytes: int
    forward_peak_bytes: int
    backward_peak_bytes: int
    local_bytes: dict[str, int]
    trainable_bytes: dict[str, int]
    held_elements: dict[str, float]


@dataclass(frozen=True, slots=True)
class AtRest:
    """Bytes per parameter element at rest. narrow_copy: of the whole copy that blocks compute with, 0 for none."""

    parameter: float
    gradient: float
    optimizer: float
    narrow_copy: float = 0.0


def at_rest(wide_bytes: float, used_bytes: float, constants: Constants) -> AtRest:
    """wide_bytes, used_bytes: of an element in the module, and as blocks compute with it."""
    if used_bytes >= wide_bytes:
        return AtRest(wide_bytes, wide_bytes, OPTIMIZER_BYTES_PER_ELEMENT)
    copy = used_bytes if constants.narrow_copy else 0.0
    return AtRest(constants.parameter_bytes, constants.gradient_bytes, constants.optimizer_bytes, copy)


def stage_memory(
    graph: Graph,
    local: Callable[[int], LocalShapes],
    plan: Plan,
    index: int,
    prices: Sequence[tuple[Block, Priced]],
    constants: Constants,
) -> StageMemory:
    """The memory of stage `index`, of blocks with these prices."""
    stage = plan.stages[index]
    memories = [price.memory for _, price in prices]
    sizes: dict[str, int] = {}
    for (block, _), memory in zip(prices, memories, strict=True):
        sizes.update(zip(block.parameters, memory.parameter_bytes, strict=True))
    trainable = {name: size for name, size in sizes.items() if graph.tensors[name].requires_grad}
    group = stage.zero_group or stage.data
    cuts = [group if stage.zero >= level else 1 for level in (1, 2, 3)]
    if stage.zero == 1 and constants.slices_at_rest and scatters_each(stage, plan.microbatches, constants):
        cuts[1] = group  # the only microbatch's gradients are scattered block by block
    resting = [0.0, 0.0, 0.0]
    held: dict[str, float] = {}
    moved: dict[str, Sizes] = {}
    tensors = local(1).tensors
    for name, size in sizes.items():
        elements = size // tensors[name].dtype.itemsize
        rest = at_rest(graph.tensors[name].at_rest.itemsize, tensors[name].dtype.itemsize, constants)
        moved[name] = (size, 0, 0)
        if plan.offload:
            # On the device there are the copies that blocks compute with, and what their gradients are summed in.
            resting[0] += size if stage.zero < 3 else 0.0
        elif stage.zero in (1, 2) and constants.slices_at_rest:
            resting[0] += elements * rest.parameter / group + size
        else:
            resting[0] += elements * (rest.parameter / cuts[2] + (rest.narrow_copy if stage.zero < 3 else 0.0))
        if name in trainable:
            moved[name] = (size, size, int(elements * rest.gradient))
            resting[1] += elements * rest.gradient / cuts[1]
            resting[2] += 0.0 if plan.offload else elements * rest.optimizer / cuts[0]
            held[name] = elements / cuts[0]
    whole = gathered(
        [block.parameters for block, _ in prices], moved.__getitem__, stage, plan.microbatches, constants
    )
    activation, forward_peak, backward_peak = _activations(
        memories, stage.block_recompute, constants.selective_kept, whole
    )
    if index > 0 and stage.block_recompute[0] == "none":  # what arrives is kept, because its gradient travels on
        first = memories[0]
        activation += sum(b for b, saved in zip(first.input_bytes, first.saves_input, strict=True) if not saved)
    # The stage's last output waits for its gradient; a loss is a scalar.
    if index + 1 < len(plan.stages):
        last = memories[-1]
        activation += sum(b for b, saved in zip(last.output_bytes, last.saves_output, strict=True) if not saved)
    slack = 1.0 + constants.allocator_share
    inputs = _batch_inputs(graph, prices, local(stage_parts(stage, 1)))
    return StageMemory(
        parameter_bytes=_ceil(resting[0]) + inputs,
        gradient_bytes=_ceil(resting[1]),
        optimizer_bytes=_ceil(resting[2]),
        unsharded_bytes=int(whole.always * slack + constants.context_bytes),
        activation_bytes=int(activation * slack),
        forward_peak_bytes=int(forward_peak * slack),
        backward_peak_bytes=int(backward_peak * slack),
        local_bytes=sizes,
        trainable_bytes=trainable,
        held_elements=held,
    )


def _ceil(size: float) -> int:
    return -int(-size // 1)


def _activations(
    memories: Sequence[BlockMemory], choices: Sequence[Recompute], selective_kept: float, whole: Gathered
) -> tuple[int, int, int]:
    """(activation, forward peak, backward peak) bytes of one microbatch, parameters and gradients that lie `whole` in
    the peaks.

    Both peaks are beyond `activation`, which counts from the forward's start to the backward's end: while a block runs
    forward, later blocks have not saved yet, and in its backward they have let go. A block that is computed again keeps
    its inputs and, if selectively, the results of its expensive ops; the rest comes back, whole, for its own backward.
    """
    held = []  # what each block adds to what is kept
    kept = []  # of it, what the block makes
    sides: dict[str, int] = {}
    outputs_kept: Sequence[bool] = ()
    for memory, choice in zip(memories, choices, strict=True):
        own = {"none": memory.saved_bytes, "selective": int(memory.selective_bytes * selective_kept), "full": 0}[choice]
        size = own
        for position, saved in enumerate(memory.saves_input):
            # An input's storage counts here unless the block before has counted it as its output.
            counted = bool(outputs_kept) and outputs_kept[position]
            if (saved or choice != "none") and not counted:
                size += memory.input_bytes[position]
        for name, bytes_ in memory.side_bytes if choice == "none" else memory.read_side_bytes:
            if name not in sides:
                sides[name] = bytes_
                size += bytes_
        held.append(size)
        kept.append(own)
        # Passing through, an input stays counted where it was.
        outputs_kept = memory.saves_output if choice == "none" else ()
    activation = sum(held)
    forward = backward = done = 0
    for i, (memory, choice, size, own) in enumerate(zip(memories, choices, held, kept, strict=True)):
        forward = max(forward, done + whole.gathering[i])
        inputs = sum(memory.input_bytes)
        # While it runs backward, the gradients of its outputs wait; `backward_peak_bytes` has them already.
        waiting = sum(memory.output_bytes)
        in_backward = memory.whole_gradients_peak_bytes if whole.whole_gradients else memory.backward_peak_bytes
        before = done
        if choice == "none":
            forward = max(forward, done + (size - own) + memory.forward_peak_bytes + whole.forward[i])
            done += size
            backward = max(backward, done + in_backward + whole.backward[i])
        else:
            # The bare peak starts with the inputs, which `size` has counted.
            least = done + max(0, size - own - inputs) + own
            forward = max(forward, least + memory.bare_peak_bytes + whole.forward[i])
            done += size
            again = max(memory.forward_peak_bytes + waiting, memory.saved_bytes + in_backward)
            backward = max(backward, done - own + again + whole.backward[i])
        if whole.ending[i]:
            backward = max(backward, done + waiting + whole.copying[i], before + inputs + whole.ending[i])
    # Side tensors are made once per microbatch and stay until its forward ends.
    read = sum({name: size for memory in memories for name, size in memory.read_side_bytes}.values())
    forward += max(0, read - sum(sides.values()))
    return activation, max(0, forward - activation), max(0, backward - activation)


def _batch_inputs(graph: Graph, prices: Sequence[tuple[Block, Priced]], local: LocalShapes) -> int:
    """The local batch lies on every rank for the whole step."""
    return sum(local.size_bytes(name) for name in graph.inputs) if prices else 0
