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
from typing import Any

from ..graph import Shape
from .call import Call
from .notation import Dim, Dims
from .rule import Rule, Special
from .rules_pointwise import RuleFunction, full
from .window import Window

HALO = "halo"


@dataclass(frozen=True)
class Space:
    """Named dims of the space of an op, in input and output, and what the rule has to say about them."""

    inputs: Dims
    outputs: Dims
    sizes: Mapping[str, int]
    specials: Mapping[str, Special]
    blocked: Mapping[str, str]
    sums: frozenset[str] = frozenset()


def windows_of(call: Call) -> tuple[Window | None, ...]:
    """The window of each dim of the op's space, the last dims of its tensors; None where it is none that may be split."""
    return _WINDOWS[call.packet](call) if call.packet in _WINDOWS else ()


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
            specials[name] = Special(HALO, window=window, row_bytes=given.size_bytes // size, composes=True)
            continue
        factor = max(window.down, window.up)
        sizes[inner] = factor
        blocked[inner] = "a window's places stay together"
        inputs.append((name, inner) if window.down > 1 else (name,))
        outputs.append((name, inner) if window.up > 1 else (name,))
    return Space(tuple(inputs), tuple(outputs), sizes, specials, blocked)


def convolution(call: Call) -> Rule:
    """input [b, (g i), *space], weight [(g o), i, *kernel], bias [(g o)] -> [b, (g o), *space']."""
    groups, weight = call["groups"], call.shape("weight")
    kernel = weight[2:]
    return _convolution(call, {"o": weight[0] // groups, "i": weight[1]}, ("o", "i"), math.prod(call.out), kernel)


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


# -- the windows of each kind of op


def each(value: Any, count: int, default: int) -> tuple[int, ...]:
    """An argument that stands for all dims of space, or has one entry for each."""
    listed = tuple(value) if isinstance(value, tuple | list) else () if value is None else (value,)
    return (listed or (default,)) * count if len(listed) < 2 else listed


def paddings(call: Call) -> tuple[tuple[int, int], ...]:
    """(before, behind) of a convolution, by dim of space."""
    kernel = call.shape("weight")[2:]
    padding = call["padding"]
    if padding == "valid":
        return ((0, 0),) * len(kernel)
    dilation = each(call["dilation"], len(kernel), 1)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return tuple((n // 2, n - n // 2) for n in total)
    return tuple((p, p) for p in each(padding, len(kernel), 0))


def _of_convolution(call: Call) -> tuple[Window | None, ...]:
    kernel = call.shape("weight")[2:]
    n = len(kernel)
    extents = [d * (k - 1) + 1 for d, k in zip(each(call["dilation"], n, 1), kernel, strict=True)]
    sizes = zip(call.shape("input")[-n:], call.out[-n:], strict=True)
    return tuple(
        Window(size, out, stride, -before, extent - 1 - before)
        for (size, out), stride, (before, _), extent in zip(
            sizes, each(call["stride"], n, 1), paddings(call), extents, strict=True
        )
    )


def _of_transposed(call: Call) -> tuple[Window | None, ...]:
    kernel = call.shape("weight")[2:]
    n = len(kernel)
    found: list[Window | None] = []
    for i in range(n):
        extent = each(call["dilation"], n, 1)[i] * (kernel[i] - 1) + 1
        stride, padding = each(call["stride"], n, 1)[i], each(call["padding"], n, 0)[i]
        size, out = call.shape("input")[i - n], call.out[i - n]
        window = Window(size, out, 1, padding - extent + 1, padding, stride)
        # Between narrower kernels lie outputs that no input reaches.
        found.append(window if extent >= stride or window.apart else None)
    return tuple(found)


def _of_pool(spatial: int) -> Any:
    def windows(call: Call) -> tuple[Window | None, ...]:
        if len(call.outputs) > 1:
            return (None,) * spatial  # the second output numbers places of the whole
        first = next(iter(call.positions()))
        kernel = each(call["kernel_size"], spatial, 1)
        return tuple(
            Window(
                call.shape(first)[i - spatial],
                call.out[i - spatial],
                each(call.get("stride"), spatial, 0)[i] or kernel[i],
                -each(call["padding"], spatial, 0)[i],
                each(call.get("dilation", 1), spatial, 1)[i] * (kernel[i] - 1) - each(call["padding"], spatial, 0)[i],
            )
            for i in range(spatial)
        )

    return windows


def _of_adaptive(spatial: int) -> Any:
    def windows(call: Call) -> tuple[Window | None, ...]:
        first = next(iter(call.positions()))
        found: list[Window | None] = []
        for size, out in zip(call.shape(first)[-spatial:], call.out[-spatial:], strict=True):
            regular = out > 0 and size % out == 0 and len(call.outputs) == 1
            found.append(Window(size, out, size // out, 0, size // out - 1) if regular else None)
        return tuple(found)

    return windows


def scales_agree(call: Call, spatial: int) -> bool:
    """Whether the scales that an upsampling op was given, if any, are the ratios of its sizes."""
    names = ("scales",) if spatial == 1 else ("scales_d", "scales_h", "scales_w")[-spatial:]
    given = call.get("scale_factors") or [call.get(name) for name in names]
    ratios = zip(given, call.shape(_first(call))[-spatial:], call.out[-spatial:], strict=True)
    return all(scale is None or scale * size == out for scale, size, out in ratios)


def _of_upsampling(spatial: int, reach: int) -> Any:
    """reach: how many neighbours on either side an output looks at; 0: the nearest input alone."""

    def windows(call: Call) -> tuple[Window | None, ...]:
        if call.get("align_corners") or not scales_agree(call, spatial):
            return (None,) * spatial
        found: list[Window | None] = []
        for size, out in zip(call.shape(_first(call))[-spatial:], call.out[-spatial:], strict=True):
            window = None
            if out % size == 0:
                factor = out // size
                window = Window(size, out, 1, 1 - factor if not reach else -reach * factor, reach * factor, factor)
            elif size % out == 0 and not reach:
                window = Window(size, out, size // out, 0, 0)
            found.append(window)
        return tuple(found)

    return windows


def pad_amounts(call: Call) -> tuple[tuple[int, int], ...]:
    """(before, behind) of the last dims, in their order."""
    amounts = call["pad"]
    return tuple(reversed(list(zip(amounts[::2], amounts[1::2], strict=True))))


def _of_pad(call: Call) -> tuple[Window | None, ...]:
    constant = call.get("mode", "constant") == "constant"
    amounts = pad_amounts(call)
    sizes = zip(call.shape("self")[-len(amounts) :], call.out[-len(amounts) :], strict=True) if amounts else ()
    return tuple(
        Window(size, out, 1, -before, -before) if constant or before == after == 0 else None
        for (size, out), (before, after) in zip(sizes, amounts, strict=True)
    )


def _first(call: Call) -> str:
    return next(iter(call.positions()))


_UPSAMPLING = (
    ("nearest1d", 1, 0),
    ("linear1d", 1, 1),
    ("nearest2d", 2, 0),
    ("bilinear2d", 2, 1),
    ("bicubic2d", 2, 2),
    ("nearest3d", 3, 0),
    ("trilinear3d", 3, 1),
)
_AVERAGES = MappingProxyType({f"aten.avg_pool{n}d": n for n in (1, 2, 3)})
_MAXIMA = MappingProxyType({f"aten.max_pool{n}d{more}": n for n in (1, 2, 3) for more in ("", "_with_indices")})
ADAPTIVE_AVERAGES: Mapping[str, int] = MappingProxyType(
    {**{f"aten.adaptive_avg_pool{n}d": n for n in (1, 2, 3)}, "aten._adaptive_avg_pool2d": 2}
)
UPSAMPLING: Mapping[str, int] = MappingProxyType({f"aten.upsample_{name}": n for name, n, _ in _UPSAMPLING})

_WINDOWS: Mapping[str, Any] = MappingProxyType(
    {
        **{f"aten.conv{n}d": _of_convolution for n in (1, 2, 3)},
        **{f"aten.conv_transpose{n}d": _of_transposed for n in (1, 2, 3)},
        **{name: _of_pool(n) for name, n in {**_AVERAGES, **_MAXIMA}.items()},
        **{name: _of_adaptive(n) for name, n in ADAPTIVE_AVERAGES.items()},
        **{f"aten.upsample_{name}": _of_upsampling(n, reach) for name, n, reach in _UPSAMPLING},
        "aten.pad": _of_pad,
        "aten.constant_pad_nd": _of_pad,
    }
)

_INDICES = "indices number the places of the whole"

RULES: Mapping[str, RuleFunction] = MappingProxyType(
    {
        **{f"aten.conv{n}d": convolution for n in (1, 2, 3)},
        **{f"aten.conv_transpose{n}d": transposed_convolution for n in (1, 2, 3)},
        **{name: _pooling(n, True, "") for name, n in _AVERAGES.items()},
        **{name: _pooling(n, False, _INDICES) for name, n in _MAXIMA.items()},
        **{f"aten.adaptive_max_pool{n}d": _pooling(n, False, _INDICES) for n in (1, 2, 3)},
        **{name: adaptive_average(n) for name, n in ADAPTIVE_AVERAGES.items()},
        **{name: _pooling(n, True, "its places are no whole multiples") for name, n in UPSAMPLING.items()},
        "aten.pad": pad,
        "aten.constant_pad_nd": pad,
    }
)
