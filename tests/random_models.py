"""Small random modules over the supported ops: token sequences [B, S, H] through random steps to a random loss.

Output and input embeddings may be tied, and some parameters frozen.
"""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH, LENGTH, HIDDEN, VOCAB = 8, 4, 16, 24


class Attend(nn.Module):
    """Self-attention, causal or not, fused or spelt out, in heads."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.causal, self.fused, self.heads = draw.random() < 0.5, draw.random() < 0.7, draw.choice([2, 4])
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN, bias=draw.random() < 0.5), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k)
            if self.causal:
                places = torch.arange(x.shape[1], device=x.device)
                scores = scores.masked_fill(places[:, None] < places[None, :], float("-inf"))
            mixed = scores.softmax(-1) @ v
        return x + self.out(mixed.transpose(1, 2).flatten(-2))


class Feed(nn.Module):
    """Two linear layers with something pointwise between them, gated or not, on tokens or on flattened rows."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.act = draw.choice([F.gelu, F.relu, torch.tanh, F.silu])
        self.gated, self.flat = draw.random() < 0.4, draw.random() < 0.4
        self.up, self.down = nn.Linear(HIDDEN, 2 * HIDDEN), nn.Linear(HIDDEN if self.gated else 2 * HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x.flatten(0, 1) if self.flat else x)
        if self.gated:
            left, right = y.chunk(2, -1)
            y = self.act(left) * right
        else:
            y = self.act(y)
        return x + self.down(y).view(x.shape)


class Norm(nn.Module):
    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN) if draw.random() < 0.6 else nn.RMSNorm(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Convolve(nn.Module):
    """Along the sequence, in groups or not."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.conv = nn.Conv1d(HIDDEN, HIDDEN, 3, padding=1, groups=draw.choice([1, 4]))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x.transpose(1, 2)).transpose(1, 2)


class Places(nn.Module):
    """Adds something that depends on the place alone: a parameter, a row of a table, or numbers."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.kind = draw.choice(["parameter", "table", "numbers"])
        if self.kind == "parameter":
            self.table = nn.Parameter(torch.randn(LENGTH, HIDDEN) * 0.1)
        elif self.kind == "table":
            self.table = nn.Embedding(LENGTH, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        if self.kind == "numbers":
            return x + (places * 0.1).sin()[:, None]
        return x + (self.table if self.kind == "parameter" else self.table(places))


class Pool(nn.Module):
    """Every token sees the mean, the maximum or the running sum of its sequence."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.kind = draw.choice(["mean", "max", "cumsum"])
        self.scale = nn.Parameter(torch.randn(HIDDEN) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "mean":
            seen = x.mean(1, keepdim=True)
        elif self.kind == "max":
            seen = x.amax(1, keepdim=True)
        else:
            seen = x.cumsum(1) / LENGTH
        return x + seen * self.scale


class Mix(nn.Module):
    """Halves of the features exchanged and joined with halves of the input."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.mix = nn.Linear(HIDDEN // 2, HIDDEN // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.split(HIDDEN // 2, -1)
        return torch.cat((right + self.mix(left), left), -1)


STEPS = (Attend, Feed, Norm, Convolve, Places, Pool, Mix)


class RandomModel(nn.Module):
    """Random steps with random long skips; the output layer may be tied to the embedding, and a loss may be added."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.steps = nn.ModuleList(draw.choice(STEPS)(draw) for _ in range(draw.randint(3, 6)))
        self.skips = {i: draw.randrange(i) for i in range(1, len(self.steps)) if draw.random() < 0.3}
        self.loss = draw.choice(["tokens", "tokens", "rows", "regression"])
        self.out = nn.Linear(HIDDEN, VOCAB, bias=False)
        if self.loss != "regression" and draw.random() < 0.4:
            self.out.weight = self.embed.weight
        self.penalty = draw.random() < 0.2
        if draw.random() < 0.4:
            for parameter in self.steps.parameters():
                parameter.requires_grad_(draw.random() < 0.7)
            self.embed.weight.requires_grad_(draw.random() < 0.7)

    def forward(self, ids: Tensor, labels: Tensor, classes: Tensor, targets: Tensor) -> Tensor:
        """ids, labels [B, S] (-100: no label), classes [B], targets [B, S, V]."""
        x = self.embed(ids)
        seen = [x]
        for i, step in enumerate(self.steps):
            if i in self.skips:
                x = x + seen[self.skips[i]]
            x = step(x)
            seen.append(x)
        scores = self.out(x)
        if self.loss == "tokens":
            loss = F.cross_entropy(scores.flatten(0, 1), labels.flatten())
        elif self.loss == "rows":
            loss = F.cross_entropy(scores.mean(1), classes)
        else:
            loss = F.mse_loss(scores, targets)
        if self.penalty:
            loss = loss + 0.01 * self.out.weight.square().sum()
        return loss


def random_model(seed: int) -> tuple[RandomModel, dict[str, Any]]:
    """The module, and a batch with few labels in some rows."""
    module = RandomModel(seed)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator)
    labels = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator)
    labels[torch.rand(BATCH, LENGTH, generator=generator) < torch.linspace(0, 0.9, BATCH)[:, None]] = -100
    labels[0, 0] = 1
    example = {
        "ids": ids,
        "labels": labels,
        "classes": torch.randint(0, VOCAB, (BATCH,), generator=generator),
        "targets": torch.randn(BATCH, LENGTH, VOCAB, generator=generator),
    }
    return module, example
