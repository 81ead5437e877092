"""Batches of one rank's rows: of every microbatch of a global batch, the part that this rank's data rank computes."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ..sharding.rows import Rows


class RankRows(Sampler[list[int]]):
    """Indices of this rank's rows, batch by batch; their order depends on (seed, epoch) alone, alike on all ranks."""

    def __init__(self, num_rows: int, batch_size: int, rows: Rows, shuffle: bool, seed: int):
        self.num_rows, self.batch_size, self.rows = num_rows, batch_size, rows
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0

    def __len__(self) -> int:
        return self.num_rows // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.arange(self.num_rows)
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(self.num_rows, generator=generator)
        _, first, count = self.rows.of_global(self.batch_size)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            batch = order[start : start + self.batch_size].view(self.rows.microbatches, -1)
            yield batch[:, first : first + count].flatten().tolist()


class RankLoader:
    """Iterates over `dataset` in global batches of `batch_size` rows, of which it yields this data rank's (`rows`).

    Ranks of one data rank see the same rows. Every
    iteration is an epoch with an order of its own; rows that do not fill a last batch are left out, because a plan has
    one batch size. Further options go to torch's DataLoader (num_workers, collate_fn, pin_memory, ...).

    dataset: map-style, with a length.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        rows: Rows,
        *,
        shuffle: bool = False,
        seed: int = 0,
        **options: Any,
    ):
        if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
            raise ValueError(f"loader: got {type(dataset).__name__}; expected a dataset with a length and indices")
        if batch_size < 1 or batch_size % rows.units:
            raise ValueError(
                f"loader: batch_size={batch_size} does not divide over {rows.microbatches} microbatches x "
                f"{rows.per_microbatch} shares of the data ranks"
            )
        if len(dataset) < batch_size:
            raise ValueError(f"loader: the dataset has {len(dataset)} rows, fewer than one batch of {batch_size}")
        excluded = {"sampler", "batch_sampler", "drop_last"} & set(options)
        if excluded:
            raise ValueError(f"loader: {sorted(excluded)} cannot be set, because the plan decides on the rows")
        self._rows = RankRows(len(dataset), batch_size, rows, shuffle, seed)
        self._loader = DataLoader(dataset, batch_sampler=self._rows, **options)
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Begin the next iteration with the order of this epoch, for resuming a run."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self._rows)

    def __iter__(self) -> Iterator[Any]:
        self._rows.epoch = self._epoch
        self._epoch += 1
        return iter(self._loader)
