"""How ops over windows run on one rank's part of space: their arguments for local sizes, and for borders of neighbours."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ..graph import Shape
from ..ops import resolve
from .call import Call
from .halo import Crop, Fill, Finish, Inside, Recount, Taps, Windowed
from .op_windows import ADAPTIVE_AVERAGES, UPSAMPLING, each, pad_amounts, paddings, windows_of
from .window import Window

Arguments = dict[str, Any]


def groups(inputs: Sequence[Shape]) -> Arguments:
    """Of a convolution whose channels are cut."""
    channels, weight = inputs[0][-len(inputs[1]) + 1], inputs[1]
    return {"groups": channels // weight[1]}


def transposed_groups(inputs: Sequence[Shape], outputs: Sequence[Shape]) -> Arguments:
    weight = inputs[1]
    return {"groups": outputs[0][-len(weight) + 1] // weight[1]}


def own_size(call: Call, out: Shape) -> Arguments:
    """Of an op that is told how large its output is, if it is."""
    spatial = ADAPTIVE_AVERAGES.get(call.packet) or UPSAMPLING[call.packet]
    return {} if call.get("output_size") is None else {"output_size": list(out[-spatial:])}


@dataclass(frozen=True)
class Cut:
    """A call over windows whose space is cut so that ranks fetch borders.

    inputs, outputs: local shapes. dims: of the space, per axis, counted from its first. counts: into how many parts.
    """

    call: Call
    inputs: Sequence[Shape]
    outputs: Sequence[Shape]
    dims: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def windows(self) -> tuple[Window, ...]:
        found = windows_of(self.call)
        return tuple(window for i in self.dims if (window := found[i]) is not None)

    def run(
        self,
        function: Callable[..., Any] | None = None,
        fill: Fill = 0.0,
        padding: tuple[int, ...] = (),
        finish: tuple[Finish | None, ...] = (),
    ) -> Windowed:
        """function: the op's own where there is none."""
        first = len(self.inputs[0]) - len(windows_of(self.call))
        at = tuple(first + i for i in self.dims)
        return Windowed(function or resolve(self.call.op.target), at, self.windows, fill, padding, finish)

    def uncut(self, values: Sequence[int]) -> list[int]:
        """Padding by dim, without that of dims whose borders are fetched."""
        return [0 if i in self.dims else value for i, value in enumerate(values)]


def windowed(cut: Cut) -> tuple[Windowed, Arguments]:
    """What runs an op over windows, and what changes in its arguments."""
    return _FORMS[cut.call.packet](cut)


def stencil(call: Call, dims: tuple[int, ...], windows: tuple[Window, ...]) -> Windowed:
    """What runs an op of a user's that looks at its neighbours along these dims, and ends as it does where the whole ends."""
    return Windowed(resolve(call.op.target), dims, windows, "end", (), (Inside(),) * len(dims))


def _convolution(cut: Cut) -> tuple[Windowed, Arguments]:
    amounts = [(0, 0) if i in cut.dims else pair for i, pair in enumerate(paddings(cut.call))]
    even = all(before == behind for before, behind in amounts)
    padding = () if even else tuple(n for pair in reversed(amounts) for n in pair)
    changed = groups(cut.inputs) | {"padding": [before if even else 0 for before, _ in amounts]}
    return cut.run(resolve(f"{cut.call.packet}.default"), padding=padding), changed


def by_taps(cut: Cut) -> tuple[Taps, Arguments]:
    """A convolution of which one axis cuts a dim of the kernel."""
    run, changed = _convolution(cut)
    (i,) = cut.dims
    kernel = cut.call.shape("weight")[2:]
    dilation = each(cut.call["dilation"], len(kernel), 1)[i]
    return Taps(run.function, run.dims[0], run.windows[0], kernel[i], dilation, run.padding), changed


def _transposed(cut: Cut) -> tuple[Windowed, Arguments]:
    count = len(cut.inputs[1]) - 2
    changed = transposed_groups(cut.inputs, cut.outputs)
    for name in ("padding", "output_padding"):
        changed[name] = cut.uncut(each(cut.call[name], count, 0))
    return cut.run(finish=tuple(Crop(-window.last) for window in cut.windows)), changed


def _maximum(cut: Cut) -> tuple[Windowed, Arguments]:
    padding = each(cut.call["padding"], len(windows_of(cut.call)), 0)
    return cut.run(fill=-math.inf), {"padding": cut.uncut(padding)}


def _average(cut: Cut) -> tuple[Windowed, Arguments]:
    call, spatial = cut.call, len(windows_of(cut.call))
    padding, kernel = each(call["padding"], spatial, 0), each(call["kernel_size"], spatial, 1)
    finish: list[Finish | None] = []
    for i, window in zip(cut.dims, cut.windows, strict=True):
        recount = Recount(kernel[i], padding[i] if call["count_include_pad"] else 0)
        whole = all(count == kernel[i] for count in recount.counts(window, 0, window.out))
        finish.append(None if whole or call.get("divisor_override") is not None else recount)
    return cut.run(finish=tuple(finish)), {"padding": cut.uncut(padding)}


def _upsampling(cut: Cut) -> tuple[Windowed, Arguments]:
    changed = own_size(cut.call, cut.outputs[0])
    for i, window, count in zip(cut.dims, cut.windows, cut.counts, strict=True):
        parts = window.parts(count)
        if changed and parts:
            changed["output_size"][i] = parts[0].length * window.up
    return cut.run(fill="edge", finish=(Crop(0),) * len(cut.dims)), changed


def _padding(cut: Cut) -> tuple[Windowed, Arguments]:
    amounts = [(0, 0) if i in cut.dims else pair for i, pair in enumerate(pad_amounts(cut.call))]
    fill = float(cut.call["value"] or 0.0)
    return cut.run(fill=fill), {"pad": [n for pair in reversed(amounts) for n in pair]}


_FORMS: Mapping[str, Callable[[Cut], tuple[Windowed, Arguments]]] = MappingProxyType(
    {
        **{f"aten.conv{n}d": _convolution for n in (1, 2, 3)},
        **{f"aten.conv_transpose{n}d": _transposed for n in (1, 2, 3)},
        **{f"aten.max_pool{n}d": _maximum for n in (1, 2, 3)},
        **{f"aten.avg_pool{n}d": _average for n in (1, 2, 3)},
        **dict.fromkeys(UPSAMPLING, _upsampling),
        "aten.pad": _padding,
        "aten.constant_pad_nd": _padding,
    }
)
