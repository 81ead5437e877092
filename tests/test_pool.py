"""The worker pool itself: results by rank, independence of runs, and every way in which a rank can fail."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from pool import Pool, RankError
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor


def rank_and_sum(offset: int) -> tuple[int, int, float, int]:
    total = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), total.item(), torch.get_num_threads()


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_results_come_in_order_of_rank(pool: Pool, world_size: int) -> None:
    results = pool.run(rank_and_sum, 10, world_size=world_size)
    total = sum(range(10, 10 + world_size))
    assert results == [(rank, world_size, total, 1) for rank in range(world_size)]


def process_id() -> int:
    return os.getpid()


def test_workers_are_kept_from_run_to_run(pool: Pool) -> None:
    first = pool.run(process_id, world_size=4)
    assert len({*first, os.getpid()}) == 5
    assert pool.run(process_id, world_size=2) == first[:2]


def gram(shape: tuple[int, int], names: tuple[str, str], shard_axis: int) -> torch.Tensor:
    """x^T x with x split over one axis of a mesh: the same call on meshes that differ only in their groups' order."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    x = torch.arange(32.0).reshape(8, 4)
    placements = [Replicate(), Replicate()]
    placements[shard_axis] = Shard(0)
    split = distribute_tensor(x, mesh, placements, src_data_rank=None)
    product = split.t() @ split
    assert isinstance(product, DTensor)
    return product.full_tensor()


def test_runs_do_not_see_each_others_meshes(pool: Pool) -> None:
    x = torch.arange(32.0).reshape(8, 4)
    for shape, shard_axis in [((2, 2), 0), ((2, 2), 1), ((4, 1), 0), ((1, 4), 1)] * 2:
        for result in pool.run(gram, shape, ("a", "b"), shard_axis=shard_axis, world_size=4):
            torch.testing.assert_close(result, x.t() @ x)


def raise_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise KeyError(f"broken on {rank}")
    dist.barrier()


@pytest.mark.alone
@pytest.mark.parametrize("rank", [0, 3])
def test_the_rank_that_raises_is_named_at_once(pool: Pool, rank: int) -> None:
    start_s = time.monotonic()
    with pytest.raises(RankError, match=rf"(?s)rank {rank} of 4 raised.*raise_on.*KeyError: 'broken on {rank}'"):
        pool.run(raise_on, rank, world_size=4)
    assert time.monotonic() - start_s < 15, "the peers' collective timeout was waited for"
    assert [r[0] for r in pool.run(rank_and_sum, 0, world_size=4)] == [0, 1, 2, 3], "the pool did not recover"


def hang(rank: int) -> None:
    while dist.get_rank() == rank:
        time.sleep(0.05)


@pytest.mark.alone
def test_a_hanging_rank_is_stopped_and_shown(pool: Pool) -> None:
    with pytest.raises(RankError, match=r"(?s)ranks \[1\] of 2 still ran after 1 s.*rank 1:.*in hang"):
        pool.run(hang, 1, world_size=2, timeout_s=1)
    assert len(pool.run(process_id)) == 2


def lonely_barrier() -> None:
    if dist.get_rank() == 0:
        dist.barrier()
    time.sleep(10)


@pytest.mark.alone
def test_a_collective_that_peers_do_not_join_times_out(pool: Pool) -> None:
    with pytest.raises(RankError, match=r"(?s)rank 0 of 2 raised.*lonely_barrier"):
        pool.run(lonely_barrier, collective_timeout_s=1)


def die(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(7)
    dist.barrier()


@pytest.mark.alone
def test_a_rank_that_dies_is_named(pool: Pool) -> None:
    with pytest.raises(RankError, match="rank 1 of 2 died, exit code 7"):
        pool.run(die, 1)
    assert len(pool.run(process_id)) == 2


def something_local() -> object:
    return lambda: None


def test_what_cannot_be_pickled_is_an_error_not_a_hang(pool: Pool) -> None:
    with pytest.raises(RankError, match="rank . of 2 raised"):
        pool.run(something_local)
    with pytest.raises(ValueError, match="cannot be sent"):
        pool.run(lambda: None)
    with pytest.raises(ValueError, match="world_size=9"):
        pool.run(process_id, world_size=9)
