"""Seeded random parameter sets, and a computation on them whose exact gradient is known on one process."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from autopar.runtime.axis import Axis
from autopar.runtime.ownership import Holder, Ownership
from autopar.runtime.storage import ParameterSpec, StageAxes
from autopar.sharding.placement import REPLICATED, SHARED, Split


@dataclass(frozen=True)
class Case:
    """specs, and per block the names it uses. `common` names are used by two blocks."""

    specs: tuple[ParameterSpec, ...]
    blocks: dict[int, tuple[str, ...]]
    whole: dict[str, torch.Tensor]
    coefficients: dict[str, torch.Tensor]


def make_axes(data: int, tensor: int, ranks: tuple[int, ...] | None = None, zero_group: int = 0) -> StageAxes:
    """Groups over `ranks` (all by default); every process of the world must call this, in the same order."""
    ranks = ranks or tuple(range(data * tensor))
    me = dist.get_rank()
    d, t = divmod(ranks.index(me), tensor) if me in ranks else (0, 0)
    axes = {}
    columns = [ranks[i::tensor] for i in range(tensor)]
    wanted = [
        ("data", data, columns, d),
        ("tensor", tensor, [ranks[i * tensor : (i + 1) * tensor] for i in range(data)], t),
        ("stage", data * tensor, [ranks], d * tensor + t),
    ]
    if zero_group:
        n = zero_group
        wanted.append(("copies", data // n, [column[i::n] for column in columns for i in range(n)], d // n))
        wanted.append(("shards", n, [column[i : i + n] for column in columns for i in range(0, data, n)], d % n))
    for name, size, lists, index in wanted:
        for members in lists:
            group = dist.new_group(list(members)) if size > 1 else None
            if me in members:
                axes[name] = Axis(name, index, size, members, group)
    if me not in ranks:
        return None
    hybrid = (axes["copies"], axes["shards"]) if zero_group else None
    return StageAxes(axes["data"], axes["tensor"], axes["stage"], me, torch.device("cpu"), hybrid=hybrid)


def make_case(seed: int, ranks: tuple[int, ...], data: int, tensor: int, shards: int, dtypes=(torch.float64,)) -> Case:
    """Three blocks of random parameters: scalars, uneven first dims, splits with and without blocks, frozen, tied.

    shards: data ranks that ZeRO cuts each parameter over."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    specs, blocks, whole, coefficients = [], {0: [], 1: [], 2: []}, {}, {}
    for number in range(14):
        block = number % 3
        kind = draw.choice(["scalar", "row", "matrix", "matrix", "cube"])
        factor = 4 * draw.choice([1, 3])
        shape = {
            "scalar": (),
            "row": (factor * draw.randint(1, 5),),
            "matrix": (factor * draw.randint(1, 9), draw.randint(1, 3) * factor),
            "cube": (draw.randint(1, 7), factor, 3),
        }[kind]
        options = [REPLICATED, SHARED]
        for dim, size in enumerate(shape):
            options += [Split(dim)] * 2 if size % tensor == 0 else []
            options += [Split(dim, 3)] * 2 if size % (3 * tensor) == 0 else []
        placement = draw.choice(options)
        ownership = Ownership(shape, (Holder(ranks, data, tensor, placement, shards if shape else 1),))
        fqn = f"layers.{block}.part{number}.weight"
        specs.append(ParameterSpec(fqn, draw.choice(dtypes), ownership, requires_grad=draw.random() > 0.1))
        blocks[block].append(fqn)
        whole[fqn] = torch.randn(shape, generator=generator, dtype=torch.float64).to(specs[-1].dtype)
        coefficients[fqn] = torch.randn(shape, generator=generator, dtype=torch.float64).to(specs[-1].dtype)
    # The first parameter is used by the first and by the last block, the way a tied embedding is.
    blocks[2].append(specs[0].fqn)
    return Case(tuple(specs), {k: tuple(v) for k, v in blocks.items()}, whole, coefficients)


def block_function(case: Case, index: int, rank: int):
    """total + sum over parameters of sum(sin(p c)) sum(rows), as this rank's share of it."""
    weights, coefficients = [], []
    for fqn in case.blocks[index]:
        ownership = next(s.ownership for s in case.specs if s.fqn == fqn)
        holder = ownership.holder(rank)
        unsharded = Ownership(ownership.shape, (Holder(holder.ranks, holder.data, holder.tensor, holder.placement),))
        coefficients.append(unsharded.take(case.coefficients[fqn], rank))
        tensor_index = holder.coordinates(rank)[1]
        # A shared parameter's gradient is a summand on each rank: unequal parts of one.
        total = holder.tensor * (holder.tensor + 1) / 2
        weights.append((tensor_index + 1) / total if holder.placement == SHARED else 1.0)

    def function(parameters, rows, total):
        for p, c, w in zip(parameters, coefficients, weights, strict=True):
            assert type(p) in (torch.Tensor, torch.nn.Parameter), type(p)
            total = total + (w * (p * c).sin().sum()).double() * rows.sum()
        return total

    return function


def oracle_loss(case: Case, parameters: dict[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for fqns in case.blocks.values():
        for fqn in fqns:
            total = total + (parameters[fqn] * case.coefficients[fqn]).sin().sum().double() * rows.sum()
    return total


def run_step(storage, case: Case, rows: torch.Tensor, microbatches: int, order: str = "1f1b", recompute: bool = False):
    """One program: forwards and backwards of all microbatches; returns the step's gradients."""

    def stage(total, part):
        for index in case.blocks:
            call = storage.block(index)
            total = checkpoint(call, part, total, use_reentrant=False) if recompute else call(part, total)
        return total

    parts = rows.chunk(microbatches)
    storage.begin_step()
    if order == "gpipe":
        outputs = [storage.forward(stage, torch.zeros((), dtype=torch.float64), part) for part in parts]
        for number, output in enumerate(outputs):
            if number == microbatches - 1:
                storage.begin_last_backward()
            output.backward()
    else:
        pending = []
        for number in range(microbatches + 1):
            if number < microbatches:
                pending.append(storage.forward(stage, torch.zeros((), dtype=torch.float64), parts[number]))
            if number >= 1:
                if number == microbatches:
                    storage.begin_last_backward()
                pending.pop(0).backward()
    return storage.finish()


class CountCollectives(TorchDispatchMode):
    """Counts the calls of process groups by kind; everything that communicates passes through here."""

    KINDS = {"gather": "allgather", "scatter": "reduce_scatter", "all_reduce": "allreduce", "all_to_all": "alltoall"}

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            kind = next((kind for kind, part in self.KINDS.items() if part in str(func)), "message")
            self.found[kind] = self.found.get(kind, 0) + 1
        return func(*args, **(kwargs or {}))
