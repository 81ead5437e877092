"""What the user pins by the names of modules: how their ops lie on a model axis, and which stage runs their blocks.

A pattern is matched (fnmatch: "*" also crosses dots) against the path of the module that an op stands in and against the
full names of the parameters that the op uses. WORDS says which ops a word is about, and which of their strategies it
leaves; ops that a pattern matches and its word is not about stay free. Where several patterns match an op, all hold.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ..graph import Block, Graph, Op
from ..plan import Plan, Stage
from ..sharding.flow import find_strategies
from ..sharding.placement import PARTIAL, Split
from ..sharding.rows import stage_units
from ..sharding.strategy import Strategy

ATTENTION = "aten.scaled_dot_product_attention."
ROUTED = "autopar.routed_rows"


@dataclass(frozen=True, slots=True)
class Word:
    """concerns: whether the word is about an op; allows: whether it leaves a strategy of such an op."""

    concerns: Callable[[Graph, Op], bool]
    allows: Callable[[Graph, Op, Strategy], bool]


def _weights(graph: Graph, op: Op, strategy: Strategy | None = None) -> list:
    """The placements of the op's parameters of two dims or more; their names, without a strategy."""
    places = strategy.inputs if strategy else op.inputs
    return [
        place
        for name, place in zip(op.inputs, places, strict=True)
        if graph.tensors[name].role == "parameter" and len(graph.tensors[name].shape) > 1
    ]


def _is_product(graph: Graph, op: Op) -> bool:
    return op.target != ROUTED and bool(_weights(graph, op))


def _has_rows(graph: Graph, op: Op) -> bool:
    """Whether the op's result has a dim 1 that stands for the sequence."""
    return op.target.startswith(ATTENTION) or (_is_product(graph, op) and len(graph.tensors[op.outputs[0]].shape) == 3)


def _is_vocabulary(graph: Graph, op: Op) -> bool:
    return op.target.split(".")[1] in ("embedding", "linear", "cross_entropy_loss", "cross_entropy")


def _along_vocabulary(graph: Graph, op: Op, strategy: Strategy) -> bool:
    if op.target.split(".")[1].startswith("cross_entropy"):
        return strategy.special.startswith("vocab")
    return any(isinstance(place, Split) and place.dim == 0 for place in _weights(graph, op, strategy))


def _splits(graph: Graph, op: Op, strategy: Strategy) -> bool:
    return any(isinstance(place, Split) for place in _weights(graph, op, strategy))


WORDS: Mapping[str, Word] = {
    # a product with its weight split along what it makes, as Megatron's first one is
    "column": Word(_is_product, lambda g, op, s: _splits(g, op, s) and isinstance(s.outputs[0], Split)),
    # with its weight split along what is summed over, which leaves partial sums
    "row": Word(_is_product, lambda g, op, s: _splits(g, op, s) and s.outputs[0] == PARTIAL),
    # embeddings, heads and losses split over the words
    "vocabulary": Word(_is_vocabulary, _along_vocabulary),
    "heads": Word(lambda g, op: op.target.startswith(ATTENTION), lambda g, op, s: s.outputs[0] == Split(1)),
    # positions split: attention by queries (context parallel), products on a part of the rows with whole weights
    "sequence": Word(
        _has_rows,
        lambda g, op, s: s.outputs[0] == Split(2 if op.target.startswith(ATTENTION) else 1) and not _splits(g, op, s),
    ),
    "expert": Word(lambda g, op: op.target == ROUTED, lambda g, op, s: s.key.partition("@")[0] in ("e", "n+e")),
    "replicated": Word(lambda g, op: True, lambda g, op, s: s.key == "-"),
}
# Under these an op may do without a model axis.
_NEEDS_NO_AXIS = ("replicated",)


