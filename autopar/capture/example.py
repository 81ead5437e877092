"""How the user's example reaches the module and the loss, and how loss and outputs are found in what comes back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .draft import CaptureError

Loss = Callable[..., torch.Tensor]
Key = int | str


@dataclass(frozen=True)
class Leaf:
    """Stands for tensor number `index` of the example in a nested structure."""

    index: int


@dataclass(frozen=True)
class Call:
    """One call of the module: arguments with `Leaf`s for tensors, and the tensors with their names and keys.

    targets: what the loss function is given besides the output.
    keys[i]: how a call names tensor i: an int, a str, or a tuple of such keys for nested structures.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: tuple[Any, ...]
    tensors: tuple[torch.Tensor, ...]
    names: tuple[str, ...]
    keys: tuple[Any, ...]


def describe_call(module: torch.nn.Module, example: Any, loss: Loss | None) -> Call:
    """Match the example with `module.forward`; ValueError names what is missing or unexpected."""
    signature = inspect.signature(module.forward)
    if isinstance(example, torch.Tensor):
        example = (example,)
    if isinstance(example, Mapping):
        args, kwargs, targets = _match_names(module, signature, example, loss)
    elif isinstance(example, tuple | list):
        args, kwargs, targets = _match_positions(module, signature, tuple(example), loss)
    else:
        raise ValueError(
            f"the example is a {type(example).__name__}; expected one global batch as a tensor, a tuple of positional "
            "arguments or a dict of keyword arguments"
        )
    try:
        signature.bind(*args.values(), **kwargs)
    except TypeError as error:
        hint = "" if loss is None else "; entries that forward does not take go to the loss"
        raise ValueError(
            f"the example does not fit {type(module).__name__}.forward: {error}. Given: {_describe(example)}; "
            f"expected: {_describe_signature(signature)}{hint}"
        ) from error

    tensors: list[torch.Tensor] = []
    names: list[str] = []
    keys: list[Any] = []

    def take(value: Any, path: tuple[Key, ...], name: str) -> Any:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
            names.append(name)
            keys.append(path[0] if len(path) == 1 else path)
            return Leaf(len(tensors) - 1)
        if isinstance(value, Mapping):
            return {k: take(v, (*path, k), f"{name}_{k}") for k, v in value.items()}
        if isinstance(value, tuple | list):
            items = [take(v, (*path, i), f"{name}_{i}") for i, v in enumerate(value)]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value

    positional = _positional_names(signature)
    taken_args = tuple(
        take(v, (i,), positional[i] if i < len(positional) else f"argument_{i}") for i, v in args.items()
    )
    taken_kwargs = {k: take(v, (k,), k) for k, v in kwargs.items()}
    taken_targets = tuple(
        take(v, (k,), k if isinstance(k, str) else f"target_{n}") for n, (k, v) in enumerate(targets.items())
    )
    if not any(t.dim() for t in tensors):
        raise ValueError(
            f"the example holds no tensor with a batch dim: {_describe(example)}; expected one global batch, rows first"
        )
    return Call(taken_args, taken_kwargs, taken_targets, tuple(tensors), tuple(names), tuple(keys))


def rebuild(structure: Any, tensors: tuple[torch.Tensor, ...]) -> Any:
    """The structure with its `Leaf`s replaced by tensors."""
    if isinstance(structure, Leaf):
        return tensors[structure.index]
    if isinstance(structure, dict):
        return {k: rebuild(v, tensors) for k, v in structure.items()}
    if isinstance(structure, tuple | list):
        items = [rebuild(v, tensors) for v in structure]
        return type(structure)(*items) if hasattr(structure, "_fields") else type(structure)(items)
    return structure


