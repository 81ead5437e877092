"""torch.export of a module with its loss on fake tensors: nothing is materialised, real and meta tensors look alike."""

from __future__ import annotations

import linecache
import os
import traceback
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

import torch

from ..torch_private import fake_mode, forbid_custom_autograd, quiet_export_failure
from .draft import CaptureError, Untraceable
from .example import Call, Loss, find_loss, loss_of, output_tensors, rebuild
from .opaque import Recorder, record_opaque
from .output_form import form_of


@dataclass(frozen=True)
class Trace:
    """What torch.export gave: the program, where loss and other outputs stand, and the opaque calls met.

    fqns: the module's name of every parameter and buffer that the program names (tied ones under one name).
    trainable: which of these require grad. rest_dtypes: of the parameters that were cast, what the module has.
    """

    program: torch.export.ExportedProgram
    loss_path: tuple[str, ...]
    output_paths: tuple[tuple[Any, ...], ...]
    output_form: Any
    fqns: dict[str, str]
    trainable: frozenset[str]
    rest_dtypes: dict[str, torch.dtype]
    opaque: Recorder


@dataclass
class _Paths:
    """Where loss and outputs stand, noted during the trace (which undoes assignments to a module's attributes)."""

    loss: tuple[str, ...] = ()
    outputs: tuple[tuple[Any, ...], ...] = ()
    form: Any = None


