"""Rules of contractions: matrix products, attention. Their flops are 2 x the product of all dims."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from ..graph import Shape
from .call import Call
from .notation import Dims
from .rule import Rule, Special, Together
from .rules_pointwise import RuleFunction, aligned


def _product_flops(rule_sizes: Mapping[str, int], names: set[str]) -> int:
    return 2 * math.prod(size for name, size in rule_sizes.items() if name in names)


def contraction(call: Call, inputs: Mapping[str, Dims], out: Dims, added: str | None = None) -> Rule:
    """A sum of products of the arguments `inputs`; names that the output lacks are summed. `added`: a bias."""
    names = {name for dims in inputs.values() for dim in dims for name in dim}
    kept = {name for dim in out for name in dim}
    all_inputs = dict(inputs)
    additive = [added] if added and call.has(added) else []
    if additive:
        bias = call.shape(added)
        offset = len(out) - len(bias)
        wide = call.out[offset:]
        all_inputs[added] = tuple(out[offset + i] if size == wide[i] else () for i, size in enumerate(bias))
    sizes: dict[str, int] = {}
    for name, dims in inputs.items():
        for dim, size in zip(dims, call.shape(name), strict=True):
            if len(dim) == 1:
                sizes[dim[0]] = size
    return call.rule(
        all_inputs,
        [out],
        sums=names - kept,
        additive=additive,
        linear=[[name, *additive] for name in inputs],
        flops=_product_flops(sizes, names),
    )


def linear(call: Call) -> Rule:
    lead = tuple((f"d{i}",) for i in range(len(call.shape("input")) - 1))
    if len(call.shape("weight")) == 1:
        return contraction(call, {"input": (*lead, ("i",)), "weight": (("i",),)}, lead, "bias")
    return contraction(call, {"input": (*lead, ("i",)), "weight": (("o",), ("i",))}, (*lead, ("o",)), "bias")


def matmul(call: Call) -> Rule:
    """[.., m, k] x [.., k, n] -> [.., m, n]; vectors lack m or n; leading dims broadcast."""
    return contraction(call, *_matmul_dims(call.shape("self"), call.shape("other"), call.out, "self", "other"))


def _matmul_dims(left: Shape, right: Shape, out: Shape, a: str, b: str) -> tuple[dict[str, Dims], Dims]:
    tail: Dims = ((("m",),) if len(left) > 1 else ()) + ((("n",),) if len(right) > 1 else ())
    lead = out[: len(out) - len(tail)]
    first = (*aligned(left[:-2], lead), *((("m",),) if len(left) > 1 else ()), ("k",))
    second = (*aligned(right[:-2], lead), ("k",), *((("n",),) if len(right) > 1 else ()))
    return {a: first, b: second}, (*((f"d{i}",) for i in range(len(lead))), *tail)


def addmm(call: Call) -> Rule:
    """beta self + alpha mat1 mat2 and its relatives; self broadcasts."""
    first, second = {
        "aten.addmm": ("mat1", "mat2"),
        "aten.baddbmm": ("batch1", "batch2"),
        "aten.addmv": ("mat", "vec"),
    }[call.packet]
    return contraction(call, *_matmul_dims(call.shape(first), call.shape(second), call.out, first, second), "self")


def grouped_mm(call: Call) -> Rule | None:
    """rows [n, i], weights [e, i, o], offs [e]: rows up to offs[0] times weight 0, and so on -> [n, o].

    Rows are sorted by group, and `offs` counts them, so only the batch axis may cut them: there each part has rows and
    counts of its own, and the counts add up (see sharding/order.py).
    """
    names = list(call.positions())
    if len(names) != 3 or len(call.inputs[0].shape) != 2 or len(call.inputs[1].shape) != 3:
        return None
    rows, weights, counts = names
    return call.rule(
        {rows: (("n",), ("i",)), weights: (("e",), ("i",), ("o",)), counts: (("e",),)},
        [(("n",), ("o",))],
        sums={"i"},
        blocked={"e": "rows of all groups lie in one tensor"},
        batch_only={"n"},
        counts={"n": [counts]},
        linear=[[rows], [weights]],
        flops=2 * math.prod(call.out) * call.inputs[0].shape[1],
    )


def mm(call: Call) -> Rule:
    second = next(name for name in ("mat2", "vec", "tensor") if call.has(name))
    return contraction(call, *_matmul_dims(call.shape("self"), call.shape(second), call.out, "self", second))


def addr(call: Call) -> Rule:
    return contraction(call, {"vec1": (("m",),), "vec2": (("n",),)}, (("m",), ("n",)), "self")


def outer(call: Call) -> Rule:
    other = "vec2" if call.has("vec2") else "other"
    return contraction(call, {"self": (("m",),), other: (("n",),)}, (("m",), ("n",)))


def einsum(call: Call) -> Rule | None:
    """Names are the letters of the equation; an ellipsis broadcasts. A letter twice in one operand: no rule."""
    equation = call["equation"].replace(" ", "")
    left, arrow, right = equation.partition("->")
    operands = left.split(",")
    shapes = call.shapes("tensors")
    if any(len(set(o.replace("...", ""))) != len(o.replace("...", "")) for o in operands):
        return None
    letters = left.replace(",", "").replace("...", "")
    if not arrow:
        single = sorted(c for c in set(letters) if letters.count(c) == 1)
        right = ("..." if "..." in left else "") + "".join(single)
    widths = [len(s) - len(o.replace("...", "")) for o, s in zip(operands, shapes, strict=True) if "..." in o]
    width = max(widths, default=0)
    if width and "..." not in right:
        return None
    sizes: dict[str, int] = {}

    def spread(text: str, shape: Shape) -> tuple[str, ...]:
        before, dots, after = text.partition("...")
        count = len(shape) - len(before) - len(after)
        return (*before, *((f"d{width - count + i}" for i in range(count)) if dots else ()), *after)

    named = [spread(o, s) for o, s in zip(operands, shapes, strict=True)]
    for names, shape in zip(named, shapes, strict=True):
        for name, size in zip(names, shape, strict=True):
            sizes[name] = max(sizes.get(name, 1), size)
    dims = [
        tuple((n,) if sizes[n] == size else () for n, size in zip(names, shape, strict=True))
        for names, shape in zip(named, shapes, strict=True)
    ]
    out = tuple((n,) for n in spread(right, call.out))
    rule = call.rule(
        {"tensors": dims},
        [out],
        sums={name for one in dims for dim in one for name in dim} - {dim[0] for dim in out},
        flops=(2 if len(named) > 1 else 1) * math.prod(sizes.values()),
    )
    return replace(rule, linear=tuple(frozenset({i}) for i in range(len(named))))


def attention(call: Call) -> Rule:
    """query [.., q, d], key [.., k, d], value [.., k, e] -> [.., q, e]; with enable_gqa the query has (h r) heads.

    Rows q may be split: keys and values are then whole. With is_causal that needs to know the row's offset. Rows q and k
    together may be split by ring attention, but for dropout and a mask that is trained.
    """
    query, key, value, out = call.shape("query"), call.shape("key"), call.shape("value"), call.out
    lead = out[:-2]
    sizes: dict[str, int] = {}
    grouped = bool(call["enable_gqa"]) and len(lead) > 0 and query[-3] != key[-3]
    head = f"d{len(lead) - 1}"

    def leading(shape: Shape, is_query: bool) -> Dims:
        dims = aligned(shape[:-2], lead)
        if grouped:
            last = (head, "r") if is_query else (head,)
            dims = (*dims[:-1], last)
        return dims

    if grouped:
        sizes = {head: key[-3], "r": query[-3] // key[-3]}
    inputs = {
        "query": (*leading(query, True), ("q",), ("d",)),
        "key": (*leading(key, False), ("k",), ("d",)),
        "value": (*leading(value, False), ("k",), ("e",)),
    }
    out_dims = (*(leading(out, True) if grouped else tuple((f"d{i}",) for i in range(len(lead)))), ("q",), ("e",))
    if call.has("attn_mask"):
        mask = call.shape("attn_mask")
        target = (*out[:-1], key[-2])
        offset = len(target) - len(mask)
        named = (*out_dims[:-2], ("q",), ("k",))
        inputs["attn_mask"] = tuple(
            named[offset + i] if size == target[offset + i] else () for i, size in enumerate(mask)
        )
    causal = bool(call["is_causal"])
    blocked = {
        "d": "scores need whole query and key vectors",
        "k": "the softmax runs over all keys",
        "e": "every rank would compute all scores again",
    }
    space = math.prod(lead) * query[-2] * key[-2]
    rule = call.rule(
        inputs,
        [out_dims],
        blocked=blocked,
        specials={"q": Special("sdpa_rows", work=2.0)} if causal else {},
        sizes=sizes,
        flops=2 * space * (query[-1] + value[-1]),
    )
    trained = call.has("attn_mask") and call.tensor("attn_mask").requires_grad
    heads = (*lead[:-1], key[-3]) if grouped else lead
    broadcast = query[:-2] != lead or key[:-2] != heads or value[:-2] != heads
    if call["dropout_p"] or trained or broadcast:
        return rule
    by_argument = {
        "query": "q",
        "key": "k",
        "value": "k",
        "attn_mask": "q" if ("q",) in inputs.get("attn_mask", ()) else None,
    }
    names: list[str | None] = [None] * len(rule.shapes)
    names[-1] = "q"
    for argument, numbers in call.positions().items():
        for number in numbers:
            names[number] = by_argument[argument]
    # Each rank hands on all keys and values, and in the backward these and their gradients: three times in all, which
    # sends as much as an all-reduce of one and a half times their bytes. Of a causal square the last rank has most.
    travelling = sum(call.tensor(name).size_bytes for name in ("key", "value"))
    ring = Special("ring_attention", work=2.0 if causal else 1.0, collective_bytes=travelling * 3 // 2)
    return replace(rule, together=(Together("q+k", tuple(names), ring),))


RULES: Mapping[str, RuleFunction] = MappingProxyType(
    {
        "aten.linear": linear,
        "aten.matmul": matmul,
        "aten._grouped_mm": grouped_mm,
        # What transformers' experts call where torch's own grouped product cannot be traced.
        "transformers.grouped_mm_fallback": grouped_mm,
        "aten.mm": mm,
        "aten.bmm": mm,
        "aten.mv": mm,
        "aten.dot": mm,
        "aten.addmm": addmm,
        "aten.baddbmm": addmm,
        "aten.addmv": addmm,
        "aten.addr": addr,
        "aten.outer": outer,
        "aten.ger": outer,
        "aten.einsum": einsum,
        "aten.scaled_dot_product_attention": attention,
    }
)
