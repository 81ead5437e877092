"""Rules of ops that slide windows over space: convolutions, pooling, upsampling, padding.

A dim of space is named s0, s1, ... where it may be split. Windows that lie apart (a stride as long as the kernel, no
padding) make the input's dim a product (s w), so that a split of s needs nothing of its neighbours. Where they overlap, s
is a dim of input and output alike, of different lengths, and its special "halo" fetches borders (sharding/window.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from ..graph import Shape, Tensor
from .call import Call
from .notation import Dim, Dims
from .op_windows import ADAPTIVE_AVERAGES, AVERAGES, MAXIMA, UPSAMPLING, windows_of
from .rule import Rule, Special
from .rules_pointwise import RuleFunction, full
from .window import Window

HALO, TAPS = "halo", "taps"


@dataclass(frozen=True)
class Space:
    """Named dims of the space of an op, in input and output, and what the rule has to say about them."""

    inputs: Dims
    outputs: Dims
    sizes: Mapping[str, int]
    specials: Mapping[str, Special]
    blocked: Mapping[str, str]
    sums: frozenset[str] = frozenset()


def _space(call: Call, tensor: str, windows: Sequence[Window | None], reason: str) -> Space:
    """Dims by their windows. reason: why a dim without one stays whole."""
    given = call.tensor(tensor)
    inputs: list[Dim] = []
    outputs: list[Dim] = []
    sizes: dict[str, int] = {}
    specials: dict[str, Special] = {}
    blocked: dict[str, str] = {}
    for i, window in enumerate(windows):
        size, out = given.shape[i - len(windows)], call.out[i - len(windows)]
        if window is None:
            inputs.append((f"x{i}",)), outputs.append((f"y{i}",))
            blocked |= {f"{c}{i}": reason for c in "xy"}
            continue
        name, inner = f"s{i}", f"w{i}"
        sizes[name] = math.gcd(size, out)
        if not window.apart:
            inputs.append((name,)), outputs.append((name,))
            specials[name] = halo(given, i - len(windows), window)
            continue
        factor = max(window.down, window.up)
        sizes[inner] = factor
        blocked[inner] = "a window's places stay together"
        inputs.append((name, inner) if window.down > 1 else (name,))
        outputs.append((name, inner) if window.up > 1 else (name,))
    return Space(tuple(inputs), tuple(outputs), sizes, specials, blocked)


def halo(tensor: Tensor, dim: int, window: Window) -> Special:
    """A dim of `tensor` along which borders of neighbours are fetched."""
    return Special(HALO, window=window, row_bytes=tensor.size_bytes // tensor.shape[dim], composes=True)


def convolution(call: Call) -> Rule:
    """input [b, (g i), *space], weight [(g o), i, *kernel], bias [(g o)] -> [b, (g o), *space']."""
    groups, weight = call["groups"], call.shape("weight")
    sizes = {"o": weight[0] // groups, "i": weight[1]}
    rule = _convolution(call, sizes, ("o", "i"), math.prod(call.out), weight[2:])
    # Each tap is a product of its own with the input shifted, so that taps may be summed over as input channels are.
    taps = [f"k{i}" for i, size in enumerate(weight[2:]) if size > 1]
    return replace(
        rule,
        splits=(*rule.splits, *taps),
        sums=rule.sums | set(taps),
        specials={**rule.specials, **dict.fromkeys(taps, Special(TAPS))},
        blocked={name: reason for name, reason in rule.blocked.items() if name not in taps},
    )


def transposed_convolution(call: Call) -> Rule:
    """input [b, (g i), *space], weight [(g i), o, *kernel], bias [(g o)] -> [b, (g o), *space']."""
    groups, weight = call["groups"], call.shape("weight")
    sizes = {"i": weight[0] // groups, "o": weight[1]}
    return _convolution(call, sizes, ("i", "o"), math.prod(call.shape("input")), weight[2:])


def _convolution(call: Call, sizes: Mapping[str, int], of_weight: tuple[str, str], places: int, kernel: Shape) -> Rule:
    """of_weight: names of the weight's first two dims, of which the first is cut into groups. places: of channels and
    space together, of whichever of input and output each meets every tap."""
    spatial = len(kernel)
    lead: Dims = (("b",),) if len(call.shape("input")) == spatial + 2 else ()
    g = ("g",) if call["groups"] > 1 else ()
    space = _space(call, "input", windows_of(call), "its kernel is narrower than its stride")
    taps = tuple((f"k{i}",) for i in range(spatial))
    additive = ("bias",) if call.has("bias") else ()
    first, second = of_weight
    return call.rule(
        {
            "input": (*lead, (*g, "i"), *space.inputs),
            "weight": ((*g, first), (second,), *taps),
            "bias": ((*g, "o"),),
        },
        [(*lead, (*g, "o"), *space.outputs)],
        splits=["b", "g", "i", "o", *(f"s{i}" for i in range(spatial))],
        sums={"i"},
        specials=space.specials,
        blocked={**{f"k{i}": "the taps of a kernel stay together" for i in range(spatial)}, **space.blocked},
        additive=additive,
        linear=[["input", *additive], ["weight", *additive]],
        sizes={**sizes, **space.sizes, **({"g": call["groups"]} if g else {})},
        flops=2 * places * sizes[second] * math.prod(kernel),
    )


def _pooling(spatial: int, linear: bool, reason: str) -> RuleFunction:
    def rule(call: Call) -> Rule:
        """Leading dims (batch, channels) are independent."""
        first = next(iter(call.positions()))
        shape, out = call.shape(first), call.out
        lead = full(shape[: len(shape) - spatial])
        windows = windows_of(call) or (None,) * spatial
        space = _space(call, first, windows, reason)
        return call.rule(
            {first: (*lead, *space.inputs)},
            [(*lead, *space.outputs)] * len(call.outputs),
            specials=space.specials,
            blocked=space.blocked,
            sizes=space.sizes,
            linear=[[first]] if linear else (),
            flops=math.prod(shape if math.prod(shape) > math.prod(out) else out),
        )

    return rule


def adaptive_average(spatial: int) -> RuleFunction:
    """Averages over equal windows are those of a pooling; an average over all of a dim is a sum of its parts' shares."""
    pooled = _pooling(spatial, True, "its windows differ in length")

    def rule(call: Call) -> Rule:
        found = pooled(call)
        first = next(iter(call.positions()))
        lead = len(call.shape(first)) - spatial
        over_all = {f"d{lead + i}": lead + i for i in range(spatial) if call.out[lead + i] == 1}
        if not over_all:
            return found
        by_dim = {dim: name for name, dim in over_all.items()}
        ins = tuple((by_dim[i],) if i in by_dim else dim for i, dim in enumerate(found.inputs[0]))
        outs = tuple(() if i in by_dim else dim for i, dim in enumerate(found.outputs[0]))
        names = {name for dim in (*ins, *outs) for name in dim}
        sizes = {**found.sizes, **{name: call.shape(first)[dim] for name, dim in over_all.items()}}
        return replace(
            found,
            inputs=(ins,),
            outputs=(outs,),
            sizes={name: size for name, size in sizes.items() if name in names},
            splits=tuple(dict.fromkeys(n for dim in ins for n in dim if n not in found.blocked)),
            sums=frozenset(over_all),
        )

    return rule


def pad(call: Call) -> Rule:
    """constant_pad_nd, pad: the ends of some of the last dims. Other modes than a constant look at what is inside."""
    windows = windows_of(call)
    shape = call.shape("self")
    lead = full(shape[: len(shape) - len(windows)])
    space = _space(call, "self", windows, "what is added at its ends is copied from inside")
    rule = call.rule(
        {"self": (*lead, *space.inputs)},
        [(*lead, *space.outputs)],
        specials=space.specials,
        blocked=space.blocked,
        sizes=space.sizes,
        linear=[["self"]],
    )
    return rule if call.get("mode", "constant") != "constant" or not call["value"] else replace(rule, linear=())


_INDICES = "indices number the places of the whole"

RULES: Mapping[str, RuleFunction] = MappingProxyType(
    {
        **{f"aten.conv{n}d": convolution for n in (1, 2, 3)},
        **{f"aten.conv_transpose{n}d": transposed_convolution for n in (1, 2, 3)},
        **{name: _pooling(n, True, "") for name, n in AVERAGES.items()},
        **{name: _pooling(n, False, _INDICES) for name, n in MAXIMA.items()},
        **{f"aten.adaptive_max_pool{n}d": _pooling(n, False, _INDICES) for n in (1, 2, 3)},
        **{name: adaptive_average(n) for name, n in ADAPTIVE_AVERAGES.items()},
        **{name: _pooling(n, True, "its places are no whole multiples") for name, n in UPSAMPLING.items()},
        "aten.pad": pad,
        "aten.constant_pad_nd": pad,
    }
)
