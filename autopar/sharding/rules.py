"""`rule(graph, op)`: what may be done in parallel along which dim of an op.

A rule is found by the op's target ("aten.max.dim"), else by the target without its overload ("aten.max"), else, where
it is tagged as pointwise (torch.Tag.pointwise), as an elementwise op. An op without a rule runs whole, which is always
legal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch

from ..graph import Graph, Op
from ..ops import resolve
from . import (
    rules_index,
    rules_linear,
    rules_loss,
    rules_norm,
    rules_opaque,
    rules_pointwise,
    rules_recurrent,
    rules_reduce,
    rules_routed,
    rules_views,
    rules_window,
)
from .call import Call
from .notation import parse
from .rule import Rule
from .window import Window

RuleFunction = Callable[[Call], Rule | None]


@dataclass(frozen=True)
class RuleTable:
    """Rules by target. Immutable: `register_rule` returns a larger table."""

    functions: Mapping[str, RuleFunction]

    def register_rule(
        self,
        target: str,
        pattern: str,
        *,
        sums: Iterable[str] = (),
        whole: Iterable[str] = (),
        sizes: Mapping[str, int] | None = None,
        linear: Iterable[int] = (),
        multiplies: bool = False,
        halo: Mapping[str, int] | None = None,
    ) -> RuleTable:
        """Add a rule in one line: `table.register_rule("mylib.scan.default", "b s h, h -> b s h", whole=["s"])`.

        target: "<namespace>.<name>" or "<namespace>.<name>.<overload>". pattern: see sharding/notation.py; names that
        only inputs carry must be in `sums` (the op sums over them) or in `whole`.
        whole: names that must not be split. sizes: of factors that shapes do not fix. linear: inputs, by number, in
        each of which alone the op is linear. multiplies: whether flops are 2 x the product of all sizes.
        halo: names along which an output at x looks at the first input from x - reach to x + reach, with that reach; what
            the op does where its input ends it then does where the whole ends. The op must have one output, which has the
            dim at the first input's place, as no other input has.
        Raises ValueError for a pattern that does not parse or that names unknown dims in the options.
        """
        parsed = parse(pattern)
        known = {name for dims in parsed.inputs + parsed.outputs for dim in dims for name in dim}
        reaches = dict(halo or {})
        unknown = sorted({*sums, *whole, *(sizes or {}), *reaches} - known)
        if unknown:
            raise ValueError(f"rule {pattern!r} has no dim {', '.join(unknown)}")
        if target.count(".") not in (1, 2):
            raise ValueError(f"target {target!r} is not '<namespace>.<name>' or '<namespace>.<name>.<overload>'")
        for name in reaches:
            places = [[i - len(dims) for i, dim in enumerate(dims) if name in dim] for dims in parsed.inputs]
            made = [[i - len(dims) for i, dim in enumerate(dims) if dim == (name,)] for dims in parsed.outputs]
            if [places[0]] != made or any(places[1:]) or len(parsed.inputs[0]) != len(parsed.outputs[0]):
                raise ValueError(
                    f"rule {pattern!r}: the halo dim {name} must be a dim of its own, at one place of the first input and of "
                    f"the one output, and in no other input"
                )
        blocked = dict.fromkeys(whole, f"its rule {pattern!r} keeps it whole")
        options: dict[str, Any] = {"sums": tuple(sums), "blocked": blocked}
        groups = tuple(frozenset({i}) for i in linear)

        def function(call: Call) -> Rule:
            first = call.inputs[0]
            places = {
                name: len(first.shape) - len(parsed.inputs[0]) + parsed.inputs[0].index((name,)) for name in reaches
            }
            specials = {
                name: rules_window.halo(
                    first, dim, Window(first.shape[dim], first.shape[dim], 1, -reaches[name], reaches[name])
                )
                for name, dim in places.items()
            }
            found = call.pattern(pattern, sizes, specials=specials, **options)
            flops = 2 if multiplies else 0
            for size in found.sizes.values() if multiplies else ():
                flops *= size
            return replace(found, linear=groups, flops=flops)

        return RuleTable(MappingProxyType({**self.functions, target: function}))

    def find(self, target: str) -> RuleFunction | None:
        """The function that makes the rule of an op with this target."""
        packet = ".".join(target.split(".")[:2])
        found = self.functions.get(target) or self.functions.get(packet)
        if found is None and packet not in rules_pointwise.NOT_POINTWISE and not target.startswith("autopar."):
            tags = getattr(resolve(target), "tags", ())
            found = rules_pointwise.pointwise if torch.Tag.pointwise in tags else None
        return found


DEFAULT = RuleTable(
    MappingProxyType(
        {
            **rules_pointwise.RULES,
            **rules_views.RULES,
            **rules_index.RULES,
            **rules_linear.RULES,
            **rules_recurrent.RULES,
            **rules_reduce.RULES,
            **rules_norm.RULES,
            **rules_window.RULES,
            **rules_loss.RULES,
            **rules_opaque.RULES,
            **rules_routed.RULES,
        }
    )
)


def make_rule(graph: Graph, op: Op, table: RuleTable = DEFAULT) -> Rule | None:
    """The rule of an op, or None where there is none (it then runs whole)."""
    function = table.find(op.target)
    if function is None or not op.outputs:
        return None
    return function(Call.of(graph, op))


def whole_rule(graph: Graph, op: Op) -> Rule:
    """The rule that is legal for every op: nothing is split, nothing passes through."""
    tensors = [graph.tensors[name] for name in (*op.inputs, *op.outputs)]
    dims = tuple(tuple((f"t{n}_{i}",) for i in range(len(t.shape))) for n, t in enumerate(tensors))
    sizes = {f"t{n}_{i}": size for n, t in enumerate(tensors) for i, size in enumerate(t.shape)}
    return Rule(
        inputs=dims[: len(op.inputs)],
        outputs=dims[len(op.inputs) :],
        shapes=tuple(t.shape for t in tensors),
        sizes=sizes,
        blocked=dict.fromkeys(sizes, f"{op.target} has no sharding rule (see RuleTable.register_rule)"),
    )
