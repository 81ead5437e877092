"""Rows that a mixture of experts sorts: cut along the batch where all that happens to them treats rows alike."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401  (registers the grouped product)
from emulated_graph import reference, run_emulated
from torch import Tensor, nn

from autopar.capture.export import capture
from autopar.capture.opaque import opaque
from autopar.sharding.batch import batch_layout
from autopar.sharding.placement import PARTIAL
from autopar.sharding.strategies import strategies

ROWS, LENGTH, WIDTH, EXPERTS, CHOICES = 8, 4, 16, 4, 2
Rows = tuple[Tensor, Tensor]  # rows in the order of their experts [N, h], and the experts [N]


def grouped(moe: Sorted, rows: Tensor, experts: Tensor) -> Tensor:
    counts = torch.histc(experts.double(), bins=EXPERTS, min=0, max=EXPERTS - 1)
    offsets = torch.cumsum(counts, 0, dtype=torch.int32)
    return torch.ops.transformers.grouped_mm_fallback(rows, moe.weights, offsets)


def gathered(moe: Sorted, rows: Tensor, experts: Tensor) -> Tensor:
    return torch.bmm(rows.unsqueeze(1), moe.weights[experts]).squeeze(1)


def by_inverse(rows: Tensor, order: Tensor, tokens: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order))
    return rows[inverse].view(-1, CHOICES, WIDTH).sum(1)


def by_argsort(rows: Tensor, order: Tensor, tokens: Tensor) -> Tensor:
    return rows.index_select(0, order.argsort()).view(-1, CHOICES, WIDTH).sum(1)


def by_writing(rows: Tensor, order: Tensor, tokens: Tensor) -> Tensor:
    whole = torch.zeros_like(rows)
    whole[order] = rows
    return whole.view(-1, CHOICES, WIDTH).sum(1)


def by_adding(rows: Tensor, order: Tensor, tokens: Tensor) -> Tensor:
    return torch.zeros_like(tokens).index_add(0, order // CHOICES, rows)


class Sorted(nn.Module):
    """Each token goes to its two best experts; rows are sorted by expert, multiplied, and put back."""

    def __init__(self, product: Callable[..., Tensor], put_back: Callable[..., Tensor]) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, WIDTH)
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.weights = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / WIDTH**0.5)
        self.bias = nn.Parameter(torch.randn(EXPERTS, WIDTH))
        self.product, self.put_back = product, put_back

    def forward(self, ids: Tensor) -> Tensor:
        tokens = self.embed(ids).view(-1, WIDTH)
        scores, experts = self.router(tokens).softmax(-1).topk(CHOICES)
        experts, order = experts.reshape(-1).sort()
        rows = self.product(self, tokens[order // CHOICES], experts) + self.bias[experts]
        rows = F.gelu(rows) * scores.reshape(-1)[order].unsqueeze(-1)
        return self.put_back(rows, order, tokens).view(*ids.shape, WIDTH)


def token_loss(scores: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(scores.reshape(-1, scores.shape[-1]), targets.reshape(-1))


def example() -> tuple[Tensor, Tensor]:
    return torch.randint(0, 32, (ROWS, LENGTH)), torch.randint(0, WIDTH, (ROWS, LENGTH))


def check_chunks(module: nn.Module, seed: str) -> None:
    graph, values, loss, gradients = reference(module, example(), token_loss)
    draw = random.Random(seed)
    for shards, degree in ((2, 1), (8, 1), (2, 2), (4, 2)):
        layout = batch_layout(graph, shards)
        assert layout.conflict is None and layout.placements[graph.loss] == PARTIAL
        chosen = {op.name: (draw.choice(strategies(graph, op, degree, shards)),) for op in graph.ops}
        found, found_gradients = run_emulated(graph, values, shards, (degree,), chosen)
        torch.testing.assert_close(found, loss, rtol=1e-6, atol=1e-8)
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(found_gradients[parameter], gradient, rtol=1e-6, atol=1e-8, msg=parameter)


@pytest.mark.parametrize("put_back", [by_inverse, by_argsort, by_writing, by_adding])
@pytest.mark.parametrize("product", [grouped, gathered])
def test_sorted_rows_are_put_back_chunk_by_chunk(product, put_back) -> None:
    torch.manual_seed(0)
    check_chunks(Sorted(product, put_back), f"{product.__name__}/{put_back.__name__}")


def _beside(rows: Tensor, order: Tensor, tokens: Tensor) -> Tensor:
    return rows[::1] + tokens.repeat_interleave(CHOICES, 0)


MEETINGS = {
    "rows of another order": (_beside, "the order of the batch"),
    "places in the order": (lambda r, o, t: r * torch.arange(len(r)).unsqueeze(-1), "the order of the batch"),
    "neighbours": (lambda r, o, t: r.view(-1, CHOICES, WIDTH).sum(1), "groups neighbouring rows"),
    "the first rows": (lambda r, o, t: r[: len(t)], "slice"),
    "sums so far": (lambda r, o, t: by_inverse(r.cumsum(0), o, t), "cumsum"),
    "numbers as values": (lambda r, o, t: by_inverse(r * o.unsqueeze(-1), o, t), "numbers of rows"),
    "the next row": (lambda r, o, t: r[(o + 1) % len(o)], "numbers of rows"),
    "numbers of others": (lambda r, o, t: r[o], "by the numbers of others"),
}


@pytest.mark.parametrize("name", MEETINGS)
def test_what_does_not_treat_rows_alike_forbids_cutting_the_batch(name: str) -> None:
    torch.manual_seed(0)
    put_back, words = MEETINGS[name]

    def as_long_as_the_batch(rows: Tensor, order: Tensor, tokens: Tensor) -> Tensor:
        out = put_back(rows, order, tokens)
        return out.view(len(tokens), -1, WIDTH)[:, 0]

    conflict = batch_layout(capture(Sorted(gathered, as_long_as_the_batch), example(), token_loss), 2).conflict
    assert conflict is not None and words in str(conflict), conflict


@opaque
class Loop(nn.Module):
    """Experts as a loop over values."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, tokens: Tensor, experts: Tensor, scale: Tensor | None = None) -> tuple[Tensor, None]:
        out = torch.zeros_like(tokens)
        for expert in experts.unique().tolist():
            rows = (experts == expert).nonzero()[:, 0]
            out.index_add_(0, rows, tokens[rows] @ self.weights[expert])
        return (out if scale is None else out * scale[: len(out), None]), None


class Looped(nn.Module):
    """scale: what the experts get besides the tokens."""

    def __init__(self, scale: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, WIDTH)
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.loop, self.scale = Loop(), scale

    def forward(self, ids: Tensor) -> Tensor:
        tokens = self.embed(ids).view(-1, WIDTH) if self.scale is None else self.embed(ids)[:, 0]
        best, experts = self.router(tokens).softmax(-1).max(-1)
        out, _ = self.loop(tokens, experts, None if self.scale is None else self.scale(tokens))
        out = out * best.unsqueeze(-1)
        return out.view(len(ids), -1, WIDTH).expand(-1, ids.shape[1], -1)


def test_a_loop_over_experts_takes_flattened_tokens() -> None:
    torch.manual_seed(0)
    check_chunks(Looped(None), "loop")


def test_an_argument_that_may_be_rows_or_not_forbids_cutting_the_batch() -> None:
    torch.manual_seed(0)
    check_chunks(Looped(lambda t: torch.ones(len(t), dtype=t.dtype) * 2), "the same for every row")
    graph = capture(Looped(lambda t: torch.arange(len(t)).to(t.dtype)), example(), token_loss)
    conflict = batch_layout(graph, 2).conflict
    assert conflict is not None and "may have other rows" in str(conflict)
