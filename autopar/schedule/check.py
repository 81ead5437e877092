"""The checker: what a Program must satisfy before it is lowered further or interpreted.

1. Every stage runs each microbatch's forward exactly once and, in training, its backward exactly once.
2. A value is produced before it is used, and everything received or computed for a neighbour is used:
   RA -> F -> SA, and F, RG -> B -> SG.
3. Sends and receives between two stages match one to one in the order of their channel. There is one channel for each
   ordered pair of stages, so activations and gradients never share one.
4. No deadlock under rendezvous semantics: a send is fired and completes when its receive is posted; a receive blocks
   until its send was fired; a stage waits for its sends only at its end. Stages are deterministic and channels keep
   their order (a Kahn network), so one execution decides for all.
5. No stage holds more microbatches between forward and backward than the schedule promised.
6. Prologue before any forward, ReduceGradients after every backward, OptimizerStep after that, each once.

What it does not check: times and bytes (the simulator's), and what happens inside an instruction.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence

from .instructions import (
    Backward,
    Forward,
    Instruction,
    OptimizerStep,
    Program,
    Prologue,
    ReceiveActivation,
    ReceiveGradient,
    ReduceGradients,
    SendActivation,
    SendGradient,
)

_SENDS = (SendActivation, SendGradient)
_RECEIVES = (ReceiveActivation, ReceiveGradient)
_TRAINING = (Backward, SendGradient, ReceiveGradient, ReduceGradients, OptimizerStep)
_ONCE = (Prologue, ReduceGradients, OptimizerStep)
_NEIGHBOUR = {SendActivation: 1, ReceiveActivation: -1, SendGradient: -1, ReceiveGradient: 1}
# How much of a faulty program an error shows around the fault.
_STEPS_SHOWN = 12
_STAGES_SHOWN = 8

Position = tuple[int, int]
Key = tuple[Hashable, ...] | None


class ScheduleError(ValueError):
    """A Program that must not run. The text ends with the rank x step grid, the fault between asterisks."""

    def __init__(self, reason: str, program: Program, faults: Collection[Position]):
        super().__init__(f"{reason}\n{grid(program, faults, window=True)}")
        self.reason = reason
        self.faults = tuple(faults)


def check(program: Program, max_in_flight: int | Sequence[int] | None = None, *, complete: bool = True) -> None:
    """ScheduleError unless the program satisfies the rules above.

    max_in_flight: the most microbatches that a stage may hold between forward and backward, one number or one per
        stage; None does not bound them.
    complete: whether every pass has run. Otherwise transfers, and the instructions that run once, may be missing
        altogether; where they are present they are checked in the same way.
    """
    present = {type(instruction) for row in program.actions for instruction in row}
    lowered = bool(present & {*_SENDS, *_RECEIVES}) or (complete and len(program.actions) > 1)
    training = bool(present & set(_TRAINING))
    required = {kind for kind in _ONCE if complete or kind in present}
    if not training:
        required &= {Prologue}
    _check_places(program)
    microbatches = 1 + max((i.microbatch for row in program.actions for i in row if isinstance(i, Forward)), default=-1)
    if microbatches == 0:
        raise ScheduleError("the program has no forward", program, ())
    for stage in range(len(program.actions)):
        bound = max_in_flight if max_in_flight is None or isinstance(max_in_flight, int) else max_in_flight[stage]
        _check_stage(program, stage, microbatches, lowered, training, required, bound)
    if lowered:
        _check_channels(program)
    _check_deadlock(program)


def _check_places(program: Program) -> None:
    """Instructions stand in the row of their stage, and name the neighbour that their kind goes to."""
    for stage, row in enumerate(program.actions):
        for index, instruction in enumerate(row):
            if instruction.stage != stage:
                raise ScheduleError(f"{instruction} stands in the row of stage {stage}", program, [(stage, index)])
            away = _NEIGHBOUR.get(type(instruction))
            if away is not None:
                peer = stage + away
                if instruction.peer != peer or not 0 <= peer < len(program.actions):
                    raise ScheduleError(f"{instruction} names a wrong peer", program, [(stage, index)])


def _check_stage(
    program: Program,
    stage: int,
    microbatches: int,
    lowered: bool,
    training: bool,
    required: set[type],
    bound: int | None,
) -> None:
    """Rules 1, 2, 5 and 6 along one stage's list."""
    row = program.actions[stage]
    first, last = stage == 0, stage == len(program.actions) - 1
    # What must stand before an instruction of a kind, for the same microbatch.
    before: dict[type, tuple[type, ...]] = {SendActivation: (Forward,), SendGradient: (Backward,)}
    before[Forward] = (ReceiveActivation,) if lowered and not first else ()
    before[Backward] = (Forward, ReceiveGradient) if lowered and not last else (Forward,)
    expected = {Forward: True, Backward: training}
    expected |= {SendActivation: lowered and not last, ReceiveActivation: lowered and not first}
    expected |= {SendGradient: training and lowered and not first, ReceiveGradient: training and lowered and not last}
    seen: dict[type, set[int]] = {kind: set() for kind in expected}
    once: set[type] = set()

    def fault(reason: str, index: int) -> ScheduleError:
        return ScheduleError(f"stage {stage}: {reason}", program, [(stage, index)])

    for index, instruction in enumerate(row):
        kind = type(instruction)
        if kind in _ONCE:
            if kind in once:
                raise fault(f"{instruction} stands twice", index)
            if kind is Prologue and seen[Forward]:
                raise fault(f"{instruction} stands after a forward", index)
            if kind is ReduceGradients and len(seen[Backward]) < microbatches:
                raise fault(f"{instruction} stands before the last backward", index)
            if kind is OptimizerStep and ReduceGradients not in once:
                raise fault(f"{instruction} stands before gradients are reduced", index)
            once.add(kind)
            continue
        microbatch = instruction.microbatch
        if microbatch in seen[kind]:
            raise fault(f"{instruction} stands twice", index)
        for needed in before.get(kind, ()):
            if microbatch not in seen[needed]:
                raise fault(f"{instruction} uses what {_token(needed, stage, microbatch)} has not produced yet", index)
        seen[kind].add(microbatch)
        if kind is Forward and training and bound is not None:
            held = len(seen[Forward]) - len(seen[Backward])
            if held > bound:
                raise fault(f"{instruction} makes {held} microbatches in flight; the bound is {bound}", index)
    for kind, wanted in expected.items():
        for microbatch in range(microbatches) if wanted else ():
            if microbatch not in seen[kind]:
                raise fault(f"{_token(kind, stage, microbatch)} is missing", len(row))
        if len(seen[kind]) > (microbatches if wanted else 0):
            strange = max(seen[kind])
            index = next(k for k, i in enumerate(row) if type(i) is kind and i.microbatch == strange)
            raise fault(f"{row[index]} belongs to nothing that is computed", index)
    for kind in _ONCE:
        if kind in required and kind not in once:
            raise fault(f"{kind(stage)} is missing", len(row))


