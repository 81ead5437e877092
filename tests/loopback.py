"""All ranks in one process: `run(function, num_ranks)` calls `function` on every rank, as threads that take turns.

While it runs, the calls of torch.distributed listed in `Loopback.CALLS` are answered in memory, so code that uses those
and nothing else of it (collectives on tensors, isend and irecv, groups by ranks) runs unchanged. One rank runs at a
time, until it waits for another; then the next in order of rank that can go on does. The order is therefore the same in
every run, and a deadlock is an error at once that lists what each rank waits for. A message that nobody has received
when all have ended is one too, because elsewhere its sender waits.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Deadlock(Exception):
    """No rank can go on; the message lists what each waits for."""


class _Stopped(BaseException):
    """Unwinds the ranks that did not fail themselves."""


@dataclass(frozen=True)
class Group:
    """Stands for a process group: a name that its ranks agree on, and those ranks."""

    name: str
    ranks: tuple[int, ...]


@dataclass(eq=False)
class _Receive:
    """What irecv returns: filled by wait()."""

    loopback: Loopback
    tensor: Tensor
    channel: tuple[Any, ...]

    def wait(self) -> None:
        queue = self.loopback.mail[self.channel]
        group, source, target = self.channel
        self.loopback.wait_until(lambda: bool(queue), f"a message from rank {source} to {target} in {group.name}")
        sent = queue.popleft()
        assert (sent.shape, sent.dtype) == (self.tensor.shape, self.tensor.dtype), (
            f"rank {target} expects {tuple(self.tensor.shape)} {self.tensor.dtype} from rank {source}, "
            f"which sent {tuple(sent.shape)} {sent.dtype}"
        )
        self.tensor.copy_(sent)


class _Sent:
    """What isend returns: the message was copied, so there is nothing to wait for."""

    def wait(self) -> None:
        pass

    def is_completed(self) -> bool:
        return True


@dataclass(eq=False)
class _Collective:
    """What an asynchronous collective returns: done by wait(), which puts in place what every rank brought."""

    put: Callable[[list[Any], int], None]
    others: Callable[[], tuple[list[Any], int]]
    callbacks: list[Callable[[Any], None]] = field(default_factory=list)

    def begun(self, later: bool) -> _Collective | None:
        """later: whether the caller will wait; else it is done at once."""
        return self if later else self.wait()

    def wait(self) -> None:
        self.put(*self.others())
        for callback in self.callbacks:
            callback(None)

    def get_future(self) -> _Collective:
        return self

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self.callbacks.append(callback)


def run(function: Callable[..., T], num_ranks: int, *args: Any) -> list[T]:
    """The results of `function(*args)` on each rank; the first rank's error if one raises, with a note of its rank."""
    return Loopback(num_ranks).run(function, *args)


