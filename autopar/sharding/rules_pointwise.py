"""Rules of ops that treat every element alike, with broadcasting, and of ops that make new tensors.

Named dims are d0, d1, ... of the output; an input that is broadcast along a dim lacks it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

import torch

from ..graph import Ref, Shape
from .call import Call
from .notation import Dims
from .placement import SHARED
from .rule import Rule, Special

RuleFunction = Callable[[Call], Rule | None]


def aligned(shape: Shape, out: Shape) -> Dims:
    """Dims of an input that broadcasts to `out` from the right."""
    offset = len(out) - len(shape)
    return tuple((f"d{offset + i}",) if size == out[offset + i] else () for i, size in enumerate(shape))


def full(out: Shape) -> Dims:
    return tuple((f"d{i}",) for i in range(len(out)))


_SCALINGS = (
    "neg negative positive clone contiguous alias detach lift_fresh_copy deg2rad rad2deg _to_copy resolve_conj "
    "resolve_neg"
)

# Ops that are linear in these groups of tensor arguments (other arguments, scalars among them, held fixed).
_LINEAR: Mapping[str, tuple[tuple[str, ...], ...]] = MappingProxyType(
    {
        "aten.mul": (("self",), ("other",)),
        "aten.multiply": (("self",), ("other",)),
        "aten.div": (("self",),),
        "aten.divide": (("self",),),
        "aten.true_divide": (("self",),),
        "aten.add": (("self", "other"),),
        "aten.sub": (("self", "other"),),
        "aten.subtract": (("self", "other"),),
        "aten.rsub": (("self", "other"),),
        "aten.where": (("self", "other"),),
        "aten.lerp": (("self", "end"),),
        **{f"aten.{name}": (("self",),) for name in (*_SCALINGS.split(), "to", "type_as")},
        "aten.dropout": (("input",),),
        "aten.native_dropout": (("input",),),
    }
)


_ADDITIONS = frozenset({"aten.add", "aten.sub", "aten.subtract", "aten.rsub", "aten.where", "aten.lerp"})


def linear_groups(call: Call) -> tuple[tuple[str, ...], ...]:
    """Groups of arguments in which an elementwise op is jointly linear."""
    groups = _LINEAR.get(call.packet, ())
    if call.packet == "aten.masked_fill" and not call.has("value") and call["value"] == 0:
        groups = (("self",),)
    if call.packet in _ADDITIONS and not all(call.has(name) for group in groups for name in group):
        return ()  # adding a scalar is affine: every summand would add it
    if call.get("rounding_mode") is not None or call.outputs[0].dtype == torch.bool:
        return ()
    if not call.outputs[0].dtype.is_floating_point and any(t.dtype.is_floating_point for t in call.inputs):
        return ()  # rounds every summand
    return groups


def pointwise(call: Call) -> Rule | None:
    """Any elementwise op: all tensor arguments broadcast to the output."""
    out = call.out
    if any(t.shape != out for t in call.outputs) or not all(_broadcasts(t.shape, out) for t in call.inputs):
        return None  # an overload of another kind, such as where(condition)
    inputs = {name: [aligned(call.inputs[i].shape, out) for i in numbers] for name, numbers in call.positions().items()}
    return call.rule(
        {name: dims if isinstance(call[name], tuple | list) else dims[0] for name, dims in inputs.items()},
        [full(t.shape) for t in call.outputs],
        linear=linear_groups(call),
        flops=math.prod(out),
    )


def _broadcasts(shape: Shape, out: Shape) -> bool:
    return len(shape) <= len(out) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(out), strict=False))


def copies(call: Call) -> Rule | None:
    """clone, casts, contiguous: no arithmetic."""
    rule = pointwise(call)
    return rule and replace(rule, flops=0)


def feature_dropout(call: Call) -> Rule:
    """dropout2d and its like: one draw for all places of a channel."""
    shape = call.shape("input")
    blocked = {f"d{i}": "one draw decides for all places of a channel" for i in range(2, len(shape))}
    return call.rule({"input": full(shape)}, [full(shape)], blocked=blocked, linear=[["input"]], flops=math.prod(shape))


def lender(shape: Shape, out: Shape) -> Dims:
    """Dims of an argument of which only dtype and device matter: split with the output, else by itself."""
    return tuple((f"d{i}",) if i < len(out) and out[i] == size else (f"l{i}",) for i, size in enumerate(shape))


def _with_lenders(call: Call, inputs: Mapping[str, Dims], linear: tuple[tuple[str, ...], ...] = ()) -> Rule:
    own = {name for dims in inputs.values() for dim in dims for name in dim if name.startswith("l")}
    return call.rule(
        inputs,
        [full(call.out)],
        sums=own,
        specials={name: Special("", output=SHARED, work=math.inf) for name in own},
        linear=linear,
    )


def same_shape(call: Call) -> Rule:
    """to, type_as: the first argument has the output's shape, other tensors only lend dtype and device."""
    inputs = {name: lender(call.shape(name), call.out) for name in call.positions()}
    return _with_lenders(call, inputs, linear_groups(call))


