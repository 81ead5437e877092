"""Tensors and optimizers moved between random layouts: every element where it belongs, training as if never moved."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.distributed as dist
from storage_cases import make_axes

from autopar.runtime.optimizer_state import move_optimizer
from autopar.runtime.ownership import Holder, Ownership
from autopar.runtime.replicas import Replicas
from autopar.runtime.reshard import moves, reshard
from autopar.runtime.shards import Shards
from autopar.runtime.storage import ParameterSpec
from autopar.runtime.ties import sum_tied
from autopar.sharding.placement import REPLICATED, SHARED, Split

CPU = torch.device("cpu")
SHAPES = [(), (12,), (5,), (24, 4), (7, 12), (12, 5), (3, 24, 2), (1, 12), (0, 4)]


def random_holder(draw: random.Random, ranks: tuple[int, ...], shape: tuple[int, ...]) -> Holder:
    tensor = draw.choice([d for d in (1, 2, 3, 4) if len(ranks) % d == 0])
    options = [REPLICATED, SHARED]
    for dim, size in enumerate(shape):
        options += [Split(dim, b) for b in (1, 2, 3) if size % (b * tensor) == 0]
    data = len(ranks) // tensor
    shards = draw.choice([1, *(d for d in range(1, data + 1) if data % d == 0)])
    return Holder(ranks, data, tensor, draw.choice(options), shards)


def random_ownership(draw: random.Random, world: int, shape: tuple[int, ...], num_holders: int = 0) -> Ownership:
    """One to three stages out of a world cut into runs of ranks."""
    cuts = sorted(draw.sample(range(1, world), draw.randint(0, min(2, world - 1))))
    runs = [tuple(range(a, b)) for a, b in zip([0, *cuts], [*cuts, world], strict=True)]
    chosen = draw.sample(runs, draw.randint(1, len(runs)) if draw.random() < 0.3 else 1)
    return Ownership(shape, tuple(random_holder(draw, ranks, shape) for ranks in sorted(chosen)))


@pytest.mark.parametrize("seed", range(3))
def test_parts_cover_every_element_once(seed):
    """`counts` marks each element of the tensor on exactly one rank, and `take` agrees with torch's own chunks."""
    draw = random.Random(seed)
    for _ in range(200):
        ownership = random_ownership(draw, 6, draw.choice(SHAPES))
        whole = torch.arange(torch.Size(ownership.shape).numel()).view(ownership.shape)
        counted = [ownership.take(whole, r).flatten() for r in ownership.ranks if ownership.counts(r)]
        assert torch.cat(counted).sort().values.tolist() == whole.flatten().tolist()
        for rank in ownership.ranks:
            holder = ownership.holder(rank)
            data_index, tensor_index = holder.coordinates(rank)
            part = whole
            if holder.split:
                dim, blocks = holder.split.dim, holder.split.blocks
                runs = part.chunk(blocks * holder.tensor, dim)
                part = torch.cat(runs[tensor_index :: holder.tensor], dim) if part.numel() else part
            if holder.shards > 1 and part.ndim:
                chunks, shard = part.chunk(holder.shards), data_index % holder.shards
                part = chunks[shard] if shard < len(chunks) else part[:0]
            assert ownership.local_shape(rank) == tuple(ownership.take(whole, rank).shape)
            assert torch.equal(ownership.take(whole, rank), part) or not part.numel()


@pytest.mark.parametrize("seed", range(3))
def test_moves_match_between_ranks(seed):
    """What one rank sends is what the other expects, and every new part is filled exactly once."""
    draw = random.Random(seed)
    for _ in range(60):
        shape = draw.choice(SHAPES)
        old, new = random_ownership(draw, 6, shape), random_ownership(draw, 6, shape)
        all_moves = [moves(old, new, rank) for rank in range(6)]
        for rank, job in enumerate(all_moves):
            for peer, boxes in job.sends.items():
                assert all_moves[peer].receives[rank] == boxes
            for peer, boxes in job.receives.items():
                assert all_moves[peer].sends[rank] == boxes
            if rank in new.ranks and not job.kept:
                filled = torch.zeros(new.local_shape(rank))
                for box in [*job.copies, *(b for boxes in job.receives.values() for b in boxes)]:
                    filled[tuple(slice(s, s + n) for s, n in zip(box.mine, box.size, strict=True))] += 1
                assert bool((filled == 1).all())


