"""The graph while capture works on it: ops and tensors that passes may add, drop and rename."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..graph import Op, Ref, Tensor, map_refs
from ..ops import mutated_inputs


class CaptureError(ValueError):
    """A user's error found while tracing, already in words; capture lets it pass unchanged."""


class Untraceable(CaptureError):
    """A module that cannot be traced. module: its fully qualified name, as far as it is known; "" for the outermost."""

    def __init__(self, message: str, module: str) -> None:
        super().__init__(message)
        self.module = module


@dataclass
class Draft:
    """tensors: all named values, in order of definition. ops: topological. trainable: parameters that require grad.

    loss, outputs, loss_path and the input fields mean what they mean in `Graph`.
    sources: the user's source line that an op came from, where the tracer knows it.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    loss: str = ""
    outputs: list[tuple[tuple[Any, ...], str]] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)
    _taken: set[str] = field(default_factory=set)

    def fresh(self, wanted: str) -> str:
        """A name that no tensor and no op has yet; torch's own numbering is dropped."""
        wanted = re.sub(r"[^A-Za-z0-9_.]", "_", wanted)
        stem, number, name = re.sub(r"_\d+$", "", wanted) or wanted, 0, wanted
        while name in self._taken:
            number += 1
            name = f"{stem}_{number}"
        self._taken.add(name)
        return name

    def add_tensor(self, name: str, shape: Any, dtype: torch.dtype, role: str = "activation", **fields: Any) -> str:
        self.tensors[name] = Tensor(name, tuple(int(n) for n in shape), dtype, role, **fields)  # type: ignore[arg-type]
        self._taken.add(name)
        return name

    def new_op(self, like: Op, target: str, args: tuple[Any, ...], shape: Any, dtype: torch.dtype, wanted: str) -> Op:
        """An op with one output of this shape, in the module and grad mode of `like`; the caller places it."""
        name = self.fresh(wanted)
        self.add_tensor(name, shape, dtype)
        if like.name in self.sources:
            self.sources[name] = self.sources[like.name]
        return Op(name, target, args, (), (name,), module=like.module, no_grad=like.no_grad)

    def rewrite(self, step: Callable[[Op], list[Op] | None]) -> None:
        """Replace every op by what `step` returns for it; None keeps it."""
        ops: list[Op] = []
        for op in self.ops:
            replaced = step(op)
            ops.extend([op] if replaced is None else replaced)
        self.ops = ops

    def rename(self, renamed: dict[str, str]) -> None:
        """Let every use of a key use its value; chains of renames are followed."""
        if not renamed:
            return

        def final(name: str) -> str:
            while name in renamed:
                name = renamed[name]
            return name

        def follow(ref: Ref) -> Ref:
            return Ref(final(ref.name)) if ref.name in renamed else ref

        self.ops = [
            replace(op, args=map_refs(op.args, follow), kwargs=tuple((k, map_refs(v, follow)) for k, v in op.kwargs))
            if any(name in renamed for name in op.inputs)
            else op
            for op in self.ops
        ]
        self.loss = final(self.loss)
        self.outputs = [(path, final(name)) for path, name in self.outputs]

    def updated_buffers(self) -> set[str]:
        """Buffers that an op writes, directly or through a view, with all views of them (bases must be known)."""
        written = {self.tensors[name].base or name for op in self.ops for name in mutated_inputs(op)}
        return written | {name for name, t in self.tensors.items() if t.base in written}

    def drop_dead(self) -> None:
        """Remove what reaches neither the loss, nor an output, nor a buffer update, and tensors that nobody names.

        In-place ops other than buffer updates must be gone by now.
        """
        needed = {self.loss, *(name for _, name in self.outputs)}
        kept: list[Op] = []
        for op in reversed(self.ops):
            if needed.intersection(op.outputs) or mutated_inputs(op):
                kept.append(op)
                needed.update(op.inputs)
        self.ops = kept[::-1]
        alive = {name for op in self.ops for name in (*op.outputs, *op.inputs)} | needed
        self.tensors = {
            name: t for name, t in self.tensors.items() if name in alive or t.role in ("parameter", "buffer", "input")
        }
        self.constants = {name: value for name, value in self.constants.items() if name in self.tensors}
