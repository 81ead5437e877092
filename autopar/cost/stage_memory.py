"""Bytes of a stage per rank: what lies at rest, what a microbatch keeps, and the peaks while it runs.

The caching allocator of a GPU keeps freed blocks and rounds sizes up, so what a program holds of the device exceeds its
tensors by a share of what comes and goes (`Constants.allocator_share`), and by the driver's context, library workspaces
and communication buffers (`context_bytes`). Both are 0 on CPUs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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


class BlockRun(Protocol):
    """Consecutive blocks of a stage that cost the same: all but the first of a run add the same to what is counted.

    block: the first of them. shares_parameters: whether other blocks use some of its parameters; it then stands alone.
    """

    @property
    def block(self) -> Block: ...
    @property
    def count(self) -> int: ...
    @property
    def memory(self) -> BlockMemory: ...
    @property
    def recompute(self) -> Recompute: ...
    @property
    def shares_parameters(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class StageMemory:
    """As `StageCost`; local_bytes, trainable_bytes: of all (trainable) parameters as used, before data sharding;
    held_elements: of each parameter, after it, that this rank's optimizer updates, and how many there are of the size."""

    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    unsharded_bytes: int
    activation_bytes: int
    forward_peak_bytes: int
    backward_peak_bytes: int
    local_bytes: int
    trainable_bytes: int
    held_elements: Mapping[float, int]
    gradients_stay: bool | None


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


@dataclass(frozen=True, slots=True)
class _Parameter:
    """What tells parameters apart here. size_bytes, whole_bytes: of what lies on a rank and of what it computes with, both
    before data sharding. wide_bytes, used_bytes: of an element at rest in the module, and as computed with."""

    size_bytes: int
    whole_bytes: int
    wide_bytes: int
    used_bytes: int
    trained: bool


def as_run(plan: Plan, index: int, constants: Constants) -> Stage:
    """A stage whose parameters stay whole through a step (`Constants.pipeline_keeps`) is one of level 1."""
    stage = plan.stages[index]
    return replace(stage, zero=1) if keeps_whole(plan, constants) and stage.zero == 3 else stage


def keeps_whole(plan: Plan, constants: Constants) -> bool:
    return constants.pipeline_keeps and plan.pipeline > 1 and plan.microbatches > 1


@dataclass(frozen=True, slots=True)
class _OfBlock:
    """The parameters of a block, by name; and all together."""

    named: tuple[tuple[str, _Parameter], ...]
    sizes: Sizes


class BlockParameters:
    """What the parameters of blocks are, here; remembered by the block's memory, which comes of its kind and layouts, and by
    whether they take gradients."""

    def __init__(self, graph: Graph, constants: Constants) -> None:
        self._graph, self._constants = graph, constants
        # With the memory itself, so that its identity stays taken.
        self._known: dict[tuple, tuple[BlockMemory, _OfBlock]] = {}

    def of(self, run: BlockRun, local: LocalShapes) -> _OfBlock:
        """Of the first block of a run."""
        tensors = self._graph.tensors
        named = run.block.parameters
        # Only of blocks that share parameters names are looked at.
        key = (
            id(run.memory),
            run.block.index if run.shares_parameters else tuple(tensors[n].requires_grad for n in named),
        )
        if key not in self._known:
            found = tuple(
                (
                    name,
                    _Parameter(
                        size, whole, tensors[name].at_rest.itemsize, local.tensors[name].dtype.itemsize,
                        bool(tensors[name].requires_grad),
                    ),
                )
                for name, size, whole in zip(
                    named, run.memory.parameter_bytes, run.memory.used_bytes, strict=True
                )
            )  # fmt: skip
            self._known[key] = run.memory, _OfBlock(found, _sizes([one for _, one in found], self._constants))
        return self._known[key][1]


