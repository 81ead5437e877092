"""A module's outputs besides the loss, whole on every rank, from the parts that ranks and microbatches have computed.

Each rank puts its parts where they belong into a tensor of zeros, and one sum over the world makes it whole everywhere:
summands, slices of unequal size, and ranks that have nothing of it, all in one. It moves more bytes than a gather among
the ranks that have parts and a broadcast would; outputs are asked for to be looked at, not in every step.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from ..graph import Graph
from ..sharding.batch import batch_layout
from ..sharding.placement import PARTIAL, Split
from .build import Runtime

Parts = Mapping[str, Mapping[int, Tensor]]
"""By name of the tensor, and microbatch."""


def check_outputs(graph: Graph) -> None:
    """ValueError for an output that no block computes."""
    for path, name in graph.outputs:
        producer = graph.producer.get(name)
        if producer is None or producer.name in graph.side_ops:
            raise ValueError(
                f"outputs='all': output {'.'.join(map(str, path)) or name!r} of {graph.name} depends on no parameter (it is "
                f"{name!r}); expected outputs that the model computes: return it from elsewhere, or use outputs='loss'"
            )


def whole_outputs(runtime: Runtime, graph: Graph, parts: Parts, device: torch.device) -> dict[tuple, Tensor]:
    """Every output by path, detached. All ranks call it, after a program of theirs has ended."""
    found: dict[str, Tensor] = {}
    for _, name in graph.outputs:
        if name not in found:
            found[name] = _whole(runtime, graph, name, parts.get(name, {}), device)
    return {path: found[name] for path, name in graph.outputs}


@torch.no_grad()
def _whole(runtime: Runtime, graph: Graph, name: str, parts: Mapping[int, Tensor], device: torch.device) -> Tensor:
    tensor, op = graph.tensors[name], graph.producer[name]
    whole = torch.zeros(tensor.shape, dtype=_summable(tensor.dtype), device=device)
    for stage, mesh in runtime.groups.meshes.items():
        span = runtime.plan.stages[stage]
        if not any(op.name in block.ops for block in graph.blocks[span.start : span.stop]) or mesh.tensor.rank != 0:
            continue
        rows = runtime.compiled[stage].rows
        placement = batch_layout(graph, rows.units).placements[name]
        for microbatch, part in parts.items():
            if isinstance(placement, Split):
                dim = placement.dim
                seen = whole.unflatten(dim, (placement.blocks, rows.units, -1))
                own = seen.narrow(dim + 1, rows.first(microbatch), rows.length)
                own.copy_(part.unflatten(dim, (placement.blocks, rows.length, -1)))
            elif placement == PARTIAL:
                whole += part
            elif microbatch == 0 and mesh.data.rank == 0:
                whole.copy_(part)
    if runtime.plan.world_size > 1:
        dist.all_reduce(torch.view_as_real(whole) if whole.is_complex() else whole)
    return whole.to(tensor.dtype)


def _summable(dtype: torch.dtype) -> torch.dtype:
    """A dtype in which every backend sums, and a value and zeros give that value."""
    narrow = {torch.bool: torch.uint8, torch.float16: torch.float32, torch.bfloat16: torch.float32}
    return narrow.get(dtype, dtype)
