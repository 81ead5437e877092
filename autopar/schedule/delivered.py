"""Which sends are known to have arrived, and when: a message that comes back from a peer tells of all that it took before.

Backends need not say whether a send is done without waiting for it (gloo does not), but a wait for what must have
arrived returns at once. So the sender can let go of its buffers in the midst of a step, and never waits for a peer.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping

from .instructions import Instruction, Program, ReceiveGradient, SendActivation, SendGradient
from .steps import RECEIVES, SENDS, dependencies


def delivered(program: Program, group: int) -> Mapping[Instruction, tuple[Instruction, ...]]:
    """For each receive of the group's row that tells of any: the sends of the row whose messages have been taken once it
    is complete, each named once, by the first receive that tells of it.

    With several ranks in a group this holds for its rows: a wait for another rank of the peer's group ends without any
    further instruction of this group.
    """
    needs, provides = dependencies(program)
    taken_at: dict[object, int] = {}
    sent_at: dict[object, int] = {}
    for row in needs:
        taken_at.update((key, index) for index, key in enumerate(row) if key is not None)
    for row in provides:
        sent_at.update((key, index) for index, key in enumerate(row) if key is not None)
    under_way: dict[int, deque[tuple[int, Instruction]]] = defaultdict(deque)
    found: dict[Instruction, tuple[Instruction, ...]] = {}
    for index, instruction in enumerate(program.actions[group]):
        kind = type(instruction)
        if kind in SENDS:
            under_way[program.home[instruction.peer]].append((taken_at[provides[group][index]], instruction))
        elif kind in RECEIVES:
            peer = program.home[instruction.peer]
            reached = sent_at[needs[group][index]]
            known = tuple(send for taken, send in under_way[peer] if taken < reached)
            if known:
                under_way[peer] = deque(pair for pair in under_way[peer] if pair[0] >= reached)
                found[instruction] = known
    return found


def delivered_in_stream(receive: Instruction, num_stages: int) -> tuple[Instruction, ...]:
    """The same for a stream of 1F1B's order without end: a gradient tells of its activation, and an activation, whose stage
    holds at most `num_stages` microbatches, of the gradient of the one that far before."""
    if isinstance(receive, ReceiveGradient):
        return (SendActivation(receive.stage, receive.microbatch, receive.peer),)
    earlier = receive.microbatch - num_stages
    return (SendGradient(receive.stage, earlier, receive.peer),) if earlier >= 0 else ()
