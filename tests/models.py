"""Tiny models for all tests, one builder each: `() -> (module, example, loss or None)`, seeded and in float32.

Batches have 8 rows, and every dim that may be split divides by 2 and by 4. Labels of language models hold -100 spread
unevenly over the rows, so that a mean over ranks or microbatches would be wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from conv_models import build_residual_net, build_unet, build_vgg  # noqa: F401  (found here by name)
from torch import Tensor, nn

ROWS, LENGTH, VOCAB = 8, 16, 64
Built = tuple[nn.Module, Any, Callable[..., Tensor] | None]


def token_batch(rows: int = ROWS, length: int = LENGTH, vocab: int = VOCAB, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Token ids and labels [rows, length]; row i has about i/rows of its labels ignored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (rows, length), generator=generator)
    ignored = torch.rand(rows, length, generator=generator) < torch.arange(rows)[:, None] / rows
    return ids, torch.where(ignored, -100, ids)


class Loss(nn.Module):
    """Of a language model of transformers, alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **batch: Tensor) -> Tensor:
        return self.inner(**batch).loss


def build_llama(layers: int = 2, seed: int = 0, **changes: Any) -> Built:
    """Hugging Face Llama from a config: 4 heads over 2 key-value heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings: dict[str, Any] = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
    )
    ids, labels = token_batch()
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))), {"input_ids": ids, "labels": labels}, None


def build_gpt2(layers: int = 2, dropout: float = 0.0, seed: int = 0) -> Built:
    """Hugging Face GPT-2 from a config; its output projection is its token embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=32,
        n_embd=32,
        n_layer=layers,
        n_head=4,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=1,
        loss_type="ForCausalLM",
    )
    ids, labels = token_batch()
    return GPT2LMHeadModel(config), {"input_ids": ids, "labels": labels}, None


def build_gpt2_dropout() -> Built:
    return build_gpt2(dropout=0.1)


def build_mlp(layers: int = 4, seed: int = 0) -> Built:
    """Equal linear layers; the loss is given apart, with class targets."""
    torch.manual_seed(seed)
    hidden = [part for _ in range(layers) for part in (nn.Linear(32, 32), nn.ReLU())]
    module = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), *hidden, nn.Linear(32, 8))
    return module, (torch.randn(ROWS, 16), torch.randint(0, 8, (ROWS,))), F.cross_entropy


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.first_norm = nn.GroupNorm(4, 8)
        self.second = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.second_norm = nn.GroupNorm(4, 16)
        self.pool = nn.MaxPool2d(2)
        self.out = nn.Linear(16 * 4 * 4, 8)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 4, 16, 16] -> class scores [B, 8]."""
        x = F.relu(self.first_norm(self.first(images)))
        x = self.pool(F.relu(self.second_norm(self.second(x))))
        return self.out(torch.flatten(x, 1))


def build_conv_net(seed: int = 0) -> Built:
    torch.manual_seed(seed)
    return ConvNet(), (torch.randn(ROWS, 4, 16, 16), torch.randint(0, 8, (ROWS,))), F.cross_entropy


class TiedLanguageModel(nn.Module):
    """Embedding, causal self-attention layers in plain PyTorch, and the embedding again as output projection."""

    def __init__(self, layers: int = 2, hidden: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(VOCAB, hidden)
        self.position = nn.Parameter(torch.randn(LENGTH, hidden) * 0.02)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(hidden),
                    "qkv": nn.Linear(hidden, 3 * hidden),
                    "proj": nn.Linear(hidden, hidden),
                    "mlp_norm": nn.LayerNorm(hidden),
                    "up": nn.Linear(hidden, 4 * hidden),
                    "down": nn.Linear(4 * hidden, hidden),
                }
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, S] -> logits [B, S, V]."""
        x = self.embed(ids) + self.position
        for layer in self.layers:
            q, k, v = layer["qkv"](layer["norm"](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + layer["proj"](mixed.transpose(1, 2).flatten(-2))
            x = x + layer["down"](F.gelu(layer["up"](layer["mlp_norm"](x))))
        return self.head(self.norm(x))


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of predicting label t from position t; labels [B, S] with -100 where there is none."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def build_tied_lm(layers: int = 2, seed: int = 0) -> Built:
    torch.manual_seed(seed)
    ids, labels = token_batch(seed=2)
    # Rolled: a tied model predicts its own input from the start, and a loss near 0 has no accuracy to compare.
    return TiedLanguageModel(layers), {"ids": ids, "labels": labels.roll(-1, 1)}, token_loss


def build_dropout_mlp(seed: int = 0) -> Built:
    """An MLP with dropout and a regression target."""
    torch.manual_seed(seed)
    module = nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 32), nn.GELU(), nn.Dropout(0.2), nn.Linear(32, 8)
    )
    return module, (torch.randn(ROWS, 16), torch.randn(ROWS, 8)), F.mse_loss


