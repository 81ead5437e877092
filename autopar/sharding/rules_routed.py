"""Rules of `autopar.routed_rows` (autopar/routed.py), the op behind a mixture of experts.

n  tokens: rows are treated alike, so any part of them runs by itself
e  groups (experts): each rank treats the rows of its own groups; the rows of others are zeros, hence a sum
n+e  tokens and groups: rows travel to the rank of their group and back, by all-to-all (GShard, Lepikhin et al. 2020)
i  an inner dim of the weights, column parallel in one product and row parallel in the next (Megatron-LM)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from ..routed import Body, shared, weight
from .call import Call
from .notation import Dims
from .placement import Split
from .rule import Rule, Special, Together
from .rules_pointwise import RuleFunction


def routed_rows(call: Call) -> Rule | None:
    """tokens [n, ..], groups [(n k)], operands [(n k), ..], weights [e, ..] -> [(n k), ..]"""
    body: Body = call["body"]
    repeat, num_groups = call["repeat"], call["num_groups"]
    from .routed_body import inner_split  # which asks for the rules of the body's ops

    inner = inner_split(body, 2)
    count = 0
    tokens = call.shape("tokens")
    sizes = {"n": tokens[0], "e": num_groups, **({"k": repeat} if repeat > 1 else {})}

    def own(shape: tuple[int, ...], lead: Dims, cut: Split | None = None) -> Dims:
        """Names of its own for all dims but the first; that which the inner split cuts is i, or c blocks of i."""
        nonlocal count
        dims = []
        for dim in range(len(lead), len(shape)):
            count += 1
            if cut is not None and cut.dim == dim:
                dims.append(("i",) if cut.blocks == 1 else (f"c{count}", "i"))
                sizes["i"] = shape[dim] // cut.blocks
                sizes.update({f"c{count}": cut.blocks} if cut.blocks > 1 else {})
            else:
                dims.append((f"x{count}",))
        return (*lead, *dims)

    rows = ("n", "k") if repeat > 1 else ("n",)
    cuts = inner.weights if inner else {}
    weights = [own(s, (("e",),), cuts.get(weight(i))) for i, s in enumerate(call.shapes("weights"))]
    others = [own(s, (), cuts.get(shared(i))) for i, s in enumerate(call.shapes("shared_weights"))]
    operands = [own(s, (rows,)) for s in call.shapes("operands")]
    out = own(call.out, (rows,))
    dims = {
        "tokens": own(tokens, (("n",),)),
        "groups": (rows,),
        "operands": operands,
        "weights": weights,
        "shared_weights": others,
    }
    moved = 2 * math.prod(call.out[:1]) * (math.prod(tokens[1:]) + math.prod(call.out[1:]))
    moved = moved // 2 * call.outputs[0].dtype.itemsize
    flops = 2 * call.out[0] * sum(math.prod(s[1:]) for s in call.shapes("weights") if len(s) == 3)
    rule = call.rule(
        {name: value for name, value in dims.items() if name in call.positions()},
        [out],
        splits=["n", "e", "i"],
        sums={"e", "i"},
        specials={"e": Special("own_groups")},
        sizes=sizes,
        flops=flops,
    )
    names: list[str | None] = [None] * len(rule.shapes)
    names[-1] = "n"
    for argument, numbers in call.positions().items():
        for number in numbers:
            names[number] = {"weights": "e", "shared_weights": None}.get(argument, "n")
    # Rows go to their group and back, forward and backward. Four all-to-alls of a rank's rows send what an all-reduce of
    # twice these bytes does.
    exchange = Special("exchanged_groups", exchanged_bytes=2 * moved)
    return replace(rule, together=(Together("n+e", tuple(names), exchange, free="n"),))


RULES: Mapping[str, RuleFunction] = MappingProxyType({"autopar.routed_rows": routed_rows})
