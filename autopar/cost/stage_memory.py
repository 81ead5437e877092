"""Bytes of a stage per rank: what lies at rest, what a microbatch keeps, and the peaks while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..graph import Block, Graph
from ..plan import Plan
from ..sharding.rows import stage_parts
from .local import LocalShapes
from .memory import BlockMemory


class Priced(Protocol):
    @property
    def memory(self) -> BlockMemory: ...


@dataclass(frozen=True, slots=True)
class StageMemory:
    """As `StageCost`; local_bytes, trainable_bytes: of each (trainable) parameter before data sharding, by name."""

    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    unsharded_bytes: int
    activation_bytes: int
    forward_peak_bytes: int
    backward_peak_bytes: int
    local_bytes: dict[str, int]
    trainable_bytes: dict[str, int]


def stage_memory(
    graph: Graph,
    local: Callable[[int], LocalShapes],
    plan: Plan,
    index: int,
    prices: Sequence[tuple[Block, Priced]],
    optimizer_bytes_per_element: int,
) -> StageMemory:
    """The memory of stage `index`, of blocks with these prices."""
    stage = plan.stages[index]
    memories = [price.memory for _, price in prices]
    sizes: dict[str, int] = {}
    for (block, _), memory in zip(prices, memories, strict=True):
        sizes.update(zip(block.parameters, memory.parameter_bytes, strict=True))
    trainable = {name: size for name, size in sizes.items() if graph.tensors[name].requires_grad}
    elements = sum(size // graph.tensors[name].dtype.itemsize for name, size in trainable.items())
    cut = stage.data if stage.zero == 3 else 1
    activation, forward_peak, backward_peak = _recomputed(memories) if stage.recompute else _kept(memories)
    if index > 0 and not stage.recompute:  # what arrives is kept, because its gradient travels on
        first = memories[0]
        activation += sum(b for b, saved in zip(first.input_bytes, first.saves_input, strict=True) if not saved)
    # The stage's last output waits for its gradient; a loss is a scalar.
    if index + 1 < len(plan.stages):
        last = memories[-1]
        activation += sum(b for b, saved in zip(last.output_bytes, last.saves_output, strict=True) if not saved)
    inputs = _batch_inputs(graph, prices, local(stage_parts(stage, 1)))
    return StageMemory(
        parameter_bytes=-(-sum(sizes.values()) // cut) + inputs,
        gradient_bytes=-(-sum(trainable.values()) // cut),
        optimizer_bytes=-(-elements * optimizer_bytes_per_element // cut),
        unsharded_bytes=_gathered(memories, sum(trainable.values()), plan.microbatches) if cut > 1 else 0,
        activation_bytes=activation,
        forward_peak_bytes=forward_peak,
        backward_peak_bytes=backward_peak,
        local_bytes=sizes,
        trainable_bytes=trainable,
    )


def _kept(memories: Sequence[BlockMemory]) -> tuple[int, int, int]:
    """(activation, forward peak, backward peak) bytes when every block's activations are kept.

    Both peaks are beyond `activation`, which counts from the forward's start to the backward's end: while a block runs
    forward, later blocks have not saved yet, and in its backward they have let go.
    """
    held = []  # what each block adds to what is kept
    sides: dict[str, int] = {}
    read = _read_sides(memories)
    before: BlockMemory | None = None
    for memory in memories:
        size = memory.saved_bytes
        for position, saved in enumerate(memory.saves_input):
            # An input's storage counts here unless the block before has counted it as its output.
            if saved and not (before is not None and before.saves_output[position]):
                size += memory.input_bytes[position]
        for name, bytes_ in memory.side_bytes:
            if name not in sides:
                sides[name] = bytes_
                size += bytes_
        held.append(size)
        before = memory
    activation = sum(held)
    forward = backward = done = 0
    for memory, size in zip(memories, held, strict=True):
        forward = max(forward, done + (size - memory.saved_bytes) + memory.forward_peak_bytes)
        done += size
        backward = max(backward, done + memory.backward_peak_bytes)
    forward += max(0, read - sum(sides.values()))
    return activation, max(0, forward - activation), max(0, backward - activation)


def _read_sides(memories: Sequence[BlockMemory]) -> int:
    """Side tensors are made once per microbatch and stay until its forward ends."""
    return sum({name: size for memory in memories for name, size in memory.read_side_bytes}.values())


def _recomputed(memories: Sequence[BlockMemory]) -> tuple[int, int, int]:
    """The same when only block inputs are kept: a block's activations come back, whole, for its own backward."""
    activation = sum(sum(memory.input_bytes) for memory in memories) + _read_sides(memories)
    forward = backward = 0
    done = _read_sides(memories)
    for memory in memories:
        inputs = sum(memory.input_bytes)
        done += inputs
        # The bare peak starts with the inputs, which `done` has counted.
        forward = max(forward, done - inputs + memory.bare_peak_bytes)
        # While it comes back, the gradients of its outputs wait; `backward_peak_bytes` has them already.
        waiting = sum(memory.output_bytes)
        again = max(memory.forward_peak_bytes + waiting, memory.saved_bytes + memory.backward_peak_bytes)
        backward = max(backward, done + again)
    return activation, max(0, forward - activation), max(0, backward - activation)


def _gathered(memories: Sequence[BlockMemory], gradient_bytes: int, microbatches: int) -> int:
    """ZeRO 3: the block at work and the one prefetched lie whole, with whole gradients on their way to be scattered.

    fully_shard frees a block's parameters after its forward and keeps one reduce-scatter input at a time. With several
    microbatches gradients are scattered in the last backward only, and lie whole until then.
    """
    sizes = [sum(memory.parameter_bytes) for memory in memories]
    pairs = [a + b for a, b in zip(sizes, sizes[1:], strict=False)] or sizes
    return max(pairs) + (2 * max(sizes) if microbatches == 1 else gradient_bytes + max(sizes))


def _batch_inputs(graph: Graph, prices: Sequence[tuple[Block, Priced]], local: LocalShapes) -> int:
    """The local batch lies on every rank for the whole step."""
    return sum(local.size_bytes(name) for name in graph.inputs) if prices else 0