def stage_memory(
    graph: Graph,
    local: Callable[[int], LocalShapes],
    plan: Plan,
    index: int,
    runs: Sequence[BlockRun],
    constants: Constants,
    data_rank: int | None = None,
    known: BlockParameters | None = None,
) -> StageMemory:
    """The memory of stage `index`, of these runs of blocks; of a data rank, by default the one with the most rows.

    known: what was asked before of the same graph and constants.
    """
    stage = as_run(plan, index, constants)
    keeps = keeps_whole(plan, constants)
    known = known or BlockParameters(graph, constants)
    named = [known.of(run, local(1)) for run in runs]
    parameters = _parameters(runs, named)
    local_bytes = sum(one.size_bytes * count for one, count in parameters.items())
    trainable_bytes = sum(one.size_bytes * count for one, count in parameters.items() if one.trained)
    group = stage.zero_group or stage.data
    cuts = [group if stage.zero >= level else 1 for level in (1, 2, 3)]
    if stage.zero == 1 and constants.slices_at_rest and scatters_each(stage, plan.microbatches, constants):
        cuts[1] = group  # the only microbatch's gradients are scattered block by block
    resting = [0.0, 0.0, 0.0]
    held: dict[float, int] = {}
    for one, count in parameters.items():
        elements = one.size_bytes // one.used_bytes
        rest = at_rest(one.wide_bytes, one.used_bytes, constants)
        if plan.offload:
            # On the device there are the copies that blocks compute with, and what their gradients are summed in.
            resting[0] += count * one.size_bytes if stage.zero < 3 else 0.0
        elif stage.zero in (1, 2) and constants.slices_at_rest:
            resting[0] += count * (elements * rest.parameter / group + (one.whole_bytes if keeps else one.size_bytes))
        elif keeps and one.whole_bytes > one.size_bytes:
            resting[0] += count * (elements * rest.parameter + one.whole_bytes)
        else:
            whole_copy = rest.narrow_copy if stage.zero < 3 else 0.0
            resting[0] += count * elements * (rest.parameter / cuts[2] + whole_copy)
        if one.trained:
            summed = one.whole_bytes // one.used_bytes if keeps else elements
            resting[1] += count * summed * rest.gradient / cuts[1]
            resting[2] += 0.0 if plan.offload else count * elements * rest.optimizer / cuts[0]
            held[elements / cuts[0]] = held.get(elements / cuts[0], 0) + count
    whole = _whole(stage, runs, named, plan.microbatches, constants)
    activation, forward_peak, backward_peak = _activations(runs, constants.selective_kept, whole)
    first, last = runs[0], runs[-1].memory
    if index > 0 and first.recompute == "none":  # what arrives is kept, because its gradient travels on
        memory = first.memory
        activation += sum(b for b, saved in zip(memory.input_bytes, memory.saves_input, strict=True) if not saved)
    # The stage's last output waits for its gradient; a loss is a scalar.
    if index + 1 < len(plan.stages):
        activation += sum(b for b, saved in zip(last.output_bytes, last.saves_output, strict=True) if not saved)
    # Beside them: what is received one microbatch ahead, both ways, and the gradient that is being sent.
    passing = 2 * sum(first.memory.input_bytes) if _receives(plan, index, index - 1) else 0
    passing += sum(last.output_bytes) if _receives(plan, index, index + 1) else 0
    slack = 1.0 + constants.allocator_share
    inputs = _batch_inputs(graph, local(stage_parts(stage, 1, data_rank)))
    return StageMemory(
        parameter_bytes=_ceil(resting[0]) + inputs,
        gradient_bytes=_ceil(resting[1]),
        optimizer_bytes=_ceil(resting[2]),
        unsharded_bytes=int((whole.always + passing) * slack + constants.context_bytes),
        activation_bytes=int(activation * slack),
        forward_peak_bytes=int(forward_peak * slack),
        backward_peak_bytes=int(backward_peak * slack),
        local_bytes=local_bytes,
        trainable_bytes=trainable_bytes,
        held_elements=held,
        gradients_stay=_gradients_stay(stage, parameters, constants),
    )


def _parameters(runs: Sequence[BlockRun], named: Sequence[_OfBlock]) -> Counter[_Parameter]:
    """The distinct parameters of the runs, each as often as there are such; one that several blocks use counts once."""
    found: Counter[_Parameter] = Counter()
    shared: dict[str, _Parameter] = {}
    for run, own in zip(runs, named, strict=True):
        for name, one in own.named:
            if run.shares_parameters:
                shared[name] = one
            else:
                found[one] += run.count
    found.update(shared.values())
    return found


def _whole(
    stage: Stage, runs: Sequence[BlockRun], named: Sequence[_OfBlock], microbatches: int, constants: Constants
) -> Gathered:
    """What ZeRO gathers and scatters, see gathered.py."""
    if stage.zero == 0:
        return gathered([(run.count, (0, 0, 0)) for run in runs], (0, 0, 0), stage, microbatches, constants)
    uses = Counter(name for run in runs if run.shares_parameters for name in run.block.parameters)
    own: list[tuple[int, Sizes]] = []
    common: dict[str, _Parameter] = {}
    for run, of_block in zip(runs, named, strict=True):
        if not run.shares_parameters:
            own.append((run.count, of_block.sizes))
            continue
        common |= {name: one for name, one in of_block.named if uses[name] > 1}
        own.append((run.count, _sizes([one for name, one in of_block.named if uses[name] < 2], constants)))
    return gathered(own, _sizes(list(common.values()), constants), stage, microbatches, constants)