@dataclass(frozen=True)
class Pins:
    """The layouts and stages that constraints pin, resolved against a graph.

    graph: the problem's, in which blocks of one kind are pinned alike: kinds are parted where pins tell them apart.
    words: per op, what it is pinned to. stages: per block, the stage that must run it (negative: counted from the last),
    None where it is free.
    """

    graph: Graph
    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    stages: tuple[int | None, ...] = ()
    layout: tuple[tuple[str, str], ...] = ()
    stage: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, graph: Graph, layout: Sequence[tuple[str, str]], stage: Sequence[tuple[str, int]]) -> Pins:
        """ValueError for a pattern that nothing matches, or whose word is about none of what it matches."""
        if not layout and not stage:
            return cls(graph)
        words: dict[str, tuple[str, ...]] = {}
        for pattern, word in layout:
            for op in _pinned_ops(graph, pattern, word):
                words[op.name] = (*words.get(op.name, ()), word)
        stages: list[int | None] = [None] * len(graph.blocks)
        for pattern, number in stage:
            matched = {op.name for op in _matching(graph, pattern, f"stage[{pattern!r}]")}
            for block in graph.blocks:
                if matched.intersection(block.ops):
                    if stages[block.index] not in (None, number):
                        raise ValueError(
                            f"stage[{pattern!r}]={number}: block {block.index} of {graph.name}, which it is about, is "
                            f"pinned to stage {stages[block.index]} too; leave one of the two out"
                        )
                    stages[block.index] = number
        return cls(_parted(graph, words), words, tuple(stages) if stage else (), tuple(layout), tuple(stage))

    def on(self, graph: Graph) -> Pins:
        """The same constraints resolved against another graph, such as a rewritten one; ValueError as `of`."""
        return Pins.of(graph, self.layout, self.stage)

    # -- layouts

    def allows(self, op: Op, strategy: Strategy) -> bool:
        """Whether the op may run so."""
        return all(WORDS[word].allows(self.graph, op, strategy) for word in self.words.get(op.name, ()))

    def allowed(self, op: Op, found: Sequence[Strategy]) -> tuple[Strategy, ...]:
        """Those of the strategies that the op may take."""
        if op.name not in self.words:
            return tuple(found)
        return tuple(strategy for strategy in found if self.allows(op, strategy))

    @cached_property
    def needs_axis(self) -> bool:
        """Whether what is pinned takes a model axis."""
        return any(word not in _NEEDS_NO_AXIS for words in self.words.values() for word in words)

    @cached_property
    def distinct_ops(self) -> tuple[Op, ...]:
        """The pinned ops, one for each kind of block and position."""
        kinds = {block.kind: block for block in reversed(self.graph.blocks)}
        return tuple(op for block in kinds.values() for op in self.graph.block_ops(block) if op.name in self.words)

    # -- plans

    def refusal(self, plan: Plan) -> str:
        """Which pinned name a finished plan of this graph does not keep, "" if it keeps all."""
        for s, stage in enumerate(plan.stages):
            if not self.allows_stage(s, stage.start, stage.stop, len(plan.stages)):
                return f"stage {s} of blocks {stage.start} to {stage.stop - 1} is not what stage= says"
            if self.needs_axis and not stage.axes:
                return f"stage {s} has no model axis, which layout= needs"
            if not self.words or not stage.axes:
                continue
            for block, layouts in zip(self.graph.blocks[stage.start : stage.stop], plan.layouts_of(stage), strict=True):
                per_op = zip(*(layout.strategies for layout in layouts), strict=True)
                for op, keys in zip(self.graph.block_ops(block), per_op, strict=True):
                    if op.name in self.words and not self._keeps(op, keys, plan, stage):
                        return f"{op.name} of {op.module} runs as {'/'.join(keys)}, which layout= does not allow"
        return ""

    def _keeps(self, op: Op, keys: Sequence[str], plan: Plan, stage: Stage) -> bool:
        """Whether an op that runs so is laid out as it is pinned on one of its model axes."""
        chosen = find_strategies(self.graph, op, keys, stage.axes, stage_units(plan, stage))
        return any(self.allows(op, strategy) for strategy in chosen)

    # -- stages

    def allows_stage(self, stage: int, start: int, stop: int, num_stages: int) -> bool:
        """Whether blocks [start, stop) may be stage number `stage` of `num_stages`."""
        return all(fixed is None or _place(fixed, num_stages) == stage for fixed in self.stages[start:stop])

    def stages_possible(self, num_stages: int) -> bool:
        """Whether any way to cut the blocks into so many stages keeps what is pinned."""
        place, at = 0, 0
        for index, fixed in enumerate(self.stages):
            if fixed is None:
                continue
            wanted = _place(fixed, num_stages)
            # stages follow each other, and each between takes a block at least
            if wanted is None or not place <= wanted <= place + index - at:
                return False
            place, at = wanted, index
        return not self.stages or num_stages - 1 - place <= len(self.stages) - 1 - at


