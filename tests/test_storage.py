"""Parameters at rest, gradients and their reductions: several gloo processes against one process."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from storage_cases import CountCollectives, block_function, make_axes, make_case, oracle_loss, run_step

from autopar.runtime.clip import clip_grad_norm_
from autopar.runtime.ownership import Holder, Ownership
from autopar.runtime.replicas import Replicas
from autopar.runtime.shards import Shards
from autopar.runtime.storage import ParameterSpec, at_rest, deliver
from autopar.sharding.placement import REPLICATED, Split


def build(case, axes, zero, **options):
    values = {s.fqn: s.ownership.take(case.whole[s.fqn], axes.rank) for s in case.specs}
    if zero:
        options["level"] = zero
    storage = (Shards if zero else Replicas)(case.specs, case.blocks, values, axes, **options)
    for index in case.blocks:
        storage.bind(index, block_function(case, index, axes.rank))
    return storage


def train(
    seed: int, data: int, tensor: int, levels: tuple[int, ...], zero_group: int = 0, offload: bool = False
) -> None:
    """Six AdamW steps: some with gradient accumulation, some with two losses in one backward, evaluation between."""
    ranks = tuple(range(data * tensor))
    axes = make_axes(data, tensor, zero_group=zero_group)
    for zero in levels:
        for mixed in (False, True):
            dtypes = (torch.float64, torch.float32) if mixed else (torch.float64,)
            case = make_case(seed + mixed, ranks, data, tensor, (zero_group or data) if zero else 1, dtypes)
            storage = build(case, axes, zero, bucket_bytes=2000, offload=offload)
            compare_training(case, axes, storage, f"{seed=} {data=} {tensor=} {zero=} {zero_group=} {mixed=}")


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

    for step in range(6):
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
            storage.begin_evaluation()
            for _ in range(2):
                storage.forward(
                    lambda total, rows: storage.block(2)(rows, storage.block(0)(rows, total)), torch.zeros(()), rows
                )
            storage.end_evaluation()
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


@pytest.mark.parametrize(
    ("data", "tensor"), [(1, 1), pytest.param(2, 1, marks=pytest.mark.slow), (1, 2), (4, 1), (2, 2), (1, 4)]
)
def test_training_equals_one_process(pool, data, tensor):
    """Every gradient, every parameter after each of six steps, and every clipped norm, at every level."""
    levels = (0, 1, 2, 3) if data > 1 else (0,)
    pool.run(train, 10 * data + tensor, data, tensor, levels, world_size=data * tensor)


def test_offloaded_training_equals_one_process(pool):
    pool.run(train, 9, 2, 2, (0, 2, 3), 0, True, world_size=4)


@pytest.mark.parametrize(
    ("seed", "tensor", "levels"), [(7, 1, (1, 2, 3)), pytest.param(8, 2, (3,), marks=pytest.mark.slow)]
)
def test_hybrid_training_equals_one_process(pool, seed, tensor, levels):
    pool.run(train, seed, 4, tensor, levels, 2, world_size=4 * tensor)


def collectives(storage, case, axes, microbatches: int, order: str) -> dict[str, int]:
    """How many collectives of each kind one step issues."""
    rows = torch.rand(4, dtype=torch.float64)
    run_step(storage, case, rows, microbatches, order)  # the first one may do more
    with CountCollectives() as counted:
        run_step(storage, case, rows, microbatches, order)
    return counted.found


def count_collectives(microbatches: int, order: str) -> None:
    """What the table in shards.py says, bucket by bucket."""
    for zero_group, levels in ((0, (0, 1, 2, 3)), (2, (1, 2, 3))):
        axes = make_axes(4, 1, zero_group=zero_group)
        for level in levels:
            # One bucket per block, one for the parameter that two blocks use, and one for scalars.
            case = make_case(0, (0, 1, 2, 3), 4, 1, (zero_group or 4) if level else 1)
            trainable = {s.fqn: s.ownership.shape for s in case.specs if s.requires_grad}
            shared = case.blocks[0][0]
            assert trainable[shared] and () in trainable.values()
            assert all(any(trainable.get(f) for f in fqns if f != shared) for fqns in case.blocks.values())
            want = {"gather": 4, "scatter": 4 if level == 1 else 4 * microbatches, "all_reduce": 1}
            want["all_reduce"] += 4 if zero_group else 0
            if level == 3:
                # Blocks are gathered for a forward and for a backward; what they share stays until a backward frees it.
                want["gather"] = 3 * 2 * microbatches + microbatches
            if level == 0:
                want = {"all_reduce": 1}
            have = collectives(build(case, axes, level), case, axes, microbatches, order)
            assert have == want, (level, zero_group, have, want)


@pytest.mark.parametrize(("microbatches", "order"), [(1, "1f1b"), (4, "1f1b"), (4, "gpipe")])
def test_number_of_collectives(pool, microbatches, order):
    pool.run(count_collectives, microbatches, order, world_size=4)


def fail_and_go_on() -> None:
    """A step or an evaluation that breaks off anywhere leaves nothing in the next step's gradients."""
    for zero_group, levels in ((0, (0, 1, 2, 3)), (2, (2, 3))):
        axes = make_axes(4, 1, zero_group=zero_group)
        for level in levels:
            case = make_case(0, (0, 1, 2, 3), 4, 1, (zero_group or 4) if level else 1)
            storage = build(case, axes, level)
            rows = torch.ones(4, dtype=torch.float64)
            want = {fqn: g.clone() for fqn, g in run_step(storage, case, rows, 2).items()}
            for where in (1, 5):
                # At the call of block `where`, or in its backward; the second microbatch begins with call 4.
                for backward in (False, True):
                    failing = Failing(case, axes.rank, where, backward)
                    for index in case.blocks:
                        storage.bind(index, failing.function(index))
                    with pytest.raises(Interrupted):
                        run_step(storage, case, rows, 4, "gpipe")
                    with pytest.raises(Interrupted), torch.no_grad():
                        failing.restart(where if not backward else 1)
                        storage.begin_evaluation()
                        for _ in range(2):
                            storage.forward(
                                partial(storage.block(0), rows),
                                storage.forward(partial(storage.block(1), rows), rows.sum()),
                            )
                        raise Interrupted
                    for index in case.blocks:
                        storage.bind(index, block_function(case, index, axes.rank))
                    have = run_step(storage, case, rows, 2)
                    assert have.keys() == want.keys()
                    for fqn, gradient in want.items():
                        torch.testing.assert_close(have[fqn], gradient, msg=f"{level=} {where=} {backward=} {fqn}")


class Interrupted(Exception):
    pass


class Failing:
    """Blocks that raise in call number `where` or, if `backward`, when its gradient arrives."""

    def __init__(self, case, rank: int, where: int, backward: bool) -> None:
        self.case, self.rank, self.backward = case, rank, backward
        self.restart(where)

    def restart(self, where: int) -> None:
        self.where, self.calls = where, 0

    def function(self, index: int):
        whole = block_function(self.case, index, self.rank)

        def call(*arguments):
            self.calls += 1
            result = whole(*arguments)
            if self.calls == self.where:
                if not self.backward or not result.requires_grad:
                    raise Interrupted
                result.register_hook(self.stop)
            return result

        return call

    def stop(self, gradient: torch.Tensor) -> None:
        raise Interrupted


def test_failed_steps_leave_no_trace(pool):
    pool.run(fail_and_go_on, world_size=4)


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
    left = {name: Holder((0, 1), 2, 1, REPLICATED, shards=1 if name == "scalar" else 2) for name in shapes}
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
