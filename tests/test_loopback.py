"""The in-memory stand-in for torch.distributed: against gloo, its fixed order, its deadlocks, and conversions on it.

Placements state what the ranks' tensors mean, so a conversion is right when the meaning stays: the value going forward,
and the gradient, placed by the duals, going back.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.distributed as dist
from loopback import Deadlock, run
from pool import Pool
from torch import Tensor

from autopar.runtime.axis import Axis
from autopar.runtime.collectives import convert
from autopar.sharding.placement import PARTIAL, REPLICATED, SHARED, Placement, Split


def random_exchanges(seed: int) -> list[Tensor]:
    """A random sequence of every call that the loopback answers, the same sequence on every rank."""
    draw = random.Random(seed)
    rank, size = dist.get_rank(), dist.get_world_size()
    values = torch.Generator().manual_seed(seed * 100 + rank)
    tensor = torch.randn(size * 6, generator=values)
    # Every rank makes every group, in one order: gloo hangs where ranks have made different numbers of groups before.
    groups = {pair: dist.new_group(list(pair)) for pair in itertools.combinations(range(size), 2)}
    seen = []
    for _ in range(12):
        kind = draw.choice(["sum", "max", "gather", "scatter", "all_to_all", "broadcast", "ring", "pair", "barrier"])
        peer = draw.randrange(size - 1)
        out = torch.empty_like(tensor)
        if kind in ("sum", "max"):
            dist.all_reduce(tensor, dist.ReduceOp.SUM if kind == "sum" else dist.ReduceOp.MAX)
        elif kind == "gather":
            dist.all_gather_into_tensor(out, tensor[:6].contiguous())
            tensor = out
        elif kind == "scatter":
            part = torch.empty(6)
            dist.reduce_scatter_tensor(part, tensor)
            tensor = tensor + part.repeat(size)
        elif kind == "all_to_all":
            dist.all_to_all_single(out, tensor)
            tensor = out
        elif kind == "broadcast":
            dist.broadcast(tensor, src=peer)
            tensor = tensor + rank
        elif kind == "ring":
            work = dist.irecv(out, (rank - 1) % size)
            dist.isend(tensor, (rank + 1) % size).wait()
            work.wait()
            tensor = out
        elif kind == "pair" and rank in (peer, peer + 1):
            dist.all_reduce(tensor, group=groups[peer, peer + 1])
        elif kind == "barrier":
            dist.barrier()
        tensor = tensor / tensor.abs().max()
        seen.append(tensor.clone())
    return seen


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_it_answers_as_gloo_does(pool: Pool, num_ranks: int) -> None:
    for seed in range(8):
        expected = pool.run(random_exchanges, seed, world_size=num_ranks, timeout_s=10)
        torch.testing.assert_close(run(random_exchanges, num_ranks, seed), expected)


def test_the_order_is_the_same_in_every_run() -> None:
    def trace(seed: int) -> list[tuple[int, int]]:
        order: list[tuple[int, int]] = []

        def program() -> None:
            rank = dist.get_rank()
            draw = random.Random(seed)
            for step in range(10):
                order.append((rank, step))
                source = draw.randrange(4)
                if rank == source:
                    for peer in set(range(4)) - {rank}:
                        dist.isend(torch.zeros(1), peer)
                else:
                    dist.irecv(torch.zeros(1), source).wait()

        run(program, 4)
        return order

    for seed in range(5):
        assert trace(seed) == trace(seed)
    assert trace(0) != trace(1)


def receive_from_the_next() -> None:
    rank = dist.get_rank()
    if rank < 2:
        dist.irecv(torch.zeros(1), 1 - rank).wait()


def test_a_deadlock_lists_what_each_rank_waits_for() -> None:
    with pytest.raises(Deadlock) as caught:
        run(receive_from_the_next, 3)
    assert str(caught.value).splitlines()[1:] == [
        "rank 0 waits for a message from rank 1 to 0 in the world",
        "rank 1 waits for a message from rank 0 to 1 in the world",
        "rank 2 has ended",
    ]


def test_a_collective_that_one_rank_leaves_out_is_a_deadlock() -> None:
    def program() -> None:
        dist.barrier()
        if dist.get_rank() != 1:
            dist.all_reduce(torch.zeros(1))

    with pytest.raises(Deadlock, match=r"rank 0 waits for all_reduce.* number 1 of the world \[0, 1, 2\]"):
        run(program, 3)


def test_different_collectives_at_one_meeting_are_an_error() -> None:
    def program() -> None:
        if dist.get_rank():
            dist.barrier()
        else:
            dist.all_reduce(torch.zeros(1))

    with pytest.raises(AssertionError, match="rank 1 calls barrier where rank 0 calls all_reduce"):
        run(program, 2)


def test_the_rank_that_raises_is_named_and_the_others_stop() -> None:
    def program() -> None:
        if dist.get_rank() == 2:
            raise KeyError("broken")
        dist.barrier()

    with pytest.raises(KeyError) as caught:
        run(program, 4)
    assert caught.value.__notes__ == ["on rank 2 of 4"]
    assert not dist.is_initialized(), "torch.distributed is itself again"


# B = 2 blocks of the split dims; sizes divide by 2, 3 and 4 ranks, twice.
SHAPE = (24, 48)
PLACEMENTS: tuple[Placement, ...] = (REPLICATED, PARTIAL, SHARED, Split(0), Split(1), Split(0, 2), Split(1, 2))


def cut(whole: Tensor, split: Split, num_ranks: int, rank: int) -> Tensor:
    """This rank's part by the definition: dim as (blocks, n, rest), part [:, rank]."""
    viewed = whole.unflatten(split.dim, (split.blocks, num_ranks, -1))
    return viewed.select(split.dim + 1, rank).flatten(split.dim, split.dim + 1)


