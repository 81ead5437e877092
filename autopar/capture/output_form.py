"""What a module returns, without the tensors in it: kept at capture, so that a call can return the same kind of object."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch

Path = tuple[Any, ...]


@dataclass(frozen=True)
class Hole:
    """Where a tensor stood; `path` as in `Graph.outputs`."""

    path: Path


@dataclass(frozen=True)
class Form:
    """A dict, tuple, list or (at the top) other object `like`, with these items by key, position or attribute."""

    like: Any
    items: Mapping[Any, Any]


def form_of(out: Any, path: Path = ()) -> Any:
    """The form of what a module returned. Numbers, strings and None stay; other things that hold no tensors become None."""
    if isinstance(out, torch.Tensor):
        return Hole(path)
    if isinstance(out, Mapping):
        items: Any = out.items()
    elif isinstance(out, tuple | list):
        items = enumerate(out)
    elif path == () and hasattr(out, "__dict__"):
        items = vars(out).items()
    else:
        return out if isinstance(out, bool | int | float | complex | str) else None
    found = {key: form_of(value, (*path, key)) for key, value in items}
    if isinstance(out, Mapping | tuple | list):
        return Form(type(out), found)
    shell = copy.copy(out)
    vars(shell).clear()
    return Form(shell, found)


def build(form: Any, tensors: Mapping[Path, torch.Tensor]) -> Any:
    """An object of that form around the tensors; None where one is missing."""
    if isinstance(form, Hole):
        return tensors.get(form.path)
    if not isinstance(form, Form):
        return form
    items = {key: build(value, tensors) for key, value in form.items.items()}
    kind = form.like
    if not isinstance(kind, type):
        made = copy.copy(kind)
        vars(made).update(items)
        return made
    if issubclass(kind, Mapping):
        # A dataclass of named entries, as transformers' ModelOutput is.
        return kind(**items) if is_dataclass(kind) else kind(items)
    return kind(*items.values()) if hasattr(kind, "_fields") else kind(items.values())
