"""Local shapes: what one rank holds of a tensor, given the cut of the batch and its placements on the model axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..graph import Graph, Shape, Tensor
from ..sharding.placement import Placement, Split
from ..sharding.rows import Parts


def cut(shape: Shape, placement: Placement | None, parts: Parts) -> Shape:
    """`shape` after an axis of `parts` ranks; the largest part where it does not divide."""
    if parts == 1 or not isinstance(placement, Split) or placement.dim >= len(shape):
        return shape
    dim = placement.dim
    return (*shape[:dim], math.ceil(shape[dim] / parts), *shape[dim + 1 :])


@dataclass(frozen=True)
class LocalShapes:
    """Shapes on one rank, when the batch is cut into `shards` (data ranks x microbatches).

    batch: placement of every tensor on the axis that cuts the batch. computed: the tensors in the precision that the
    blocks compute in, where it is not the graph's.
    """

    graph: Graph
    shards: Parts
    batch: Mapping[str, Placement]
    computed: Mapping[str, Tensor] | None = None

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """As the blocks compute them."""
        return self.graph.tensors if self.computed is None else self.computed

    def shape(self, tensor: str, placement: Placement | None = None, degree: int = 1) -> Shape:
        """placement, degree: on the model axis."""
        return cut(cut(self.graph.tensors[tensor].shape, self.batch.get(tensor), self.shards), placement, degree)

    def held_shape(self, tensor: str, places: Sequence[Placement] = (), degrees: Sequence[int] = ()) -> Shape:
        """places, degrees: on each model axis; () where there is none."""
        shape = self.shape(tensor)
        for place, degree in zip(places, degrees, strict=True) if places else ():
            shape = cut(shape, place, degree)
        return shape

    def held_bytes(self, tensor: str, places: Sequence[Placement] = (), degrees: Sequence[int] = ()) -> int:
        return math.prod(self.held_shape(tensor, places, degrees)) * self.tensors[tensor].dtype.itemsize

    def size_bytes(self, tensor: str, placement: Placement | None = None, degree: int = 1) -> int:
        return math.prod(self.shape(tensor, placement, degree)) * self.tensors[tensor].dtype.itemsize
