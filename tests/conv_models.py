"""Convolution nets: one that narrows, one with residuals and batch norm, one that narrows and widens with skips.

Each builder gives (module, example, loss); images [B, 4, 16, 16].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = 4


class Vgg(nn.Module):
    """Pairs of 3x3 convolutions with a pooling behind each, and two linear layers on all that is left."""

    def __init__(self, widths: tuple[int, ...] = (8, 12), size: int = 16, hidden: int = 16, classes: int = 6) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 4
        for width in widths:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
            channels, size = width, size // 2
        self.features = nn.Sequential(*layers)
        self.hidden = nn.Linear(channels * size * size, hidden)
        self.head = nn.Linear(hidden, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(self.features(images).flatten(1))))


class Bottleneck(nn.Module):
    """1x1, grouped 3x3 and 1x1 convolutions around a shortcut; the first of a size narrows."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, out, 1, bias=False)
        self.second = nn.Conv2d(out, out, 3, stride=stride, padding=1, groups=2, bias=False)
        self.third = nn.Conv2d(out, out, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(out) for _ in range(3))
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(channels, out, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        made = F.relu(self.norms[0](self.first(x)))
        made = F.relu(self.norms[1](self.second(made)))
        return F.relu(self.norms[2](self.third(made)) + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 7, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layers = nn.Sequential(Bottleneck(8, 8, 1), Bottleneck(8, 12, 2))
        self.average = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(12, 6)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.average(self.layers(self.pool(F.relu(self.norm(self.stem(images)))))).flatten(1))


class UNet(nn.Module):
    """Twice narrower and twice wider again, by a transposed convolution and by interpolation."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(4, 6, 3, padding=1)
        self.down = nn.Conv2d(6, 8, 3, padding="same", dilation=2)
        self.bottom = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.widen = nn.ConvTranspose2d(12, 8, 4, stride=2, padding=1)
        self.up = nn.Conv2d(16, 6, 3, padding=1)
        self.leave = nn.Conv2d(12, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        first = F.gelu(self.enter(images))
        second = F.gelu(self.down(F.avg_pool2d(first, 3, 2, 1)))
        wide = F.gelu(self.widen(F.gelu(self.bottom(second))))
        wide = F.gelu(self.up(torch.cat([wide, second], 1)))
        wide = F.interpolate(wide, scale_factor=2, mode="bilinear")
        return self.leave(torch.cat([wide, first], 1))


def _images() -> Tensor:
    return torch.randn(ROWS, 4, 16, 16)


def build_vgg() -> Any:
    torch.manual_seed(0)
    return Vgg(), (_images(), torch.randint(0, 6, (ROWS,))), F.cross_entropy


def build_residual_net() -> Any:
    torch.manual_seed(0)
    return ResNet(), (_images() + 1, torch.randint(0, 6, (ROWS,))), F.cross_entropy


def build_unet() -> Any:
    torch.manual_seed(0)
    return UNet(), (_images(), torch.randint(0, 3, (ROWS, 16, 16))), F.cross_entropy
