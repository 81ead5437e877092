"""Gradients summed over ranks in buckets, while the backward that makes them still runs.

Buckets are filled in reverse order of use and reduced as soon as their last gradient arrives during the last
microbatch's backward, as DistributedDataParallel does (Li et al., VLDB 2020, section 3.2). A gradient is copied once,
into its bucket, when the first microbatch makes it; later microbatches accumulate in place, and what `finish` hands out
are views of the buckets. On a CPU a bucket's memory is used again, when nobody refers to those views any more. A bucket may be
of another dtype than its leaves; then each microbatch's gradient is added to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple
from weakref import ref

import torch
from torch import Tensor

from ..torch_private import storage_use_count
from .axis import Axis

FIRST_BUCKET_BYTES = 2**20  # as DistributedDataParallel: a small first bucket starts the network early
BUCKET_BYTES = 25 * 2**20


class Summand(NamedTuple):
    """A leaf whose gradients are summed over `axis` (None: over microbatches alone) in `dtype`."""

    name: str
    leaf: Tensor
    axis: Axis | None
    dtype: torch.dtype


class Bucket:
    """Gradients that one all-reduce sums. `pending` counts the ones that the last backward still has to bring."""

    def __init__(self, members: Sequence[Summand]):
        self.axis = members[0].axis
        self.dtype = members[0].dtype
        self.leaves = leaves = tuple(member.leaf for member in members)
        self.sizes = [leaf.numel() for leaf in leaves]
        self.pending = 0
        self.wait: Callable[[], None] | None = None
        self.launched = False
        self.views: list[Tensor] | None = None
        self.flat: Tensor | None = None
        self._unused_count = 0
        # A host's allocator gives memory back that then costs a page fault each; a device's keeps it for the next buffer.
        self._stays = leaves[0].device.type == "cpu"

    def open(self) -> list[Tensor]:
        """One view per leaf, over memory that nobody else uses; the same list until `close`."""
        if self.views is None:
            if self.flat is None or storage_use_count(self.flat) != self._unused_count:
                self.flat = torch.empty(sum(self.sizes), dtype=self.dtype, device=self.leaves[0].device)
                self._unused_count = storage_use_count(self.flat)
            runs = self.flat.split(self.sizes)
            self.views = [run.view(leaf.shape) for run, leaf in zip(runs, self.leaves, strict=True)]
        return self.views

    def launch(self) -> None:
        assert self.flat is not None and not self.launched
        self.launched = True
        if self.axis is not None:
            self.wait = self.axis.begin_all_reduce(self.flat)

    def reset(self) -> None:
        """Forget a step that was broken off; its memory may still be on the wire, so it is not used again."""
        if self.views is not None:
            self.views, self.wait, self.launched, self.flat = None, None, False, None

    def close(self) -> list[Tensor]:
        """Wait for the sum, and give the views away."""
        if self.wait is not None:
            self.wait()
        views, self.views, self.wait, self.launched = self.views, None, None, False
        assert views is not None
        if not self._stays:
            self.flat = None
        return views


class GradientReducer:
    """Sums the gradients of leaf tensors over their axes, in buckets, in one order on every rank.

    summands: in order of use. Leaves must gather their gradients in one backward call per microbatch.
    """

    def __init__(self, summands: Sequence[Summand], bucket_bytes: int = BUCKET_BYTES):
        self.names: dict[int, str] = {}
        self.buckets: list[Bucket] = []
        self._arrived: list[list[bool]] = []
        self._last = False
        self._next = 0
        for members in _bucketed(summands, bucket_bytes):
            bucket = Bucket(members)
            slot = len(self.buckets)
            self.buckets.append(bucket)
            self._arrived.append([False] * len(members))
            for position, (name, leaf, _, _) in enumerate(members):
                self.names[id(leaf)] = name
                leaf.register_post_accumulate_grad_hook(partial(_arrived, ref(self), slot, position))

    def begin_step(self) -> None:
        self._last = False
        self._next = 0
        for bucket, arrived in zip(self.buckets, self._arrived, strict=True):
            bucket.reset()
            arrived[:] = [False] * len(arrived)
            for leaf in bucket.leaves:
                leaf.grad = None

    def buffers(self) -> list[Tensor]:
        """Memory of the buckets, which stays from step to step."""
        return [bucket.flat for bucket in self.buckets if bucket.flat is not None]

    def begin_last_backward(self) -> None:
        self._last = True
        for bucket in self.buckets:
            bucket.pending = len(bucket.leaves)

    def finish(self) -> dict[str, Tensor]:
        gradients: dict[str, Tensor] = {}
        for bucket, arrived in zip(self.buckets, self._arrived, strict=True):
            if not bucket.launched:
                # Some gradient never came. All ranks run the same program, so it came on none of them.
                for view, here in zip(bucket.open(), arrived, strict=True):
                    if not here:
                        view.zero_()
                bucket.launch()
        for bucket, arrived in zip(self.buckets, self._arrived, strict=True):
            for leaf, view, here in zip(bucket.leaves, bucket.close(), arrived, strict=True):
                leaf.grad = None
                if here:
                    gradients[self.names[id(leaf)]] = view
        return gradients

    def _arrive(self, slot: int, position: int, leaf: Tensor) -> None:
        bucket, arrived = self.buckets[slot], self._arrived[slot]
        assert not bucket.launched, f"the gradient of {self.names[id(leaf)]} came again after it had been reduced"
        if not arrived[position]:
            arrived[position] = True
            view = bucket.open()[position]
            # One kernel that reads and writes wide words also between dtypes, which `copy_` does not.
            torch._foreach_copy_([view], [leaf.grad])
            # The next microbatch adds to it in place; a gradient of another dtype cannot stand there.
            leaf.grad = view if view.dtype == leaf.dtype else None
        elif bucket.dtype != leaf.dtype:
            bucket.open()[position].add_(leaf.grad)
            leaf.grad = None
        if self._last:
            bucket.pending -= 1
            # Collectives of one group must be issued in one order everywhere, so a bucket waits for those before it.
            while self._next < len(self.buckets) and self.buckets[self._next].pending == 0:
                self.buckets[self._next].launch()
                self._next += 1


def _arrived(reducer: ref[GradientReducer], slot: int, position: int, leaf: Tensor) -> None:
    """A hook is no path for Python's collector: one that held the reducer would keep it, its leaves and its buckets for good."""
    found = reducer()
    assert found is not None
    # Autograd calls also where it has come by a leaf with nothing: a weight that stood by for a conversion's backward
    # (runtime/overlap.py), and whose product the loss does not depend on.
    if leaf.grad is not None:
        found._arrive(slot, position, leaf)


def _bucketed(summands: Sequence[Summand], bucket_bytes: int) -> list[list[Summand]]:
    """In reverse order of use, cut into buckets of one axis and dtype of at least `bucket_bytes` (but the last).

    Buckets are ordered by when their last gradient comes: they are launched in this order, and none waits in vain.
    """
    full: list[list[Summand]] = []
    filling: dict[tuple[int, torch.dtype], list[Summand]] = {}
    filled_bytes: dict[tuple[int, torch.dtype], int] = {}
    limit = min(FIRST_BUCKET_BYTES, bucket_bytes)
    for summand in reversed(summands):
        key = (id(summand.axis), summand.dtype)
        # Taking it out and putting it back keeps `filling` in the order of the latest member.
        bucket = filling.pop(key, [])
        bucket.append(summand)
        filled_bytes[key] = filled_bytes.get(key, 0) + summand.leaf.numel() * summand.dtype.itemsize
        if filled_bytes[key] >= limit:
            full.append(bucket)
            filled_bytes[key] = 0
            limit = bucket_bytes
        else:
            filling[key] = bucket
    return full + list(filling.values())