def _sizes(parameters: Sequence[_Parameter], constants: Constants) -> Sizes:
    trained = [one for one in parameters if one.trained]
    reduced = sum(
        one.size_bytes // one.used_bytes * at_rest(one.wide_bytes, one.used_bytes, constants).gradient
        for one in trained
    )
    return sum(one.size_bytes for one in parameters), sum(one.size_bytes for one in trained), int(reduced)


def _receives(plan: Plan, index: int, neighbour: int) -> bool:
    """Whether messages come to a stage from another one, which exists and runs on other ranks."""
    return 0 <= neighbour < len(plan.stages) and plan.stages[neighbour].ranks != plan.stages[index].ranks


def _gradients_stay(stage: Stage, parameters: Iterable[_Parameter], constants: Constants) -> bool | None:
    """As in `StageCost`. Gradients of narrow copies are summed in buffers of their own."""
    if stage.zero:
        return False if constants.slices_at_rest else None
    if not constants.keeps_buffers:
        return False
    return True if any(one.used_bytes < one.wide_bytes for one in parameters) else None


def _ceil(size: float) -> int:
    return -int(-size // 1)


def _activations(runs: Sequence[BlockRun], selective_kept: float, whole: Gathered) -> tuple[int, int, int]:
    """(activation, forward peak, backward peak) bytes of one microbatch; in the peaks what ZeRO lays `whole` counts too.

    Both peaks are beyond `activation`, which counts from the forward's start to the backward's end: while a block runs
    forward, later blocks have not saved yet, and in its backward they have let go. A block that is computed again keeps
    its inputs and, if selectively, the results of its expensive ops; the rest comes back, whole, for its own backward.

    From its second block on a run adds the same with each, and peaks in its last two.
    """
    sides: dict[str, int] = {}
    outputs_kept: Sequence[bool] = ()
    forward = backward = done = 0
    besides = iter(whole.blocks)

    def keep(memory: BlockMemory, choice: Recompute) -> tuple[int, int]:
        """What a block adds to what is kept, and what of it the block makes."""
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
        return size, own

    for run in runs:
        memory, choice = run.memory, run.recompute
        # Passing through, an input stays counted where it was.
        kept_after = memory.saves_output if choice == "none" else ()
        for number in range(min(run.count, 3)):
            size, own = keep(memory, choice)
            outputs_kept = kept_after
            if number == 1:
                done += max(0, run.count - 3) * size
            beside = next(besides)
            before, inputs = done, sum(memory.input_bytes)
            # While it runs backward, the gradients of its outputs wait; `backward_peak_bytes` has them already.
            waiting = sum(memory.output_bytes)
            passing = memory.whole_gradients_peak_bytes if whole.whole_gradients else memory.backward_peak_bytes
            forward = max(forward, done + beside.gathering)
            if choice == "none":
                forward = max(forward, done + (size - own) + memory.forward_peak_bytes + beside.forward)
                done += size
                backward = max(backward, done + passing + beside.backward)
            else:
                # The peak starts with the inputs, which `size` has counted, and has what is kept of the block's own.
                peak = memory.bare_peak_bytes
                if choice == "selective":
                    peak = max(peak, memory.kept_peak_bytes - (memory.selective_bytes - own))
                forward = max(forward, done + max(0, size - own - inputs) + peak + beside.forward)
                done += size
                again = max(memory.forward_peak_bytes + waiting, memory.saved_bytes + passing)
                backward = max(backward, done - own + again + beside.backward)
            if beside.ending:
                backward = max(backward, done + waiting + beside.copying, before + inputs + beside.ending)
    # Side tensors are made once per microbatch and stay until its forward ends.
    read = sum({name: size for run in runs for name, size in run.memory.read_side_bytes}.values())
    forward += max(0, read - sum(sides.values()))
    return done, max(0, forward - done), max(0, backward - done)


def _batch_inputs(graph: Graph, local: LocalShapes) -> int:
    """The local batch lies on every rank for the whole step."""
    return sum(local.size_bytes(name) for name in graph.inputs)
