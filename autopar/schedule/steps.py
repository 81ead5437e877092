"""When the instructions of a Program run: what waits for what, one execution, and the grid that shows it."""

from __future__ import annotations

from collections.abc import Collection, Hashable

from .instructions import (
    Backward,
    BackwardInput,
    Forward,
    Program,
    ReceiveActivation,
    ReceiveGradient,
    SendActivation,
    SendGradient,
)

SENDS = (SendActivation, SendGradient)
RECEIVES = (ReceiveActivation, ReceiveGradient)
# How much of a faulty program an error shows around the fault.
_STEPS_SHOWN = 12
_GROUPS_SHOWN = 8

Position = tuple[int, int]
Key = tuple[Hashable, ...] | None


def dependencies(program: Program) -> tuple[list[list[Key]], list[list[Key]]]:
    """Per group and instruction: the key that it waits for, and the key that it makes available (None: none).

    Keys are messages, (from stage, to stage, how manyth), once the program has transfers. Before, a forward waits for the
    same microbatch's forward one stage earlier, and a backward for the backward one stage later, if other groups run these.
    """
    lowered = any(isinstance(i, SENDS + RECEIVES) for row in program.actions for i in row)
    home = program.home
    needs: list[list[Key]] = []
    provides: list[list[Key]] = []
    for group, row in enumerate(program.actions):
        count: dict[Position, int] = {}
        need: list[Key] = [None] * len(row)
        provide: list[Key] = [None] * len(row)
        for index, instruction in enumerate(row):
            kind, stage = type(instruction), instruction.stage
            if lowered:
                if kind in SENDS or kind in RECEIVES:
                    channel = (stage, instruction.peer) if kind in SENDS else (instruction.peer, stage)
                    position = count.get(channel, 0)
                    count[channel] = position + 1
                    (provide if kind in SENDS else need)[index] = (*channel, position)
            elif kind in (Forward, Backward, BackwardInput):
                source = stage - 1 if kind is Forward else stage + 1
                if home.get(source, group) != group:
                    need[index] = (kind is Forward, source, instruction.microbatch)
                provide[index] = (kind is Forward, stage, instruction.microbatch)
        needs.append(need)
        provides.append(provide)
    return needs, provides


def execution_steps(program: Program) -> list[list[int]]:
    """When each instruction runs if all take one step; a group that is stuck has fewer entries than instructions."""
    needs, provides = dependencies(program)
    steps: list[list[int]] = [[] for _ in program.actions]
    available: dict[Key, int] = {}
    waiting: dict[Key, int] = {}
    ready = list(range(len(program.actions)))
    while ready:
        group = ready.pop()
        done = steps[group]
        step = done[-1] + 1 if done else 0
        for index in range(len(done), len(needs[group])):
            need = needs[group][index]
            if need is not None:
                if need not in available:
                    waiting[need] = group
                    break
                step = max(step, available[need] + 1)
            done.append(step)
            provide = provides[group][index]
            if provide is not None:
                available[provide] = step
                if provide in waiting:
                    ready.append(waiting.pop(provide))
            step += 1
    return steps


def grid(program: Program, marked: Collection[Position] = (), window: bool = False) -> str:
    """One line per group, one column per step, each instruction in the step in which it would run.

    Groups that are stuck go on in consecutive steps, so that the rest of their list is seen. `marked` positions
    (group, index) stand between asterisks; an index past the end marks what is missing there. window=True shows only
    the surroundings of the first marked position of a large program.
    """
    cells: list[dict[int, str]] = []
    centre: Position | None = None
    for group, (row, done) in enumerate(zip(program.actions, execution_steps(program), strict=True)):
        line: dict[int, str] = {}
        step = -1
        for index in range(len(row) + 1):
            step = done[index] if index < len(done) else step + 1
            token = str(row[index]) if index < len(row) else "missing"
            if (group, index) in marked:
                line[step] = f"*{token}*"
                centre = centre or (group, step)
            elif index < len(row):
                line[step] = token
        cells.append(line)
    columns = range(max((max(line, default=-1) for line in cells), default=-1) + 1)
    groups = range(len(cells))
    if window and centre is not None:
        groups = groups[max(0, centre[0] - _GROUPS_SHOWN) : centre[0] + _GROUPS_SHOWN + 1]
        columns = columns[max(0, centre[1] - _STEPS_SHOWN) : centre[1] + _STEPS_SHOWN + 1]
    head = ["step", *map(str, columns)]
    table = [head, *([f"group {g}", *(cells[g].get(c, "") for c in columns)] for g in groups)]
    widths = [max(len(line[k]) for line in table) for k in range(len(head))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in table]
    return "\n".join(lines)
