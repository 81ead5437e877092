"""A little interpreter of Programs that carries values through rendezvous channels: the oracle of the checker."""

from __future__ import annotations

import random
from collections import Counter

from autopar.schedule.instructions import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Program,
    Prologue,
    ReceiveActivation,
    ReceiveGradient,
    SendActivation,
    SendGradient,
)

SENDS = (SendActivation, SendGradient)
RECEIVES = (ReceiveActivation, ReceiveGradient)


class Refused(Exception):
    """The executor came to a halt or computed something else than training needs."""


def execute(program: Program, rng: random.Random) -> None:
    """Run every group by itself, in a random interleaving, with values that remember how they were computed.

    A send waits in its channel and completes when the receiver, at its receive, takes it. Refused unless all groups end,
    all channels are empty, no value is left over, and the gradients are those of each microbatch exactly once. A stage
    belongs to the group that computes its forwards.
    """
    rows = program.actions
    count = 1 + max((i.microbatch for row in rows for i in row if isinstance(i, Forward)), default=-1)
    evaluation = (Prologue, ReceiveActivation, Forward, SendActivation)
    training = any(not isinstance(i, evaluation) for row in rows for i in row)
    owner: dict[int, int] = {}
    channels: dict[tuple[int, int], list] = {}
    values: dict[tuple, object] = {}
    gradients: Counter = Counter()
    computed: Counter = Counter()
    once: list[list[tuple[str, int]]] = [[] for _ in rows]
    position = [0] * len(rows)

    def demand(condition: bool, what: object) -> None:
        if not condition:
            raise Refused(what)

    demand(count > 0, "nothing is computed")
    for group, row in enumerate(rows):
        for i in row:
            if isinstance(i, Forward):
                demand(owner.setdefault(i.stage, group) == group, (i, "on two groups"))
    demand(sorted(owner) == list(range(len(owner))), "a stage without forwards")
    last = len(owner) - 1
    lowest = [min((s for s in owner if owner[s] == g), default=-1) for g in range(len(rows))]
    demand(lowest == sorted(lowest) and -1 not in lowest, "order of groups")

    def take(*key: object) -> object:
        demand(key in values, key)
        return values.pop(key)

    def put(value: object, *key: object) -> None:
        demand(key not in values, key)
        values[key] = value

    def step(group: int) -> bool:
        instruction = rows[group][position[group]]
        stage, m = instruction.stage, getattr(instruction, "microbatch", None)
        demand(owner.get(stage) == group, instruction)
        if isinstance(instruction, (*SENDS, *RECEIVES)):
            forwards = isinstance(instruction, (SendActivation, ReceiveGradient))
            demand(instruction.peer == stage + (1 if forwards else -1), instruction)
            demand(owner.get(instruction.peer, group) != group, instruction)
        if isinstance(instruction, RECEIVES):
            channel = channels.get((instruction.peer, stage), [])
            if not channel:
                return False
            kind, value, sent = channel.pop(0)
            wanted = "activation" if isinstance(instruction, ReceiveActivation) else "gradient"
            demand(kind == wanted and sent == m, (instruction, kind, sent))
            put(value, "in", kind, stage, m)
        elif isinstance(instruction, SENDS):
            kind = "activation" if isinstance(instruction, SendActivation) else "gradient"
            channels.setdefault((stage, instruction.peer), []).append((kind, take("out", kind, stage, m), m))
        elif isinstance(instruction, Forward):
            value = ("batch", m) if stage == 0 else take("in", "activation", stage, m)
            computed["F", stage, m] += 1
            if training:
                put(value, "saved", stage, m)
            if stage < last:
                near = owner[stage + 1] == group
                put(
                    ("F", stage, value), *(("in", "activation", stage + 1) if near else ("out", "activation", stage)), m
                )
        elif isinstance(instruction, (Backward, BackwardInput)):
            saved = take("saved", stage, m)
            value = ("loss", m) if stage == last else take("in", "gradient", stage, m)
            computed["B", stage, m] += 1
            if isinstance(instruction, BackwardInput):
                put((value, saved), "deferred", stage, m)
            else:
                gradients[stage, value, saved] += 1
            if stage > 0:
                near = owner[stage - 1] == group
                put(("B", stage, value), *(("in", "gradient", stage - 1) if near else ("out", "gradient", stage)), m)
        elif isinstance(instruction, BackwardWeight):
            value, saved = take("deferred", stage, m)
            gradients[stage, value, saved] += 1
        else:
            kind = str(instruction).lstrip("0123456789")
            forwards = sum(times for (what, s, _), times in computed.items() if (what, s) == ("F", stage))
            demand(kind != "P" or not forwards, instruction)
            whole = sum(times for (s, *_), times in gradients.items() if s == stage)
            demand(kind != "D" or whole >= count, instruction)
            demand(kind != "O" or stage == lowest[group], instruction)
            demand(kind != "O" or all(("D", s) in once[group] for s in owner if owner[s] == group), instruction)
            once[group].append((kind, stage))
        position[group] += 1
        return True

    while True:
        open_groups = [g for g in range(len(rows)) if position[g] < len(rows[g])]
        if not open_groups:
            break
        rng.shuffle(open_groups)
        demand(any([step(g) for g in open_groups]), "deadlock")

    demand(not any(channels.values()), "a send never completes")
    demand(not values, "a value is left over")
    expected = Counter({(k, s, m): 1 for k in ("FB" if training else "F") for s in owner for m in range(count)})
    demand(computed == expected, "not every microbatch once")
    for group, kinds in enumerate(once):
        stages = [s for s in sorted(owner) if owner[s] == group]
        wanted = [("P", s) for s in stages]
        wanted += [("D", s) for s in stages] + [("O", stages[0])] if training else []
        demand(sorted(kinds) == sorted(wanted), "once")
    for stage in range(len(owner)) if training else ():
        for m in range(count):
            saved: tuple = ("batch", m)
            for before in range(stage):
                saved = ("F", before, saved)
            value: tuple = ("loss", m)
            for after in range(last, stage, -1):
                value = ("B", after, value)
            demand(gradients[stage, value, saved] == 1, "wrong gradient")
