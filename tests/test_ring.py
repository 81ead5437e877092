"""Attention with queries, keys and values split along the sequence, against the whole attention on one device."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from loopback import run
from torch import Tensor

from autopar.runtime.axis import Axis
from autopar.sharding.ring import ring_attention


def draw_case(seed: int, num_ranks: int, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any], Tensor]:
    """(query, key, value[, mask]), options and the gradient of the output of a random attention."""
    draw, values = random.Random(seed), torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=values, dtype=torch.float64).to(dtype)

    rows, columns = num_ranks * draw.choice([1, 3, 8]), num_ranks * draw.choice([1, 2, 8])
    size = draw.choice([4, 8])
    lead = (2, 4) if draw.random() < 0.8 else (3,)
    groups = draw.choice([4, 2, 1]) if len(lead) == 2 else lead[-1]
    causal = draw.random() < 0.5
    if causal and draw.random() < 0.7:
        columns = rows
    query, key = normal(*lead, rows, size), normal(*lead[:-1], groups, columns, size)
    value = normal(*lead[:-1], groups, columns, size if draw.random() < 0.7 else 6)
    options: dict[str, Any] = dict(is_causal=causal, scale=draw.choice([None, 0.3]), enable_gqa=groups != lead[-1])
    operands = [query, key, value]
    kind = draw.choice(["", "bool", "float", "hidden", "large"])
    if kind and not causal:
        shape = [n if draw.random() < 0.7 else 1 for n in lead] + [rows if draw.random() < 0.7 else 1, columns]
        keep = torch.rand(shape, generator=values) < 0.6
        if kind != "hidden":
            keep[..., :1] = True  # a row with nothing to see is drawn on purpose only
        if kind in ("bool", "hidden"):
            mask = keep
        else:
            mask = normal(*shape).masked_fill(~keep, torch.finfo(dtype).min if kind == "large" else -torch.inf)
        operands.append(mask)
    return operands, options, normal(*lead, rows, value.shape[-1])


def attend(operands: list[Tensor], options: dict[str, Any], axis: Axis | None = None) -> tuple[Tensor, list[Tensor]]:
    *differentiable, mask = operands if len(operands) == 4 else [*operands, None]
    leaves = [t.clone().requires_grad_() for t in differentiable]
    if axis is None:
        return F.scaled_dot_product_attention(*leaves, mask, **options), leaves
    return ring_attention(axis, *leaves, mask, **options), leaves


def on_rank(operands: list[Tensor], options: dict[str, Any], gradient: Tensor) -> list[Tensor]:
    """This rank's rows of the output and of the gradients of query, key and value."""
    rank, size = dist.get_rank(), dist.get_world_size()
    axis = Axis("tensor", rank, size, tuple(range(size)), dist.new_group(list(range(size))))
    parts = [t.chunk(size, -2)[rank] for t in operands[:3]]
    for mask in operands[3:]:
        parts.append(mask if mask.shape[-2] == 1 else mask.chunk(size, -2)[rank])
    out, leaves = attend(parts, options, axis)
    out.backward(gradient.chunk(size, -2)[rank])
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def compare(results: list[list[Tensor]], operands: list[Tensor], options: dict[str, Any], gradient: Tensor, case: Any):
    out, leaves = attend(operands, options)
    out.backward(gradient)
    tolerance = 1e-9 if out.dtype == torch.float64 else 1e-5
    for parts, expected in zip(zip(*results, strict=True), [out.detach(), *(t.grad for t in leaves)], strict=True):
        found = torch.cat(parts, -2)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, msg=lambda m: f"{case}: {m}")


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_it_is_the_whole_attention(num_ranks: int) -> None:
    for seed in range(40):
        dtype = torch.float64 if seed % 2 else torch.float32
        operands, options, gradient = draw_case(seed, num_ranks, dtype)
        results = run(on_rank, num_ranks, operands, options, gradient)
        compare(results, operands, options, gradient, (seed, options, [tuple(t.shape) for t in operands]))


def test_on_processes(pool) -> None:
    for seed in range(4):
        operands, options, gradient = draw_case(seed, 4, torch.float32)
        results = pool.run(on_rank, operands, options, gradient, world_size=4, timeout_s=60)
        compare(results, operands, options, gradient, seed)