def find_loss(out: Any, module: torch.nn.Module) -> tuple[torch.Tensor, tuple[str, ...]]:
    """The scalar loss in what the module returned, and its path; ValueError says what was returned instead."""
    if isinstance(out, torch.Tensor):
        found, path = out, ()
    elif isinstance(out, Mapping):
        found, path = out.get("loss"), ("loss",)
    else:
        found, path = getattr(out, "loss", None), ("loss",)
    name = type(module).__name__
    if not isinstance(found, torch.Tensor):
        raise CaptureError(
            f"{name} returned no loss, but {_describe(out)}; return a scalar, or an object or dict with a loss (give "
            "the labels in the example, where the module takes them), or pass loss=f, called as f(output, *targets)"
        )
    return _checked(found, f"the loss that {name} returned"), path


def loss_of(out: Any, loss: Loss, targets: tuple[Any, ...]) -> torch.Tensor:
    """`loss(out, *targets)`, which must be a scalar tensor."""
    name = getattr(loss, "__name__", type(loss).__name__)
    try:
        inspect.signature(loss).bind(out, *targets)
    except TypeError as error:
        raise CaptureError(
            f"the loss function {name} cannot be called with the output and {len(targets)} target(s): {error}. Targets "
            "are the example entries that forward does not take: extra positions of a tuple, or other names of a dict"
        ) from error
    except ValueError:
        pass  # a builtin without a signature: let the call itself say
    value = loss(out, *targets)
    if not isinstance(value, torch.Tensor):
        raise CaptureError(f"the loss function {name} returned {_describe(value)}; expected a scalar tensor")
    return _checked(value, f"what the loss function {name} returned")


def output_tensors(out: Any, path: tuple[Key, ...] = ()) -> list[tuple[tuple[Key, ...], torch.Tensor]]:
    """All tensors in nested dicts, tuples, lists and, at the top, attributes of an object; with their paths."""
    if isinstance(out, torch.Tensor):
        return [(path, out)]
    if isinstance(out, Mapping):
        items: Any = out.items()
    elif isinstance(out, tuple | list):
        items = enumerate(out)
    elif path == () and hasattr(out, "__dict__"):
        items = vars(out).items()
    else:
        return []
    return [found for key, value in items for found in output_tensors(value, (*path, key))]


def _checked(value: torch.Tensor, what: str) -> torch.Tensor:
    if value.dim() != 0 or not value.is_floating_point():
        raise CaptureError(f"{what} is {_describe(value)}; expected a floating-point scalar, such as a mean over rows")
    return value


def _match_names(module: Any, signature: inspect.Signature, example: Mapping, loss: Loss | None) -> tuple:
    for key in example:
        if not isinstance(key, str):
            raise ValueError(
                f"the example's key {key!r} is a {type(key).__name__}; expected names of forward's arguments"
            )
    if loss is None:
        return {}, dict(example), {}
    named = {p.name for p in signature.parameters.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    return {}, {k: v for k, v in example.items() if k in named}, {k: v for k, v in example.items() if k not in named}


def _match_positions(module: Any, signature: inspect.Signature, example: tuple, loss: Loss | None) -> tuple:
    count = len(example)
    if loss is not None and not any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values()):
        count = len(_positional_names(signature))
    entries = dict(enumerate(example))
    return {i: v for i, v in entries.items() if i < count}, {}, {i: v for i, v in entries.items() if i >= count}


def _positional_names(signature: inspect.Signature) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in signature.parameters.values() if p.kind in kinds]


def _describe_signature(signature: inspect.Signature) -> str:
    required = [p for p in signature.parameters.values() if p.default is p.empty and p.kind not in (2, 4)]
    optional = [p for p in signature.parameters.values() if p not in required]
    words = "(" + ", ".join(p.name for p in required) + ")"
    if optional:
        words += " and optionally " + ", ".join(str(p).split(":")[0].split("=")[0].strip() for p in optional)
    return words


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)} and dtype {value.dtype}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with keys {', '.join(map(repr, value))}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}: " + ", ".join(type(v).__name__ for v in value)
    return f"a {type(value).__name__}"
