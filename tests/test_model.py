"""The parallel module from the outside: failures, dropout, meta initialisation, refinement and moving between plans."""

from __future__ import annotations

import copy
import time
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from plan_cases import random_plan
from pool import RankError
from test_parity import call, parallel
from torch import Tensor, nn

import autopar
from autopar.cluster.spec import Cluster
from autopar.runtime.failure import RankFailure
from autopar.runtime.torch_private import local_tensor

PLANS = [
    dict(data=4, tensor=1, pipeline=1, microbatches=1, zero=1, zero_group=2),
    dict(data=2, tensor=1, pipeline=2, microbatches=2, zero=3),
    dict(data=1, tensor=2, pipeline=2, microbatches=4),
    dict(data=2, tensor=2, pipeline=1, microbatches=1),
]


def wrong_batch(key: str) -> list[str]:
    model, example, _, _ = parallel("build_two_inputs", PLANS[3])
    messages = []
    for change in (lambda t: t[:-1], lambda t: t.to(torch.complex64), lambda t: None):
        try:
            model(**{**example, key: change(example[key])})
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_a_batch_unlike_the_example(pool) -> None:
    _, example, _ = models.build_two_inputs()
    key = next(iter(example))
    for messages in pool.run(wrong_batch, key, world_size=4):
        assert len(messages) == 3
        assert all(repr(key) in m and "expected" in m or "example had" in m for m in messages), messages
        assert "pass the global batch" in messages[0]


class FailsOnRank(nn.Module):
    """Raises in the third call on one rank, in the middle of a program."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if dist.is_initialized() and dist.get_rank() == 1 and self.calls > 2:
            raise ArithmeticError("the third call was one too many")
        return x * 2


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.middle = autopar.opaque(FailsOnRank())
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x))).square().mean()


def one_rank_fails() -> tuple[str, float]:
    torch.manual_seed(0)
    module, example = Failing(), torch.randn(8, 8)
    cluster = Cluster.preset("cpu", hosts=1, devices_per_host=2)
    model = autopar.parallelize(module, example, cluster=cluster, data=2, microbatches=1, zero=0)
    start = time.monotonic()
    try:
        for _ in range(5):
            model(example).backward()
            start = time.monotonic()
    except (RankFailure, ArithmeticError) as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - start
    return "nothing failed", 0.0


@pytest.mark.alone
def test_one_rank_fails_and_all_stop(pool) -> None:
    other, failing = pool.run(one_rank_fails, world_size=2)
    assert failing[0] == "ArithmeticError: the third call was one too many"
    assert "rank 1 failed in 0F0 of stage 0: ArithmeticError: the third call was one too many" in other[0]
    assert max(other[1], failing[1]) < 10


def dropout_run(plan: dict[str, Any]) -> tuple[list[float], float, dict[str, Tensor]]:
    model, example, _, _ = parallel("build_gpt2_dropout", plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = call(model, example)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        evaluated = [call(model.eval(), example).item() for _ in range(2)]
    assert evaluated[0] == evaluated[1], "evaluation drew random numbers"
    parts = {n: local_tensor(p.detach()).clone() for n, p in model.named_parameters()}
    return losses, evaluated[0], {n: t for n, t in parts.items() if model_is_replicated(model, n)}


def model_is_replicated(model: autopar.Model, name: str) -> bool:
    ownership = dict(model.named_parameters())[name].autopar.ownership
    return all(h.split is None and h.shards == 1 for h in ownership.holders)


@pytest.mark.parametrize("plan", PLANS)
def test_replicas_stay_equal_under_dropout(pool, plan: dict[str, Any]) -> None:
    results = pool.run(dropout_run, plan, world_size=4, timeout_s=120)
    assert all(result[:2] == results[0][:2] for result in results), "ranks disagree about the loss"
    held: dict[str, Tensor] = {}
    for _, _, parts in results:
        for name, tensor in parts.items():
            assert torch.equal(held.setdefault(name, tensor), tensor), f"replicas of {name} differ"


class Kept(nn.Module):
    """The share of ones that dropout keeps, in the loss's gradient with respect to one scale per feature."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4096))

    def forward(self, x: Tensor) -> Tensor:
        return (nn.functional.dropout(x * self.scale, 0.3) > 0).float().mul(x * self.scale).mean()


def kept_share(plan: dict[str, Any]) -> list[float]:
    example = torch.ones(8, 4096)
    graph = autopar.capture(Kept(), example)
    world = plan["data"] * plan["tensor"]
    model = autopar.parallelize(
        Kept(),
        example,
        plan=random_plan(graph, pipeline=1, **plan),
        cluster=Cluster.preset("cpu", hosts=1, devices_per_host=world),
    )
    return [model(example).item() for _ in range(4)]