class TwoInputs(nn.Module):
    """Takes two tensors and targets, one of them nested, and returns a dict with its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 32)
        self.features = nn.Linear(16, 32)
        self.mix = nn.Linear(64, 32)
        self.out = nn.Linear(32, VOCAB)

    def forward(
        self, tokens: Tensor, extra: dict[str, Tensor], targets: Tensor, scale: float = 1.0
    ) -> dict[str, Tensor]:
        """tokens [B, S], extra["features"] [B, 16], targets [B]."""
        words = self.embed(tokens).mean(1)
        mixed = torch.tanh(self.mix(torch.cat((words, self.features(extra["features"])), -1))) * scale
        scores = self.out(mixed)
        return {"loss": F.cross_entropy(scores, targets), "scores": scores}


def build_two_inputs(seed: int = 0) -> Built:
    torch.manual_seed(seed)
    tokens, _ = token_batch(seed=3)
    targets = torch.randint(0, VOCAB, (ROWS,))
    targets[1:4] = -100
    example = {"tokens": tokens, "extra": {"features": torch.randn(ROWS, 16)}, "targets": targets, "scale": 0.5}
    return TwoInputs(), example, None


ZOO: dict[str, Callable[[], Built]] = {
    "llama": build_llama,
    "gpt2": build_gpt2,
    "mlp": build_mlp,
    "conv_net": build_conv_net,
    "tied_lm": build_tied_lm,
    "two_inputs": build_two_inputs,
}
RANDOM_ZOO: dict[str, Callable[[], Built]] = {"gpt2_dropout": build_gpt2_dropout, "dropout_mlp": build_dropout_mlp}


def eager_loss(module: nn.Module, example: Any, loss: Callable[..., Tensor] | None) -> Tensor:
    """The one-device loss that everything is compared with, from an example of this file."""
    if loss is None:
        out = module(**example)
        return out["loss"] if isinstance(out, dict) else out.loss
    *inputs, target = example.values() if isinstance(example, dict) else example
    return loss(module(*inputs), target)


def check_values(x: Tensor) -> None:
    """An assertion about values, which a trace passes by. (In a test module pytest would rewrite it.)"""
    assert (x > 0).sum(1).max().item() <= x.shape[1]


class Experts(nn.Module):
    """Residual layers of experts: each token goes to the experts that the batch says, weighed by a learned router."""

    def __init__(self, num_experts: int = 4, layers: int = 2, bias: bool = True):
        super().__init__()
        self.num_experts = num_experts
        self.router = nn.ModuleList(nn.Linear(16, num_experts) for _ in range(layers))
        self.up = nn.ParameterList(torch.randn(num_experts, 16, 24) * 0.2 for _ in range(layers))
        self.down = nn.ParameterList(torch.randn(num_experts, 12, 16) * 0.2 for _ in range(layers))
        self.bias = nn.ParameterList(torch.randn(num_experts, 24) * 0.2 for _ in range(layers)) if bias else None

    def experts(self, i: int, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x [n, h], chosen and weights [n, k] -> [n, h]"""
        from transformers.integrations import moe  # registers the grouped product

        assert moe
        product = torch.ops.transformers.grouped_mm_fallback
        count = chosen.shape[-1]
        groups, order = torch.sort(chosen.reshape(-1))
        rows, scale = x[order // count], weights.reshape(-1)[order]
        ends = torch.histc(groups.float(), bins=self.num_experts, min=0, max=self.num_experts - 1).cumsum(0).int()
        made = product(rows, self.up[i], ends)
        if self.bias is not None:
            made = made + self.bias[i][groups]
        gate, value = made.chunk(2, -1)
        made = product(torch.nn.functional.silu(gate) * value, self.down[i], ends) * scale.unsqueeze(-1)
        return made[order.argsort()].view(*chosen.shape, -1).sum(1)

    def forward(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        for i in range(len(self.up)):
            weights = self.router[i](x).softmax(-1).gather(-1, chosen)
            flat = self.experts(i, x.flatten(0, 1), chosen.flatten(0, 1), weights.flatten(0, 1))
            x = x + flat.view_as(x)
        return x.square().mean()


def _experts(chosen: torch.Tensor, seed: int = 0, **options: Any) -> Built:
    torch.manual_seed(seed)
    return Experts(**options), {"x": torch.randn(*chosen.shape[:2], 16), "chosen": chosen}, None


def build_experts(seed: int = 0) -> Built:
    """Random choices of 2 of 4 experts."""
    scores = torch.rand((8, 4, 4), generator=torch.Generator().manual_seed(seed))
    return _experts(scores.topk(2, -1).indices, seed)


def build_uneven_experts(seed: int = 0) -> Built:
    """Nearly all tokens choose expert 0, none expert 2, a few expert 3; one choice each."""
    chosen = torch.zeros(8, 4, 1, dtype=torch.int64)
    chosen[0, 0], chosen[5, 2:] = 1, 3
    return _experts(chosen, seed, bias=False)


def build_one_expert(seed: int = 0) -> Built:
    """All tokens choose expert 3 and, in vain, expert 3 again."""
    return _experts(torch.full((8, 4, 2), 3), seed, layers=1)


def build_mixtral(seed: int = 0, **changes: Any) -> Built:
    """Hugging Face Mixtral from a config: 4 experts, 2 of them for each token."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    settings: dict[str, Any] = dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    ids, labels = token_batch()
    return MixtralForCausalLM(MixtralConfig(**(settings | changes))), {"input_ids": ids, "labels": labels}, None
