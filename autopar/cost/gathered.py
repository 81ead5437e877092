"""What ZeRO lays whole beside what is at rest while blocks compute, as fully_shard does it.

Each block's parameters are gathered together, into one buffer from which they are copied out. In forwards the buffer
stays until the next block's has arrived; in backwards it goes at once, and the gather of the block before is started.
A block's gradients stay whole until its backward ends; then they are copied into the buffer to be scattered, which stays
until the next block's takes its place. With o_i the bytes of block i's parameters, g_i those of their gradients and r_i
of these in the dtype of reductions, block i's forward and backward need beside their activations

    level 3         forward  o_i + o_i     backward  o_i + o_(i-1) + r_(i+1)     its end  g_i + r_i + o_(i-1)
    levels 1, 2     forward  o_i, once     backward  r_(i+1)                     its end  g_i + r_i

where r_(i+1) of the last block is the buffer that the microbatch before scattered last, which stays through the next
forward too. The parameters of levels 1 and 2 lie whole from first use to last and count as at rest. Parameters that
several blocks use are gathered once for all, and their gradients stay whole to the last backward's end. Stacks that do
not keep slices at rest under levels 1 and 2 are taken to need the gradients of a block, and the buffer to scatter them in.
On hosts a block's buffer goes when it has been copied out, and then the next block's parameters set out (`gathers_ahead`):
the second o_i of a forward is o_(i+1).

Ignored: parts of the hybrid's copies, and the cast slices that a gather in a narrower dtype starts from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..plan import Stage
from .constants import Constants

Sizes = tuple[int, int, int]
"""(o, g, r); 0, 0 for what takes no gradient."""


@dataclass(frozen=True, slots=True)
class Whole:
    """Bytes beside the activations of one block: while its forward and its backward compute, in front of each, and when
    the backward is done."""

    forward: int = 0
    gathering: int = 0
    backward: int = 0
    copying: int = 0
    ending: int = 0


@dataclass(frozen=True)
class Gathered:
    """always: bytes all the while. blocks: of each run of equal blocks the first and, where there are so many, the last but
    one and the last.
    whole_gradients: whether the gradients of a block stay until its backward ends."""

    always: int
    blocks: Sequence[Whole]
    whole_gradients: bool = False


def scatters_each(stage: Stage, microbatches: int, constants: Constants) -> bool:
    """Whether the gradients of each microbatch are scattered, so that no sum of them ever lies whole."""
    if microbatches == 1:
        return True
    return stage.zero > (1 if constants.slices_at_rest else 2) and constants.scatter_each


def gathered(
    runs: Sequence[tuple[int, Sizes]], common: Sizes, stage: Stage, microbatches: int, constants: Constants
) -> Gathered:
    """runs: of equal blocks, how many and the sizes of each. common: of the parameters that several blocks use."""
    shown = [(number, count, sizes) for count, sizes in runs for number in range(min(count, 3))]
    if stage.zero == 0 or (stage.zero < 3 and not constants.slices_at_rest):
        scattering = 2 if stage.zero == 2 else 0
        return Gathered(0, [Whole(backward=scattering * o) for _, _, (o, _, _) in shown])
    each = scatters_each(stage, microbatches, constants)
    blocks = []
    # The buffer that the microbatch before scattered last.
    left = (common[2] or shown[0][2][2]) if each and microbatches > 1 else 0
    later = sum(count * o for count, (o, _, _) in runs)
    for i, (number, count, (o, g, r)) in enumerate(shown):
        following = o if number < min(count, 3) - 1 else shown[i + 1][2][0] if i + 1 < len(shown) else 0
        buffer = following if constants.gathers_ahead else o
        before = o if number else shown[i - 1][2][0] if i else 0
        after = (shown[i + 1][2][2] if i + 1 < len(shown) else left) if each else 0
        end = common[1] + g + r if each else r
        after += common[1] if each else 0
        if stage.zero == 3:
            ahead = left + (o if constants.gathers_ahead else before) + o
            blocks.append(Whole(left + o + buffer, ahead, o + before + after, 2 * o + after, end + before))
            continue
        later -= (count - 2) * o if number == 1 and count > 2 else o
        if microbatches > 1:
            blocks.append(Whole(left, left, after, after, end if each else 0))
            continue
        # What counts as at rest comes with the forward of the only microbatch and goes with its backward.
        arriving = o if constants.gathers_ahead else before
        blocks.append(Whole(buffer - later, arriving - later, after - later, after - later, end - later))
    if stage.zero < 3:
        return Gathered(0, blocks, each or common[1] != common[2] or any(g != r for _, (_, g, r) in runs))
    summed = 0 if each else common[1] + sum(count * g for count, (_, g, _) in runs)
    return Gathered(common[0] + summed, blocks, each)
