"""The checker: what a Program must satisfy before it is lowered further or interpreted.

1. Every stage stands in one group's list, and runs each microbatch's forward exactly once and, in training, its backward
   exactly once: whole, or its input half and then its weight half.
2. A value is produced before it is used, and everything received or computed for a neighbour is used:
   RA -> F -> SA, and F, RG -> B or I -> SG, and I -> W. Between two stages of one group nothing is sent: there F of the
   one stands before F of the next, and B or I the other way.
3. Sends and receives between two stages match one to one in the order of their channel. There is one channel for each
   ordered pair of stages, so activations and gradients never share one.
4. No deadlock under rendezvous semantics: a send is fired and completes when its receive is posted; a receive blocks
   until its send was fired; a group waits for its sends only at its end. Groups are deterministic and channels keep
   their order (a Kahn network), so one execution decides for all.
5. No group holds more microbatches between forward and backward, nor between the halves of a backward, than the schedule
   promised.
6. Prologue before any forward of its stage, ReduceGradients after every backward of its stage, each once; one
   OptimizerStep per group after all of these, under the lowest of its stages.
7. In a stream (which Updates tell): a Prologue in front of every batch, an Update after its last backward and before the
   next batch's first, and no ReduceGradients or OptimizerStep. A forward follows its StashWeights, whose version has come
   into being; a backward follows its RestoreWeights, of the same version.

What it does not check: times and bytes (the simulator's), and what happens inside an instruction.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from .instructions import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Instruction,
    OptimizerStep,
    Program,
    Prologue,
    ReceiveActivation,
    ReceiveGradient,
    ReduceGradients,
    RestoreWeights,
    SendActivation,
    SendGradient,
    StashWeights,
    Update,
)
from .steps import RECEIVES as _RECEIVES
from .steps import SENDS as _SENDS
from .steps import Position, execution_steps, grid

# What gives the gradients of a stage's inputs; W is checked beside.
_BACKWARDS = (Backward, BackwardInput)
_WEIGHTS = (StashWeights, RestoreWeights)
_TRAINING = (
    *_BACKWARDS,
    BackwardWeight,
    SendGradient,
    ReceiveGradient,
    ReduceGradients,
    OptimizerStep,
    Update,
    *_WEIGHTS,
)
_ONCE = (Prologue, ReduceGradients, OptimizerStep)
_NEIGHBOUR = {SendActivation: 1, ReceiveActivation: -1, SendGradient: -1, ReceiveGradient: 1}

Channel = tuple[int, int]
Bound = int | Sequence[int] | None


class ScheduleError(ValueError):
    """A Program that must not run. The text ends with the group x step grid, the fault between asterisks."""

    def __init__(self, reason: str, program: Program, faults: Collection[Position]):
        super().__init__(f"{reason}\n{grid(program, faults, window=True)}")
        self.reason = reason
        self.faults = tuple(faults)


def check(program: Program, max_in_flight: Bound = None, max_deferred: Bound = None, *, complete: bool = True) -> None:
    """ScheduleError unless the program satisfies the rules above.

    max_in_flight: the most microbatches, summed over its stages, that a group may hold between forward and backward, one
        number or one per group; None does not bound them. max_deferred: the same between the halves of a backward.
    complete: whether every pass has run. Otherwise transfers, and the instructions that run once, may be missing
        altogether; where they are present they are checked in the same way.
    """
    _check_places(program)
    present = {type(instruction) for row in program.actions for instruction in row}
    microbatches = 1 + max((i.microbatch for row in program.actions for i in row if isinstance(i, Forward)), default=-1)
    if microbatches == 0:
        raise ScheduleError("the program has no forward", program, ())
    training = bool(present & set(_TRAINING))
    batches = 1 + max((i.batch for row in program.actions for i in row if isinstance(i, Update)), default=-1)
    if batches and microbatches % batches:
        raise ScheduleError(f"{microbatches} microbatches are not {batches} equal batches", program, ())
    rules = _Rules(
        program,
        microbatches,
        lowered=bool(present & {*_SENDS, *_RECEIVES}) or (complete and len(program.actions) > 1),
        training=training,
        required=tuple(
            k for k in _ONCE if (complete or k in present) and (k is Prologue or (training and not batches))
        ),
        batches=batches,
    )
    for group in range(len(program.actions)):
        bounds = [b if b is None or isinstance(b, int) else b[group] for b in (max_in_flight, max_deferred)]
        _RowCheck(rules, group).run(*bounds)
    if rules.lowered:
        _check_channels(program)
    _check_deadlock(program)


def _check_places(program: Program) -> None:
    """Each stage has one row, rows stand in the order of their first stages, and peers are neighbours elsewhere."""
    home = program.home
    for group, row in enumerate(program.actions):
        for index, instruction in enumerate(row):
            stage = instruction.stage
            if home[stage] != group:
                reason = f"{instruction} stands in the row of group {group}, but stage {stage} belongs to {home[stage]}"
                raise ScheduleError(reason, program, [(group, index)])
            away = _NEIGHBOUR.get(type(instruction))
            if away is not None:
                peer = stage + away
                if instruction.peer != peer or home.get(peer, group) == group:
                    raise ScheduleError(f"{instruction} names a wrong peer", program, [(group, index)])
    if list(home) != list(range(len(home))):
        raise ScheduleError(f"stages {list(home)} have instructions, but stages count from 0 without gaps", program, ())
    first = [min(program.stages_of(group), default=len(home)) for group in range(len(program.actions))]
    if first != sorted(first):
        raise ScheduleError(f"groups run stages from {first} on, but they stand in ascending order", program, ())


@dataclass(frozen=True)
class _Rules:
    """What all rows have in common. lowered: transfers are there; required: kinds that must stand once; batches: of a
    stream, 0 in a step."""

    program: Program
    microbatches: int
    lowered: bool
    training: bool
    required: tuple[type, ...]
    batches: int

    @property
    def batch_size(self) -> int:
        """Microbatches of one batch."""
        return self.microbatches // max(1, self.batches)

    def before(self, kind: type, stage: int) -> tuple[tuple[tuple[type, ...], int], ...]:
        """What must stand before an instruction, for the same microbatch: (any of these kinds, on which stage)."""
        if kind is SendActivation:
            return (((Forward,), stage),)
        if kind is SendGradient:
            return ((_BACKWARDS, stage),)
        if kind is BackwardWeight:
            return (((BackwardInput,), stage),)
        if kind is RestoreWeights:
            return (((StashWeights,), stage),)
        stash, restore = ((((k,), stage),) if self.batches else () for k in _WEIGHTS)
        if kind is Forward:
            return (*stash, *self._arrival(stage, stage - 1, (Forward,), ReceiveActivation))
        if kind in _BACKWARDS:
            return (((Forward,), stage), *restore, *self._arrival(stage, stage + 1, _BACKWARDS, ReceiveGradient))
        return ()

    def _arrival(self, stage: int, peer: int, made_by: tuple[type, ...], received_by: type):
        home = self.program.home
        if peer not in home:
            return ()
        if home[peer] == home[stage]:
            return ((made_by, peer),)
        return (((received_by,), stage),) if self.lowered else ()

    def expected(self, stage: int) -> dict[type, bool]:
        """Kinds that stand once for every microbatch (True), or not at all. Halves of backwards are apart."""
        home = self.program.home
        before, after = (self.lowered and home.get(p, home[stage]) != home[stage] for p in (stage - 1, stage + 1))
        return {
            Forward: True,
            Backward: self.training,
            SendActivation: after,
            ReceiveActivation: before,
            SendGradient: self.training and before,
            ReceiveGradient: self.training and after,
        } | dict.fromkeys(_WEIGHTS, bool(self.batches))


class _RowCheck:
    """Rules 1, 2, 5 and 6 along one group's list."""

    def __init__(self, rules: _Rules, group: int):
        self.rules, self.group = rules, group
        self.row = rules.program.actions[group]
        self.stages = rules.program.stages_of(group)
        kinds = (*_NEIGHBOUR, Forward, *_BACKWARDS, BackwardWeight, *_WEIGHTS)
        self.seen: dict[tuple[type, int], set[int]] = {(k, s): set() for k in kinds for s in self.stages}
        self.once: set[tuple[type, int]] = set()
        self.prologues: set[tuple[int, int]] = set()
        self.updates = dict.fromkeys(self.stages, 0)
        self.versions: dict[tuple[int, int], int] = {}
        self.furthest: dict[int, int] = {}
        self.before = {key: rules.before(*key) for key in self.seen}
        self.in_flight = self.deferred = 0

    def run(self, max_in_flight: int | None, max_deferred: int | None) -> None:
        for index, instruction in enumerate(self.row):
            kind, stage = type(instruction), instruction.stage
            if kind is Prologue:
                self._prologue(instruction, index)
                continue
            if kind is Update:
                self._update(instruction, index)
                continue
            if kind in _ONCE:
                self._once(instruction, index)
                continue
            microbatch, seen = instruction.microbatch, self.seen[kind, stage]
            if microbatch in seen or (kind in _BACKWARDS and self._ran(_BACKWARDS, stage, microbatch)):
                raise self._fault(f"{instruction} stands twice", index)
            for needed, where in self.before[kind, stage]:
                if not self._ran(needed, where, microbatch):
                    missing = _token(needed[0], where, microbatch)
                    raise self._fault(f"{instruction} uses what {missing} has not produced yet", index)
            seen.add(microbatch)
            if kind in _WEIGHTS:
                self._version(instruction, index)
            if kind is Forward:
                self.furthest[stage] = max(microbatch, self.furthest.get(stage, -1))
                self.in_flight += 1
                self._bounded(self.in_flight, max_in_flight if self.rules.training else None, "in flight", index)
            elif kind in _BACKWARDS:
                self.in_flight -= 1
                if kind is BackwardInput:
                    self.deferred += 1
                    self._bounded(self.deferred, max_deferred, "between the halves of a backward", index)
            elif kind is BackwardWeight:
                self.deferred -= 1
        for stage in self.stages:
            self._complete(stage)

    def _prologue(self, instruction: Prologue, index: int) -> None:
        stage, batch = instruction.stage, instruction.batch
        if (stage, batch) in self.prologues:
            raise self._fault(f"{instruction} stands twice", index)
        if batch >= max(1, self.rules.batches):
            raise self._fault(f"{instruction} belongs to nothing that is computed", index)
        if self.furthest.get(stage, -1) >= batch * self.rules.batch_size:
            raise self._fault(f"{instruction} stands after a forward", index)
        self.prologues.add((stage, batch))

    def _update(self, instruction: Update, index: int) -> None:
        stage, batch = instruction.stage, instruction.batch
        if batch != self.updates[stage]:
            raise self._fault(f"{instruction} stands where update {self.updates[stage]} is due", index)
        backwards = len(self.seen[Backward, stage])
        if backwards != (batch + 1) * self.rules.batch_size:
            raise self._fault(f"{instruction} stands after {backwards} backwards, not between two batches", index)
        self.updates[stage] += 1

    def _version(self, instruction: StashWeights | RestoreWeights, index: int) -> None:
        place = (instruction.stage, instruction.microbatch)
        if isinstance(instruction, StashWeights):
            if instruction.version > self.updates[instruction.stage]:
                raise self._fault(f"{instruction} names weights that have not come into being", index)
            self.versions[place] = instruction.version
        elif instruction.version != self.versions[place]:
            raise self._fault(f"{instruction} restores other weights than those of {self.versions[place]}", index)

    def _once(self, instruction: Instruction, index: int) -> None:
        kind, stage = type(instruction), instruction.stage
        if (kind, stage) in self.once:
            raise self._fault(f"{instruction} stands twice", index)
        if kind is ReduceGradients and not self._backward_is_over(stage):
            raise self._fault(f"{instruction} stands before the last backward", index)
        if kind is OptimizerStep:
            if stage != self.stages[0]:
                raise self._fault(f"{instruction} stands for stage {self.stages[0]}, the lowest of its group", index)
            if any((ReduceGradients, s) not in self.once for s in self.stages):
                raise self._fault(f"{instruction} stands before gradients are reduced", index)
        self.once.add((kind, stage))

    def _backward_is_over(self, stage: int) -> bool:
        whole, halves, weights = (len(self.seen[k, stage]) for k in (*_BACKWARDS, BackwardWeight))
        return whole + halves >= self.rules.microbatches and weights >= halves

    def _ran(self, kinds: tuple[type, ...], stage: int, microbatch: int) -> bool:
        return any(microbatch in self.seen[kind, stage] for kind in kinds)

    def _bounded(self, held: int, bound: int | None, what: str, index: int) -> None:
        if bound is not None and held > bound:
            raise self._fault(f"{self.row[index]} makes {held} microbatches {what}; the bound is {bound}", index)

    def _complete(self, stage: int) -> None:
        microbatches = self.rules.microbatches
        halves = self.seen[BackwardInput, stage]
        for kind, wanted in self.rules.expected(stage).items():
            seen = self.seen[kind, stage] | (halves if kind is Backward else set())
            self._all_there(kind, stage, seen, range(microbatches) if wanted else ())
        self._all_there(BackwardWeight, stage, self.seen[BackwardWeight, stage], sorted(halves))
        for kind in self.rules.required:
            where = self.stages[0] if kind is OptimizerStep else stage
            if kind is Prologue:
                for batch in range(max(1, self.rules.batches)):
                    if (stage, batch) not in self.prologues:
                        raise self._fault(f"{Prologue(stage, batch)} is missing", len(self.row))
            elif (kind, where) not in self.once:
                raise self._fault(f"{kind(where)} is missing", len(self.row))
        if self.updates[stage] != self.rules.batches:
            raise self._fault(f"{Update(stage, self.updates[stage])} is missing", len(self.row))

    def _all_there(self, kind: type, stage: int, seen: Collection[int], wanted: Sequence[int]) -> None:
        for microbatch in wanted:
            if microbatch not in seen:
                raise self._fault(f"{_token(kind, stage, microbatch)} is missing", len(self.row))
        if len(seen) > len(wanted):
            strange = max(seen)
            index = next(k for k, i in enumerate(self.row) if i.stage == stage and _is(i, kind, strange))
            raise self._fault(f"{self.row[index]} belongs to nothing that is computed", index)

    def _fault(self, reason: str, index: int) -> ScheduleError:
        return ScheduleError(f"group {self.group}: {reason}", self.rules.program, [(self.group, index)])


