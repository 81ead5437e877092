"""Models beyond the zoo of tests/models.py: encoders, vision, speech, recurrence, and modules with awkward habits.

Each builder gives (module, example, loss), small enough for a step in well under a second.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

ROWS = 8
VOCAB = 64


def _ids(*shape: int, limit: int = VOCAB) -> Tensor:
    return torch.randint(0, limit, shape)


def build_bert() -> Any:
    torch.manual_seed(0)
    config = hf.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=VOCAB,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    mask = torch.ones(ROWS, 12, dtype=torch.long)
    mask[:3, 9:] = 0
    labels = _ids(ROWS, 12).masked_fill(mask == 0, -100)
    return hf.BertForMaskedLM(config), {"input_ids": _ids(ROWS, 12), "attention_mask": mask, "labels": labels}, None


def build_vit() -> Any:
    torch.manual_seed(0)
    config = hf.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=8,
        num_labels=6, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    example = {"pixel_values": torch.randn(ROWS, 3, 16, 16), "labels": _ids(ROWS, limit=6)}
    return hf.ViTForImageClassification(config), example, None


def build_swin() -> Any:
    torch.manual_seed(0)
    config = hf.SwinConfig(
        embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, image_size=32, patch_size=2, num_labels=6,
        drop_path_rate=0.0,
    )  # fmt: skip
    example = {"pixel_values": torch.randn(ROWS, 3, 32, 32), "labels": _ids(ROWS, limit=6)}
    return hf.SwinForImageClassification(config), example, None


def build_t5() -> Any:
    torch.manual_seed(0)
    config = hf.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=VOCAB, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config), {"input_ids": _ids(ROWS, 12), "labels": _ids(ROWS, 8)}, None


def build_whisper() -> Any:
    torch.manual_seed(0)
    config = hf.WhisperConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=VOCAB, num_mel_bins=8, max_source_positions=16,
        max_target_positions=16, dropout=0.0, decoder_start_token_id=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    example = {"input_features": torch.randn(ROWS, 8, 32), "labels": _ids(ROWS, 8)}
    return hf.WhisperForConditionalGeneration(config), example, None


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> the same."""
        return F.relu(x + self.second_norm(self.second(F.relu(self.first_norm(self.first(x))))))


class ResNet(nn.Module):
    """With batch norm, whose rows meet, and running statistics, which a step writes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.layers = nn.Sequential(*(Residual(8) for _ in range(3)))
        self.head = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 3, H, W] -> [B, 6]."""
        return self.head(self.layers(F.relu(self.norm(self.stem(x)))).mean((2, 3)))


def build_resnet() -> Any:
    torch.manual_seed(0)
    return ResNet(), (torch.randn(ROWS, 3, 8, 8) + 1, _ids(ROWS, limit=6)), F.cross_entropy


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 16)
        self.lstm = nn.LSTM(16, 16, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(32, 6)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, S] -> [B S, 6]."""
        return self.head(self.lstm(self.embed(ids))[0]).flatten(0, 1)


def build_tagger() -> Any:
    torch.manual_seed(0)
    return Tagger(), (_ids(ROWS, 10), _ids(ROWS, 10, limit=6)), lambda out, tags: F.cross_entropy(out, tags.flatten())


class Habits(nn.Module):
    """A layer used twice, a long skip, two losses added, a counter, frozen parameters and some without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(16, 16)
        self.twice = nn.Linear(16, 16)
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4)))
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.leave = nn.Linear(16, 16)
        self.unused = nn.Linear(16, 16)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 16] -> []."""
        self.calls += 1
        first = self.enter(x)
        middle = self.layers(self.twice(F.relu(self.twice(first))))
        out = self.leave(self.frozen(middle) + first) * (1 + 0.1 * self.calls)
        return F.mse_loss(out, x) + 0.1 * middle.square().mean()


def build_habits() -> Any:
    torch.manual_seed(0)
    return Habits(), torch.randn(ROWS, 16), None


BUILDERS = [
    build_bert, build_vit, build_swin, build_t5, build_whisper, build_resnet, build_tagger, build_habits,
]  # fmt: skip
