"""The tensors as blocks compute them: where a plan's precision is narrower than float32, so are they.

Parameters as used, activations and their gradients take the precision; integers, masks and what is made wide on purpose
(float64) stay, and so does the loss itself. What lies at rest is counted elsewhere (cost/stage_memory.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from ..graph import Graph, Tensor

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def computed_tensors(graph: Graph, precision: str) -> Mapping[str, Tensor]:
    """`graph.tensors` in `precision`. ValueError for one that plans do not have."""
    if precision not in _DTYPES:
        raise ValueError(f"precision={precision!r}: expected one of {', '.join(map(repr, _DTYPES))}")
    # A graph that was captured in a precision has every tensor as it is computed.
    if precision == "float32" or graph.precision != "float32":
        return graph.tensors
    narrow = _DTYPES[precision]
    return {
        name: replace(t, dtype=narrow) if t.dtype == torch.float32 and t.shape and name != graph.loss else t
        for name, t in graph.tensors.items()
    }
