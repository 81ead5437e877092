"""Asynchronous pipelines: a stream of batches without a flush, each backward with the weights of its forward.

The compute order is that of 1F1B, going on from batch to batch. Weights of a stage are of version k after k updates, one for
each batch. V(m) is the version that both the forward and the backward of microbatch m use.

- pipedream (Narayanan et al. 2019, PipeDream, section 3.3, weight stashing): V(m) is the latest at the forward. A batch is
  one microbatch, so stage s of S has V(m) = max(0, m - (S - 1 - s)), and at most S - s versions:
  w(t+1) = w(t) - lr * grad f(w_0(t-S+1), ..., w_{S-1}(t)).
- 2bw (Narayanan et al. 2021, PipeDream-2BW, section 3.1, double-buffered weights): a batch is M >= S microbatches whose
  gradients are summed; all stages have V(m) = max(0, b - 1) for batch b, and two versions: w(t+1) = w(t) - lr * grad f(w(t-1)).

Inconsistent across stages (no vertical sync) as in the papers: each stage counts its own versions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from .instructions import Backward, Forward, Instruction, Prologue, RestoreWeights, StashWeights, Update


def stream_order(
    stage: int, num_stages: int, microbatches: int, delay: int | None, exists: Callable[[int], bool]
) -> Iterator[Instruction]:
    """What a stage does, without transfers; microbatches are numbered through the stream.

    delay: 0 to use the latest weights, 1 those of the batch before. exists(batch): whether there is such a batch, asked in
    order and as late as can be.
    """
    depth = num_stages - stage
    begun = done = updates = 0
    stashed: deque[int] = deque()
    while True:
        if begun - done < depth and exists(begun // microbatches):
            batch, first = divmod(begun, microbatches)
            if first == 0:
                yield Prologue(stage, batch)
            stashed.append(max(0, batch - 1) if delay else updates)
            yield StashWeights(stage, begun, stashed[-1])
            yield Forward(stage, begun)
            begun += 1
        elif done < begun:
            yield RestoreWeights(stage, done, stashed.popleft())
            yield Backward(stage, done)
            done += 1
            if done % microbatches == 0:
                yield Update(stage, updates)
                updates += 1
        else:
            return