class _WithLoss(torch.nn.Module):
    """The module and its loss as one module over the flat tensors of the example; returns (loss, *other outputs)."""

    def __init__(self, module: torch.nn.Module, call: Call, loss: Loss | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.call, self.loss, self.dtype = module, call, loss, dtype
        self.paths = _Paths()

    def forward(self, *flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = flat
        if self.dtype != torch.float32:
            # As fully_shard's mixed precision does: what goes into the module is cast, what goes to the loss is not.
            given = tuple(t.to(self.dtype) if t.dtype == torch.float32 else t for t in flat)
        args, kwargs = rebuild(self.call.args, given), rebuild(self.call.kwargs, given)
        out = self.module(*args, **kwargs)
        if self.loss is None:
            value, self.paths.loss = find_loss(out, self.module)
        else:
            value = loss_of(out, self.loss, rebuild(self.call.targets, flat))
        others = [(path, t) for path, t in output_tensors(out) if self.loss is not None or path != self.paths.loss]
        self.paths.outputs = tuple(path for path, _ in others)
        self.paths.form = form_of(out)
        return (value, *(t for _, t in others))


def trace(
    module: torch.nn.Module,
    call: Call,
    loss: Loss | None,
    whole: Collection[str] = (),
    dtype: torch.dtype = torch.float32,
) -> Trace:
    """Export in training mode, with float32 parameters and inputs of the module as `dtype`.

    The module's tensors and modes are the same after as before.

    whole: names of submodules to keep whole, besides those that are marked opaque.
    ValueError where it cannot be traced: names the source line that stopped it, and what to mark opaque.
    """
    names = {id(t): name for name, t in (*module.named_parameters(), *module.named_buffers())}
    every = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    fqns = {"module." + name: names[id(t)] for name, t in every}
    if isinstance(loss, torch.nn.Module) and (any(loss.parameters()) or any(loss.buffers())):
        raise ValueError(
            f"the loss {type(loss).__name__} has parameters or buffers; put it into the module, which then returns it"
        )
    trainable = frozenset(names[id(p)] for p in module.parameters() if p.requires_grad)
    rest_dtypes = {
        name: p.dtype for name, p in module.named_parameters() if p.dtype == torch.float32 and dtype != torch.float32
    }
    mode = fake_mode()
    fakes = _fake_tensors(module, mode, dtype)
    with fakes, _training(module), record_opaque(module, dict(every), whole) as recorder:
        with mode:
            flat = tuple(torch.empty(t.shape, dtype=t.dtype, device="cpu") for t in call.tensors)
        wrapper = _WithLoss(module, call, loss, dtype)
        try:
            with forbid_custom_autograd(partial(_refuse_custom_autograd, module)), quiet_export_failure():
                program = torch.export.export(wrapper, flat, strict=False)
        except CaptureError:
            raise
        except Exception as error:
            raise Untraceable(*_explain(module, error)) from error
    return Trace(
        program, wrapper.paths.loss, wrapper.paths.outputs, wrapper.paths.form, fqns, trainable, rest_dtypes, recorder
    )


@contextmanager
def _fake_tensors(module: torch.nn.Module, mode: Any, dtype: torch.dtype) -> Iterator[None]:
    """Swap every parameter and buffer for a fake one on the CPU while the context lasts."""
    fakes: dict[int, torch.Tensor] = {}
    swapped: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    try:
        for submodule in module.modules():
            for store in (submodule._parameters, submodule._buffers):
                for name, tensor in store.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in fakes:
                        fakes[id(tensor)] = _fake_like(tensor, mode, dtype)
                    swapped.append((store, name, tensor))
                    store[name] = fakes[id(tensor)]
        yield
    finally:
        for store, name, tensor in swapped:
            store[name] = tensor


def _fake_like(tensor: torch.Tensor, mode: Any, dtype: torch.dtype) -> torch.Tensor:
    if isinstance(tensor, torch.nn.parameter.UninitializedTensorMixin):
        raise ValueError("the module has uninitialised (lazy) parameters; run it once on a small batch first")
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise ValueError(
            f"the module holds a {type(tensor).__name__} of shape {list(tensor.shape)}; expected plain tensors: "
            "give the module before anything has sharded, wrapped or quantised it"
        )
    with mode:
        is_cast = isinstance(tensor, torch.nn.Parameter) and tensor.dtype == torch.float32
        fake = torch.empty(tensor.shape, dtype=dtype if is_cast else tensor.dtype, device="cpu")
        return torch.nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else fake


@contextmanager
def _training(module: torch.nn.Module) -> Iterator[None]:
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    module.train()
    try:
        yield
    finally:
        for submodule, training in modes:
            submodule.training = training


def _refuse_custom_autograd(module: torch.nn.Module, function: type) -> None:
    raise Untraceable(
        f"torch.autograd.Function {function.__qualname__} cannot be traced "
        f"({_last_user_line(traceback.extract_stack())}): its own backward would be lost. Mark the module that calls "
        "it with autopar.opaque(...), or register the function as an operator with torch.library.custom_op and "
        "register_autograd",
        _owner(module, [frame for frame, _ in traceback.walk_stack(None)][::-1]),
    )


def _owner(module: torch.nn.Module, frames: Sequence[FrameType]) -> str:
    """The name of the submodule that the innermost of the frames belongs to; "" where none does."""
    names = {id(m): name for name, m in module.named_modules() if name}
    owners = [names[id(frame.f_locals.get("self"))] for frame in frames if id(frame.f_locals.get("self")) in names]
    return owners[-1] if owners else ""


def _explain(module: torch.nn.Module, error: BaseException) -> tuple[str, str]:
    """One message: the user's line that stopped the trace, the submodule it stands in, and what to do; and its name."""
    frames = list(traceback.walk_tb(error.__traceback__))
    inner = error.__cause__ or error.__context__
    line = _last_user_line(traceback.extract_tb(error.__traceback__))
    if not line and inner is not None:
        line = _last_user_line(traceback.extract_tb(inner.__traceback__))
        frames += list(traceback.walk_tb(inner.__traceback__))
    owner = _owner(module, [frame for frame, _ in frames])
    named = f" in module {owner!r} ({type(module.get_submodule(owner)).__name__})" if owner else ""
    where = f"{line or 'a line of torch'}{named}"
    reason = next((text.strip().rstrip(".") for text in str(error).splitlines() if text.strip()), "")
    values = "data-dependent" in str(error).lower() or "DataDependent" in type(error).__name__
    hint = (
        "Rewrite the line so that shapes and control flow do not depend on tensor values"
        if values
        else "Check that the example's shapes and dtypes are what the module takes, and rewrite what cannot be traced"
    )
    message = (
        f"{type(module).__name__} cannot be traced: {where} stopped it with {type(error).__name__}: {reason}. {hint}, "
        "or keep the module that holds it whole: autopar.opaque(module.that_submodule), or @autopar.opaque on its class"
    )
    return message, owner


def user_line(stack_trace: str | None) -> str:
    """The innermost user line of a traced node's stack trace."""
    found = ""
    for text in (stack_trace or "").splitlines():
        if text.strip().startswith('File "'):
            file, number, *_ = text.strip()[6:].split(", ")
            file = file.rstrip('"')
            if _is_user_file(file):
                found = _spell(file, int(number.removeprefix("line ")))
    return found or "a line of torch"


def _last_user_line(frames: Any) -> str:
    for frame in reversed(list(frames)):
        if _is_user_file(frame.filename):
            return _spell(frame.filename, frame.lineno)
    return ""


def _spell(file: str, number: int) -> str:
    return f"line {number} of {file}, `{linecache.getline(file, number).strip()}`,"


_OWN_FILES = (os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def _is_user_file(file: str) -> bool:
    return (
        os.path.isabs(file)
        and not file.startswith(tuple(path + os.sep for path in _OWN_FILES))
        and (os.sep + "contextlib.py" not in file)
    )
