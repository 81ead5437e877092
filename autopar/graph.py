"""The captured computation as plain data: ops in topological order over tensors with global shapes.

A `Graph` says what is computed, for one whole global batch, and nothing about who computes it. It is what the planner
searches over, what the simulator prices and what the runtime rewrites into per-rank code.

Shape legend used across the project: B global batch rows, S sequence, H hidden, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import torch

Shape = tuple[int, ...]
Precision = Literal["float32", "bfloat16", "float16"]
"""What a module's float32 parameters are computed with; float32 leaves every dtype as the module has it."""
Role = Literal["input", "parameter", "buffer", "constant", "activation"]


class _Device:
    """Stands in an op's arguments for "the device this rank computes on"; there is one instance, `DEVICE`."""

    def __repr__(self) -> str:
        return "DEVICE"

    def __reduce__(self) -> str:
        """Copies and pickles are the one instance."""
        return "DEVICE"


DEVICE = _Device()


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor of the graph, by name, inside an op's arguments."""

    name: str

    def __repr__(self) -> str:
        return f"%{self.name}"


@dataclass(frozen=True, slots=True)
class Tensor:
    """One value of the graph, with its global shape.

    `requires_grad` is true where a gradient flows: a trainable parameter, or what is computed from one under grad mode.
    `fqn` is the original fully qualified name of a parameter or buffer, "" otherwise. Tied parameters are one `Tensor`.
    `base` names the tensor whose storage this one is a view of, "" where it has its own: memory is counted per base.
    `rest_dtype` is the dtype of a parameter at rest where the computation uses it in another, None elsewhere.
    """

    name: str
    shape: Shape
    dtype: torch.dtype
    role: Role
    requires_grad: bool = False
    fqn: str = ""
    base: str = ""
    rest_dtype: torch.dtype | None = None

    @property
    def at_rest(self) -> torch.dtype:
        """The dtype that the module, an optimizer and a checkpoint see."""
        return self.rest_dtype or self.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Op:
    """One operator call.

    `target` is "aten.<name>.<overload>" or "autopar.<name>" (an op of our own, see capture/normalise.py).
    `args` and `kwargs` hold `Ref`s for tensors, nested tuples for lists, `DEVICE` for devices, plain values otherwise.
    `outputs` has one name per output tensor; `returns_sequence` tells a one-element list from a single tensor.
    `no_grad`: the op stood in a no-grad region, so nothing differentiates through it.
    `saves`: names among inputs and outputs whose storage autograd keeps for the backward; `saved_extra_bytes`: what it
    keeps besides (dropout masks, norm statistics), at the global shape. Both are observed on fake tensors at capture.
    """

    name: str
    target: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    outputs: tuple[str, ...]
    module: str = ""
    returns_sequence: bool = False
    random: bool = False
    no_grad: bool = False
    saves: tuple[str, ...] = ()
    saved_extra_bytes: int = 0

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of the tensor arguments, one per occurrence, positional before keyword, in order."""
        return tuple(ref.name for ref in iterate_refs((self.args, tuple(v for _, v in self.kwargs))))


@dataclass(frozen=True, slots=True)
class Block:
    """A contiguous run of main ops with a small cut set on both sides. Blocks of one `kind` are isomorphic.

    Isomorphic means: their `ops`, `inputs`, `outputs` and `parameters` correspond position by position, with equal
    targets, shapes, dtypes and non-tensor arguments.
    `inputs`: activations of main ops that arrive from earlier blocks (or pass through to later ones);
    `outputs`: activations that later blocks, or the loss, need, in the order of the next block's `inputs`.
    Side tensors (see `Graph.side_ops`) and batch inputs are available everywhere and are not listed.
    """

    index: int
    kind: int
    ops: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Graph:
    """What is computed.

    name: class name of the module.
    ops: every op, topological.
    inputs: names of the batch tensors; input_keys[i] is how a call names it: an int (positional) or str (keyword), and
        for nested structures a tuple of such keys.
    loss: name of the scalar loss tensor. loss_path: () when the module returns the loss itself, else ("loss",).
    outputs: the module's other tensor outputs, as (path, tensor name). output_form: what it returned, without the tensors
        (capture/output_form.py).
    side_ops: ops that depend on no parameter, draw no random numbers and touch no buffer that is updated (masks, rotary
        tables, target shifts and counts): computed wherever they are needed, by every stage that needs them. All other
        ops are main ops, and `blocks` partitions exactly those.
    batch_size: rows of the global batch.
    constants: values of lifted tensor constants, by tensor name.
    opaque_modules: the modules that "autopar.opaque" ops run, by fully qualified name.
    precision: what the module's float32 parameters and inputs were cast to before it was captured.
    """

    name: str
    tensors: Mapping[str, Tensor]
    ops: tuple[Op, ...]
    inputs: tuple[str, ...]
    input_keys: tuple[Any, ...]
    loss: str
    loss_path: tuple[str, ...]
    outputs: tuple[tuple[tuple[Any, ...], str], ...]
    side_ops: frozenset[str]
    blocks: tuple[Block, ...]
    batch_size: int
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)
    opaque_modules: Mapping[str, torch.nn.Module] = field(default_factory=dict, repr=False, compare=False)
    precision: Precision = "float32"
    output_form: Any = field(default=None, repr=False, compare=False)

    @cached_property
    def op(self) -> dict[str, Op]:
        return {op.name: op for op in self.ops}

    @cached_property
    def producer(self) -> dict[str, Op]:
        return {name: op for op in self.ops for name in op.outputs}

    @cached_property
    def consumers(self) -> dict[str, tuple[Op, ...]]:
        found: dict[str, list[Op]] = {name: [] for name in self.tensors}
        for op in self.ops:
            for name in dict.fromkeys(op.inputs):
                found[name].append(op)
        return {name: tuple(ops) for name, ops in found.items()}

    @cached_property
    def parameters(self) -> tuple[Tensor, ...]:
        return tuple(t for t in self.tensors.values() if t.role == "parameter")

    @cached_property
    def shared_parameters(self) -> tuple[str, ...]:
        """Parameters that more than one block uses (tied embeddings, a module called twice)."""
        uses: dict[str, int] = {}
        for block in self.blocks:
            for name in block.parameters:
                uses[name] = uses.get(name, 0) + 1
        return tuple(name for name, count in uses.items() if count > 1)

    @cached_property
    def made_of_parameters(self) -> dict[str, frozenset[str]]:
        """Tensors that follow from parameters alone, such as a transposed weight, with these; parameters themselves too."""
        found = {t.name: frozenset({t.name}) for t in self.parameters}
        for op in self.ops:
            if op.inputs and all(name in found for name in op.inputs):
                found.update((name, frozenset().union(*map(found.get, op.inputs))) for name in op.outputs)
        return found

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the computation: names of parameters, shapes, targets and arguments, but no values."""
        digest = hashlib.sha256()
        for t in self.tensors.values():
            digest.update(repr((t.name, t.shape, str(t.dtype), t.role, t.fqn, t.requires_grad)).encode())
        for op in self.ops:
            digest.update(repr((op.name, op.target, op.args, op.kwargs, op.outputs)).encode())
        return digest.hexdigest()[:16]

    def block_ops(self, block: Block) -> tuple[Op, ...]:
        return tuple(self.op[name] for name in block.ops)


def torch_dtype(precision: Precision) -> torch.dtype:
    """The dtype of that name. ValueError for one that is not a `Precision`."""
    if precision not in get_args(Precision):
        raise ValueError(f"precision {precision!r}: expected one of {', '.join(map(repr, get_args(Precision)))}")
    return getattr(torch, precision)


def iterate_refs(value: Any) -> Iterator[Ref]:
    """All `Ref`s in a nested argument structure, in order."""
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from iterate_refs(item)


def map_refs(value: Any, function) -> Any:
    """The same argument structure with `function(ref)` in place of every `Ref`."""
    if isinstance(value, Ref):
        return function(value)
    if isinstance(value, tuple | list):
        return tuple(map_refs(item, function) for item in value)
    return value
