"""Which submodules stay whole: those that are marked, and those that turn out not to be traceable.

A trace that fails in some submodule is tried again with that one, and all of its class, kept whole (opaque.py). Where it
cannot be kept whole either (it fails on zeros too, or takes or returns more than tensors), the module around it is tried;
when nothing is left but the outermost module, the first error stands.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

from .draft import Untraceable

Result = TypeVar("Result")


def keeping_whole(module: torch.nn.Module, attempt: Callable[[frozenset[str]], Result]) -> Result:
    """`attempt(whole)`, with names of submodules to keep whole added until it does not raise `Untraceable`.

    Warns of each class that is kept whole, with the reason; raises the first error where that does not help.
    """
    whole: frozenset[str] = frozenset()
    reasons: dict[str, Untraceable] = {}
    first: Untraceable | None = None
    while True:
        try:
            result = attempt(whole)
        except Untraceable as error:
            first = first or error
            name = _next_to_keep(module, error.module, whole)
            if not name or getattr(module.get_submodule(error.module), "_autopar_opaque", False):
                raise first from first.__cause__
            kind = type(module.get_submodule(name))
            reasons[kind.__qualname__] = first
            whole |= {n for n, m in module.named_modules() if n and type(m) is kind}
            continue
        for kind_name, error in reasons.items():
            warnings.warn(
                f"{kind_name} is kept whole, replicated on every model axis: {error}. autopar.opaque on it says that this "
                "is meant",
                stacklevel=4,
            )
        return result


def _next_to_keep(module: torch.nn.Module, failed: str, whole: frozenset[str]) -> str:
    """The submodule to keep whole next: `failed`, or the module around what is whole already and did not help."""
    path = failed.split(".") if failed else []
    around = [".".join(path[:depth]) for depth in range(1, len(path) + 1)]
    tried = [i for i, name in enumerate(around) if name in whole]
    left = around[: tried[0]] if tried else around
    # Lists of modules, and modules of which only other methods are called, have no forward to replace.
    called = [name for name in left if type(module.get_submodule(name)).forward is not torch.nn.Module.forward]
    return called[-1] if called else ""
