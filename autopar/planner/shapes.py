"""A plan without its stages, and the layouts that all its blocks have: what the searches put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..plan import Layout


@dataclass(frozen=True, slots=True)
class Shape:
    """A plan without its stages."""

    pipeline: int
    data: int
    tensor: int
    microbatches: int
    schedule: str
    zero: int

    @property
    def shards(self) -> int:
        """How many ways the batch is cut: over the data axis, then in time."""
        return self.data * self.microbatches

    def ranks(self, stage: int) -> tuple[int, ...]:
        """Ranks of a stage: tensor innermost, then data, pipeline outermost."""
        width = self.data * self.tensor
        return tuple(range(stage * width, (stage + 1) * width))

    @property
    def spacing(self) -> int:
        """From one rank of a stage to the next."""
        return 1

    @property
    def group(self) -> tuple[int, int, int, int]:
        """What the table of candidates has one row for."""
        return (self.pipeline, self.data, self.tensor, self.zero)

    def __str__(self) -> str:
        return (
            f"pipeline {self.pipeline} x data {self.data} x tensor {self.tensor}, {self.microbatches} "
            f"microbatch{'es' if self.microbatches > 1 else ''}, {self.schedule}, zero {self.zero}"
        )


@dataclass(frozen=True, slots=True)
class LoneShape(Shape):
    """Of a shape with model ranks the first of every replica, alone: without a model axis, and `apart` ranks from the next."""

    apart: int

    @classmethod
    def of(cls, shape: Shape) -> LoneShape:
        return cls(
            shape.pipeline, shape.data, 1, shape.microbatches, shape.schedule, shape.zero, shape.tensor
        )  # fmt: skip

    @property
    def spacing(self) -> int:
        return self.apart

    def ranks(self, stage: int) -> tuple[int, ...]:
        width = self.data * self.apart
        return tuple(range(stage * width, (stage + 1) * width, self.apart))


@dataclass(frozen=True, eq=False)
class Chain:
    """Layouts of all blocks on the model axis, neighbours agreeing at their boundary; () where there is no such axis.

    unique: the distinct layouts; index: per block, which of them; inner: the same on a second axis inside of it.
    """

    unique: tuple[Layout, ...] = ()
    index: tuple[int, ...] = ()
    inner: tuple[int, ...] = ()

    @classmethod
    def of(cls, layouts: Sequence[Layout], inner: Sequence[Layout] = ()) -> Chain:
        order = {layout: i for i, layout in enumerate(dict.fromkeys((*layouts, *inner)))}
        return cls(tuple(order), *(tuple(order[layout] for layout in row) for row in (layouts, inner)))

    @property
    def axes(self) -> tuple[int, ...]:
        """Degrees of the model axes, outermost first."""
        return tuple(self.unique[row[0]].degree for row in (self.index, self.inner) if row)

    def rows(self, start: int = 0, stop: int | None = None) -> tuple[tuple[int, ...], ...]:
        """Of each model axis, which layouts blocks [start, stop) have."""
        return tuple(row[start:stop] for row in (self.index, self.inner) if row)
