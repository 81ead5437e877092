"""outputs="all": what a call returns, under random plans, against what the module returns."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import models
import pytest
import torch
from plan_cases import plan_of, world_of
from torch import Tensor, nn

import autopar
from autopar.cluster.spec import Cluster

Pair = namedtuple("Pair", "left right")


@dataclass
class Result:
    """What `Many` returns."""

    loss: Tensor
    scores: Tensor
    nested: dict[str, Any]
    pair: Pair
    note: str


class Many(nn.Module):
    """Outputs of every kind: rows, all rows' sum, flags, half precision, a parameter's image, and from several stages."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(8))
        self.scale = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor, y: Tensor) -> Result:
        seen = []
        for layer in self.layers:
            x = torch.tanh(layer(x))
            seen.append(x)
        early, late = seen[1], seen[-1]
        nested = {"sign": late > 0, "half": early.half(), "places": late.argmax(-1), "list": [seen[3].flatten(0, 1)]}
        pair = Pair(early.sum(), (self.scale * 2).exp())
        loss = (late * self.scale - y).square().mean()
        return Result(loss, late.transpose(0, 1), nested, pair, "as it was")


def example() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 4, 16, generator=generator), torch.randn(8, 4, 16, generator=generator)


PLANS = [
    dict(data=1, tensor=1, pipeline=1, microbatches=2),
    dict(data=2, tensor=2, pipeline=1, microbatches=2, recompute="full"),
    dict(data=2, tensor=1, pipeline=2, microbatches=4, zero=3, schedule="zb-h1"),
    dict(data=1, tensor=2, pipeline=2, microbatches=2, recompute="selective", schedule="interleaved"),
    dict(meshes=[(3, 1), (1, 1)], microbatches=2, shares=[(2, 1, 1), ()]),
]


def flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for key in value for leaf in (key, *flat(value[key]))]
    if isinstance(value, list | tuple):
        return [type(value), *(leaf for item in value for leaf in flat(item))]
    if isinstance(value, Result):
        return [type(value), *flat(vars(value))]
    return [value]


def returned(plans: list[dict[str, Any]]) -> list[list[tuple[list[Any], list[Any]]]]:
    """Per plan, in training and in evaluation: the leaves of what the parallel module and the module return."""
    module, batch = Many(), example()
    graph = autopar.capture(module, batch)
    expected = flat(module(*batch))
    found = []
    for options in plans:
        cluster = Cluster.preset("cpu", hosts=1, devices_per_host=world_of(options))
        plan = plan_of(graph, options)
        model = autopar.parallelize(module, batch, plan=plan, cluster=cluster, outputs="all")
        out = model(*batch)
        out.loss.backward()
        with torch.no_grad():
            evaluated = model.eval()(*batch)
        assert all(p.grad is not None for _, p in model.named_parameters())
        found.append([(flat(each), expected) for each in (out, evaluated)])
    return [[([detached(v) for v in a], [detached(v) for v in b]) for a, b in pairs] for pairs in found]


def detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


@pytest.mark.parametrize("world_size", [1, 4])
def test_all_outputs_are_whole_on_every_rank(pool, world_size: int) -> None:
    plans = [plan for plan in PLANS if world_of(plan) == world_size]
    for rank, results in enumerate(pool.run(returned, plans, world_size=world_size, timeout_s=120)):
        for plan, pairs in zip(plans, results, strict=True):
            for have, want in pairs:
                assert len(have) == len(want) > 15
                for a, b in zip(have, want, strict=True):
                    if not isinstance(b, Tensor):
                        assert a == b, (rank, plan)
                        continue
                    assert a.dtype == b.dtype, (rank, plan)
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=f"{rank} {plan}")


def of_transformers() -> list[str]:
    module, batch, _ = models.build_llama()
    cluster = Cluster.preset("cpu", hosts=1, devices_per_host=2)
    model = autopar.parallelize(module, batch, cluster=cluster, outputs="all", tensor=2)
    out, want = model(**batch), module(**batch)
    torch.testing.assert_close(out.logits, want.logits.detach(), rtol=1e-4, atol=1e-5)
    assert type(out) is type(want) and out["loss"] is out.loss
    # With a loss function: the loss, and what the module returned.
    net = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))
    rows = torch.randn(8, 16), torch.randn(8, 4)
    other = autopar.parallelize(net, rows, nn.functional.mse_loss, cluster=cluster, outputs="all", data=2)
    both = other(*rows)
    torch.testing.assert_close(both.output, net(rows[0]).detach())
    messages = []
    for options in (dict(outputs="logits"), dict(outputs="all")):
        try:
            autopar.parallelize(Passing(), rows, cluster=cluster, data=2, **options)
        except ValueError as error:
            messages.append(str(error))
    return messages


class Passing(nn.Module):
    """Returns a batch input beside its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 4)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.layer(x) - y).square().mean(), "given": y}


def test_objects_of_transformers_and_what_is_refused(pool) -> None:
    for messages in pool.run(of_transformers, timeout_s=120):
        assert len(messages) == 2
        assert "outputs='logits'" in messages[0] and "outputs='all': output 'given' of Passing" in messages[1]