def _token(kind: type, stage: int, microbatch: int) -> str:
    away = _NEIGHBOUR.get(kind)
    return str(kind(stage, microbatch) if away is None else kind(stage, microbatch, stage + away))


def _check_channels(program: Program) -> None:
    """Rule 3. Counts agree already, since each stage sends and receives every microbatch once."""
    sent: dict[Position, list[int]] = {}
    for row in program.actions:
        for instruction in row:
            if isinstance(instruction, _SENDS):
                sent.setdefault((instruction.stage, instruction.peer), []).append(instruction.microbatch)
    taken: dict[Position, int] = {}
    for stage, row in enumerate(program.actions):
        for index, instruction in enumerate(row):
            if isinstance(instruction, _RECEIVES):
                channel = (instruction.peer, stage)
                position = taken.get(channel, 0)
                taken[channel] = position + 1
                found = sent[channel][position]
                if found != instruction.microbatch:
                    raise ScheduleError(
                        f"{instruction} would receive microbatch {found}: message {position} from stage "
                        f"{instruction.peer} to stage {stage} is not the one that the receiver expects",
                        program,
                        [(stage, index)],
                    )


def _check_deadlock(program: Program) -> None:
    """Rule 4."""
    steps = execution_steps(program)
    stuck = [(s, len(done)) for s, done in enumerate(steps) if len(done) < len(program.actions[s])]
    if stuck:
        waits = ", ".join(f"stage {s} at {program.actions[s][k]}" for s, k in stuck)
        raise ScheduleError(f"deadlock: {waits}", program, stuck)


