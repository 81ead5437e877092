"""Modules that cannot be traced stay whole: each call becomes one op, "autopar.opaque".

While torch.export runs, the forward of a marked module is replaced by a call of the operator `autopar::opaque`, whose
output shapes come from running the module once, for real, on zeros on the CPU. At run time the op calls the original
module with this rank's parameters and buffers (`ops.run_opaque`).

Limits: positional and keyword arguments may be tensors, plain values, or tuples of these; the output is a tensor, or
tensors and plain values nested in tuples, lists and dicts. Rows of the inputs are taken to correspond to rows of the
outputs where their numbers agree.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..torch_private import storage_key
from .draft import Untraceable

Marked = TypeVar("Marked", torch.nn.Module, type[torch.nn.Module])
_MARK = "_autopar_opaque"
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


def opaque(module_or_class: Marked) -> Marked:
    """Mark a module, or every instance of a module class (also as a decorator), as not to be traced.

    It is replicated on the model axes, and data-parallel and pipelinable still. ValueError for anything else.
    """
    is_class = isinstance(module_or_class, type) and issubclass(module_or_class, torch.nn.Module)
    if not (is_class or isinstance(module_or_class, torch.nn.Module)):
        raise ValueError(f"opaque() marks an nn.Module or a class of modules; it was given {module_or_class!r}")
    setattr(module_or_class, _MARK, True)
    return module_or_class


@dataclass(frozen=True)
class OpaqueCall:
    """One traced call.

    args, kwargs: the arguments with `Slot`s for tensors. state_names: parameters and buffers, relative to the module.
    saved_inputs, saved_outputs: positions whose storage autograd keeps; saved_extra_bytes: what it keeps besides.
    """

    fqn: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    state_names: tuple[str, ...]
    saved_inputs: tuple[int, ...]
    saved_outputs: tuple[int, ...]
    saved_extra_bytes: int


@dataclass(frozen=True)
class Slot:
    """Stands for tensor number `index` of an opaque call."""

    index: int


@dataclass
class Recorder:
    """Collects the opaque calls of one capture."""

    calls: list[OpaqueCall] = field(default_factory=list)
    modules: dict[str, torch.nn.Module] = field(default_factory=dict)


@contextmanager
def record_opaque(
    module: torch.nn.Module, originals: Mapping[str, torch.Tensor], whole: Collection[str] = ()
) -> Iterator[Recorder]:
    """Replace the forward of every outermost marked submodule while the context lasts.

    originals: the user's own parameters and buffers, by fully qualified name. whole: submodules to treat as marked.
    """
    recorder = Recorder()
    for fqn, submodule in module.named_modules():
        inside = any(fqn.startswith(outer + ".") or outer == "" for outer in recorder.modules)
        if (getattr(submodule, _MARK, False) or fqn in whole) and not inside:
            recorder.modules[fqn] = submodule
    had_forward = {fqn: m.__dict__.get("forward") for fqn, m in recorder.modules.items()}
    for fqn, submodule in recorder.modules.items():
        submodule.forward = _stand_in(recorder, fqn, submodule, submodule.forward, originals)
    try:
        yield recorder
    finally:
        for fqn, submodule in recorder.modules.items():
            del submodule.forward
            if had_forward[fqn] is not None:
                submodule.forward = had_forward[fqn]


def _stand_in(
    recorder: Recorder, fqn: str, module: torch.nn.Module, forward: Callable, originals: Mapping[str, torch.Tensor]
) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        tensors: list[torch.Tensor] = []

        def slot(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                tensors.append(value)
                return Slot(len(tensors) - 1)
            if isinstance(value, tuple | list):
                return tuple(slot(v) for v in value)
            if isinstance(value, _PLAIN):
                return value
            raise Untraceable(
                f"opaque module {fqn!r} is called with a {type(value).__name__}; pass its tensors as arguments", fqn
            )

        slots = slot(args), tuple((k, slot(v)) for k, v in kwargs.items())
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        inputs = [(tuple(t.shape), t.dtype, t.requires_grad) for t in tensors]
        real_state = {name: (originals[f"{fqn}.{name}" if fqn else name], fake.dtype) for name, fake in state.items()}
        ran = _in_clean_thread(lambda: _run_real(module, forward, slots, inputs, real_state))
        if isinstance(ran, Exception):
            raise Untraceable(
                f"opaque module {fqn!r} ({type(module).__name__}) failed on zeros of shapes "
                f"{[shape for shape, _, _ in inputs]}: {type(ran).__name__}: {ran}",
                fqn,
            ) from ran
        outputs, rebuild, saves = ran
        recorder.calls.append(OpaqueCall(fqn, *slots, tuple(state), *saves))
        spec = ";".join(f"{str(dtype).removeprefix('torch.')}:{','.join(map(str, shape))}" for shape, dtype in outputs)
        flat = torch.ops.autopar.opaque.default(len(recorder.calls) - 1, spec, tensors, list(state.values()))
        return rebuild(flat)

    return call


def _run_real(
    module: torch.nn.Module,
    forward: Callable,
    slots: Any,
    inputs: Any,
    state: Mapping[str, tuple[torch.Tensor, torch.dtype]],
):
    """Run the module eagerly on zeros, with each tensor of its state in the dtype given: output shapes, how to rebuild its
    output, and what autograd saves."""
    stand_in = module.__dict__["forward"]
    module.forward = forward
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.default_generator.manual_seed(0)
            tensors = [torch.zeros(shape, dtype=dtype).requires_grad_(grad) for shape, dtype, grad in inputs]
            values = {name: _materialised(t, dtype) for name, (t, dtype) in state.items()}

            def fill(value: Any) -> Any:
                if isinstance(value, Slot):
                    return tensors[value.index]
                return tuple(fill(v) for v in value) if isinstance(value, tuple) else value

            saved: list[torch.Tensor] = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t), lambda _: None):
                out = torch.func.functional_call(
                    module, values, fill(slots[0]), {name: fill(value) for name, value in slots[1]}
                )
        outputs, rebuild = _flatten_output(out)
        return (
            tuple((tuple(t.shape), t.dtype) for t in outputs),
            rebuild,
            _match_saved(saved, tensors, outputs, tuple(values.values())),
        )
    except Exception as error:
        return error
    finally:
        module.forward = stand_in


def _materialised(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not tensor.is_meta:
        copy = tensor.detach().to("cpu", dtype, copy=True)
    elif tensor.is_floating_point():
        copy = torch.empty(tensor.shape, dtype=dtype).normal_(std=0.01)
    else:
        copy = torch.zeros(tensor.shape, dtype=dtype)
    return copy.requires_grad_(tensor.requires_grad)


def _flatten_output(out: Any) -> tuple[tuple[torch.Tensor, ...], Callable[[Sequence[torch.Tensor]], Any]]:
    """The tensors in what a module returned, and how to put others in their places."""
    leaves, structure = tree_flatten(out)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    strange = next((leaf for leaf in leaves if not isinstance(leaf, (torch.Tensor, *_PLAIN))), None)
    if strange is not None or not places:
        raise TypeError(f"returned a {type(out if strange is None else strange).__name__}; expected tensors")

    def rebuild(flat: Sequence[torch.Tensor]) -> Any:
        filled = list(leaves)
        for place, tensor in zip(places, flat, strict=True):
            filled[place] = tensor
        return tree_unflatten(filled, structure)

    return tuple(leaves[i] for i in places), rebuild


def _match_saved(saved: Any, inputs: Any, outputs: Any, state: Any) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    input_at = {storage_key(t): i for i, t in reversed(list(enumerate(inputs)))}
    output_at = {storage_key(t): i for i, t in reversed(list(enumerate(outputs)))}
    parameters = {storage_key(t) for t in state}
    extra: dict[int, int] = {}
    for tensor in saved:
        key = storage_key(tensor)
        if key not in input_at and key not in output_at and key not in parameters:
            extra[key] = tensor.untyped_storage().nbytes()
    keys = {storage_key(t) for t in saved}
    return (
        tuple(sorted(i for key, i in input_at.items() if key in keys)),
        tuple(sorted(i for key, i in output_at.items() if key in keys)),
        sum(extra.values()),
    )


def _in_clean_thread(function: Callable[[], Any]) -> Any:
    """Run where none of the tracing modes is active: they belong to the tracing thread."""
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(function()))
    thread.start()
    thread.join()
    return result[0]


@torch.library.custom_op("autopar::opaque", mutates_args=())
def _opaque(call: int, outputs: str, inputs: list[torch.Tensor], state: list[torch.Tensor]) -> list[torch.Tensor]:
    raise AssertionError("autopar::opaque stands in traces only")


@_opaque.register_fake
def _(call: int, outputs: str, inputs: list[torch.Tensor], state: list[torch.Tensor]) -> list[torch.Tensor]:
    made = []
    for spec in outputs.split(";"):
        dtype, _, shape = spec.partition(":")
        made.append(torch.empty([int(n) for n in shape.split(",") if n], dtype=getattr(torch, dtype), device="cpu"))
    return made
