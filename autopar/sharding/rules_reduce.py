"""Rules of reductions and of ops that look along a whole dim (softmax, cumulative sums, sorting)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType

import torch

from .call import Call
from .notation import Dims
from .rule import Rule
from .rules_pointwise import RuleFunction, aligned, full, pointwise


def _reduced(call: Call) -> set[int]:
    rank = len(call.inputs[0].shape)
    dims = call.get("dim", call.get("axis"))
    if dims is None or (isinstance(dims, tuple | list) and not dims):
        return set(range(rank))
    listed: Iterable[int] = dims if isinstance(dims, tuple | list) else (dims,)
    return {d % rank for d in listed} if rank else set()


def _reduction(call: Call, summable: bool, reason: str) -> Rule:
    shape = call.inputs[0].shape
    reduced = _reduced(call)
    keep = bool(call.get("keepdim", False))
    ins = full(shape)
    outs: Dims = tuple(() if i in reduced else d for i, d in enumerate(ins) if keep or i not in reduced)
    names = {f"d{i}" for i in reduced}
    first = next(iter(call.positions()))
    return call.rule(
        {first: ins},
        [outs] * len(call.outputs),
        sums=names if summable else (),
        blocked={} if summable else dict.fromkeys(names, reason),
        linear=[[first]] if summable else (),
        flops=math.prod(shape),
    )


def summation(call: Call) -> Rule:
    """sum and mean (a mean over a split dim is scaled to a summand: see local.py)."""
    return _reduction(call, True, "")


def count(call: Call) -> Rule:
    """count_nonzero: counts add up, but are not linear in the input."""
    return replace(_reduction(call, True, ""), linear=())


def extremum(call: Call) -> Rule:
    """amax, argmax, var, norm, all, ...: what they reduce must be whole."""
    return _reduction(call, False, f"{call.packet} needs every element along it")


def max_or_min(call: Call) -> Rule | None:
    """max and min of one tensor reduce it; of two they are elementwise."""
    if call.overload == "other":
        return pointwise(call)
    return extremum(call) if call.overload in ("default", "dim") else None


def histogram(call: Call) -> Rule | None:
    """histc between fixed ends: counts of parts of the input add up. Without ends, they depend on all of it."""
    shape = call.shape("self")
    names = [d[0] for d in full(shape)]
    fixed = call["min"] < call["max"]
    blocked = {"bin": "every element may fall into any bin"}
    blocked |= {} if fixed else dict.fromkeys(names, "the ends of the bins depend on all elements")
    return call.rule({"self": full(shape)}, [(("bin",),)], sums=names if fixed else (), blocked=blocked)


def along(call: Call) -> Rule:
    """Ops whose outputs have the input's shape, with one dim that must be whole."""
    shape = call.inputs[0].shape
    first = next(iter(call.positions()))
    rank = len(shape)
    dim = call.get("dim", -1)
    whole = {dim % rank} if rank and dim is not None else set()
    linear = [[first]] if call.packet in ("aten.cumsum",) else ()
    return _along(call, first, whole, linear)


def _along(call: Call, first: str, whole: set[int], linear: Iterable[Iterable[str]] = ()) -> Rule:
    shape = call.inputs[0].shape
    ins = tuple((f"x{i}",) if i in whole else (f"d{i}",) for i in range(len(shape)))
    outs = [
        tuple((f"y{n}_{i}",) if size != shape[i] else ins[i] for i, size in enumerate(t.shape))
        for n, t in enumerate(call.outputs)
    ]
    reason = f"{call.packet} needs every element along it"
    names = {name for dims in (ins, *outs) for dim in dims for name in dim if not name.startswith("d")}
    return call.rule({first: ins}, outs, blocked=dict.fromkeys(names, reason), linear=linear, flops=math.prod(shape))


def cosine_similarity(call: Call) -> Rule:
    """Two tensors that broadcast against each other; one dim of them goes."""
    wide = torch.broadcast_shapes(call.shape("x1"), call.shape("x2"))
    dim = call.dim("dim", len(wide))
    inputs = {name: aligned(call.shape(name), wide) for name in ("x1", "x2")}
    out = tuple(d for i, d in enumerate(full(wide)) if i != dim)
    blocked = {f"d{dim}": "its sums are divided by each other"}
    return call.rule(inputs, [out], blocked=blocked, flops=6 * math.prod(wide))


def diff(call: Call) -> Rule:
    """Differences along a dim; prepend and append are joined to it."""
    shape = call.shape("self")
    dim = call.dim("dim", len(shape))
    inputs = {}
    for name in call.positions():
        inputs[name] = tuple((f"{name}",) if i == dim else (f"d{i}",) for i in range(len(call.shape(name))))
    out = tuple(("y",) if i == dim else (f"d{i}",) for i in range(len(shape)))
    blocked = dict.fromkeys([*inputs, "y"], "neighbours are subtracted along it")
    is_linear = [list(inputs)] if call.outputs[0].dtype.is_floating_point else ()
    return call.rule(inputs, [out], blocked=blocked, linear=is_linear, flops=math.prod(shape))


_ALONG = (
    "softmax _softmax log_softmax _log_softmax _safe_softmax cumsum cumprod logcumsumexp cummax cummin topk "
    "sort argsort"
)
_EXTREMA = (
    "amax amin argmax argmin var std var_mean std_mean all any prod logsumexp norm linalg_vector_norm median nanmedian "
    "mode kthvalue aminmax"
)

RULES: Mapping[str, RuleFunction] = MappingProxyType(
    {
        "aten.sum": summation,
        "aten.nansum": count,
        "aten.mean": summation,
        "aten.count_nonzero": count,
        **{f"aten.{name}": extremum for name in _EXTREMA.split()},
        "aten.max": max_or_min,
        "aten.min": max_or_min,
        **{f"aten.{name}": along for name in _ALONG.split()},
        "aten.histc": histogram,
        "aten.diff": diff,
        "aten.cosine_similarity": cosine_similarity,
    }
)