def _place(fixed: int, num_stages: int) -> int | None:
    """The stage that is meant, None where there is none."""
    return fixed % num_stages if -num_stages <= fixed < num_stages else None


def _names(graph: Graph, op: Op) -> Iterator[str]:
    if op.module:
        yield op.module
    for name in op.inputs:
        if graph.tensors[name].role == "parameter":
            yield graph.tensors[name].fqn


def _matching(graph: Graph, pattern: str, what: str) -> list[Op]:
    """The main ops that a pattern means. ValueError, with the nearest names, where there is none."""
    found = [
        op
        for op in graph.ops
        if op.name not in graph.side_ops and any(fnmatch.fnmatchcase(name, pattern) for name in _names(graph, op))
    ]
    if not found:
        names = sorted({name for op in graph.ops for name in _names(graph, op)})
        near = difflib.get_close_matches(pattern, names, 3, cutoff=0.3) or names[:3]
        raise ValueError(
            f"{what}: no module or parameter of {graph.name} has such a name; names are like {', '.join(near)}, and * "
            "stands for anything"
        )
    return found


def _pinned_ops(graph: Graph, pattern: str, word: str) -> list[Op]:
    matched = _matching(graph, pattern, f"layout[{pattern!r}]={word!r}")
    found = [op for op in matched if WORDS[word].concerns(graph, op)]
    if not found:
        fitting = [other for other, one in WORDS.items() if any(one.concerns(graph, op) for op in matched)]
        raise ValueError(
            f"layout[{pattern!r}]={word!r}: none of the {len(matched)} ops that the pattern matches can be laid out so; "
            f"what suits them is {' or '.join(map(repr, fitting))}"
        )
    return found


def _parted(graph: Graph, words: Mapping[str, tuple[str, ...]]) -> Graph:
    """The graph with blocks of one kind pinned alike."""
    kinds: dict[Any, int] = {}

    def key(block: Block) -> tuple:
        return (block.kind, tuple(words.get(name, ()) for name in block.ops))

    seen = {block.kind for block in graph.blocks}
    blocks = []
    for block in graph.blocks:
        if key(block) not in kinds:
            used = block.kind in {old for old, _ in kinds}
            kinds[key(block)] = max((*seen, *kinds.values())) + 1 if used else block.kind
        blocks.append(replace(block, kind=kinds[key(block)]))
    return graph if tuple(blocks) == graph.blocks else replace(graph, blocks=tuple(blocks))


def checked_layout(layout: Any) -> tuple[tuple[str, str], ...] | None:
    """The constraint `layout` as pairs. ValueError unless it maps patterns to words."""
    pairs = _pairs("layout", layout, "column")
    for pattern, word in pairs or ():
        if word not in WORDS:
            near = difflib.get_close_matches(str(word), WORDS, 1)
            raise ValueError(
                f"layout[{pattern!r}]={word!r}: expected one of {', '.join(map(repr, WORDS))}"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )
    return pairs


def checked_stage(stage: Any) -> tuple[tuple[str, int], ...] | None:
    """The constraint `stage` as pairs. ValueError unless it maps patterns to whole numbers."""
    pairs = _pairs("stage", stage, 0)
    for pattern, number in pairs or ():
        if not isinstance(number, int) or isinstance(number, bool):
            raise ValueError(f"stage[{pattern!r}]={number!r}: expected the number of a stage, or -1 for the last one")
    return pairs


def _pairs(name: str, given: Any, value: Any) -> tuple[tuple[str, Any], ...] | None:
    if given is None:
        return None
    pairs = tuple(given.items()) if isinstance(given, Mapping) else given
    is_pairs = isinstance(pairs, tuple) and all(isinstance(p, tuple) and len(p) == 2 for p in pairs)
    if not is_pairs or not all(isinstance(pattern, str) and pattern for pattern, _ in pairs):
        raise ValueError(f"{name}={given!r}: expected patterns of modules' names, like {{'*.q_proj': {value!r}}}")
    return pairs or None