def move_random(seed: int) -> int:
    draw = random.Random(seed)
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(seed)
    whole, old, new, dtypes = {}, {}, {}, {}
    for number in range(40):
        name, shape = f"p{number}", draw.choice(SHAPES)
        dtypes[name] = draw.choice([torch.float32, torch.bfloat16, torch.float64, torch.int8])
        whole[name] = (torch.randn(shape, generator=generator) * 50).to(dtypes[name])
        old[name], new[name] = (random_ownership(draw, world, shape) for _ in range(2))
        if number % 5 == 0:
            new[name] = old[name]
    held = {name: old[name].take(whole[name], rank) for name in whole if rank in old[name].ranks}
    moved = reshard(held, old, new, dtypes, rank, CPU, batch_bytes=draw.choice([1, 1000, 10**6]))
    assert moved.keys() == {name for name in whole if rank in new[name].ranks}
    for name, tensor in moved.items():
        assert torch.equal(tensor, new[name].take(whole[name], rank)), name
    return len(moved)


def test_reshard_is_exact(pool):
    for seed in range(6):
        assert sum(pool.run(move_random, seed, world_size=4)) > 40


def tie_random(seed: int) -> None:
    draw = random.Random(seed)
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(seed)
    tied, sums, gradients = {}, {}, {}
    for number in range(10):
        name, shape = f"p{number}", draw.choice(SHAPES)
        runs = draw.choice([[(0,), (1, 2), (3,)], [(0, 1), (2, 3)], [(0,), (3,)]])
        tied[name] = Ownership(shape, tuple(random_holder(draw, ranks, shape) for ranks in runs))
        summands = [torch.randn(shape, generator=generator) for _ in runs]
        total = summands[0].clone()
        for summand, holder in zip(summands[1:], tied[name].holders[1:], strict=True):
            total += summand * (number != 3 or holder is not tied[name].holders[-1])
        sums[name] = total
        for summand, holder in zip(summands, tied[name].holders, strict=True):
            if rank in holder.ranks and (number != 3 or holder is not tied[name].holders[-1]):
                gradients[name] = tied[name].take(summand, rank)
    sum_tied(gradients, tied, dict.fromkeys(tied, torch.float32), rank, CPU)
    for name, ownership in tied.items():
        if rank in ownership.ranks:
            assert torch.equal(gradients[name], ownership.take(sums[name], rank)), name


def test_tied_gradients_are_summed_over_stages_of_any_layout(pool):
    for seed in range(4):
        pool.run(tie_random, seed, world_size=4)


