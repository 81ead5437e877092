"""The windows of ops that slide them over space, read off the ops' arguments (see sharding/window.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from .call import Call
from .window import Window

Windows = tuple[Window | None, ...]


def windows_of(call: Call) -> Windows:
    """The window of each dim of the op's space, the last dims of its tensors; None where it is none that may be split."""
    return _WINDOWS[call.packet](call) if call.packet in _WINDOWS else ()


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


def _of_convolution(call: Call) -> Windows:
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


def _of_transposed(call: Call) -> Windows:
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


def _of_pool(spatial: int) -> Callable[[Call], Windows]:
    def windows(call: Call) -> Windows:
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


def _of_adaptive(spatial: int) -> Callable[[Call], Windows]:
    def windows(call: Call) -> Windows:
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


def _of_upsampling(spatial: int, reach: int) -> Callable[[Call], Windows]:
    """reach: how many neighbours on either side an output looks at; 0: the nearest input alone."""

    def windows(call: Call) -> Windows:
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


def _of_pad(call: Call) -> Windows:
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
AVERAGES: Mapping[str, int] = MappingProxyType({f"aten.avg_pool{n}d": n for n in (1, 2, 3)})
MAXIMA: Mapping[str, int] = MappingProxyType(
    {f"aten.max_pool{n}d{more}": n for n in (1, 2, 3) for more in ("", "_with_indices")}
)
ADAPTIVE_AVERAGES: Mapping[str, int] = MappingProxyType(
    {**{f"aten.adaptive_avg_pool{n}d": n for n in (1, 2, 3)}, "aten._adaptive_avg_pool2d": 2}
)
UPSAMPLING: Mapping[str, int] = MappingProxyType({f"aten.upsample_{name}": n for name, n, _ in _UPSAMPLING})

_WINDOWS: Mapping[str, Callable[[Call], Windows]] = MappingProxyType(
    {
        **{f"aten.conv{n}d": _of_convolution for n in (1, 2, 3)},
        **{f"aten.conv_transpose{n}d": _of_transposed for n in (1, 2, 3)},
        **{name: _of_pool(n) for name, n in {**AVERAGES, **MAXIMA}.items()},
        **{name: _of_adaptive(n) for name, n in ADAPTIVE_AVERAGES.items()},
        **{f"aten.upsample_{name}": _of_upsampling(n, reach) for name, n, reach in _UPSAMPLING},
        "aten.pad": _of_pad,
        "aten.constant_pad_nd": _of_pad,
    }
)
