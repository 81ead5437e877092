"""How an op runs on one rank's part of its tensors: local shapes, and the call with local sizes in its arguments.

An op usually is its own local form. Three things change: sizes written into the arguments (of views, of tensors that
are made, of groups of channels), means (scaled so that the parts add up), and the special algorithms of
sharding/algorithms.py, which need to know where the rank stands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ..graph import Graph, Op, Shape
from ..ops import resolve
from . import algorithms
from .analysis import analysis
from .call import Call, schema
from .group_norm import GroupNorm, InstanceNorm
from .local_window import Cut, by_taps, groups, own_size, stencil, transposed_groups, windowed
from .op_windows import ADAPTIVE_AVERAGES, UPSAMPLING, windows_of
from .placement import Placement, Split
from .ring import ring_attention
from .routed import exchanged_groups, own_groups
from .routed_body import local_body
from .rows import Parts, parts_of
from .rules_loss import MEAN
from .rules_pointwise import CREATIONS
from .rules_views import CUTS
from .strategy import Strategy

Placed = Sequence[tuple[Placement, Parts]]
Axes = tuple[int, ...]
BATCH: Axes = ()


@dataclass(frozen=True, slots=True)
class LocalCall:
    """`function(*axes, *args, **kwargs)` runs an op on local tensors.

    args, kwargs: as in `Op`, the `Ref`s in the same order. axes: which axis contexts the function takes first: BATCH,
    of which it reads `rank` and `size` only, or model axes by their numbers, of which several count as one.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    axes: tuple[Axes, ...] = ()


def local_shape(shape: Shape, placements: Placed) -> Shape:
    """The shape of one rank's part of a tensor that lies by `placements`, (placement, degree) by axis.

    A degree is a Fraction where the rank has more than one of the parts. ValueError where a degree does not divide.
    """
    local = list(shape)
    for placement, degree in placements:
        if isinstance(placement, Split) and degree > 1:
            if local[placement.dim] % degree:
                raise ValueError(f"dim {placement.dim} of {shape} does not split as {placement} into {degree} parts")
            local[placement.dim] = int(local[placement.dim] // degree)
    return tuple(local)


def local_blocks(shape: Shape, placements: Placed, index: int) -> int:
    """In how many blocks the split of axis `index` lies in what the other axes leave of the tensor.

    A split with more blocks lies inside one with fewer, which therefore cuts its blocks. Blocks of equal splits on a
    later axis are relative (see sharding/axes.py).
    """
    split, _ = placements[index]
    assert isinstance(split, Split)
    cut = math.prod(
        degree
        for placement, degree in placements
        if isinstance(placement, Split) and placement.dim == split.dim and placement.blocks < split.blocks
    )
    if split.blocks % cut:
        raise ValueError(f"{split} of {shape} does not lie inside the splits of the other axes, {cut} parts together")
    return split.blocks // cut


def localize(
    graph: Graph,
    op: Op,
    batch: Strategy,
    shards: int,
    model: Sequence[Strategy] = (),
    degrees: Sequence[int] = (),
    length: int = 1,
) -> LocalCall:
    """The call that runs `op` on `length` consecutive chunks of the batch, of `shards`, and one rank's part of the model.

    model, degrees: per model axis, which cuts each chunk. The operands must lie as the strategies say on all axes. Raises
    ValueError where the degrees do not divide.
    """
    sides: list[tuple[Strategy, Parts]] = [(batch, parts_of(shards, length)), *zip(model, degrees, strict=True)]
    placed = [
        [(side.inputs[i] if i < len(op.inputs) else side.outputs[i - len(op.inputs)], n) for side, n in sides]
        for i in range(len(op.inputs) + len(op.outputs))
    ]
    call = Call.of(graph, op)
    shapes = [local_shape(t.shape, p) for t, p in zip(call.inputs + call.outputs, placed, strict=True)]
    local = Local(call, tuple(shapes[: len(op.inputs)]), tuple(shapes[len(op.inputs) :]))
    special = {side.special: None for side, n in sides if side.special and n > 1}
    if special:
        (name,) = special
        on_batch = {batch.key: BATCH} if batch.special == name and sides[0][1] > 1 else {}
        # Model axes that cut one dim, one inside the other, count as one axis.
        on_model: dict[str, Axes] = {}
        for i, (side, n) in enumerate(sides[1:]):
            if side.special == name and n > 1:
                on_model[side.key] = (*on_model.get(side.key, ()), i)
        counts = [shards] * len(on_batch) + [math.prod(degrees[i] for i in axes) for axes in on_model.values()]
        cuts = _Cuts((*on_batch, *on_model), tuple(counts), length if on_batch else 1)
        return _SPECIALS[name](local, (*on_batch.values(), *on_model.values()), cuts)
    changed = _ADAPT[call.packet](local) if call.packet in _ADAPT and local.is_smaller else {}
    function: Callable[..., Any] = resolve(op.target, graph.opaque_modules)
    args, kwargs = _arguments(op, changed)
    if call.packet in ("aten.squeeze",) and local.is_smaller:
        return _squeeze(local)
    share = _mean_share(local)
    return LocalCall(algorithms.Scaled(function, share) if share != 1 else function, args, kwargs)


@dataclass(frozen=True)
class Local:
    """A call and the local shapes of its tensors."""

    call: Call
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]

    @property
    def is_smaller(self) -> bool:
        tensors = self.call.inputs + self.call.outputs
        return any(t.shape != shape for t, shape in zip(tensors, self.inputs + self.outputs, strict=True))

    def shape(self, name: str) -> Shape:
        """Local shape of a tensor argument."""
        return self.inputs[self.call.positions()[name][0]]


