"""One answer for all ranks."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

Result = TypeVar("Result")


def from_rank_zero(function: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result:
    """`function()` of rank 0, on every rank; what it raises there is raised everywhere, so that no rank waits.

    group: all ranks, where another thread uses the default group at the same time.
    """
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = function()
        except Exception as error:
            answer[1] = error if _can_travel(error) else RuntimeError(f"{type(error).__name__}: {error}")
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(answer, src=0, group=group)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def on_every_rank(function: Callable[[], Result], group: dist.ProcessGroup | None = None) -> list[Result]:
    """`function()` of every rank, in order, on every rank; the first rank's error is raised everywhere.

    group: as in `from_rank_zero`.
    """
    answer: tuple[Any, Exception | None] = (None, None)
    try:
        answer = function(), None
    except Exception as error:
        answer = None, error if _can_travel(error) else RuntimeError(f"{type(error).__name__}: {error}")
    answers = [answer]
    if dist.get_world_size() > 1:
        answers = [answer] * dist.get_world_size()
        dist.all_gather_object(answers, answer, group=group)
    for _, error in answers:
        if error is not None:
            raise error
    return [result for result, _ in answers]


def _can_travel(error: Exception) -> bool:
    """Whether another process can rebuild the error (some take more arguments than they keep)."""
    try:
        return str(pickle.loads(pickle.dumps(error))) == str(error)
    except Exception:
        return False
