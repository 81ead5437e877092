"""What ZeRO lays whole beside what is at rest while blocks compute, as fully_shard does it.

Each block's parameters are gathered together, into one buffer from which they are copied out. In forwards the buffer
stays until the next block's has arrived; in backwards it goes at once, and the gather of the block before is started.
A block's gradients stay whole until its backward ends; then they are copied into the buffer to be scattered, which stays
until the next block's takes its place. With o_i the bytes of block i's parameters, g_i those of their gradients and r_i
of these in the dtype of reductions, block i's forward and backward need beside their activations

    level 3                 forward  o_i + o_i           backward  o_i + o_(i-1) + r_(i+1), its end g_i + r_i + o_(i-1)
    levels 1 and 2          forward  o_i, once           backward  r_(i+1),                 its end g_i + r_i

where the parameters of levels 1 and 2 lie whole from first use to last and count as at rest. Parameters that several
blocks use are gathered once for all, and their gradients stay whole to the last backward's end. Stacks that do not keep
slices at rest under levels 1 and 2 are taken to need the gradients of a block, and the buffer to scatter them in.

Ignored: parts of the hybrid's copies, and the cast slices that a gather in a narrower dtype starts from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..plan import Stage
from .constants import Constants

Sizes = tuple[int, int, int]
"""(o, g, r) of one parameter: gathered, its gradient, its gradient in the dtype of reductions; 0, 0 without gradient."""


@dataclass(frozen=True)
class Gathered:
    """Bytes beside activations. always: all the while. By block: `forward` and `backward` while it computes, `gathering`
    in front of its forward, `copying` in front of its backward, `ending` when its backward is done.

    whole_gradients: a block's parameter gradients stay until its backward ends.
    """

    always: int = 0
    forward: Sequence[int] = ()
    gathering: Sequence[int] = ()
    backward: Sequence[int] = ()
    copying: Sequence[int] = ()
    ending: Sequence[int] = ()
    whole_gradients: bool = False


def scatters_each(stage: Stage, microbatches: int, constants: Constants) -> bool:
    """Whether the gradients of each microbatch are scattered, so that no sum of them ever lies whole."""
    if microbatches == 1:
        return True
    return stage.zero > (1 if constants.slices_at_rest else 2) and constants.scatter_each


def gathered(
    blocks: Sequence[Sequence[str]],
    size_of: Callable[[str], Sizes],
    stage: Stage,
    microbatches: int,
    constants: Constants,
) -> Gathered:
    """blocks: the names of the parameters of each block of the stage."""
    none = [0] * len(blocks)
    if stage.zero == 0 or (stage.zero == 1 and not constants.slices_at_rest):
        return Gathered(0, none, none, none, none, none)
    uses = Counter(name for names in blocks for name in names)
    own = [_sums([size_of(name) for name in names if uses[name] == 1]) for names in blocks]
    o, g, r = (list(column) for column in zip(*own, strict=True))
    if stage.zero == 2 and not constants.slices_at_rest:
        return Gathered(0, none, none, [2 * size for size in o], none, none)
    common = _sums([size_of(name) for name, count in uses.items() if count > 1])
    each = scatters_each(stage, microbatches, constants)
    before, after = [0, *o[:-1]], [*r[1:], 0] if each else none
    ends = [a + b for a, b in zip(g, r, strict=True)]
    if stage.zero == 3:
        always = common[0] + (0 if each else sum(g) + common[1])
        return Gathered(
            always=always,
            forward=[2 * size for size in o],
            gathering=[a + b for a, b in zip(before, o, strict=True)],
            backward=[_common(common, each) + sum(sizes) for sizes in zip(o, before, after, strict=True)],
            copying=[_common(common, each) + 2 * a + b for a, b in zip(o, after, strict=True)],
            ending=[_common(common, each) + a + b for a, b in zip(ends if each else r, before, strict=True)],
            whole_gradients=each,
        )
    # With one microbatch, what counts as at rest comes in its forward and goes in its backward.
    absent = [-sum(o[i + 1 :]) for i in range(len(o))] if microbatches == 1 else none
    return Gathered(
        forward=[a + b if microbatches == 1 else 0 for a, b in zip(absent, o, strict=True)],
        gathering=[a + b if microbatches == 1 else 0 for a, b in zip(absent, before, strict=True)],
        backward=[_common(common, each) + a + b for a, b in zip(absent, after, strict=True)],
        copying=none,
        ending=[_common(common, each) + a + b for a, b in zip(absent, ends if each else none, strict=True)],
        whole_gradients=each or g != r,
    )


def _common(sizes: Sizes, each: bool) -> int:
    """The gradients of parameters that several blocks use, whole until the last backward has ended."""
    return sizes[1] if each else 0


def _sums(sizes: Sequence[Sizes]) -> Sizes:
    o, g, r = (sum(column) for column in zip(*sizes, strict=True)) if sizes else (0, 0, 0)
    return o, g, r
