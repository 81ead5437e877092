"""Keyed random numbers, and the rows that each rank reads."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from autopar.runtime.loader import RankLoader
from autopar.runtime.random import Seeds, seed_of
from autopar.sharding.rows import Rows

CPU = torch.device("cpu")


def draw(seeds: Seeds, key: str, size: int = 20_000) -> torch.Tensor:
    with seeds.stream(key, CPU):
        return torch.dropout(torch.ones(size), 0.3, True) != 0


def test_same_key_same_numbers_and_the_generator_is_put_back():
    torch.manual_seed(5)
    expected = torch.rand(3), torch.randn(3)
    torch.manual_seed(5)
    seeds, twin = Seeds(1), Seeds(1)
    first = draw(seeds, "a@0/0")
    assert torch.equal(torch.rand(3), expected[0])
    assert torch.equal(first, draw(twin, "a@0/0"))
    assert torch.equal(torch.randn(3), expected[1])
    with pytest.raises(RuntimeError), seeds.stream("a", CPU):
        raise RuntimeError
    torch.manual_seed(5)
    with pytest.raises(RuntimeError), seeds.stream("a", CPU):
        raise RuntimeError
    assert torch.equal(torch.rand(3), expected[0])


def test_other_keys_are_independent_and_fair():
    seeds = Seeds(1)
    masks = [draw(seeds, f"{op}@{rank}/{chunk}") for op in "ab" for rank in range(3) for chunk in range(3)]
    seeds.next_step()
    masks += [draw(seeds, "a@0/0"), draw(Seeds(2), "a@0/0")]
    deviation = math.sqrt(0.3 * 0.7 / masks[0].numel())
    for i, mask in enumerate(masks):
        assert abs(mask.float().mean() - 0.7) < 4.5 * deviation
        for other in masks[:i]:
            # Two independent masks are both on with probability 0.49.
            both = (mask & other).float().mean()
            assert abs(both - 0.49) < 4.5 * math.sqrt(0.49 * 0.51 / mask.numel())


def test_recomputation_replays():
    seeds = Seeds(0)

    def block(x):
        with seeds.stream("drop", CPU):
            return torch.dropout(x * x, 0.5, True)

    x = torch.ones(1000, requires_grad=True)
    out = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
    out.sum().backward()
    assert torch.equal(x.grad, 2 * out.detach()) and 0 < out.count_nonzero() < 1000


def test_seed_depends_on_every_part_and_not_on_the_process():
    assert seed_of(1, "ab", "c") != seed_of(1, "a", "bc") != seed_of(1, "a", "b")
    assert seed_of(7, 1, "op@0/2") == 8204290593971645200
    assert len({seed_of(0, step, f"op@{rank}") for step in range(100) for rank in range(100)}) == 10_000


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_rows_of_all_ranks_make_the_global_batch(shuffle, size):
    rows = torch.arange(43)
    whole = RankLoader(TensorDataset(rows), 8, Rows(1, 1, 0, 1), shuffle=shuffle, seed=9)
    loaders = [RankLoader(TensorDataset(rows), 8, Rows(1, size, r, 1), shuffle=shuffle, seed=9) for r in range(size)]
    epochs = []
    for _ in range(2):
        batches = [batch for (batch,) in whole]
        parts = [[batch for (batch,) in loader] for loader in loaders]
        assert len(batches) == len(whole) == len(parts[0]) == 5
        for step, batch in enumerate(batches):
            assert torch.equal(torch.cat([part[step] for part in parts]), batch)
        epochs.append(torch.cat(batches))
        assert len(set(epochs[-1].tolist())) == 40
    assert torch.equal(*epochs) != shuffle
    loaders[0].set_epoch(1)
    assert torch.equal(next(iter(loaders[0]))[0], epochs[1][: 8 // size])


def test_uneven_shares_of_every_microbatch():
    """Two microbatches of 4 rows, cut 3:1."""
    data = TensorDataset(torch.arange(16))
    loaders = [RankLoader(data, 8, Rows(2, 4, start, length)) for start, length in ((0, 3), (3, 1))]
    assert [[batch.tolist() for (batch,) in loader] for loader in loaders] == [
        [[0, 1, 2, 4, 5, 6], [8, 9, 10, 12, 13, 14]],
        [[3, 7], [11, 15]],
    ]


def test_loader_says_what_is_wrong():
    data = TensorDataset(torch.arange(10))
    for arguments, message in (
        ((data, 6, Rows(1, 4, 0, 1)), "batch_size=6 does not divide over 1 microbatches x 4"),
        ((data, 12, Rows(1, 2, 0, 1)), "10 rows, fewer than one batch of 12"),
        ((iter([1]), 2, Rows(1, 2, 0, 1)), "expected a dataset"),
    ):
        with pytest.raises(ValueError, match=message):
            RankLoader(*arguments)
    with pytest.raises(ValueError, match="drop_last"):
        RankLoader(data, 2, Rows(1, 2, 0, 1), drop_last=True)
