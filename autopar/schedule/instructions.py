"""Instructions: what one rank does, one small frozen dataclass per kind. Each prints as one token and parses back.

Tokens are <stage><kind><microbatch>, after torch.distributed.pipelining's notation: `2F0` is the forward of microbatch
0 on stage 2. Communication names its peer stage: `0SA1>1` sends the activations of microbatch 1 from stage 0 to stage
1, `1RA1<0` receives them there; SG and RG are the gradients that travel back. `0WS5@3` and `0WR5@3` say that microbatch
5 uses weights of version 3.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True, slots=True)
class Forward:
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}F{self.microbatch}"


@dataclass(frozen=True, slots=True)
class Backward:
    """The whole backward (inputs and weights), with the recomputation of the stage's blocks where the plan asks."""

    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}B{self.microbatch}"


@dataclass(frozen=True, slots=True)
class BackwardInput:
    """The half of a backward that the stage before waits for: the gradients of the stage's inputs.

    Gradients of parameters that are not left to the weight half come out here as well.
    """

    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}I{self.microbatch}"


@dataclass(frozen=True, slots=True)
class BackwardWeight:
    """The half of a backward that nobody waits for: the gradients of the weights of matrix products."""

    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}W{self.microbatch}"


@dataclass(frozen=True, slots=True)
class SendActivation:
    stage: int
    microbatch: int
    peer: int

    def __str__(self) -> str:
        return f"{self.stage}SA{self.microbatch}>{self.peer}"


@dataclass(frozen=True, slots=True)
class ReceiveActivation:
    stage: int
    microbatch: int
    peer: int

    def __str__(self) -> str:
        return f"{self.stage}RA{self.microbatch}<{self.peer}"


@dataclass(frozen=True, slots=True)
class SendGradient:
    stage: int
    microbatch: int
    peer: int

    def __str__(self) -> str:
        return f"{self.stage}SG{self.microbatch}>{self.peer}"


@dataclass(frozen=True, slots=True)
class ReceiveGradient:
    stage: int
    microbatch: int
    peer: int

    def __str__(self) -> str:
        return f"{self.stage}RG{self.microbatch}<{self.peer}"


@dataclass(frozen=True, slots=True)
class Prologue:
    """Batch-wide values that need every microbatch at once (the loss's token count), reduced over data.

    batch: which of a stream, 0 where there is one.
    """

    stage: int
    batch: int = 0

    def __str__(self) -> str:
        return f"{self.stage}P{self.batch or ''}"


@dataclass(frozen=True, slots=True)
class ReduceGradients:
    """Wait until the stage's gradients are whole: over data, over model axes (shared parameters), over tied stages."""

    stage: int

    def __str__(self) -> str:
        return f"{self.stage}D"


@dataclass(frozen=True, slots=True)
class OptimizerStep:
    """The user's optimizer, outside the call; it stands in the program so that time and memory are accounted.

    One for each group, under the lowest of its stages.
    """

    stage: int

    def __str__(self) -> str:
        return f"{self.stage}O"


@dataclass(frozen=True, slots=True)
class StashWeights:
    """The forward that follows uses weights of this version, which stay until the microbatch's backward."""

    stage: int
    microbatch: int
    version: int

    def __str__(self) -> str:
        return f"{self.stage}WS{self.microbatch}@{self.version}"


@dataclass(frozen=True, slots=True)
class RestoreWeights:
    """The backward that follows uses the weights of this version, those of the microbatch's forward."""

    stage: int
    microbatch: int
    version: int

    def __str__(self) -> str:
        return f"{self.stage}WR{self.microbatch}@{self.version}"


@dataclass(frozen=True, slots=True)
class Update:
    """A batch's gradients, reduced, into the optimizer: version `batch` of the weights becomes version `batch` + 1."""

    stage: int
    batch: int

    def __str__(self) -> str:
        return f"{self.stage}U{self.batch}"


Instruction = (
    Forward
    | Backward
    | BackwardInput
    | BackwardWeight
    | SendActivation
    | ReceiveActivation
    | SendGradient
    | ReceiveGradient
    | Prologue
    | ReduceGradients
    | OptimizerStep
    | StashWeights
    | RestoreWeights
    | Update
)

_COMPUTE = {"F": Forward, "B": Backward, "I": BackwardInput, "W": BackwardWeight}
_TRANSFER = {"SA": SendActivation, "RA": ReceiveActivation, "SG": SendGradient, "RG": ReceiveGradient}
_WEIGHTS = {"WS": StashWeights, "WR": RestoreWeights}
_BATCH = {"P": Prologue, "U": Update}
_ONCE = {"D": ReduceGradients, "O": OptimizerStep}
_TOKEN = re.compile(r"(\d+)([A-Z]{1,2})(\d+)?(?:[<>@](\d+))?")


def parse_instruction(token: str) -> Instruction:
    """The inverse of `str(instruction)`; ValueError for anything else."""
    match = _TOKEN.fullmatch(token)
    if match:
        stage, kind, microbatch, peer = match.groups()
        found: Instruction | None = None
        if kind in _COMPUTE and microbatch:
            found = _COMPUTE[kind](int(stage), int(microbatch))
        elif kind in _TRANSFER | _WEIGHTS and microbatch and peer:
            found = (_TRANSFER | _WEIGHTS)[kind](int(stage), int(microbatch), int(peer))
        elif kind in _BATCH:
            found = _BATCH[kind](int(stage), int(microbatch or 0))
        elif kind in _ONCE:
            found = _ONCE[kind](int(stage))
        if found is not None and str(found) == token:
            return found
    raise ValueError(f"not an instruction: {token!r}; expected a token such as 2F0, 2B0, 0SA1>1, 1RA1<0, 0D")


@dataclass(frozen=True)
class Program:
    """actions[g] is what every rank of group g executes, in order; a group runs one stage or several.

    Groups stand in the order of the lowest stage that each runs.
    """

    actions: tuple[tuple[Instruction, ...], ...]

    @cached_property
    def home(self) -> dict[int, int]:
        """The group that runs each stage: where most of its instructions stand (the checker wants all of them there)."""
        found: dict[int, Counter[int]] = {}
        for group, row in enumerate(self.actions):
            for stage, count in Counter(instruction.stage for instruction in row).items():
                found.setdefault(stage, Counter())[group] = count
        return {stage: found[stage].most_common(1)[0][0] for stage in sorted(found)}

    def stages_of(self, group: int) -> tuple[int, ...]:
        """The stages that a group runs, ascending."""
        return tuple(stage for stage, home in self.home.items() if home == group)

    def __str__(self) -> str:
        return "\n".join(" ".join(map(str, row)) for row in self.actions)

    @classmethod
    def parse(cls, text: str) -> Program:
        return cls(tuple(tuple(parse_instruction(t) for t in line.split()) for line in text.splitlines()))