def _arguments(op: Op, changed: Mapping[str, Any]) -> tuple[tuple[Any, ...], tuple[tuple[str, Any], ...]]:
    """The op's arguments with some replaced by name; one that was left to its default is passed by keyword."""
    if not changed:
        return op.args, op.kwargs
    names = [p.name for p in schema(op.target)]
    args = tuple(changed.get(name, value) for name, value in zip(names, op.args, strict=False))
    kwargs = {**dict(op.kwargs), **{name: v for name, v in changed.items() if name not in names[: len(args)]}}
    return args, tuple(kwargs.items())


def _sized(name: str) -> Callable[[Local], Mapping[str, Any]]:
    """The argument `name` is the shape of the output."""
    return lambda local: {name: local.outputs[0]}


def _split(local: Local) -> Mapping[str, Any]:
    call = local.call
    dim = call.dim("dim", len(call.shape("self")))
    sizes = tuple(shape[dim] for shape in local.outputs)
    ends = tuple(sum(sizes[: i + 1]) for i in range(len(sizes) - 1))
    for name, value in (("split_size", sizes[0]), ("split_sizes", sizes), ("chunks", len(sizes)), ("indices", ends)):
        if name in call.arguments:
            listed = isinstance(call[name], tuple | list)
            return {name: sizes if listed and name == "split_size" else value}
    return {}


def _unflatten(local: Local) -> Mapping[str, Any]:
    rank = len(local.call.shape("self"))
    dim = local.call.dim("dim", rank)
    return {"sizes": local.outputs[0][dim : dim + len(local.outputs[0]) - rank + 1]}


