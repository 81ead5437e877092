"""One mesh axis as a rank sees it: its coordinate, its process group, and the raw collectives over it.

The functions here move tensors and know nothing of autograd; runtime/collectives.py makes them differentiable.
`blocks` everywhere is the number of times the split repeats along the dim (see sharding/placement.py), locally.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..graph import Shape
from .torch_private import all_gather_single, reduce_scatter_single

_REDUCTIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}

Transfer = Callable[[str, int], Callable[[], None]]
"""(kind, bytes) of something that begins to travel -> what to call when it has arrived"""
Arrive = Callable[[], Tensor]
"""What waits for a collective that has been started, and gives its result."""
Record = Callable[[str, tuple[int, ...], int, float], None]
"""(kind, global ranks, bytes of the whole tensor as cost/collectives.py counts them, seconds)"""


@dataclass(eq=False)
class Axis:
    """A mesh axis of `size` ranks; `ranks` are their global numbers, in axis order.

    on_collective, when set, hears of every collective (for refinement). Setting it makes collectives synchronise with
    the device, so the runtime sets it for measured steps only.
    on_transfer and on_wait, when set, hear of asynchronous collectives: as they begin, and as this rank begins to wait for
    their end. What they hear is as "all_gather tensor" for the axis "tensor".

    `start_<collective>` starts one and returns what waits for it; with `ahead` it runs beside what this rank does
    meanwhile, else it has ended by then, and so it has where collectives are measured.
    """

    name: str
    rank: int
    size: int
    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None
    on_collective: Record | None = field(default=None, repr=False)
    on_transfer: Transfer | None = field(default=None, repr=False)
    on_wait: Callable[[str], Callable[[], None]] | None = field(default=None, repr=False)

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        """Reduce in place where `tensor` is contiguous; returns the reduced tensor."""
        return self.start_all_reduce(tensor, op)()

    def start_all_reduce(self, tensor: Tensor, op: str = "sum", ahead: bool = False) -> Arrive:
        tensor = tensor.contiguous()

        def call(later: bool) -> Any:
            return dist.all_reduce(tensor, _REDUCTIONS[op], group=self.group, async_op=later)

        return self._started("all_reduce", tensor, call, lambda: tensor, ahead)

    def begin_all_reduce(self, tensor: Tensor) -> Callable[[], None]:
        """Start to sum a contiguous tensor in place, measured or not; the result waits for it."""
        return self.under_way("all_reduce", tensor, dist.all_reduce(tensor, group=self.group, async_op=True))

    def all_gather(self, tensor: Tensor, dim: int, blocks: int = 1) -> Tensor:
        """Join the slices of all ranks along `dim`."""
        return self.start_all_gather(tensor, dim, blocks)()

    def start_all_gather(self, tensor: Tensor, dim: int, blocks: int = 1, ahead: bool = False) -> Arrive:
        tensor = tensor.contiguous()
        gathered = tensor.new_empty((self.size, *tensor.shape))

        def call(later: bool) -> Any:
            return all_gather_single(gathered.view(-1), tensor.view(-1), self.group, later)

        return self._started("all_gather", gathered, call, lambda: _join(gathered, dim, blocks), ahead)

    def reduce_scatter(self, tensor: Tensor, dim: int, blocks: int = 1) -> Tensor:
        """Sum over the ranks, and keep this rank's slice along `dim`."""
        return self.start_reduce_scatter(tensor, dim, blocks)()

    def start_reduce_scatter(self, tensor: Tensor, dim: int, blocks: int = 1, ahead: bool = False) -> Arrive:
        pieces = _cut(tensor, dim, blocks, self.size)
        out = pieces.new_empty(pieces.shape[1:])

        def call(later: bool) -> Any:
            return reduce_scatter_single(out.view(-1), pieces.view(-1), self.group, later)

        return self._started("reduce_scatter", pieces, call, lambda: out, ahead)

    def all_to_all(self, tensor: Tensor, dim: int, blocks: int, to_dim: int, to_blocks: int) -> Tensor:
        """From slices along `dim` to slices along `to_dim`; the two may be one dim, split with other blocks."""
        return self.start_all_to_all(tensor, dim, blocks, to_dim, to_blocks)()

    def start_all_to_all(
        self, tensor: Tensor, dim: int, blocks: int, to_dim: int, to_blocks: int, ahead: bool = False
    ) -> Arrive:
        if dim == to_dim:
            if to_blocks % (blocks * self.size) == 0:
                to_blocks //= self.size  # the finer split lies inside this rank's slice of the coarser one
            elif blocks % (to_blocks * self.size) == 0:
                blocks //= self.size
            else:
                whole = self.start_all_gather(tensor, dim, blocks, ahead)
                return lambda: self.slice(whole(), dim, to_blocks)
        pieces = _cut(tensor, to_dim, to_blocks, self.size)
        received = torch.empty_like(pieces)

        def call(later: bool) -> Any:
            return dist.all_to_all_single(received.view(-1), pieces.view(-1), group=self.group, async_op=later)

        return self._started("all_to_all", pieces, call, lambda: _join(received, dim, blocks), ahead, self.size)

    def pass_on(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Start sending to the next rank what the one before sends here alike; the result waits for that.

        Sends are waited for as well, so that what is passed on may be overwritten afterwards.
        """
        following, before = self.ranks[(self.rank + 1) % self.size], self.ranks[self.rank - 1]
        received = [torch.empty_like(tensor) for tensor in tensors]
        operations = [dist.P2POp(dist.isend, tensor, following, self.group) for tensor in tensors]
        operations += [dist.P2POp(dist.irecv, tensor, before, self.group) for tensor in received]
        works = dist.batch_isend_irecv(operations)

        def wait() -> list[Tensor]:
            for work in works:
                work.wait()
            return received

        return wait

    def swap(
        self,
        to_previous: Tensor | None,
        to_next: Tensor | None,
        from_previous: Shape | None,
        from_next: Shape | None,
        like: Tensor,
    ) -> Callable[[], tuple[Tensor | None, Tensor | None]]:
        """Start sending to and receiving from the ranks before and behind; the result waits for both.

        from_previous, from_next: shapes of what comes, which is of `like`'s dtype; None where nothing does.
        """
        start = self._start(like.device)
        arriving = [None if shape is None else like.new_empty(shape) for shape in (from_previous, from_next)]
        operations = []
        for tensor, received, step in zip((to_previous, to_next), arriving, (-1, 1), strict=True):
            if tensor is not None:
                operations.append(dist.P2POp(dist.isend, tensor, self.ranks[self.rank + step], self.group))
            if received is not None:
                operations.append(dist.P2POp(dist.irecv, received, self.ranks[self.rank + step], self.group))
        works = dist.batch_isend_irecv(operations) if operations else []

        def wait() -> tuple[Tensor | None, Tensor | None]:
            for work in works:
                work.wait()
            operations.clear()  # what is sent must live until here
            if start is not None and works:
                synchronize(like.device)
                size_bytes = sum(t.numel() * t.element_size() for t in arriving if t is not None)
                self.on_collective("send", self.ranks, size_bytes, time.perf_counter() - start)
            return arriving[0], arriving[1]

        return wait

    def exchange(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """All-to-all of rows: sent[r] of them, in order, to rank r; those that come, received[r] from rank r, in order."""
        out = rows.new_empty((sum(received), *rows.shape[1:]))
        call = partial(dist.all_to_all_single, out, rows.contiguous(), list(received), list(sent), group=self.group)
        self._timed("all_to_all", rows, call, parts=self.size)
        return out

    def slice(self, tensor: Tensor, dim: int, blocks: int = 1) -> Tensor:
        """This rank's slice of a whole tensor; a view where blocks == 1."""
        if blocks == 1:
            size = tensor.shape[dim] // self.size
            return tensor.narrow(dim, self.rank * size, size)
        return _cut(tensor, dim, blocks, self.size)[self.rank]

    def pad(self, tensor: Tensor, dim: int, blocks: int = 1) -> Tensor:
        """The whole tensor with this rank's slice in place and zeros elsewhere."""
        pieces = tensor.new_zeros((self.size, *tensor.shape))
        pieces[self.rank] = tensor
        return _join(pieces, dim, blocks)

    def mask(self, tensor: Tensor) -> Tensor:
        """The tensor on rank 0 of the axis, zeros elsewhere."""
        return tensor if self.rank == 0 else torch.zeros_like(tensor)

    def _start(self, device: torch.device) -> float | None:
        """The time, where collectives are measured."""
        assert self.group is not None, f"axis {self.name} of {self.size} ranks has no group (any more)"
        if self.on_collective is None:
            return None
        synchronize(device)
        return time.perf_counter()

    def _started(
        self,
        kind: str,
        whole: Tensor,
        call: Callable[[bool], Any],
        result: Callable[[], Tensor],
        ahead: bool,
        parts: int = 1,
    ) -> Arrive:
        """call(whether it returns before the collective has ended); result(), once it has."""
        if not ahead or self.on_collective is not None:
            self._timed(kind, whole, lambda: call(False), parts)
            return result
        wait = self.under_way(kind, whole, call(True), parts)

        def arrive() -> Tensor:
            wait()
            return result()

        return arrive

    def under_way(self, kind: str, whole: Tensor, work: dist.Work, parts: int = 1) -> Callable[[], None]:
        """What waits for `work`, which has begun on `parts` tensors like `whole`; on CUDA the current stream alone does."""
        arrived = None
        if self.on_transfer is not None:
            arrived = self.on_transfer(f"{kind} {self.name}", whole.numel() * whole.element_size() * parts)
            try:
                work.get_future().add_done_callback(lambda _, done=arrived: done())
                arrived = None
            except RuntimeError:
                pass  # gloo's reduce-scatter has no future: that it is complete is known when it has been waited for

        def wait() -> None:
            ended = self.on_wait and self.on_wait(f"{kind} {self.name}")
            work.wait()
            for heard in (ended, arrived):
                if heard is not None:
                    heard()

        return wait

    def _timed(self, kind: str, whole: Tensor, call: Callable[[], object], parts: int = 1) -> None:
        """parts: of how many such tensors the collective's whole consists."""
        start = self._start(whole.device)
        call()
        if start is None or self.on_collective is None:
            return
        synchronize(whole.device)
        size_bytes = whole.numel() * whole.element_size() * parts
        self.on_collective(kind, self.ranks, size_bytes, time.perf_counter() - start)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cut(tensor: Tensor, dim: int, blocks: int, size: int) -> Tensor:
    """[.., blocks * size * rest, ..] -> contiguous [size, .., blocks * rest, ..]."""
    shape = tensor.shape
    rest = shape[dim] // (blocks * size)
    viewed = tensor.reshape(*shape[:dim], blocks, size, rest, *shape[dim + 1 :])
    moved = viewed.movedim(dim + 1, 0)
    return moved.reshape(size, *shape[:dim], blocks * rest, *shape[dim + 1 :]).contiguous()


def _join(pieces: Tensor, dim: int, blocks: int) -> Tensor:
    """The inverse of `_cut`: [size, .., blocks * rest, ..] -> [.., blocks * size * rest, ..]."""
    size, shape = pieces.shape[0], pieces.shape[1:]
    rest = shape[dim] // blocks
    viewed = pieces.reshape(size, *shape[:dim], blocks, rest, *shape[dim + 1 :])
    moved = viewed.movedim(0, dim + 1)
    return moved.reshape(*shape[:dim], blocks * size * rest, *shape[dim + 1 :])
