"""The blocks of a stage through `torch.compile`, once per kind.

Blocks of one kind, laid out alike, have the same generated code. They get one function, so that torch compiles it once
however many of them there are. Communication, random draws and what selective recomputation keeps stay outside of the
compiled graphs: a block with such calls is compiled in the pieces between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from .stage import CompiledBlock

Backend = str | Callable[..., Any]
"""What `torch.compile` takes: "inductor", "aot_eager", or a function."""


Functions = dict[str, list[tuple[tuple[Any, ...], Callable[..., Any]]]]
"""By generated code, for each set of constants in it, the compiled function."""


def compile_blocks(
    blocks: Sequence[CompiledBlock], backend: Backend, functions: Functions
) -> tuple[CompiledBlock, ...]:
    """The same blocks with compiled functions. Nothing is compiled before a function's first call.

    functions: those of other stages of this rank, to which new ones are added.
    """

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        """The compiled function of what does the same as `function`."""
        # The first line has the name, which is the only difference between blocks of a kind.
        body = function.source.partition("\n")[2]
        known = functions.setdefault(body, [])
        constants = tuple(function.constants.values())
        for others, found in known:
            if others == constants:
                return found
        known.append((constants, torch.compile(function, backend=backend, dynamic=False)))
        return known[-1][1]

    return tuple(replace(b, training=compiled(b.training), evaluation=compiled(b.evaluation)) for b in blocks)
