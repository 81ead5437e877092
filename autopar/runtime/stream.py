"""Batches through an asynchronous pipeline, one after the other without a flush (schedule/pipedream.py).

Every rank takes its batches from its own iterator and is as far ahead of the others as its stage is in front of theirs.
A batch's loss is summed over the ranks in the background; a rank hands it to the loop once it has gone so much further that
the first stage, which ends a batch last, has ended it too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from ..schedule.instructions import Backward, SendGradient, Update
from ..schedule.orders import schedule_named
from ..schedule.passes import with_transfers
from ..schedule.pipedream import stream_order
from .build import Runtime

Rows = Mapping[str, Tensor]


class Feed:
    """The batches of a stream as they are asked for, in order; `end` of them, once that is known."""

    def __init__(self, batches: Iterator[Rows]):
        self._batches = batches
        self._taken: dict[int, Rows] = {}
        self.taken = 0
        self.end: int | None = None

    def __call__(self, number: int) -> Rows | None:
        """The rows of a batch that is not forgotten; None where there is none."""
        self._take(number + 1)
        return None if self.end is not None and number >= self.end else self._taken[number]

    def _take(self, count: int) -> None:
        while self.taken < count and self.end is None:
            rows = next(self._batches, None)
            if rows is None:
                self.end = self.taken
            else:
                self._taken[self.taken] = rows
                self.taken += 1

    def forget(self, number: int) -> None:
        self._taken.pop(number)

    def stop_at(self, count: int) -> None:
        """End after so many batches, taking what is missing to them."""
        self._take(count)
        self.end = self.taken


def run_stream(
    runtime: Runtime,
    feed: Feed,
    optimizer: torch.optim.Optimizer,
    training: bool,
    summed: Callable[[Tensor | None], Tensor],
) -> Iterator[Tensor]:
    """Train on every batch of the feed; yields each one's whole loss, in order.

    summed(summand): what this rank adds to the sum of the loss over all ranks.
    """
    plan, executor = runtime.plan, runtime.executor
    (stage,) = executor.parts
    order = stream_order(
        stage, len(plan.stages), plan.microbatches, schedule_named(plan.schedule).delay, lambda n: feed(n) is not None
    )
    actions = with_transfers(order, {s: s for s in range(len(plan.stages))})
    losses: deque[tuple[int, Tensor, dist.Work | None]] = deque()
    done = 0
    for action, summand in executor.stream(actions, feed, optimizer, training, runtime.training.postings):
        done += isinstance(action, Backward)
        if isinstance(action, Update):
            feed.forget(action.batch)
            loss = summed(summand)
            # A group of its own: ranks that are ahead have more of these under way than others.
            work = dist.all_reduce(loss, group=runtime.losses, async_op=True) if plan.world_size > 1 else None
            losses.append((done, loss, work))
            runtime.recorder.begin()
        # The first stage ends what this one ended `stage` microbatches ago, without anything that this one does later.
        if isinstance(action, SendGradient | Update):
            while losses and losses[0][0] + stage <= done:
                yield _whole(losses)
    while losses:
        yield _whole(losses)


def _whole(losses: deque[tuple[int, Tensor, dist.Work | None]]) -> Tensor:
    _, loss, work = losses.popleft()
    if work is not None:
        work.wait()
    return loss


def agree_on_end(feed: Feed, device: torch.device) -> None:
    """Let every rank end with the same batch, the furthest that any has taken. All ranks call it at one place."""
    taken = torch.tensor(feed.taken, device=device)
    if dist.get_world_size() > 1:
        dist.all_reduce(taken, dist.ReduceOp.MAX)
    feed.stop_at(int(taken))
