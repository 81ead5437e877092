"""The batch axis: chunks of the batch add up to the whole, or the layout says which op lets rows meet."""

from __future__ import annotations

import random

import models
import pytest
import torch
import torch.nn.functional as F
from emulated_graph import BACKWARD_MEETS, reference, run_emulated
from plan_cases import random_strategies
from torch import Tensor, nn

from autopar.capture.export import capture
from autopar.capture.opaque import opaque
from autopar.sharding.batch import batch_layout
from autopar.sharding.placement import PARTIAL, REPLICATED, SHARED, Split
from autopar.sharding.strategies import strategies

ROWS = 8


class Penalised(nn.Module):
    """A term of the loss that depends on parameters alone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.linear(x), y) + 0.1 * self.linear.weight.pow(2).sum()


class MaskedMean(nn.Module):
    """A mean over what a mask keeps, with a guard against empty masks."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        error = (self.linear(x) - x).pow(2).mean(-1)
        return (error * mask).sum() / mask.sum().clamp(min=1.0)


class ClassToken(nn.Module):
    """A parameter expanded over the rows, positions added, the token's place picked."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 32))
        self.position = nn.Parameter(torch.randn(1, 17, 32))
        self.patches = nn.Conv2d(4, 32, 4, 4)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 8)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(images.shape[0], -1, -1), patches], 1) + self.position
        scores = torch.einsum("bqd,bkd->bqk", x, self.norm(x)).softmax(-1)
        return self.head((scores @ x)[:, 0])


class PickRows(nn.Module):
    """Each row picks a place by its own index, as sequence classifiers do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.out = nn.Linear(16, 8)

    def forward(self, ids: Tensor, last: Tensor) -> Tensor:
        x = self.embed(ids).cumsum(1)
        return self.out(x[torch.arange(ids.shape[0]), last])


