"""An optimizer taken along to new parameters: the same object, its state moved into the new layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .ownership import Ownership
from .reshard import reshard
from .torch_private import local_tensor, wrap_local


@dataclass(frozen=True)
class Described:
    """What one rank's optimizer knows of one parameter: its group, dtypes of the state that is laid out like it, and
    the rest of the state by value, with whether a tensor lies on the CPU."""

    group: int
    like: dict[str, torch.dtype]
    values: dict[str, tuple[Any, bool]]


@torch.no_grad()
def move_optimizer(
    optimizer: torch.optim.Optimizer,
    before: Mapping[str, nn.Parameter],
    after: Mapping[str, nn.Parameter],
    old: Mapping[str, Ownership],
    new: Mapping[str, Ownership],
    rank: int,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Put the parameters `after` in place of `before`, with their state moved from the layout `old` to `new`.

    before, after: this rank's parameters at rest by name. old, new: every parameter of the model, alike on all ranks.
    All ranks call it. Parameters of the optimizer that are not in `before` stay; gradients are not moved.
    State must be laid out like its parameter, or be one number, as in torch's elementwise optimizers. ValueError, on
    every rank, for other state (Adafactor's factors, L-BFGS's history) and for groups that differ between ranks.
    """
    merged = agree_on_state(optimizer, before, "taken to another plan", group)
    states = _moved(optimizer, before, after, merged, old, new, rank, device, group)
    _install(optimizer, before, after, merged, states)


def agree_on_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    what: str,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Described]:
    """What the ranks together know of the state, by parameter name; equal on all ranks, and all ranks call it.

    parameters: this rank's at rest. what: "saved" and the like, for the ValueError that `move_optimizer` speaks of.
    """
    described, complaints = _describe(optimizer, parameters)
    everyone: list[Any] = [(described, complaints, len(optimizer.param_groups))]
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        mine = everyone[0]
        everyone = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, mine, group=group)
    complaints = sorted({text for _, texts, _ in everyone for text in texts})
    if len({count for _, _, count in everyone}) > 1:
        complaints.append(f"ranks have {sorted({count for _, _, count in everyone})} parameter groups")
    merged: dict[str, Described] = {}
    for known, _, _ in everyone:
        for fqn, about in known.items():
            if merged.setdefault(fqn, about).group != about.group:
                complaints.append(f"{fqn} is in group {merged[fqn].group} on one rank and in {about.group} on another")
    if complaints:
        raise ValueError(
            f"{type(optimizer).__name__} cannot be {what}: {'; '.join(complaints[:3])}. Use an "
            "elementwise optimizer (SGD, Adam, AdamW, ...) whose parameter groups depend on the parameters' names alone"
        )
    _as_parameters_where_any_is(merged)
    return merged


def _describe(
    optimizer: torch.optim.Optimizer, before: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Described], list[str]]:
    groups = {id(p): index for index, g in enumerate(optimizer.param_groups) for p in g["params"]}
    described: dict[str, Described] = {}
    complaints: list[str] = []
    for fqn, parameter in before.items():
        if id(parameter) not in groups:
            continue
        about = described[fqn] = Described(groups[id(parameter)], {}, {})
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.ndim and value.shape == parameter.shape:
                about.like[key] = value.dtype
            elif isinstance(value, Tensor) and value.ndim == 0:
                local = local_tensor(value)
                about.values[key] = (local.cpu(), local.device.type == "cpu")
            elif value is None or isinstance(value, bool | int | float | str):
                about.values[key] = (value, True)
            else:
                what = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
                complaints.append(f"its state {key!r} of {fqn} is {what}")
    return described, complaints


def _as_parameters_where_any_is(merged: dict[str, Described]) -> None:
    """A scalar parameter's momentum looks like a step count; other parameters tell which of the two a key is."""
    like = {key: dtype for about in merged.values() for key, dtype in about.like.items()}
    for about in merged.values():
        for key in set(about.values) & set(like):
            about.like[key] = like[key]


def _moved(
    optimizer: torch.optim.Optimizer,
    before: Mapping[str, nn.Parameter],
    after: Mapping[str, nn.Parameter],
    merged: Mapping[str, Described],
    old: Mapping[str, Ownership],
    new: Mapping[str, Ownership],
    rank: int,
    device: torch.device,
    group: dist.ProcessGroup | None,
) -> dict[str, dict[str, Any]]:
    """The new state by parameter name. One key at a time, and the old one goes, so that memory stays small."""
    states: dict[str, dict[str, Any]] = {fqn: {} for fqn in after if fqn in merged}
    for fqn, state in states.items():
        for key, (value, on_cpu) in merged[fqn].values.items():
            if isinstance(value, Tensor):
                value = value.clone() if on_cpu else value.to(local_tensor(after[fqn]).device)
                if key in merged[fqn].like and isinstance(after[fqn], DTensor):
                    value = wrap_local(value, after[fqn]._spec)
            state[key] = value
    names = sorted(merged)
    for key in sorted({key for about in merged.values() for key in about.like}):
        moving = [fqn for fqn in names if key in merged[fqn].like and key not in merged[fqn].values]
        held = {fqn: local_tensor(optimizer.state[before[fqn]].pop(key)) for fqn in moving if fqn in before}
        moved = reshard(
            held,
            {fqn: old[fqn] for fqn in moving},
            {fqn: new[fqn] for fqn in moving},
            {fqn: merged[fqn].like[key] for fqn in moving},
            rank,
            device,
            group,
        )
        for fqn, local in moved.items():
            local = local.to(local_tensor(after[fqn]).device)
            state = wrap_local(local, after[fqn]._spec) if isinstance(after[fqn], DTensor) else local
            states[fqn][key] = state
    return states


def _install(
    optimizer: torch.optim.Optimizer,
    before: Mapping[str, nn.Parameter],
    after: Mapping[str, nn.Parameter],
    merged: Mapping[str, Described],
    states: Mapping[str, dict[str, Any]],
) -> None:
    """Change the optimizer in place: schedulers and users hold on to the object and to its groups."""
    gone = {id(p) for p in before.values()}
    for parameter in before.values():
        optimizer.state.pop(parameter, None)
    for index, parameters in enumerate(optimizer.param_groups):
        parameters["params"][:] = [p for p in parameters["params"] if id(p) not in gone]
        parameters["params"] += [after[fqn] for fqn in after if fqn in merged and merged[fqn].group == index]
    for fqn, state in states.items():
        if state:
            optimizer.state[after[fqn]] = state
