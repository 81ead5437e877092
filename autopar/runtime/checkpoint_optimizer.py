"""An optimizer in a checkpoint: what its index says of it, and how a new optimizer takes it over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .agree import from_rank_zero
from .checkpoint_files import Part, dtype_name, dtype_of
from .optimizer_state import agree_on_state
from .ownership import Ownership
from .torch_private import local_tensor, wrap_local


def describe(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """The optimizer as JSON-able data, all but the state that is laid out like its parameter; all ranks call it.

    parameters: this rank's at rest. ValueError, on every rank, where state or options cannot be kept.
    """
    merged = agree_on_state(optimizer, parameters, "saved")

    def options() -> list[dict[str, Any]]:
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        return [{key: _encode(value, f"its option {key!r}") for key, value in group.items()} for group in groups]

    return {
        "class": type(optimizer).__name__,
        "options": from_rank_zero(options),
        "group": {fqn: about.group for fqn, about in merged.items()},
        "like": {
            fqn: {key: dtype_name(dtype) for key, dtype in about.like.items() if key not in about.values}
            for fqn, about in merged.items()
        },
        "laid_out": {fqn: sorted(about.like) for fqn, about in merged.items()},
        "values": {
            fqn: {k: [_encode(value, f"its state {k!r}"), on_cpu] for k, (value, on_cpu) in about.values.items()}
            for fqn, about in merged.items()
        },
    }


def state_key(key: str, fqn: str) -> str:
    """The checkpoint's name of the state `key` of a parameter."""
    return f"optimizer/{key}/{fqn}"


def owned_parts(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], described: Mapping[str, Any], rank: int
) -> Iterator[Part]:
    """The state laid out like its parameter, of the parameters that count on this rank."""
    for fqn, parameter in parameters.items():
        ownership: Ownership = parameter.autopar.ownership
        if not ownership.counts(rank):
            continue
        for key in described["like"].get(fqn, ()):
            local = local_tensor(optimizer.state[parameter][key])
            yield Part(state_key(key, fqn), ownership.shape, ownership.segments(rank), local)


def mismatches(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], described: Mapping[str, Any] | None
) -> list[str]:
    """Why this rank's optimizer cannot take over what is described; [] if it can."""
    name = type(optimizer).__name__
    if described is None:
        return [f"it holds no optimizer state, but load was given a {name}; leave the optimizer out"]
    if described["class"] != name:
        return [f"it holds the state of {described['class']}, but load was given {name}"]
    if len(described["options"]) != len(optimizer.param_groups):
        return [f"its {name} has {len(described['options'])} parameter groups, the given {len(optimizer.param_groups)}"]
    groups = {id(p): index for index, g in enumerate(optimizer.param_groups) for p in g["params"]}
    found = []
    for fqn, parameter in parameters.items():
        given, saved = groups.get(id(parameter)), described["group"].get(fqn)
        if given != saved:
            told = ["in no group" if g is None else f"in group {g}" for g in (saved, given)]
            found.append(f"{fqn} is {told[0]} of its {name}, but {told[1]} of the given one")
    return found


def wanted_parts(parameters: Mapping[str, nn.Parameter], described: Mapping[str, Any], rank: int) -> list[Part]:
    """Empty parts, on the CPU, for the state of this rank's parameters that is laid out like them."""
    parts = []
    for fqn, parameter in parameters.items():
        ownership: Ownership = parameter.autopar.ownership
        for key, dtype in described["like"].get(fqn, {}).items():
            local = torch.empty(ownership.local_shape(rank), dtype=dtype_of(dtype))
            parts.append(Part(state_key(key, fqn), ownership.shape, ownership.segments(rank), local))
    return parts


def install(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    described: Mapping[str, Any],
    parts: Mapping[str, Tensor],
) -> None:
    """Give the optimizer the options and the state, `parts` being local tensors by `state_key`."""
    for group, options in zip(optimizer.param_groups, described["options"], strict=True):
        for key, encoded in options.items():
            value = _decode(encoded)
            if isinstance(group.get(key), Tensor):
                group[key].fill_(value)
            else:
                group[key] = value
    for fqn, parameter in parameters.items():
        if fqn not in described["group"]:
            continue
        state: dict[str, Any] = {}
        for key, (encoded, on_cpu) in described["values"][fqn].items():
            value = _decode(encoded)
            if isinstance(value, Tensor):
                value = value if on_cpu else value.to(local_tensor(parameter).device)
                if key in described["laid_out"][fqn] and isinstance(parameter, DTensor):
                    value = wrap_local(value, parameter._spec)
            state[key] = value
        for key in described["like"][fqn]:
            local = parts[state_key(key, fqn)].to(local_tensor(parameter).device)
            state[key] = wrap_local(local, parameter._spec) if isinstance(parameter, DTensor) else local
        optimizer.state.pop(parameter, None)
        if state:
            optimizer.state[parameter] = state


def _encode(value: Any, what: str) -> Any:
    if isinstance(value, Tensor) and value.ndim == 0:
        return {"dtype": dtype_name(value.dtype), "tensor": value.item()}
    if isinstance(value, tuple):
        return {"tuple": [_encode(part, what) for part in value]}
    if isinstance(value, list):
        return [_encode(part, what) for part in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"the optimizer cannot be saved: {what} is a {type(value).__name__}; expected numbers or text")


def _decode(encoded: Any) -> Any:
    if isinstance(encoded, dict):
        if "tuple" in encoded:
            return tuple(_decode(part) for part in encoded["tuple"])
        return torch.tensor(encoded["tensor"], dtype=dtype_of(encoded["dtype"]))
    if isinstance(encoded, list):
        return [_decode(part) for part in encoded]
    return encoded