def random_plan(draw: random.Random, shapes: dict[str, tuple[int, ...]]) -> dict[str, Ownership]:
    """Two stages of two ranks, or one of four; the last parameter is tied between them."""
    stages = draw.choice([[(0, 1, 2, 3)], [(0, 1), (2, 3)]])
    grids = []
    for ranks in stages:
        tensor = draw.choice([d for d in (1, 2, 4) if len(ranks) % d == 0])
        grids.append((tensor, draw.choice([d for d in (1, 2, 4) if len(ranks) // tensor % d == 0])))
    plan = {}
    for number, (name, shape) in enumerate(shapes.items()):
        holders = []
        for index in range(len(stages)) if number == len(shapes) - 1 else [number * len(stages) // len(shapes)]:
            ranks, (tensor, shards) = stages[index], grids[index]
            options = [REPLICATED] + [Split(d, b) for d, n in enumerate(shape) for b in (1, 3) if n % (b * tensor) == 0]
            holders.append(Holder(ranks, len(ranks) // tensor, tensor, draw.choice(options), shards))
        plan[name] = Ownership(shape, tuple(holders))
    return plan


def stored(plan: dict[str, Ownership], values: dict[str, torch.Tensor], axes_of: dict) -> dict[str, torch.nn.Parameter]:
    rank = dist.get_rank()
    mine = [name for name, o in plan.items() if rank in o.ranks]
    holder = plan[mine[0]].holder(rank)
    axes = axes_of[holder.ranks, holder.tensor, holder.shards % holder.data]
    kind = Shards if holder.shards > 1 else Replicas
    specs = [ParameterSpec(name, torch.float64, plan[name]) for name in mine]
    return kind(specs, {0: mine}, values, axes).parameters


def train_and_move(seed: int, make: str) -> None:
    """Optimizer steps with random gradients, with a move in between every two: as on one process, and one object."""
    draw = random.Random(seed)
    rank = dist.get_rank()
    axes_of = {}
    for ranks, tensor in itertools.product(((0, 1, 2, 3), (0, 1), (2, 3)), (1, 2, 4)):
        data = len(ranks) // tensor
        for group in (0, 1, 2):
            if data and group < max(1, data):
                # A group of one is no hybrid, but what an uncut parameter's holder says.
                axes_of[ranks, tensor, group] = make_axes(data, tensor, ranks, group if group > 1 else 0)
    shapes = {f"layer{i}.weight": draw.choice([s for s in SHAPES if s != (0, 4)]) for i in range(8)}
    shapes["layer0.weight"] = ()
    generator = torch.Generator().manual_seed(seed)
    whole = {name: torch.randn(s, generator=generator, dtype=torch.float64) for name, s in shapes.items()}
    plan = random_plan(draw, shapes)
    local = {name: o.take(whole[name], rank) for name, o in plan.items() if rank in o.ranks}
    parameters = stored(plan, local, axes_of)

    def optimizer_for(named):
        heavy = [p for n, p in named.items() if n[5] in "0246"]
        light = [p for n, p in named.items() if n[5] not in "0246"]
        groups = [{"params": heavy, "weight_decay": 0.3}, {"params": light}]
        if make == "sgd":
            return torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
        return torch.optim.AdamW(groups, lr=0.05, amsgrad=make == "amsgrad")

    oracle = {name: t.clone().requires_grad_() for name, t in whole.items()}
    single, optimizer = optimizer_for(oracle), optimizer_for(parameters)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    single_scheduler = torch.optim.lr_scheduler.ExponentialLR(single, 0.9)
    for _ in range(6):
        gradients = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
        for name, parameter in parameters.items():
            gradient = plan[name].take(gradients[name], rank)
            parameter.grad = torch.zeros_like(parameter)
            getattr(parameter.grad, "_local_tensor", parameter.grad).copy_(gradient)
        for name, tensor in oracle.items():
            tensor.grad = gradients[name]
        for each in (optimizer, scheduler, single, single_scheduler):
            each.step()
        for name, parameter in parameters.items():
            have = getattr(parameter, "_local_tensor", parameter).detach()
            want = plan[name].take(oracle[name].detach(), rank)
            torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-9)
        target = random_plan(draw, shapes)
        held = {name: getattr(p, "_local_tensor", p).detach() for name, p in parameters.items()}
        dtypes = dict.fromkeys(shapes, torch.float64)
        after = stored(target, reshard(held, plan, target, dtypes, rank, CPU), axes_of)
        move_optimizer(optimizer, parameters, after, plan, target, rank, CPU)
        plan, parameters = target, after
        assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in parameters.values()}
        assert len(optimizer.state) == len(parameters)


@pytest.mark.parametrize(("seed", "make"), [(0, "adamw"), (1, "adamw"), (2, "sgd"), (3, "amsgrad")])
def test_training_goes_on_in_other_plans(pool, seed, make):
    pool.run(train_and_move, seed, make, world_size=4)


def move_factored() -> str:
    parameter = torch.nn.Parameter(torch.zeros(4, 4))
    optimizer = torch.optim.Adafactor([parameter])
    parameter.grad = torch.ones(4, 4)
    optimizer.step()
    plan = {"w": Ownership((4, 4), (Holder((0, 1), 2, 1, REPLICATED),))}
    before = {"w": parameter} if dist.get_rank() == 1 else {}
    try:
        move_optimizer(optimizer, before, before, plan, plan, dist.get_rank(), CPU)
    except ValueError as error:
        return str(error)
    return ""


def test_state_that_cannot_be_moved_is_named_on_every_rank(pool):
    first, second = pool.run(move_factored, world_size=2)
    assert first == second and "row_var" in first and "Adafactor" in first
