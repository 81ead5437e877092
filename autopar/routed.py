"""Rows routed to groups: each row is treated by the weights of its group. The op behind a mixture of experts.

`routed_rows` sorts rows by group, treats them by a `Body` of ordinary ops (grouped products, activations, norms), and puts
them back. A body treats rows alike, whatever rows stand beside them: so any part of the rows, in any order by group, gives
the same rows, and that is what makes it splittable (sharding/rules_routed.py).

    N tokens, K groups chosen by each, S = N K rows, E groups
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .graph import DEVICE, Op, Tensor, map_refs

ROWS, GROUPS, ENDS = "rows", "groups", "ends"


def operand(i: int) -> str:
    return f"operand{i}"


def weight(i: int) -> str:
    return f"weight{i}"


def shared(i: int) -> str:
    return f"shared{i}"


@dataclass(frozen=True, slots=True)
class Step:
    """One call of a body on values by name."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    outputs: tuple[str, ...]
    returns_sequence: bool


@dataclass(frozen=True)
class Body:
    """Ops on values by name, of which there are in the beginning: `ROWS` of tokens, sorted by group; `GROUPS`, the group
    of each row; `ENDS`, where each group's rows end; operands, a row of each per row; weights, one per group; and shared
    weights. tensors: the forms of all values when there are S rows; no op says S in its arguments."""

    ops: tuple[Op, ...]
    output: str
    tensors: tuple[Tensor, ...]

    def run(self, values: dict[str, torch.Tensor]) -> torch.Tensor:
        from .ops import resolve

        steps = [Step(resolve(op.target), op.args, op.kwargs, op.outputs, op.returns_sequence) for op in self.ops]
        return run_steps(steps, values, self.output)


def run_steps(steps: Sequence[Step], values: dict[str, torch.Tensor], output: str) -> torch.Tensor:
    device = values[ROWS].device

    def fill(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(fill(item) for item in value)
        return device if value is DEVICE else value

    for step in steps:
        args, kwargs = map_refs((step.args, tuple(v for _, v in step.kwargs)), lambda ref: values[ref.name])
        named = {name: fill(value) for (name, _), value in zip(step.kwargs, kwargs, strict=True)}
        out = step.function(*fill(args), **named)
        values.update(zip(step.outputs, out if len(step.outputs) > 1 or step.returns_sequence else (out,), strict=True))
    return values[output]


def treat(
    body: Any,
    rows: torch.Tensor,
    groups: torch.Tensor,
    ends: torch.Tensor,
    operands: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    shared_weights: Sequence[torch.Tensor],
) -> torch.Tensor:
    """The body on rows that are sorted by group."""
    values = {ROWS: rows, GROUPS: groups, ENDS: ends}
    values |= {operand(i): t for i, t in enumerate(operands)}
    values |= {weight(i): t for i, t in enumerate(weights)}
    values |= {shared(i): t for i, t in enumerate(shared_weights)}
    return body.run(values)


def counts_of(groups: torch.Tensor, num_groups: int) -> torch.Tensor:
    """How many rows each group has; rows of other groups do not count."""
    inside = (groups >= 0) & (groups < num_groups)
    counts = torch.zeros(num_groups, dtype=torch.int64, device=groups.device)
    return counts.scatter_add(0, groups.clamp(0, num_groups - 1).long(), inside.long())


def routed_rows(
    tokens: torch.Tensor,
    groups: torch.Tensor,
    operands: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    shared_weights: Sequence[torch.Tensor],
    body: Any,
    repeat: int,
    num_groups: int,
) -> torch.Tensor:
    """tokens [N, ..], groups [S], operands [S, ..], weights [E, ..] -> [S, ..]: row j is token j // K, treated by the
    weights of group groups[j] and by operand rows j. repeat: K; num_groups: E."""
    order = groups.argsort()
    ends = counts_of(groups, num_groups).cumsum(0).to(torch.int32)
    treated = treat(
        body, tokens[order // repeat], groups[order], ends, [t[order] for t in operands], weights, shared_weights
    )
    return treated[order.argsort()]
