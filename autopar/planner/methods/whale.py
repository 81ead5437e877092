"""Whale: parallelism from two annotations, `replicate` and `split`, on parts of the model.

Ops of modules annotated `split` share out what is not the batch (the shards of a large classifier, or experts); those
annotated `replicate` (everything else, by default) share out the batch. Both lie on one axis of devices, so that a part
that is split follows one that is replicated on the same devices; the conversions between them are Whale's bridges, and
the layout solver finds the cheapest. Shares in proportion to the devices are `whale_balance`.

Without annotations, the ops of the largest parameter are split where that parameter holds at least `LARGE` of the
model (Whale's own example: a classifier over 100,000 classes), else everything is replicated.

Reference: Jia et al., USENIX ATC 2022, section 3.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Literal

from ...graph import Graph, Op
from ...plan import Plan
from ...sharding.strategies import strategies
from ...sharding.strategy import Strategy
from ..chains import AxisPrices
from ..layout_chain import chain_layouts
from ..layout_options import layout_options
from ..pricing import Piece, assemble
from ..problem import Chain, Problem, Shape
from .bench import Bench

Annotation = Literal["replicate", "split"]

LARGE = 0.25


def whale(
    problem: Problem,
    annotations: Mapping[str, Annotation] | None = None,
) -> Plan:
    """The best plan that does as the annotations say. annotations: by pattern of a module's name ("head*").

    ValueError for an annotation that is neither, or a pattern that no module of the graph has.
    """
    given = _checked(problem.graph, annotations) if annotations is not None else suggested(problem.graph)
    with Bench(problem, "whale") as bench:
        shapes = bench.shapes(lambda s: s.pipeline == 1, lambda s: s.zero == 0)
        for shape in shapes:
            if bench.spent:
                break
            # the whole axis for splits, or hosts replicated around it
            if "split" in given.values() or shape.tensor == 1 or problem.constraints.tensor:
                bench.offer(_plan(bench, shape, given))
                bench.fall_back(bench.shapes())
        return bench.best_plan()
    return bench.best_plan()


def suggested(graph: Graph) -> dict[str, Annotation]:
    """Annotations for a model that has none."""
    parameters = [p for p in graph.parameters if p.requires_grad]
    largest = max(parameters, key=lambda p: p.numel, default=None)
    if largest is None or largest.numel < LARGE * sum(p.numel for p in parameters):
        return {"*": "replicate"}
    return {op.module: "split" for op in graph.consumers[largest.name] if op.module} | {"*": "replicate"}


def _checked(graph: Graph, annotations: Mapping[str, str]) -> dict[str, Annotation]:
    modules = {op.module for op in graph.ops}
    for pattern, kind in annotations.items():
        if kind not in ("replicate", "split"):
            raise ValueError(f"annotations[{pattern!r}] is {kind!r}; expected 'replicate' or 'split'")
        if not any(fnmatch.fnmatchcase(module, pattern) for module in modules):
            raise ValueError(
                f"annotations[{pattern!r}]: no module of {graph.name} has such a name; expected one like "
                f"{', '.join(sorted(modules)[1:4])}"
            )
    return {**annotations, "*": annotations.get("*", "replicate")}  # type: ignore[dict-item]


def annotation(op: Op, annotations: Mapping[str, Annotation]) -> Annotation:
    """That of the first pattern that the op's module has."""
    return next(kind for pattern, kind in annotations.items() if fnmatch.fnmatchcase(op.module, pattern))


def _plan(bench: Bench, shape: Shape, annotations: Mapping[str, Annotation]) -> Plan:
    problem = bench.problem
    chain = Chain()
    if shape.tensor > 1:
        prices = AnnotatedPrices(problem, shape, False)
        prices.annotations.update(annotations)
        options = layout_options(problem.graph, shape.tensor, prices)
        chain = Chain.of(chain_layouts(options, 0, bench.num_blocks).layouts)
    cuts = [bench.num_blocks * s // shape.pipeline for s in range(shape.pipeline + 1)]
    recompute = problem.recompute_choices[0]
    pieces = [Piece(start, stop, recompute) for start, stop in zip(cuts, cuts[1:], strict=False)]
    return assemble(problem, shape, chain, pieces)


class AnnotatedPrices(AxisPrices):
    """The strategies that an op's annotation allows: along the batch for `replicate`, along anything else for `split`;
    all of them where there is none such."""

    @property
    def annotations(self) -> dict[str, Annotation]:
        return self.__dict__.setdefault("_annotations", {})

    def strategies(self, op: Op) -> tuple[Strategy, ...]:
        found = strategies(self.problem.graph, op, self.shape.tensor, self.shape.shards)
        kind = annotation(op, self.annotations)
        key = (id(found), kind)
        kept = self.__dict__.setdefault("_allowed", {})
        if key not in kept:
            wanted = tuple(s for s in found if s.work < 1 and self._cuts_batch(op, s) == (kind == "replicate"))
            kept[key] = wanted or found
        return kept[key]