def test_dropout_keeps_its_share(pool) -> None:
    for plan in (dict(data=1, tensor=1, microbatches=1), dict(data=2, tensor=1, microbatches=4)):
        (shares, *_) = pool.run(kept_share, plan, world_size=plan["data"])
        # The mean of 32,768 draws has a standard deviation of 0.0025.
        assert all(abs(share - 0.7) < 0.0125 for share in shares), shares
        assert len(set(shares)) == len(shares), "steps drew the same masks"


def meta_weights(plan: dict[str, Any]) -> dict[str, tuple[Any, Tensor]]:
    module, example, loss = models.build_llama()
    with torch.device("meta"):
        empty = type(module)(module.config)
    graph = autopar.capture(empty, example, loss)
    torch.manual_seed(11)
    world = dist.get_world_size()
    model = autopar.parallelize(
        empty,
        example,
        loss,
        plan=random_plan(graph, **plan),
        cluster=Cluster.preset("cpu", hosts=1, devices_per_host=world),
    )
    assert torch.isfinite(call(model, example))
    return {n: (p.autopar.ownership, local_tensor(p.detach()).clone()) for n, p in model.named_parameters()}


def test_meta_modules_get_the_same_weights_under_every_plan(pool) -> None:
    whole: dict[str, Tensor] = {}
    for world_size, plans in ((1, [dict(data=1, tensor=1, pipeline=1, microbatches=1)]), (4, PLANS)):
        for plan in plans:
            for rank, found in enumerate(pool.run(meta_weights, plan, world_size=world_size, timeout_s=120)):
                for name, (ownership, part) in found.items():
                    if world_size == 1:
                        whole[name] = part
                    assert torch.equal(part, ownership.take(whole[name], rank)), (plan, rank, name)
    assert any(t.std() > 0 for t in whole.values())


def move_between(plans: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Losses with a move after every third step, and those of the one-device module."""
    model, example, module, loss = parallel("build_llama", plans[0])
    sides: tuple[list[float], list[float]] = ([], [])
    for found, side, side_loss in ((sides[0], model, None), (sides[1], module, loss)):
        optimizer = torch.optim.AdamW(side.parameters(), lr=1e-2)
        for step in range(3 * len(plans)):
            if side is model and step % 3 == 0 and step > 0:
                plan = random_plan(model.graph, **plans[step // 3])
                from autopar.cost.model import CostModel

                model.move(plan, optimizer, CostModel(model.graph, model.cluster))
                assert model.plan == plan
            value = call(side, example, side_loss)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(value.item())
    return sides


def test_moving_to_another_plan_goes_on_with_the_same_losses(pool) -> None:
    for found, expected in pool.run(move_between, copy.deepcopy(PLANS), world_size=4, timeout_s=120):
        for step, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert abs(a - b) <= 1e-4 * abs(b), (step, found, expected)


def bad_plan_file(path: str) -> str:
    module, example, loss = models.build_mlp()
    cluster = Cluster.preset("cpu", hosts=1, devices_per_host=2)
    try:
        autopar.parallelize(module, example, loss, plan=path, cluster=cluster)
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_plan_files_that_cannot_be_used(pool, tmp_path) -> None:
    module, example, loss = models.build_two_inputs()
    graph = autopar.capture(module, example, loss)
    other = random_plan(graph, data=2, tensor=1, pipeline=1, microbatches=1)
    other.save(tmp_path / "other-model.json")
    (tmp_path / "truncated.json").write_text((tmp_path / "other-model.json").read_text()[:200])
    for name, expected in (("none.json", "none.json"), ("truncated.json", "truncated"), ("other-model.json", "model")):
        messages = pool.run(bad_plan_file, str(tmp_path / name), world_size=2)
        assert messages[0] == messages[1] and expected in messages[0], messages


def contradictory(constraints: dict[str, int]) -> str:
    module, example, loss = models.build_mlp()
    cluster = Cluster.preset("cpu", hosts=1, devices_per_host=2)
    try:
        autopar.parallelize(module, example, loss, cluster=cluster, **constraints)
    except ValueError as error:
        return str(error)
    return ""


def test_constraints_that_cannot_hold(pool) -> None:
    for constraints, expected in (
        (dict(data=2, tensor=2, pipeline=1), "2"),
        (dict(tensor=3), "tensor=3"),
        (dict(microbatches=5), "microbatches"),
        (dict(memory_limit_bytes=1000), "needs"),
    ):
        messages = pool.run(contradictory, constraints, world_size=2)
        assert messages[0] and messages[0] == messages[1] and expected in messages[0], messages


def failed_pool_is_respawned() -> int:
    return dist.get_rank()


def test_the_first_error_is_the_one_reported(pool) -> None:
    with pytest.raises(RankError, match="example"):
        pool.run(wrong_example, world_size=2)
    assert pool.run(failed_pool_is_respawned, world_size=2) == [0, 1]


def wrong_example() -> None:
    module, _, loss = models.build_llama()
    autopar.parallelize(module, {"no_such_argument": torch.zeros(8, 4)}, loss)