class SequenceFirst(nn.Module):
    """Attention over [sequence, batch, hidden]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0)
        self.out = nn.Linear(16, 32)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.layer(self.embed(ids).transpose(0, 1)).transpose(0, 1))


class UsedTwice(nn.Module):
    """What parameters make over the rows is added to rows, and also weighed as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.randn(1, 16))
        self.linear = nn.Linear(16, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        wide = (self.row * 2).expand(x.shape[0], -1).contiguous().sin()
        return F.cross_entropy(self.linear(x + wide), y) + wide.pow(2).sum()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.layers = nn.GRU(16, 16, num_layers=2, batch_first=True)
        self.out = nn.Linear(16, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.layers(self.embed(ids))[0][:, -1])


@opaque
class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.sum().item() > 0 else self.linear(x) * 1.0


def frozen(module: nn.Module, name: str) -> nn.Module:
    module.get_submodule(name).requires_grad_(False)
    return module


def token_loss(scores: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(scores.reshape(-1, scores.shape[-1]), targets.reshape(-1), label_smoothing=0.1)


def _ids(*shape: int, limit: int = 32) -> Tensor:
    return torch.randint(0, limit, shape)


def _llama(**more: Tensor):
    module, example, _ = models.build_llama(layers=1)
    return module, {**example, **more}


CASES = {
    "penalty": lambda: (Penalised(), (torch.randn(ROWS, 16), _ids(ROWS, limit=8))),
    "masked mean": lambda: (MaskedMean(), (torch.randn(ROWS, 16), (torch.rand(ROWS) > 0.4).float())),
    "class token": lambda: (ClassToken(), (torch.randn(ROWS, 4, 16, 16), _ids(ROWS, limit=8)), F.cross_entropy),
    "picked rows": lambda: (PickRows(), (_ids(ROWS, 6), _ids(ROWS, limit=6), _ids(ROWS, limit=8)), F.cross_entropy),
    "sequence first": lambda: (SequenceFirst(), (_ids(ROWS, 6), _ids(ROWS, 6)), token_loss),
    "used twice": lambda: (UsedTwice(), (torch.randn(ROWS, 16), _ids(ROWS, limit=8))),
    "recurrent": lambda: (Recurrent(), (_ids(ROWS, 6), _ids(ROWS, limit=8)), F.cross_entropy),
    "opaque": lambda: (
        nn.Sequential(nn.Linear(16, 16), Untraceable(), nn.Linear(16, 8)),
        (torch.randn(ROWS, 16), _ids(ROWS, limit=8)),
        F.cross_entropy,
    ),
    "frozen": lambda: (
        frozen(models.build_mlp()[0], "4"), (torch.randn(ROWS, 16), _ids(ROWS, limit=8)), F.cross_entropy,
    ),
    "llama with a padding mask": lambda: _llama(
        attention_mask=(torch.arange(16)[None] >= torch.arange(ROWS)[:, None]).long()
    ),
    "llama with positions": lambda: _llama(position_ids=torch.arange(16).expand(ROWS, 16) // 2),
    "regression": lambda: (nn.Linear(16, 4), (torch.randn(ROWS, 16), torch.randn(ROWS, 4)), F.mse_loss),
    "smooth l1": lambda: (nn.Linear(16, 4), (torch.randn(ROWS, 16), torch.randn(ROWS, 4)), F.smooth_l1_loss),
    "binary": lambda: (
        nn.Linear(16, 4), (torch.randn(ROWS, 16), torch.rand(ROWS, 4)), F.binary_cross_entropy_with_logits,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_chunks_add_up_to_the_whole(name):
    torch.manual_seed(0)
    graph, values, loss, gradients = reference(*CASES[name]())
    draw = random.Random(name)
    for shards, degree in ((2, 1), (8, 1), (2, 2), (4, 2), (2, 2), (2, 2)):
        layout = batch_layout(graph, shards)
        assert layout.conflict is None and layout.placements[graph.loss] == PARTIAL
        chosen = {op.name: random_strategies(graph, op, (degree,), shards, draw, BACKWARD_MEETS) for op in graph.ops}
        found, found_gradients = run_emulated(graph, values, shards, (degree,), chosen)
        torch.testing.assert_close(found, loss, rtol=1e-6, atol=1e-8)
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(found_gradients[parameter], gradient, rtol=1e-6, atol=1e-8, msg=parameter)


def test_what_depends_on_no_row_is_made_only_as_large_as_needed():
    graph = capture(*CASES["llama with a padding mask"]())
    layout = batch_layout(graph, 4)
    for op in graph.ops:
        for name, placement in zip(op.outputs, layout.strategies[op.name].outputs, strict=True):
            shape = graph.tensors[name].shape
            assert shape[:1] != (graph.batch_size,) or placement == Split(0), f"{name} {shape} {placement}"


def test_counts_of_targets_form_the_prologue():
    graph = capture(*models.build_llama(layers=1))
    layout = batch_layout(graph, 4)
    (count,) = layout.prologue
    assert graph.producer[count].target == "autopar.target_count" and layout.placements[count] == PARTIAL
    division = graph.producer[graph.loss]
    assert layout.strategies[division.name].inputs == (PARTIAL, REPLICATED)
    assert all(layout.placements[t.name] == SHARED for t in graph.parameters)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.out = nn.Linear(8, 8)

    def forward(self, images: Tensor) -> Tensor:
        return self.out(F.relu(self.norm(self.conv(images))).mean((2, 3)))


class Contrastive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        z = self.linear(x)
        return F.cross_entropy(z @ z.T, torch.arange(len(x)))


class RootMeanSquare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) - x).pow(2).mean().sqrt()


class NoRows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear.weight.pow(2).sum()


@pytest.mark.parametrize(
    ("built", "target", "words"),
    [
        (lambda: (Contrastive(), torch.randn(ROWS, 16)), "matmul", "rows of the batch"),
        (lambda: (RootMeanSquare(), torch.randn(ROWS, 16)), "sqrt", "not linear"),
        (lambda: (NoRows(), torch.randn(ROWS, 16)), "sum", "not a sum over rows"),
    ],
)
def test_where_rows_meet_the_op_is_named(built, target, words):
    graph = capture(*built())
    for shards in (1, 2):
        conflict = batch_layout(graph, shards).conflict
        assert conflict and graph.op[conflict.op].target.startswith(f"aten.{target}") and words in str(conflict)
    op = next(op for op in graph.ops if op.name not in graph.side_ops)
    assert strategies(graph, op, 2)
    with pytest.raises(ValueError, match=conflict.op):
        strategies(graph, op, 2, shards=2)


def test_batch_norm_meets_over_data_and_not_in_time():
    graph = capture(Normed(), (torch.randn(ROWS, 4, 8, 8), _ids(ROWS, limit=8)), F.cross_entropy)
    layout = batch_layout(graph, 2)
    assert layout.conflict is None and layout.time_conflict is layout.meets
    assert graph.op[layout.meets.op].target == "aten.batch_norm.default" and "whole batch" in str(layout.meets)


def test_channels_of_a_batch_norm_may_be_split():
    graph = capture(*(Normed(), (torch.randn(ROWS, 4, 8, 8), _ids(ROWS, limit=8)), F.cross_entropy))
    norm = next(op for op in graph.ops if op.target == "aten.batch_norm.default")
    assert "c" in [s.key for s in strategies(graph, norm, 2)]


def test_a_batch_that_does_not_divide_is_refused():
    graph = capture(*models.build_mlp())
    with pytest.raises(ValueError, match=r"8 rows cannot be cut into 3 equal parts .*divides 8"):
        batch_layout(graph, 3)
