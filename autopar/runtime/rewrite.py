"""Captured ops rewritten to local shapes, with the plan's conversions between them, as generated functions.

A value is known by (tensor, placement on the batch axis, placement on the model axis). The batch axis is data times time:
chunk c of `shards` is data rank c % data of microbatch c // data. Conversions on it are local (a slice of
something whole, a summand's scale) because everything else was settled when the batch layout was made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..graph import DEVICE, Graph, Op, Ref, map_refs
from ..ops import evaluation_form
from ..sharding.batch import BatchLayout
from ..sharding.flow import Run, Step
from ..sharding.local import local_blocks, localize
from ..sharding.placement import PARTIAL, REPLICATED, SHARED, Placement, Split, conversion
from .axis import Axis
from .collectives import COLLECTIVES, convert
from .emit import Call, compile_calls
from .recompute import EXPENSIVE_OPS, Kept

# Ops whose output is fresh memory that neither they nor their backward read again, so that a pending sum in it may be
# reduced in place; and views, which pass that property on.
_FRESH = ("linear", "addmm", "mm", "bmm", "matmul", "baddbmm", "conv1d", "conv2d", "conv3d")
_VIEWS = ("reshape", "view", "unsqueeze", "squeeze", "transpose", "permute", "_unsafe_view")


@dataclass(eq=False)
class Chunk:
    """Where a generated function runs: which part of the batch, and the source of its random numbers.

    Serves as the batch axis of ops that need to know their offset (`rank`, `size`).
    draw(name, on_batch, on_model, function, args, kwargs) runs a random op under its own key.
    kept: in a block that is recomputed selectively, where its expensive results stay.
    """

    rank: int
    size: int
    random: Callable[[str], contextlib.AbstractContextManager[Any]]
    kept: Kept | None = None

    def keep_op(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) if self.kept is None else self.kept.op(function, args, kwargs)

    def keep_conversion(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args) if self.kept is None else self.kept.conversion(function, args)

    def draw(self, key: str, split_by_batch: bool, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.random(f"{key}/{self.rank}" if split_by_batch else key):
            return function(*args, **kwargs)


_Value = tuple[str, Placement, Placement]


@dataclass
class Rewriter:
    """Rewrites steps of one stage. `model_axis` is None where the stage has no model axis.

    training: whether random ops draw and norms use batch statistics.
    """

    graph: Graph
    batch: BatchLayout
    shards: int
    model_axis: Axis | None
    device: torch.device
    training: bool = True

    def sides(
        self, name: str, ops: Sequence[Op], batch: Sequence[str], whole: Sequence[str], outputs: Sequence[str]
    ) -> Callable[..., tuple[torch.Tensor, ...]]:
        """function(chunk, batch, whole) -> outputs, for side ops.

        batch: tensors passed as the batch layout places them; whole: values of the prologue, already whole.
        """
        emitter = _Emitter(self)
        arguments = (
            ("chunk", ["=chunk"]),
            ("s", [emitter.given(t, REPLICATED) for t in batch]),
            ("w", [emitter.given(t, REPLICATED, REPLICATED) for t in whole]),
        )
        for op in ops:
            emitter.run(Run(op, None))
        results = [
            emitter.value(t, REPLICATED if t in whole else self.batch.placements[t], REPLICATED) for t in outputs
        ]
        return compile_calls(name, emitter.calls, arguments, results)

    def block(
        self,
        name: str,
        steps: Sequence[Step],
        parameters: Sequence[tuple[str, Placement]],
        inputs: Sequence[tuple[str, Placement]],
        sides: Sequence[str],
        outputs: Sequence[tuple[str, Placement]],
        keeps: bool = False,
    ) -> Callable[..., tuple[torch.Tensor, ...]]:
        """function(chunk, parameters, activations, sides) -> outputs.

        keeps: whether expensive calls go through `Chunk.keep_op` and `Chunk.keep_conversion`.

        parameters, inputs: tensor names with their model-axis placement as passed; sides are whole; outputs: names with
        the model-axis placement wanted.
        """
        emitter = _Emitter(self)
        arguments = (
            ("chunk", ["=chunk"]),
            ("p", [emitter.given(t, place) for t, place in parameters]),
            ("x", [emitter.given(t, place) for t, place in inputs]),
            ("s", [emitter.given(t, REPLICATED, REPLICATED if t in self.batch.prologue else None) for t in sides]),
        )
        for step in steps:
            if isinstance(step, Run):
                emitter.run(step)
        results = [emitter.value(t, self.batch.placements[t], place) for t, place in outputs]
        return compile_calls(name, emitter.calls, arguments, results, "chunk" if keeps else "")

    @property
    def degree(self) -> int:
        return self.model_axis.size if self.model_axis else 1


class _Emitter:
    def __init__(self, rewriter: Rewriter) -> None:
        self.rewriter = rewriter
        self.graph = rewriter.graph
        self.batch = rewriter.batch
        self.calls: list[Call] = []
        self.values: dict[_Value, str] = {}
        self.placed: dict[str, Placement] = {}  # model-axis placement of each tensor as produced or passed

    def given(self, tensor: str, place: Placement, on_batch: Placement | None = None) -> str:
        self.placed[tensor] = place
        return self._define((tensor, on_batch or self.batch.placements[tensor], place))

    def _define(self, value: _Value) -> str:
        name = f"{value[0]}|{value[1]}|{value[2]}"
        self.values[value] = name
        return name

    def run(self, step: Run) -> None:
        """Emit one op: its operands as it wants them, then the call on local sizes."""
        op = step.op if self.rewriter.training else evaluation_form(step.op)
        strategy = step.strategy
        on_batch = self.batch.strategies[op.name]
        operands: list[str] = []
        for i, tensor in enumerate(op.inputs):
            want = strategy.inputs[i] if strategy else REPLICATED
            operands.append(self.value(tensor, on_batch.inputs[i], want))
        rewriter = self.rewriter
        local = localize(self.graph, op, on_batch, rewriter.shards, strategy, rewriter.degree)
        named = iter(operands)
        args, kwargs = map_refs((tuple(local.args), tuple(v for _, v in local.kwargs)), lambda _: Ref(next(named)))
        assert next(named, None) is None, f"localize dropped an operand of {op.name}"
        args, kwargs = _on_device(args, rewriter.device), _on_device(kwargs, rewriter.device)
        kwargs = tuple(zip((key for key, _ in local.kwargs), kwargs, strict=True))
        if op.no_grad:
            args = map_refs(args, self._detached)
        args = tuple(Ref("chunk") if axis == "batch" else rewriter.model_axis for axis in local.axes) + args
        function = local.function
        outputs = tuple(
            self._define((t, on_batch.outputs[i], strategy.outputs[i] if strategy else REPLICATED))
            for i, t in enumerate(op.outputs)
        )
        for i, t in enumerate(op.outputs):
            self.placed[t] = strategy.outputs[i] if strategy else REPLICATED
        if op.random and rewriter.training:
            key = op.name
            if strategy and any(isinstance(p, Split) for p in strategy.outputs):
                key = f"{key}@{rewriter.model_axis.rank}"  # type: ignore[union-attr]
            splits_batch = any(isinstance(p, Split) for p in on_batch.outputs)
            args = (Ref("chunk"), key, splits_batch, function, *args)
            function = Chunk.draw
        keep = "op" if op.target.split(".")[1] in EXPENSIVE_OPS else ""
        self.calls.append(Call(function, args, kwargs, outputs, op.returns_sequence, keep))

    def value(self, tensor: str, on_batch: Placement, on_model: Placement) -> str:
        """The name of `tensor` placed so, converting it where no one has asked for it yet."""
        wanted = (tensor, on_batch, on_model)
        if wanted in self.values:
            return self.values[wanted]
        placed = self.placed[tensor]
        if on_model == placed:
            return self._convert_batch(tensor, on_batch, placed)
        source = self.value(tensor, on_batch, placed)
        splits = [(on_batch, self.rewriter.shards)]
        shape = self.graph.tensors[tensor].shape

        def blocks(place: Placement) -> int:
            if not isinstance(place, Split):
                return 1
            return local_blocks(shape, [*splits, (place, self.rewriter.degree)], 1)

        name = self._define(wanted)
        axis = self.rewriter.model_axis
        assert axis is not None
        arguments = (axis, placed, on_model, blocks(placed), blocks(on_model), self._is_private(tensor))
        keep = "conversion" if conversion(placed, on_model).forward in COLLECTIVES else ""
        self.calls.append(Call(convert, (Ref(source), *arguments), (), (name,), keep=keep))
        return name

    def _convert_batch(self, tensor: str, want: Placement, placed: Placement) -> str:
        have = self.batch.placements[tensor]
        source = self.values[(tensor, have, placed)]
        shards = self.rewriter.shards
        name = self._define((tensor, want, placed))
        if shards == 1 or (have in (REPLICATED, SHARED) and want in (REPLICATED, SHARED)):
            self.values[(tensor, want, placed)] = source
            return source
        if isinstance(want, Split) and not isinstance(have, Split):
            local = local_blocks(self.graph.tensors[tensor].shape, [(placed, self.rewriter.degree), (want, shards)], 1)
            self.calls.append(Call(_slice_chunk, (Ref(source), Ref("chunk"), want.dim, local), (), (name,)))
        elif want == PARTIAL and not isinstance(have, Split):
            self.calls.append(Call(torch.mul, (Ref(source), 1.0 / shards), (), (name,)))
        else:
            raise AssertionError(f"{tensor} lies as {have} on the batch axis and is wanted as {want}")
        return name

    def _detached(self, ref: Ref) -> Ref:
        name = f"{ref.name}|detached"
        if name not in self.values.values():
            self.calls.append(Call(torch.Tensor.detach, (ref,), (), (name,)))
            self.values[(name, REPLICATED, REPLICATED)] = name
        return Ref(name)

    def _is_private(self, tensor: str) -> bool:
        """Whether the memory of `tensor` has no reader but the one conversion that asks for it."""
        while True:
            op = self.graph.producer.get(tensor)
            if op is None or len(self.graph.consumers[tensor]) > 1 or tensor in op.saves:
                return False
            kind = op.target.split(".")[1]
            if kind in _FRESH and op.target.startswith("aten."):
                return True
            if kind not in _VIEWS:
                return False
            tensor = op.inputs[0]


def _slice_chunk(tensor: torch.Tensor, chunk: Chunk, dim: int, blocks: int) -> torch.Tensor:
    return Axis("batch", chunk.rank, chunk.size, (), None).slice(tensor, dim, blocks)


def _on_device(value: Any, device: torch.device) -> Any:
    if value is DEVICE:
        return device
    return tuple(_on_device(item, device) for item in value) if isinstance(value, tuple | list) else value