def _repeats(local: Local) -> Mapping[str, Any]:
    name = "repeats" if "repeats" in local.call.arguments else "dims"
    shape, out = local.shape("self"), local.outputs[0]
    padded = (1,) * (len(out) - len(shape)) + tuple(shape)
    return {name: tuple(o // s if s else 1 for o, s in zip(out, padded, strict=True))}


def _interleave(local: Local) -> Mapping[str, Any]:
    return {"output_size": None} if local.call.get("output_size") is not None else {}


def _narrow(local: Local) -> Mapping[str, Any]:
    return {"length": local.outputs[0][local.call.dim("dim", len(local.outputs[0]))]}


def _num_groups(local: Local) -> Mapping[str, Any]:
    call = local.call
    return {"num_groups": call["num_groups"] * local.shape("input")[1] // call.shape("input")[1]}


def _body(local: Local) -> Mapping[str, Any]:
    places = local.call.positions()
    shapes = (tuple(local.inputs[i] for i in places.get(name, ())) for name in ("weights", "shared_weights"))
    return {"body": local_body(local.call, *shapes)}


_ADAPT: Mapping[str, Callable[[Local], Mapping[str, Any]]] = MappingProxyType(
    {
        **{f"aten.{n}": _sized("size") for n in ("view", "_unsafe_view", "expand", "broadcast_to", *CREATIONS)},
        "aten.reshape": _sized("shape"),
        **{f"aten.{n}": _split for n in CUTS},
        "aten.unflatten": _unflatten,
        "aten.repeat": _repeats,
        "aten.tile": _repeats,
        "aten.repeat_interleave": _interleave,
        "aten.narrow": _narrow,
        **{f"aten.conv{n}d": lambda local: groups(local.inputs) for n in (1, 2, 3)},
        **{f"aten.conv_transpose{n}d": lambda local: transposed_groups(local.inputs, local.outputs) for n in (1, 2, 3)},
        **dict.fromkeys((*ADAPTIVE_AVERAGES, *UPSAMPLING), lambda local: own_size(local.call, local.outputs[0])),
        "aten.group_norm": _num_groups,
        "autopar.routed_rows": _body,
    }
)


def _squeeze(local: Local) -> LocalCall:
    """A dim that became 1 on this rank must stay, so the dims that go are listed."""
    call = local.call
    rule = analysis(call.graph).rule(call.op)
    kept = {dim for dim in rule.outputs[0]}
    gone = tuple(i for i, dim in enumerate(rule.inputs[0]) if dim not in kept or not dim)
    return LocalCall(resolve("aten.squeeze.dims"), (call.op.args[0], gone), ())


def _mean_share(local: Local) -> float:
    """What the mean over this rank's elements contributes to the mean over all: the share of its elements."""
    call = local.call
    if call.packet in ADAPTIVE_AVERAGES:
        sizes = list(zip(call.out, call.inputs[0].shape, local.inputs[0], strict=True))[
            -ADAPTIVE_AVERAGES[call.packet] :
        ]
        return math.prod(part / whole for out, whole, part in sizes if out == 1)
    if call.packet == "aten.mean":
        whole, part = math.prod(call.shape("self")), math.prod(local.shape("self"))
        kept = math.prod(call.out), math.prod(local.outputs[0])
        return (part * kept[0]) / (whole * kept[1]) if whole and kept[1] else 1.0
    if call.get("reduction") == MEAN and not call.out:
        rule = analysis(call.graph).rule(call.op)
        sizes: dict[str, int] = {}
        for dims, shape in zip(rule.inputs, local.inputs, strict=True):
            for dim, size in zip(dims, shape, strict=True):
                for name in dim:
                    sizes[name] = min(size, sizes.get(name, size))
        return math.prod(sizes.values()) / math.prod(rule.sizes[name] for name in sizes)
    return 1.0


@dataclass(frozen=True, slots=True)
class _Cuts:
    """keys: of the strategies of the axes that an algorithm asks about, outermost first. counts: their ranks.
    length: how many parts of the first axis are this rank's, each of which the second axis cuts."""

    keys: tuple[str, ...]
    counts: tuple[int, ...]
    length: int

    def strides(self, size: int) -> tuple[int, ...]:
        """Elements of a dim of `size` between the parts of neighbouring ranks, by axis."""
        return tuple(size // math.prod(self.counts[: i + 1]) for i in range(len(self.counts)))


def _arange(local: Local, axes: tuple[Axes, ...], cuts: _Cuts) -> LocalCall:
    call = local.call
    start, step = call.get("start", 0) or 0, call.get("step", 1) or 1
    kwargs = {key: value for key, value in call.op.kwargs if key in ("device", "layout", "pin_memory")}
    kwargs["dtype"] = call.outputs[0].dtype
    function = algorithms.ArangeRows(cuts.strides(local.call.out[0]), cuts.length)
    return LocalCall(function, (start, step, local.outputs[0][0]), tuple(kwargs.items()), axes)


def _index_rows(local: Local, axes: tuple[Axes, ...], cuts: _Cuts) -> LocalCall:
    call = local.call
    rule = analysis(call.graph).rule(call.op)
    (name,) = {n for n in rule.specials if local.shape("self") != call.shape("self") and _is_cut(local, n)}
    row = next(i for i, dim in enumerate(rule.inputs[0]) if dim == (name,))
    function = algorithms.IndexRows(row, cuts.strides(call.shape("self")[row]), cuts.length)
    return LocalCall(function, call.op.args, call.op.kwargs, axes)


def _halo(local: Local, axes: tuple[Axes, ...], cuts: _Cuts) -> LocalCall:
    if not windows_of(local.call):
        rule = analysis(local.call.graph).rule(local.call.op)
        places = tuple(rule.inputs[0].index((key,)) for key in cuts.keys)
        windows = tuple(window for key in cuts.keys if (window := rule.specials[key].window) is not None)
        return LocalCall(stencil(local.call, places, windows), local.call.op.args, local.call.op.kwargs, axes)
    dims = tuple(int(key.removeprefix("s")) for key in cuts.keys)
    function, changed = windowed(Cut(local.call, local.inputs, local.outputs, dims, cuts.counts))
    return LocalCall(function, *_arguments(local.call.op, changed), axes)


def _taps(local: Local, axes: tuple[Axes, ...], cuts: _Cuts) -> LocalCall:
    dims = tuple(int(key.removeprefix("k")) for key in cuts.keys)
    function, changed = by_taps(Cut(local.call, local.inputs, local.outputs, dims, cuts.counts))
    return LocalCall(function, *_arguments(local.call.op, changed), axes)


def _batch_norm(local: Local, axes: tuple[Axes, ...], cuts: _Cuts) -> LocalCall:
    function = algorithms.BatchNorm(tuple(key != "c" for key in cuts.keys))
    return LocalCall(function, local.call.op.args, local.call.op.kwargs, axes)


def _group_norm(local: Local, axes: tuple[Axes, ...], _: _Cuts) -> LocalCall:
    return LocalCall(GroupNorm(len(axes)), *_arguments(local.call.op, _num_groups(local)), axes)


def _instance_norm(local: Local, axes: tuple[Axes, ...], _: _Cuts) -> LocalCall:
    return LocalCall(InstanceNorm(len(axes)), local.call.op.args, local.call.op.kwargs, axes)


def _is_cut(local: Local, name: str) -> bool:
    rule = analysis(local.call.graph).rule(local.call.op)
    return any(
        dim == (name,) and size != rule.sizes[name] for dim, size in zip(rule.inputs[0], local.inputs[0], strict=True)
    )


def _as_is(function: Callable[..., Any]) -> Callable[[Local, tuple[Axes, ...], _Cuts], LocalCall]:
    """An algorithm that takes the arguments of the op itself."""
    return lambda local, axes, _: LocalCall(function, local.call.op.args, local.call.op.kwargs, axes)


def _routed(function: Callable[..., Any]) -> Callable[[Local, tuple[Axes, ...], _Cuts], LocalCall]:
    """An algorithm that takes the arguments of the op itself, with the body for local weights."""
    return lambda local, axes, _: LocalCall(function, *_arguments(local.call.op, _body(local)), axes)


_SPECIALS: Mapping[str, Callable[[Local, tuple[Axes, ...], _Cuts], LocalCall]] = MappingProxyType(
    {
        "arange": _arange,
        "batch_norm": _batch_norm,
        "group_norm": _group_norm,
        "halo": _halo,
        "instance_norm": _instance_norm,
        "index_rows": _index_rows,
        "inverse_order": _as_is(algorithms.inverse_order),
        "ring_attention": _as_is(ring_attention),
        "own_groups": _routed(own_groups),
        "exchanged_groups": _routed(exchanged_groups),
        "taps": _taps,
        "sdpa_rows": _as_is(algorithms.causal_rows),
        "vocab_embedding": _as_is(algorithms.vocab_embedding),
        "vocab_cross_entropy": _as_is(algorithms.vocab_cross_entropy),
    }
)