def _is(instruction: Instruction, kind: type, microbatch: int) -> bool:
    kinds = _BACKWARDS if kind is Backward else (kind,)
    return isinstance(instruction, kinds) and instruction.microbatch == microbatch


def _token(kind: type, stage: int, microbatch: int) -> str:
    if kind in _WEIGHTS:
        return str(kind(stage, microbatch, 0)).partition("@")[0]
    away = _NEIGHBOUR.get(kind)
    return str(kind(stage, microbatch) if away is None else kind(stage, microbatch, stage + away))


def _check_channels(program: Program) -> None:
    """Rule 3. Counts agree already, since each stage sends and receives every microbatch once."""
    sent: dict[Channel, list[int]] = {}
    for row in program.actions:
        for instruction in row:
            if isinstance(instruction, _SENDS):
                sent.setdefault((instruction.stage, instruction.peer), []).append(instruction.microbatch)
    taken: dict[Channel, int] = {}
    for group, row in enumerate(program.actions):
        for index, instruction in enumerate(row):
            if isinstance(instruction, _RECEIVES):
                channel = (instruction.peer, instruction.stage)
                position = taken.get(channel, 0)
                taken[channel] = position + 1
                found = sent[channel][position]
                if found != instruction.microbatch:
                    raise ScheduleError(
                        f"{instruction} would receive microbatch {found}: message {position} from stage "
                        f"{channel[0]} to stage {channel[1]} is not the one that the receiver expects",
                        program,
                        [(group, index)],
                    )


def _check_deadlock(program: Program) -> None:
    """Rule 4."""
    steps = execution_steps(program)
    stuck = [(g, len(done)) for g, done in enumerate(steps) if len(done) < len(program.actions[g])]
    if stuck:
        waits = ", ".join(f"group {g} at {program.actions[g][k]}" for g, k in stuck)
        raise ScheduleError(f"deadlock: {waits}", program, stuck)
