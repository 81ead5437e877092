"""Which splits are worth offering, found once per graph: which named dim of which op, at which outer counts.

Ordinary splits (outer count 1) are always offered. Others arise where a view merges or cuts dims, or where a dim is
joined from equal parts, and then spread to every op that can carry them: the split of the inner factor of (b s) reaches
the matrix products of a GPT-2 layer this way, and the split of heads its fused projection. Of those that spread,
only the ones that lead somewhere stay: some producer must be able to make them and some consumer to take them.

Blocks of one kind are isomorphic, so all of this happens on one block of each kind: ops stand for their copies, and
tensors at corresponding places are one class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..graph import Graph, Op
from .placement import PARTIAL, Split
from .rule import Rule, carries, name_of, split_of

Option = tuple[str, int]  # a named dim and the outer count of its split
Splits = tuple[Split | None, ...]  # how each tensor of the op is cut, None where it is not
Key = tuple[str, Option]  # an option of an op
Place = tuple[str, Split | None]  # a class of tensors, cut so


@dataclass(frozen=True)
class Candidates:
    """By representative op: the splits to offer, and the inputs that may arrive as pending sums."""

    options: Mapping[str, tuple[Option, ...]]
    pending: Mapping[str, frozenset[int]]


def find_candidates(graph: Graph, representative: Mapping[str, str], rule_of: Callable[[Op], Rule]) -> Candidates:
    """All candidates of the main ops of a graph.

    representative: by op, the op of the first block of its kind that stands for it.
    """
    classes = _classes(graph, representative)
    ops = [op for op in graph.ops if representative[op.name] == op.name and op.name not in graph.side_ops]
    spread = _Spread(ops, classes, rule_of)
    spread.run()
    spread.prune()
    options = {name: _ordered(rule_of(graph.op[name]), found) for name, found in spread.options.items()}
    return Candidates(options, _pending(graph, representative, options, rule_of))


def _ordered(rule: Rule, found: Mapping[Option, Splits]) -> tuple[Option, ...]:
    return tuple(sorted(found, key=lambda option: (rule.splits.index(option[0]), option[1])))


def _classes(graph: Graph, representative: Mapping[str, str]) -> dict[str, str]:
    """The class of every tensor: tensors at corresponding places of representatives and their copies are one."""
    parent: dict[str, str] = {}

    def find(name: str) -> str:
        root = name
        while (up := parent.get(root, root)) != root:
            root = up
        while (up := parent.get(name, name)) != root:
            parent[name] = root
            name = up
        return root

    for op in graph.ops:
        other = graph.op[representative[op.name]]
        if other is not op:
            for a, b in zip((*op.inputs, *op.outputs), (*other.inputs, *other.outputs), strict=True):
                parent[find(a)] = find(b)
    return {name: find(name) for name in graph.tensors}


class _Spread:
    def __init__(self, ops: list[Op], classes: Mapping[str, str], rule_of: Callable[[Op], Rule]) -> None:
        self.ops = {op.name: op for op in ops}
        self.rule_of = rule_of
        self.classes = {op.name: tuple(classes[t] for t in (*op.inputs, *op.outputs)) for op in ops}
        self.options: dict[str, dict[Option, Splits]] = {op.name: {} for op in ops}
        self.uses: dict[str, list[tuple[str, int]]] = {}
        for op in ops:
            for i, c in enumerate(self.classes[op.name]):
                self.uses.setdefault(c, []).append((op.name, i))
        self.seen: set[tuple[str, Split]] = set()
        self.queue: list[tuple[str, Split]] = []

    def run(self) -> None:
        for op in self.ops.values():
            for option in _seeds(self.rule_of(op)):
                self._offer(op.name, option)
        while self.queue:
            cls, split = self.queue.pop()
            for name, index in self.uses[cls]:
                found = name_of(self.rule_of(self.ops[name]), index, split)
                if found:
                    self._offer(name, found)

    def _offer(self, name: str, option: Option) -> None:
        if option in self.options[name]:
            return
        splits = _splits(self.rule_of(self.ops[name]), option)
        if splits is None:
            return
        self.options[name][option] = splits
        for cls, split in zip(self.classes[name], splits, strict=True):
            if split and (cls, split) not in self.seen:
                self.seen.add((cls, split))
                self.queue.append((cls, split))

    def prune(self) -> None:
        """Drop splits in blocks that no producer makes or no consumer takes, until nothing changes.

        What remains is the largest set in which every option has a maker of what arrives and a taker of what leaves; an
        option is looked at again only when the last maker or taker of one of its splits is gone.
        """
        ends: dict[Key, tuple[list[Place], list[Place]]] = {}
        makers: Counter[Place] = Counter()
        takers: Counter[Place] = Counter()
        waiting: dict[Place, list[Key]] = {}
        for name, op in self.ops.items():
            count = len(op.inputs)
            for option, splits in self.options[name].items():
                places = list(zip(self.classes[name], splits, strict=True))
                ends[name, option] = [p for p in places[:count] if p[1]], [p for p in places[count:] if p[1]]
                takers.update(ends[name, option][0])
                makers.update(ends[name, option][1])
                for place in places:
                    if place[1]:
                        waiting.setdefault(place, []).append((name, option))
        produced = {c for name, op in self.ops.items() for c in self.classes[name][len(op.inputs) :]}
        consumed = {c for name, op in self.ops.items() for c in self.classes[name][: len(op.inputs)]}

        def leads_nowhere(key: Key) -> bool:
            arriving = [p for p in ends[key][0] if p[0] in produced]
            leaving = [p for p in ends[key][1] if p[0] in consumed]
            return bool(arriving and not any(makers[p] for p in arriving)) or bool(
                leaving and not any(takers[p] for p in leaving)
            )

        queue = list(ends)
        dead: set[Key] = set()
        while queue:
            key = queue.pop()
            if key in dead or not leads_nowhere(key):
                continue
            dead.add(key)
            for numbers, places in ((takers, ends[key][0]), (makers, ends[key][1])):
                for place in places:
                    numbers[place] -= 1
                    if not numbers[place]:
                        queue += waiting[place]
        for name, found in self.options.items():
            self.options[name] = {
                option: splits
                for option, splits in found.items()
                if (name, option) not in dead or all(s is None or s.blocks == 1 for s in splits)
            }


def _seeds(rule: Rule) -> set[Option]:
    """Every name at outer count 1, and at the boundaries of the dims that it is spread over."""
    seeds = {(name, 1) for name in rule.splits if name not in rule.batch_only}
    for dims, shape in rule.tensors:
        prefix: dict[str, int] = {}
        for dim, size in zip(dims, shape, strict=True):
            if len(dim) == 1 and dim[0] in rule.splits and dim[0] not in rule.batch_only:
                seeds.add((dim[0], prefix.get(dim[0], 1)))
                prefix[dim[0]] = prefix.get(dim[0], 1) * size
    return seeds


def _splits(rule: Rule, option: Option) -> Splits | None:
    """How each tensor is cut, or None where one of those that carry the name cannot be."""
    name, outer = option
    if name not in rule.splits or name in rule.batch_only:
        return None
    size = rule.sizes[name]
    if size % outer or size // outer < 2 or (outer > 1 and name in rule.specials and rule.specials[name].window):
        return None
    found: list[Split | None] = []
    for index, (dims, shape) in enumerate(rule.tensors):
        if not carries(dims, name):
            if index >= len(rule.inputs) and name not in rule.sums:
                return None
            found.append(None)
            continue
        split = split_of(rule, index, name, outer)
        if split is None or shape[split.dim] % split.blocks or shape[split.dim] // split.blocks < 2:
            return None
        found.append(split)
    return tuple(found)


def _pending(
    graph: Graph,
    representative: Mapping[str, str],
    options: Mapping[str, tuple[Option, ...]],
    rule_of: Callable[[Op], Rule],
) -> dict[str, frozenset[int]]:
    """Inputs that may arrive as pending sums: made by a contraction, passed on by linear ops."""
    tensors: set[str] = set()
    found: dict[str, frozenset[int]] = {}
    for op in graph.ops:
        if op.name in graph.side_ops:
            continue
        name = representative[op.name]
        rule = rule_of(graph.op[name])
        arrives = frozenset(i for i, t in enumerate(op.inputs) if t in tensors)
        found[name] = found.get(name, frozenset()) | arrives
        makes = any(
            option[0] in rule.sums and (option[0] not in rule.specials or rule.specials[option[0]].output == PARTIAL)
            for option in options[name]
        )
        if makes or any(group & arrives for group in rule.linear):
            tensors.update(op.outputs)
    return found