def place(whole: Tensor, placement: Placement, num_ranks: int, seed: int) -> list[Tensor]:
    """Every rank's tensor, so that together they mean `whole`: summands are random."""
    if isinstance(placement, Split):
        return [cut(whole, placement, num_ranks, rank) for rank in range(num_ranks)]
    if placement != PARTIAL:
        return [whole.clone() for _ in range(num_ranks)]
    generator = torch.Generator().manual_seed(seed)
    summands = [torch.randn(whole.shape, generator=generator, dtype=whole.dtype) for _ in range(num_ranks - 1)]
    return [*summands, whole - sum(summands)]


def assert_means(locals_: list[Tensor], placement: Placement, whole: Tensor) -> None:
    if placement == PARTIAL:
        torch.testing.assert_close(sum(locals_), whole)
        return
    for rank, local in enumerate(locals_):
        expected = cut(whole, placement, len(locals_), rank) if isinstance(placement, Split) else whole
        torch.testing.assert_close(local, expected)


def dual(placement: Placement) -> Placement:
    """How the gradient of a tensor so placed lies."""
    return {PARTIAL: REPLICATED, SHARED: PARTIAL}.get(placement, placement)


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_every_conversion_keeps_value_and_gradient(num_ranks: int) -> None:
    for seed, (have, want) in enumerate(itertools.product(PLACEMENTS, PLACEMENTS)):
        generator = torch.Generator().manual_seed(seed)
        value = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
        gradient = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
        inputs = place(value, have, num_ranks, seed)
        returned = place(gradient, dual(want), num_ranks, seed)

        def program(
            have: Placement = have,
            want: Placement = want,
            inputs: list[Tensor] = inputs,
            returned: list[Tensor] = returned,
        ) -> tuple[Tensor, Tensor]:
            rank = dist.get_rank()
            group = dist.new_group(range(num_ranks))
            axis = Axis("tensor", rank, num_ranks, tuple(range(num_ranks)), group)
            x = inputs[rank].clone().requires_grad_()
            blocks = [placement.blocks if isinstance(placement, Split) else 1 for placement in (have, want)]
            # Scaling stands for an op that another rank must not see half done.
            out = convert(x * 1.0, axis, have, want, *blocks)
            out.backward(returned[rank])
            return out.detach(), x.grad

        results = run(program, num_ranks)
        assert_means([out for out, _ in results], want, value)
        assert_means([grad for _, grad in results], dual(have), gradient)