def dependencies(program: Program) -> tuple[list[list[Key]], list[list[Key]]]:
    """Per stage and instruction: the key that it waits for, and the key that it makes available (None: none).

    Keys are messages, (from, to, how manyth), once the program has transfers. Before, a forward waits for the same
    microbatch's forward one stage earlier, and a backward for the backward one stage later.
    """
    lowered = any(isinstance(i, _SENDS + _RECEIVES) for row in program.actions for i in row)
    last = len(program.actions) - 1
    needs: list[list[Key]] = []
    provides: list[list[Key]] = []
    for stage, row in enumerate(program.actions):
        count: dict[Position, int] = {}
        need: list[Key] = [None] * len(row)
        provide: list[Key] = [None] * len(row)
        for index, instruction in enumerate(row):
            kind = type(instruction)
            if lowered and kind in _NEIGHBOUR:
                send = kind in _SENDS
                channel = (stage, instruction.peer) if send else (instruction.peer, stage)
                position = count.get(channel, 0)
                count[channel] = position + 1
                (provide if send else need)[index] = (*channel, position)
            elif not lowered and kind in (Forward, Backward):
                source = stage - 1 if kind is Forward else stage + 1
                if 0 <= source <= last:
                    need[index] = (kind, source, instruction.microbatch)
                provide[index] = (kind, stage, instruction.microbatch)
        needs.append(need)
        provides.append(provide)
    return needs, provides


def execution_steps(program: Program) -> list[list[int]]:
    """When each instruction runs if all take one step; a stage that is stuck has fewer entries than instructions."""
    needs, provides = dependencies(program)
    steps: list[list[int]] = [[] for _ in program.actions]
    available: dict[Key, int] = {}
    waiting: dict[Key, int] = {}
    ready = list(range(len(program.actions)))
    while ready:
        stage = ready.pop()
        done = steps[stage]
        step = done[-1] + 1 if done else 0
        for index in range(len(done), len(needs[stage])):
            need = needs[stage][index]
            if need is not None:
                if need not in available:
                    waiting[need] = stage
                    break
                step = max(step, available[need] + 1)
            done.append(step)
            provide = provides[stage][index]
            if provide is not None:
                available[provide] = step
                if provide in waiting:
                    ready.append(waiting.pop(provide))
            step += 1
    return steps


def grid(program: Program, marked: Collection[Position] = (), window: bool = False) -> str:
    """One line per stage, one column per step, each instruction in the step in which it would run.

    Stages that are stuck go on in consecutive steps, so that the rest of their list is seen. `marked` positions
    (stage, index) stand between asterisks; an index past the end marks what is missing there. window=True shows only
    the surroundings of the first marked position of a large program.
    """
    cells: list[dict[int, str]] = []
    centre: Position | None = None
    for stage, (row, done) in enumerate(zip(program.actions, execution_steps(program), strict=True)):
        line: dict[int, str] = {}
        step = -1
        for index in range(len(row) + 1):
            step = done[index] if index < len(done) else step + 1
            token = str(row[index]) if index < len(row) else "missing"
            if (stage, index) in marked:
                line[step] = f"*{token}*"
                centre = centre or (stage, step)
            elif index < len(row):
                line[step] = token
        cells.append(line)
    columns = range(max((max(line, default=-1) for line in cells), default=-1) + 1)
    stages = range(len(cells))
    if window and centre is not None:
        stages = stages[max(0, centre[0] - _STAGES_SHOWN) : centre[0] + _STAGES_SHOWN + 1]
        columns = columns[max(0, centre[1] - _STEPS_SHOWN) : centre[1] + _STEPS_SHOWN + 1]
    head = ["step", *map(str, columns)]
    table = [head, *([f"stage {s}", *(cells[s].get(c, "") for c in columns)] for s in stages)]
    widths = [max(len(line[k]) for line in table) for k in range(len(head))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in table]
    return "\n".join(lines)


def is_send(instruction: Instruction) -> bool:
    return isinstance(instruction, _SENDS)


def is_receive(instruction: Instruction) -> bool:
    return isinstance(instruction, _RECEIVES)
