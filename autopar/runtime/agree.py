"""One answer for all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

Result = TypeVar("Result")


def from_rank_zero(function: Callable[[], Result]) -> Result:
    """`function()` of rank 0, on every rank; a ValueError there is raised everywhere."""
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = function()
        except ValueError as error:
            answer[1] = error
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]
