"""Parameters at rest, gradients and their reductions: several gloo processes against one process."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from storage_cases import block_function, make_axes, make_case, oracle_loss, run_step

from autopar.runtime.clip import clip_grad_norm_
from autopar.runtime.ownership import Holder, Ownership
from autopar.runtime.replicas import Replicas
from autopar.runtime.shards import Shards
from autopar.runtime.storage import ParameterSpec, at_rest, deliver
from autopar.sharding.placement import REPLICATED, Split


def build(case, axes, zero, **options):
    values = {s.fqn: s.ownership.take(case.whole[s.fqn], axes.rank) for s in case.specs}
    kind = Shards if zero == 3 and axes.data.size > 1 else Replicas
    storage = kind(case.specs, case.blocks, values, axes, **options)
    for index in case.blocks:
        storage.bind(index, block_function(case, index, axes.rank))
    return storage


def train(seed: int, data: int, tensor: int, zero: int) -> None:
    """Ten AdamW steps: some with gradient accumulation, some with two losses in one backward, evaluation between."""
    ranks = tuple(range(data * tensor))
    axes = make_axes(data, tensor)
    for mixed in (False, True):
        dtypes = (torch.float64, torch.float32) if mixed else (torch.float64,)
        case = make_case(seed + mixed, ranks, data, tensor, zero, dtypes)
        storage = build(case, axes, zero, bucket_bytes=2000)
        compare_training(case, axes, storage, f"{seed=} {data=} {tensor=} {zero=} {mixed=}")


def compare_training(case, axes, storage, name: str) -> None:
    rank, data = axes.rank, axes.data
    oracle = {s.fqn: case.whole[s.fqn].clone().requires_grad_(s.requires_grad) for s in case.specs}
    specs = {s.fqn: s for s in case.specs}
    trainable = [fqn for fqn, p in oracle.items() if p.requires_grad]
    assert [f for f, p in storage.parameters.items() if p.requires_grad] == trainable
    for fqn, parameter in storage.parameters.items():
        assert tuple(parameter.shape) == specs[fqn].ownership.shape
    single = torch.optim.AdamW(oracle.values(), lr=0.05)
    optimizer = torch.optim.AdamW(storage.parameters.values(), lr=0.05)
    generator = torch.Generator().manual_seed(7)

    # Norms sum float32 terms in another order than one process does, and clipping spreads that to all gradients.
    tolerance = 2e-4 if torch.float32 in {s.dtype for s in case.specs} else 1e-9

    def check(step: int, what: str) -> None:
        for fqn in trainable:
            mine = storage.parameters[fqn]
            pairs = [(mine, oracle[fqn])] + ([(mine.grad, oracle[fqn].grad)] if what == "gradients" else [])
            for have, want in pairs:
                local = have.to_local() if hasattr(have, "to_local") else have
                expected = specs[fqn].ownership.take(want.detach(), rank)
                message = partial("{} {} {}: {}".format, name, step, fqn)
                torch.testing.assert_close(local.detach(), expected, rtol=tolerance, atol=tolerance, msg=message)

    for step in range(10):
        microbatches = (1, 2, 4)[step % 3]
        calls = (1, 1, 2)[step % 3]
        stashes = []
        for _ in range(calls):
            rows = torch.rand(data.size * 4, generator=generator, dtype=torch.float64)
            local = rows.view(data.size, 4)[data.rank]
            before = {fqn: p.grad for fqn, p in storage.parameters.items()}
            gradients = run_step(storage, case, local, microbatches, ("1f1b", "gpipe")[step % 2], step in (3, 4))
            assert all(storage.parameters[fqn].grad is grad for fqn, grad in before.items())
            scale = 1.0 if step % 4 else torch.tensor(0.5)
            stashes.append((gradients, scale))
            if step % 2 == 0:
                deliver(storage.parameters, *stashes.pop())
            (oracle_loss(case, oracle, rows) * scale).backward()
        for stash in stashes:
            deliver(storage.parameters, *stash)
        check(step, "gradients")
        with torch.no_grad():
            storage.forward(
                lambda total, rows: storage.block(2)(rows, storage.block(0)(rows, total)), torch.zeros(()), rows
            )
        norm_type = (2.0, 1.0, float("inf"), 3.0)[step % 4]
        max_norm = 10.0 ** (step % 3 - 1)
        want = torch.nn.utils.clip_grad_norm_(oracle.values(), max_norm, norm_type)
        have = clip_grad_norm_(storage.parameters.values(), max_norm, norm_type)
        torch.testing.assert_close(have, want.float(), rtol=1e-5, atol=0)
        check(step, "gradients")
        optimizer.step()
        single.step()
        check(step, "parameters")
        optimizer.zero_grad(set_to_none=step % 3 != 0)
        single.zero_grad(set_to_none=step % 3 != 0)


@pytest.mark.parametrize("zero", [0, 3])
@pytest.mark.parametrize(("data", "tensor"), [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4)])
def test_training_equals_one_process(pool, data, tensor, zero):
    """Every gradient, every parameter after each of ten steps, and every clipped norm."""
    pool.run(train, 10 * data + tensor, data, tensor, zero, world_size=data * tensor)


def reuse_memory() -> None:
    """Buckets: memory in use is left alone, memory given back is used again, what got no gradient stays without."""
    axes = make_axes(2, 1)
    shapes = {"a": (4, 3), "b": (5,), "unused": (7,)}
    specs = [
        ParameterSpec(name, torch.float32, Ownership(shape, (Holder((0, 1), 2, 1, REPLICATED),)))
        for name, shape in shapes.items()
    ]
    storage = Replicas(specs, {0: tuple(shapes)}, {n: torch.ones(s) for n, s in shapes.items()}, axes)
    storage.bind(0, lambda parameters, context, x: x * (parameters[0].sum() + 2 * parameters[1].sum()))

    def step() -> dict[str, torch.Tensor]:
        storage.begin_step()
        loss = storage.forward(storage.block(0), None, torch.tensor(axes.rank + 1.0))
        storage.begin_last_backward()
        loss.backward()
        return storage.finish()

    first = step()
    assert first.keys() == {"a", "b"} and bool((first["a"] == 3).all()) and bool((first["b"] == 6).all())
    address = first["a"].untyped_storage().data_ptr()
    deliver(storage.parameters, first)
    del first
    second = step()
    assert second["a"].untyped_storage().data_ptr() != address
    deliver(storage.parameters, second)
    assert all(bool((storage.parameters[name].grad == value).all()) for name, value in (("a", 6), ("b", 12)))
    assert storage.parameters["unused"].grad is None
    addresses = set()
    for _ in range(4):
        for parameter in storage.parameters.values():
            parameter.grad = None
        second = step()
        addresses.add(second["a"].untyped_storage().data_ptr())
        deliver(storage.parameters, second, torch.tensor(0.5))
        assert bool((storage.parameters["a"].grad == 1.5).all())
        del second
    assert len(addresses) == 1
    keep = storage.parameters["a"].grad[1:]
    storage.parameters["a"].grad = storage.parameters["b"].grad = None
    step()
    assert bool((keep == 1.5).all())


def test_gradient_memory(pool):
    pool.run(reuse_memory, world_size=2)


def clip_pipeline(seed: int) -> None:
    """Two stages of two ranks in different layouts, with a parameter that both hold, and one that has no gradient."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(seed)
    sides = [make_axes(2, 1, (0, 1)), make_axes(1, 2, (2, 3))]
    axes = next(side for side in sides if side is not None)
    shapes = {"first": (5, 4), "second": (4, 6), "scalar": (), "tied": (6, 4), "idle": (4,)}
    left = {name: Holder((0, 1), 2, 1, REPLICATED, sharded=name != "scalar") for name in shapes}
    right = {name: Holder((2, 3), 1, 2, REPLICATED if name == "scalar" else Split(0)) for name in shapes}
    holders = {"first": (left,), "second": (right,), "scalar": (right,), "tied": (left, right), "idle": (right,)}
    whole = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    specs = [
        ParameterSpec(name, torch.float32, Ownership(shapes[name], tuple(side[name] for side in sides)))
        for name, sides in holders.items()
    ]
    mine = [spec for spec in specs if rank in spec.ownership.ranks]
    values = {spec.fqn: spec.ownership.take(whole[spec.fqn], rank) for spec in mine}
    parameters = at_rest(mine, values, axes)
    for norm_type in (1.0, 2.0, float("inf")):
        oracle = {name: torch.zeros(shape, requires_grad=True) for name, shape in shapes.items()}
        for name, p in oracle.items():
            p.grad = None if name == "idle" else whole[name].clone()
        for spec in mine:
            parameters[spec.fqn].grad = None
        deliver(parameters, {s.fqn: s.ownership.take(whole[s.fqn], rank) for s in mine if s.fqn != "idle"})
        want = torch.nn.utils.clip_grad_norm_(oracle.values(), 0.7, norm_type)
        have = clip_grad_norm_(parameters.values(), 0.7, norm_type)
        torch.testing.assert_close(have, want, rtol=1e-5, atol=0)
        for spec in mine:
            if spec.fqn != "idle":
                local = parameters[spec.fqn].grad.to_local()
                torch.testing.assert_close(local, spec.ownership.take(oracle[spec.fqn].grad, rank))
    with pytest.raises(ValueError, match="autopar.parallelize"):
        clip_grad_norm_([torch.nn.Parameter(torch.ones(2))], 1.0)


def test_clip_over_stages_and_ties(pool):
    pool.run(clip_pipeline, 0, world_size=4)
