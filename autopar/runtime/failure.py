"""One rank's failure becomes everyone's: all stop within seconds, and each says what failed first and where."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from .torch_private import abort_process_groups, default_store

_KEY = "autopar/first_failure"
_GRACE_S = 3.0


class RankFailure(RuntimeError):
    """Another rank failed; the message names the rank, what it was doing and its error."""


def publish(error: BaseException, doing: str) -> None:
    """Tell the other ranks about `error`; the first rank to publish wins."""
    store = default_store()
    if store is not None:
        publish_text(store, f"rank {dist.get_rank()} failed {doing}: {type(error).__name__}: {error}")


def publish_text(store: dist.Store, text: str) -> None:
    """What failed first, in words, unless something else did."""
    # the store's host may be gone, and with it everyone who could have asked
    with contextlib.suppress(RuntimeError):
        store.compare_set(_KEY, "", text)


def published(store: dist.Store) -> str | None:
    """What failed first, None if nothing was published."""
    return store.get(_KEY).decode() if store.check([_KEY]) else None


def first_failure(wait_s: float = _GRACE_S) -> str | None:
    """What the first failing rank published, waiting a little for it; None if nobody did."""
    store = default_store()
    if store is None:
        return None
    deadline = time.monotonic() + wait_s
    try:
        while time.monotonic() < deadline:
            if store.check([_KEY]):
                store.set_timeout(timedelta(seconds=wait_s))
                return store.get(_KEY).decode()
            time.sleep(0.05)
    except RuntimeError:
        return None
    return None


def stop_everyone(error: BaseException, doing: str, find: Callable[[], str | None]) -> BaseException:
    """Publish `error` unless another rank failed before, close this rank's connections so that nobody waits for it,
    and return the error to raise.

    find(): where a connection broke and no rank has said why, who is to blame.
    """
    rank = dist.get_rank()
    is_consequence = isinstance(error, dist.DistError | RuntimeError) and _looks_remote(error)
    first = first_failure(_GRACE_S if is_consequence else 0.1)
    if first is None and is_consequence:
        first = find()
        store = default_store()
        if first is not None and store is not None:
            publish_text(store, first)
    if first is None:
        publish(error, doing)
    abort_process_groups()
    if first is not None and not first.startswith(f"rank {rank} "):
        return RankFailure(f"{first}\n(this rank stopped {doing})")
    return error


def _looks_remote(error: BaseException) -> bool:
    text = str(error)
    return any(
        sign in text
        for sign in ("Connection", "closed by peer", "gloo", "NCCL", "Timed out", "timed out", "Broken pipe")
    )