@dataclass(eq=False)
class Loopback:
    num_ranks: int
    mail: dict[tuple[Any, ...], deque[Tensor]] = field(default_factory=lambda: defaultdict(deque))

    CALLS = (
        "all_gather_into_tensor",
        "all_gather_single",
        "all_reduce",
        "all_to_all_single",
        "P2POp",
        "barrier",
        "batch_isend_irecv",
        "broadcast",
        "destroy_process_group",
        "get_rank",
        "get_world_size",
        "irecv",
        "is_initialized",
        "isend",
        "new_group",
        "reduce_scatter_single",
        "reduce_scatter_tensor",
    )

    def __post_init__(self) -> None:
        self._local = threading.local()
        self._turns = threading.Condition()
        self._turn = 0
        self._waits: dict[int, tuple[Callable[[], bool], str]] = {}
        self._ended: set[int] = set()
        self._failure: BaseException | None = None
        self._meetings: dict[tuple[Group, int], dict[int, tuple[str, Any]]] = defaultdict(dict)
        self._num_meetings: dict[tuple[Group, int], int] = defaultdict(int)
        self._num_groups: dict[tuple[int, tuple[int, ...]], int] = defaultdict(int)
        self._world = Group("the world", tuple(range(self.num_ranks)))

    def run(self, function: Callable[..., T], *args: Any) -> list[T]:
        results: dict[int, T] = {}

        def serve(rank: int) -> None:
            self._local.rank = rank
            try:
                self._await_turn(rank)
                results[rank] = function(*args)
            except _Stopped:
                pass
            except BaseException as error:
                error.add_note(f"on rank {rank} of {self.num_ranks}")
                self._failure = self._failure or error
            finally:
                self._ended.add(rank)
                self._pass_on(rank)

        threads = [threading.Thread(target=serve, args=(rank,), daemon=True) for rank in range(self.num_ranks)]
        with ExitStack() as stack:
            for name in filter(partial(hasattr, dist), self.CALLS):
                stack.enter_context(mock.patch.object(dist, name, getattr(self, name)))
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if self._failure is not None:
            raise self._failure
        left = [
            f"rank {source} waits for rank {target} to receive" for (_, source, target), m in self.mail.items() if m
        ]
        if left:
            raise Deadlock("\n".join(["no rank can go on", *sorted(left)]))
        return [results[rank] for rank in range(self.num_ranks)]

    def wait_until(self, ready: Callable[[], bool], what: str) -> None:
        """Let other ranks run until `ready()`."""
        rank = self.get_rank()
        if not ready():
            self._waits[rank] = (ready, what)
            self._pass_on(rank)
            self._await_turn(rank)

    def _await_turn(self, rank: int) -> None:
        with self._turns:
            self._turns.wait_for(lambda: self._turn == rank or self._failure is not None)
        if self._failure is not None:
            raise _Stopped

    def _pass_on(self, rank: int) -> None:
        """Give the turn to the next rank that can go on; Deadlock for all if there is none but there are ranks left."""
        with self._turns:
            for step in range(1, self.num_ranks + 1):
                candidate = (rank + step) % self.num_ranks
                ready = candidate not in self._waits or self._waits[candidate][0]()
                if candidate not in self._ended and ready:
                    self._waits.pop(candidate, None)
                    self._turn = candidate
                    break
            else:
                if len(self._ended) < self.num_ranks and self._failure is None:
                    lines = [f"rank {r} has ended" for r in self._ended]
                    lines += [f"rank {r} waits for {what}" for r, (_, what) in self._waits.items()]
                    self._failure = Deadlock("\n".join(["no rank can go on", *sorted(lines)]))
            self._turns.notify_all()

    def _meet(self, kind: str, value: Any, group: Group | None) -> tuple[list[Any], int]:
        """What every rank of the group brings to its next collective, and this rank's place among them."""
        return self._enter(kind, value, group)()

    def _enter(self, kind: str, value: Any, group: Group | None) -> Callable[[], tuple[list[Any], int]]:
        """Bring something to the group's next collective; the function that waits for the others."""
        group = group or self._world
        rank = self.get_rank()
        assert rank in group.ranks, f"rank {rank} is not in {group}"
        number = self._num_meetings[group, rank]
        self._num_meetings[group, rank] += 1
        present = self._meetings[group, number]
        present[rank] = (kind, value)
        for other, (theirs, _) in present.items():
            assert theirs == kind, f"rank {rank} calls {kind} where rank {other} calls {theirs}, in {group}"
        missing = f"{kind} number {number} of {group.name} {list(group.ranks)}"

        def wait() -> tuple[list[Any], int]:
            self.wait_until(lambda: len(present) == len(group.ranks), missing)
            return [present[r][1] for r in group.ranks], group.ranks.index(rank)

        return wait

    def get_rank(self, group: Group | None = None) -> int:
        rank = self._local.rank
        return rank if group is None else group.ranks.index(rank)

    def get_world_size(self, group: Group | None = None) -> int:
        return len((group or self._world).ranks)

    def is_initialized(self) -> bool:
        return True

    def new_group(self, ranks: Sequence[int] | None = None, use_local_synchronization: bool = False) -> Any:
        """The n-th group of the same ranks is the same group on each of them; others get none."""
        members = tuple(sorted(self._world.ranks if ranks is None else ranks))
        rank = self.get_rank()
        if rank not in members:
            return dist.GroupMember.NON_GROUP_MEMBER
        number = self._num_groups[rank, members]
        self._num_groups[rank, members] += 1
        return Group(f"group {number}", members)

    def barrier(self, group: Group | None = None) -> None:
        self._meet("barrier", None, group)

    def all_reduce(
        self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Group | None = None, async_op: bool = False
    ) -> _Collective | None:
        def reduce(values: list[Tensor], place: int) -> None:
            stacked = torch.stack(values)
            tensor.detach().copy_(stacked.amax(0) if op == dist.ReduceOp.MAX else _sum(stacked, op))

        return _Collective(reduce, self._enter(f"all_reduce {op}", tensor.detach().clone(), group)).begun(async_op)

    def all_gather_into_tensor(
        self, out: Tensor, tensor: Tensor, group: Group | None = None, async_op: bool = False
    ) -> _Collective | None:
        def gather(values: list[Tensor], place: int) -> None:
            out.view(-1).copy_(torch.cat([value.reshape(-1) for value in values]))

        return _Collective(gather, self._enter("all_gather", tensor.detach().clone(), group)).begun(async_op)

    def reduce_scatter_tensor(
        self,
        out: Tensor,
        tensor: Tensor,
        op: Any = dist.ReduceOp.SUM,
        group: Group | None = None,
        async_op: bool = False,
    ) -> _Collective | None:
        def scatter(values: list[Tensor], place: int) -> None:
            out.view(-1).copy_(_sum(torch.stack([value.reshape(len(values), -1)[place] for value in values]), op))

        return _Collective(scatter, self._enter(f"reduce_scatter {op}", tensor.detach().clone(), group)).begun(async_op)

    def P2POp(self, op: Callable[..., Any], tensor: Tensor, peer: int, group: Group | None = None) -> Any:
        return partial(op, tensor, peer, group)

    def batch_isend_irecv(self, operations: Sequence[Any]) -> list[Any]:
        return [operation() for operation in operations]

    def destroy_process_group(self, group: Group) -> None:
        """Groups are names, so that nothing is left to close."""

    # The names since torch 2.13.
    all_gather_single = all_gather_into_tensor
    reduce_scatter_single = reduce_scatter_tensor

    def all_to_all_single(
        self,
        out: Tensor,
        tensor: Tensor,
        output_split_sizes: list[int] | None = None,
        input_split_sizes: list[int] | None = None,
        group: Group | None = None,
        async_op: bool = False,
    ) -> _Collective | None:
        def exchange(values: list[Any], place: int) -> None:
            parts = [value.split(sizes) if sizes else value.chunk(len(values)) for value, sizes in values]
            if output_split_sizes:
                assert [len(part[place]) for part in parts] == output_split_sizes
            out.view(-1).copy_(torch.cat([part[place].reshape(-1) for part in parts]))

        entered = self._enter("all_to_all", (tensor.detach().clone(), input_split_sizes), group)
        return _Collective(exchange, entered).begun(async_op)

    def broadcast(self, tensor: Tensor, src: int, group: Group | None = None) -> None:
        values, _ = self._meet(f"broadcast from {src}", tensor.detach().clone(), group)
        tensor.detach().copy_(values[(group or self._world).ranks.index(src)])

    def isend(self, tensor: Tensor, dst: int, group: Group | None = None) -> _Sent:
        self.mail[group or self._world, self.get_rank(), dst].append(tensor.detach().clone())
        return _Sent()

    def irecv(self, tensor: Tensor, src: int, group: Group | None = None) -> _Receive:
        return _Receive(self, tensor, (group or self._world, src, self.get_rank()))


def _sum(stacked: Tensor, op: Any) -> Tensor:
    assert op == dist.ReduceOp.SUM, f"{op} is not answered in memory"
    return stacked.sum(0)
