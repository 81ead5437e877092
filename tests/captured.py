"""Captures that a session makes once. Tracing a module takes longer than a step of it, and ranks of many tests trace the
same few modules; here the first process that does leaves its graph in a folder for the others, of this test and of later
ones.

What tells two modules apart is all that their forward can depend on without reading a tensor's values: classes, plain
attributes, shapes and sharing of parameters and buffers, the example's structure, the loss. A capture that this mistook
for another one would fail its test, because every test holds the graph's results against the module's own.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import autopar
from autopar.graph import Graph

_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype)


def install(folder: str) -> None:
    """From now on this process captures by way of the folder."""
    module = sys.modules["autopar.parallelize"]
    known = functools.partial(_known, Path(folder), module.capture)
    module.capture = autopar.capture = known


def _known(folder: Path, capture: Callable[..., Graph], module: nn.Module, *args: Any, **options: Any) -> Graph:
    described = repr((list(_of_module(module)), _of_value(args), _of_value(options)))
    path = folder / hashlib.sha256(described.encode()).hexdigest()
    # The ranks of a test come to it together: one traces, and the others wait instead of doing the same on the same cores.
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return pickle.loads(path.read_bytes())
        graph = capture(module, *args, **options)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            pickle.dump(graph, file)
        os.replace(file.name, path)
    return graph


def _of_module(module: nn.Module) -> Iterator[Any]:
    first: dict[int, str] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        # One that stands in several places is told apart by where it stands first.
        yield name, type(part).__module__, type(part).__qualname__, part.training, first.setdefault(id(part), name)
        attributes = {key: value for key, value in vars(part).items() if not key.startswith("_")}
        yield sorted((key, _of_value(value)) for key, value in attributes.items())
    for name, tensor in (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ):
        yield name, first.setdefault(id(tensor), name), _of_value(tensor)


def _of_value(value: Any) -> Any:
    """What a trace can see of it."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), str(value.device), value.requires_grad
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, tuple | list):
        return type(value).__name__, [_of_value(one) for one in value]
    if isinstance(value, dict):
        return [(repr(key), _of_value(one)) for key, one in value.items()]
    if hasattr(value, "to_dict"):  # the config of a model of transformers
        return repr(value)
    if code := getattr(value, "__code__", None):
        closed = [_of_value(cell.cell_contents) for cell in value.__closure__ or ()]
        return value.__module__, value.__qualname__, code.co_code.hex(), repr(code.co_consts), closed
    return type(value).__module__, type(value).__qualname__