def prelu(call: Call) -> Rule:
    """One weight for all elements, or one per channel (dim 1)."""
    shape, weight = call.shape("self"), call.shape("weight")
    per_channel = len(weight) == 1 and len(shape) > 1 and weight[0] == shape[1] != 1
    return call.rule(
        {"self": full(shape), "weight": (("d1",),) if per_channel else tuple(() for _ in weight)},
        [full(shape)],
        flops=math.prod(shape),
    )


def glu(call: Call) -> Rule:
    shape = call.shape("self")
    dim = call.dim("dim", len(shape))
    dims = tuple(("half", f"d{i}") if i == dim else (f"d{i}",) for i in range(len(shape)))
    sizes = {"half": 2, f"d{dim}": shape[dim] // 2}
    blocked = {"half": "both halves meet in every element"}
    return call.rule({"self": dims}, [full(shape)], sizes=sizes, blocked=blocked, flops=math.prod(shape))


def creation(call: Call) -> Rule:
    """zeros, full, rand, ...: any dim of the output can be made smaller; tensor arguments lend dtype and device."""
    return _with_lenders(call, {name: lender(call.shape(name), call.out) for name in call.positions()})


def like(call: Call) -> Rule:
    """zeros_like, rand_like, ...: as large as the first argument."""
    name = next(iter(call.positions()))
    return call.rule({name: full(call.out)}, [full(call.out)], linear=())


def arange(call: Call) -> Rule:
    if any(isinstance(call.get(name), Ref) for name in ("start", "end", "step")):
        return call.rule({n: () for n in call.positions()}, [full(call.out)], splits=())
    return call.rule({}, [full(call.out)], specials={"d0": Special("arange")})


def eye(call: Call) -> Rule:
    blocked = dict.fromkeys(("d0", "d1"), "ones lie on the diagonal of the whole")
    return call.rule({}, [full(call.out)], blocked=blocked)


def one_hot(call: Call) -> Rule:
    shape = call.shape("self")
    blocked = {"classes": "every class is compared with every index"}
    if call["num_classes"] == -1:
        blocked |= {f"d{i}": "the number of classes depends on all indices" for i in range(len(shape))}
    return call.rule({"self": full(shape)}, [(*full(shape), ("classes",))], blocked=blocked)


CREATIONS = ("zeros", "ones", "full", "empty", "rand", "randn", "new_zeros", "new_ones", "new_full", "new_empty")

_COPIES = "clone contiguous alias detach lift_fresh_copy resolve_conj resolve_neg _to_copy positive"
_POINTWISE = (
    "multiply divide subtract negative absolute square floor_divide __and__ __or__ __xor__ __lshift__ __rshift__ "
    "bitwise_not greater greater_equal less less_equal not_equal eq dropout alpha_dropout native_dropout hardswish "
    "log_sigmoid softplus rrelu isreal isclose arccos arccosh arcsin arcsinh arctan arctanh arctan2 fix special_expit "
    "special_erf special_expm1 special_exp2 special_log1p special_round special_sinc special_xlogy special_logit "
    "special_erfc special_erfinv special_gammaln special_i0 special_psi special_digamma bernoulli "
    "isposinf isneginf zero fill relu6 celu where masked_fill polar"
)

RULES: Mapping[str, RuleFunction] = MappingProxyType(
    {
        **{f"aten.{name}": copies for name in _COPIES.split()},
        **{f"aten.{name}": pointwise for name in _POINTWISE.split()},
        **{f"aten.{name}": same_shape for name in ("to", "type_as")},
        **{f"aten.{name}": creation for name in CREATIONS},
        **{f"aten.{name}_like": like for name in ("zeros", "ones", "full", "empty", "rand", "randn")},
        "aten.feature_dropout": feature_dropout,
        "aten.scalar_tensor": creation,
        "aten.arange": arange,
        "aten.eye": eye,
        "aten.prelu": prelu,
        "aten._prelu_kernel": pointwise,
        "aten.glu": glu,
        "aten.one_hot": one_hot,
    }
)

# Tagged pointwise by torch, yet with one result for all elements.
NOT_POINTWISE = frozenset({"aten.equal", "aten.frexp"})
