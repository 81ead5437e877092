"""Captured ops rewritten to local shapes, with the plan's conversions between them, as generated functions.

A value is known by its tensor and how that lies on the axes: the batch axis and then the model axes, splits of one dim in
absolute form (see sharding/axes.py). The batch axis is data times time, as sharding/rows.py counts it; a rank with
several units of it has each of them cut by the model axes alike. Conversions on it are local (a slice of something whole,
a summand's scale) because everything else was settled when the batch layout was made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ..graph import DEVICE, Graph, Op, Ref, map_refs
from ..ops import evaluation_form, mutated_inputs
from ..sharding.axes import Change, Places, absolute, changes
from ..sharding.batch import BatchLayout
from ..sharding.flow import Run, Step
from ..sharding.local import BATCH, localize
from ..sharding.placement import PARTIAL, REPLICATED, SHARED, Placement, Split, conversion
from ..sharding.rows import Rows
from .axis import Axis
from .collectives import COLLECTIVES, convert
from .deferred import Owed, put_off
from .emit import Call, compile_calls
from .overlap import overlapped
from .recompute import EXPENSIVE_OPS, Kept

# Ops whose output is fresh memory that neither they nor their backward read again, so that a pending sum in it may be
# reduced in place; and views, which pass that property on.
_FRESH = ("linear", "addmm", "mm", "bmm", "matmul", "baddbmm", "conv1d", "conv2d", "conv3d")
_VIEWS = ("reshape", "view", "unsqueeze", "squeeze", "transpose", "permute", "_unsafe_view")


@dataclass(eq=False)
class Chunk:
    """Where a generated function runs: which part of the batch, and the source of its random numbers.

    The part is `length` of the batch's `size` units from unit `rank` on (`Rows`). Serves as the batch axis of ops that
    need to know their offset (`rank`, `size`).
    draw(name, on_batch, on_model, function, args, kwargs) runs a random op under its own key.
    kept: in a block that is recomputed selectively, where its expensive results stay.
    data: the axis of the ranks that share a microbatch, for ops whose rows meet. found: by op, the buffers as its first
    run of the step found them, shared by all chunks of a step.
    owed: where the backward is split, what its weight half will have to compute.
    given: outputs of the module by name, where they are wanted.
    """

    rank: int
    size: int
    random: Callable[[str], contextlib.AbstractContextManager[Any]]
    length: int = 1
    data: Axis | None = None
    found: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    owed: Owed | None = None
    kept: Kept | None = None
    given: dict[str, torch.Tensor] = field(default_factory=dict)

    @torch.compiler.disable
    def give(self, name: str, tensor: torch.Tensor) -> None:
        self.given.setdefault(name, tensor.detach())

    @torch.compiler.disable
    def keep_op(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) if self.kept is None else self.kept.op(function, args, kwargs)

    @torch.compiler.disable
    def keep_conversion(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args) if self.kept is None else self.kept.conversion(function, args)

    @torch.compiler.disable
    def keep_begin(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args) if self.kept is None else self.kept.begin(function, args)

    @torch.compiler.disable
    def draw(self, key: str, split_by_batch: bool, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.random(f"{key}/{self.rank}" if split_by_batch else key):
            return function(*args, **kwargs)

    def all_reduce(self, tensor: torch.Tensor, op: Literal["sum", "max"] = "sum") -> torch.Tensor:
        """Over the data ranks of the microbatch."""
        assert self.data is not None, "this chunk stands alone"
        return self.data.all_reduce(tensor, op) if self.data.size > 1 else tensor

    @torch.compiler.disable
    def update(
        self, key: str, function: Callable[..., Any], written: Sequence[torch.Tensor], *args: Any, **kwargs: Any
    ) -> Any:
        """Run an op that writes buffers, once per step: run again (recomputed, in a later microbatch) it gets copies of
        what it found the first time, so that it gives the same and leaves the buffers alone."""
        if key not in self.found:
            self.found[key] = [buffer.detach().clone() for buffer in written]
            return function(*args, **kwargs)
        copies = {id(w): f.clone() for w, f in zip(written, self.found[key], strict=True)}
        again = [copies.get(id(value), value) for value in args]
        return function(*again, **{name: copies.get(id(value), value) for name, value in kwargs.items()})


_Value = tuple[str, Places]


@dataclass
class Rewriter:
    """Rewrites steps of one stage.

    rows: this rank's of the batch.
    degrees: of its model axes. axes: by the numbers of model axes, those axes as one ((0,): the first alone).
    training: whether random ops draw and norms use batch statistics.
    deferrable: parameters that no other block of the stage uses, where backwards are split (see runtime/deferred.py).
    wanted: outputs of the module that blocks give to their chunk, whole on the model axes.
    compiled: whether torch.compile gets the functions: products then stay whole, because what notes gradients for later
    would cut its graphs.
    """

    graph: Graph
    batch: BatchLayout
    rows: Rows
    degrees: tuple[int, ...]
    axes: Mapping[tuple[int, ...], Axis]
    device: torch.device
    training: bool = True
    deferrable: frozenset[str] = frozenset()
    wanted: frozenset[str] = frozenset()
    compiled: bool = False

    def sides(
        self, name: str, ops: Sequence[Op], batch: Sequence[str], whole: Sequence[str], outputs: Sequence[str]
    ) -> Callable[..., tuple[torch.Tensor, ...]]:
        """function(chunk, batch, whole) -> outputs, for side ops.

        batch: tensors passed as the batch layout places them; whole: values of the prologue, already whole.
        """
        emitter = _Emitter(self)
        arguments = (
            ("chunk", ["=chunk"]),
            ("s", [emitter.given(t, self.whole) for t in batch]),
            ("w", [emitter.given(t, self.whole, REPLICATED) for t in whole]),
        )
        for op in ops:
            emitter.run(Run(op, ()))
        results = [
            emitter.value(t, REPLICATED if t in whole else self.batch.placements[t], self.whole) for t in outputs
        ]
        return compile_calls(name, emitter.calls, arguments, results)

    def block(
        self,
        name: str,
        steps: Sequence[Step],
        parameters: Sequence[tuple[str, Places]],
        inputs: Sequence[tuple[str, Places]],
        sides: Sequence[str],
        outputs: Sequence[tuple[str, Places]],
        keeps: bool = False,
    ) -> Callable[..., tuple[torch.Tensor, ...]]:
        """function(chunk, parameters, activations, sides) -> outputs.

        parameters, inputs: tensor names with their placement on each model axis as passed; sides are whole; outputs:
        names with the placements wanted. keeps: whether expensive calls go through `Chunk.keep_op`,
        `Chunk.keep_conversion` and `Chunk.keep_begin`.
        """
        emitter = _Emitter(self)
        given = {t: emitter.given(t, places) for t, places in parameters}
        arguments = (
            ("chunk", ["=chunk"]),
            ("p", list(given.values())),
            ("x", [emitter.given(t, places) for t, places in inputs]),
            ("s", [emitter.given(t, self.whole, REPLICATED if t in self.batch.prologue else None) for t in sides]),
        )
        for step in steps:
            if isinstance(step, Run):
                emitter.run(step)
        results = [emitter.value(t, self.batch.placements[t], places) for t, places in outputs]
        for output in [t for step in steps if isinstance(step, Run) for t in step.op.outputs if t in self.wanted]:
            value = Ref(emitter.value(output, self.batch.placements[output], self.whole))
            emitter.calls.append(Call(Chunk.give, (Ref("chunk"), output, value), (), ()))
        deferrable = [value for t, value in given.items() if t in self.deferrable]
        calls = put_off(emitter.calls, deferrable) if deferrable else emitter.calls
        calls = overlapped(
            calls,
            frozenset(given.values()),
            reorders=not any(call.function is Chunk.update for call in calls),
            attaches=not (self.deferrable or self.compiled),
        )
        return compile_calls(name, calls, arguments, results, "chunk" if keeps else "")

    @property
    def whole(self) -> Places:
        """Replicated on all model axes."""
        return (REPLICATED,) * len(self.degrees)

    @property
    def all_degrees(self) -> tuple[int, ...]:
        return (self.rows.units, *self.degrees)


class _Emitter:
    def __init__(self, rewriter: Rewriter) -> None:
        self.rewriter = rewriter
        self.graph = rewriter.graph
        self.batch = rewriter.batch
        self.calls: list[Call] = []
        self.values: dict[_Value, str] = {}
        self.placed: dict[str, Places] = {}  # batch and model placements of each tensor as produced or passed

    def given(self, tensor: str, places: Places, on_batch: Placement | None = None) -> str:
        self.placed[tensor] = (on_batch or self.batch.placements[tensor], *places)
        return self._define((tensor, self._state(self.placed[tensor])))

    def _state(self, places: Places) -> Places:
        return absolute(places, self.rewriter.all_degrees)

    def _define(self, value: _Value) -> str:
        name = "|".join(map(str, (value[0], *value[1])))
        self.values[value] = name
        return name

    def run(self, step: Run) -> None:
        """Emit one op: its operands as it wants them, then the call on local sizes."""
        op = step.op if self.rewriter.training else evaluation_form(step.op)
        rewriter = self.rewriter
        on_batch = self.batch.strategies[op.name]
        # Side ops have no strategy, and run whole.
        inputs, outputs_placed = step.inputs, step.outputs
        if not step.strategies:
            inputs, outputs_placed = (rewriter.whole,) * len(op.inputs), (rewriter.whole,) * len(op.outputs)
        operands = [self.value(*wanted) for wanted in zip(op.inputs, on_batch.inputs, inputs, strict=True)]
        degrees = rewriter.degrees if step.strategies else ()
        local = localize(self.graph, op, on_batch, rewriter.rows.units, step.strategies, degrees, rewriter.rows.length)
        named = iter(operands)
        args, kwargs = map_refs((tuple(local.args), tuple(v for _, v in local.kwargs)), lambda _: Ref(next(named)))
        assert next(named, None) is None, f"localize dropped an operand of {op.name}"
        args, kwargs = _on_device(args, rewriter.device), _on_device(kwargs, rewriter.device)
        kwargs = tuple(zip((key for key, _ in local.kwargs), kwargs, strict=True))
        if op.no_grad:
            args = map_refs(args, self._detached)
        args = tuple(Ref("chunk") if axes == BATCH else rewriter.axes[axes] for axes in local.axes) + args
        function = local.function
        made = zip(op.outputs, outputs_placed, on_batch.outputs, strict=True)
        outputs = tuple(self.given(t, places, cut) for t, places, cut in made)
        if op.random and rewriter.training:
            key = op.name
            for i, strategy in enumerate(step.strategies):
                if any(isinstance(p, Split) for p in strategy.outputs):
                    key = f"{key}@{rewriter.axes[i,].rank}"
            splits_batch = any(isinstance(p, Split) for p in on_batch.outputs)
            args = (Ref("chunk"), key, splits_batch, function, *args)
            function = Chunk.draw
        written = [operand for name, operand in zip(op.inputs, operands, strict=True) if name in mutated_inputs(op)]
        if written:
            args = (Ref("chunk"), op.name, function, tuple(map(Ref, written)), *args)
            function = Chunk.update
        keep = "op" if op.target.split(".")[1] in EXPENSIVE_OPS else ""
        self.calls.append(Call(function, args, kwargs, outputs, op.returns_sequence, keep))

    def value(self, tensor: str, on_batch: Placement, on_model: Places) -> str:
        """The name of `tensor` placed so, converting it where no one has asked for it yet."""
        placed = self.placed[tensor]
        state = self._state(placed)
        shape = self.graph.tensors[tensor].shape
        path = changes(shape, placed, (on_batch, *on_model), self.rewriter.all_degrees)
        known = max((i + 1 for i, change in enumerate(path) if (tensor, change.after) in self.values), default=0)
        if known:
            state = path[known - 1].after
        for change in path[known:]:
            self._change(tensor, change, produced=change.before == self._state(placed))
            state = change.after
        return self.values[tensor, state]

    def _change(self, tensor: str, change: Change, produced: bool) -> None:
        """produced: whether what is converted is the tensor as its op made it."""
        source = self.values[tensor, change.before]
        if change.axes == (0,):
            self._change_batch(tensor, source, change)
            return
        axis = self.rewriter.axes[tuple(i - 1 for i in change.axes)]
        blocks = (
            change.have_blocks * self._units_outside(change.axes[0], change.before),
            change.want_blocks * self._units_outside(change.axes[0], change.after),
        )
        private = produced and self._is_private(tensor)
        name = self._define((tensor, change.after))
        arguments = (Ref(source), axis, change.have, change.want, *blocks, private)
        keep = "conversion" if conversion(change.have, change.want).forward in COLLECTIVES else ""
        self.calls.append(Call(convert, arguments, (), (name,), keep=keep))

    def _units_outside(self, axis: int, state: Places) -> int:
        """How many units of the batch the rank has, if a split of `axis` cuts inside of each; else 1."""
        batch, cut = state[0], state[axis]
        if not isinstance(cut, Split) or not isinstance(batch, Split):
            return 1
        return self.rewriter.rows.length if batch.dim == cut.dim and batch.blocks < cut.blocks else 1

    def _change_batch(self, tensor: str, source: str, change: Change) -> None:
        rows, have, want = self.rewriter.rows, change.have, change.want
        if rows.length == rows.units or (have in (REPLICATED, SHARED) and want in (REPLICATED, SHARED)):
            self.values[tensor, change.after] = source
            return
        name = self._define((tensor, change.after))
        if isinstance(want, Split) and not isinstance(have, Split):
            self.calls.append(
                Call(_slice_chunk, (Ref(source), Ref("chunk"), want.dim, change.want_blocks), (), (name,))
            )
        elif want == PARTIAL and not isinstance(have, Split):
            self.calls.append(Call(torch.mul, (Ref(source), rows.length / rows.units), (), (name,)))
        else:
            raise AssertionError(f"{tensor} lies as {have} on the batch axis and is wanted as {want}")

    def _detached(self, ref: Ref) -> Ref:
        name = f"{ref.name}|detached"
        if name not in self.values.values():
            self.calls.append(Call(torch.Tensor.detach, (ref,), (), (name,)))
            self.values[name, ()] = name
        return Ref(name)

    def _is_private(self, tensor: str) -> bool:
        """Whether the memory of `tensor` has no reader but the one conversion that asks for it."""
        while True:
            op = self.graph.producer.get(tensor)
            if (
                op is None
                or tensor in self.rewriter.wanted
                or len(self.graph.consumers[tensor]) > 1
                or tensor in op.saves
            ):
                return False
            kind = op.target.split(".")[1]
            if kind in _FRESH and op.target.startswith("aten."):
                return True
            if kind not in _VIEWS:
                return False
            tensor = op.inputs[0]


def _slice_chunk(tensor: torch.Tensor, chunk: Chunk, dim: int, blocks: int) -> torch.Tensor:
    """The chunk's part of `dim` seen as (blocks, units, rest); a view where blocks == 1."""
    rest = tensor.shape[dim] // (blocks * chunk.size)
    if blocks == 1:
        return tensor.narrow(dim, chunk.rank * rest, chunk.length * rest)
    viewed = tensor.unflatten(dim, (blocks, chunk.size, rest)).narrow(dim + 1, chunk.rank, chunk.length)
    return viewed.flatten(dim, dim + 2)


def _on_device(value: Any, device: torch.device) -> Any:
    if value is DEVICE:
        return device
    return tuple(_on_device(item, device) for item in value) if isinstance(value, tuple | list) else value
