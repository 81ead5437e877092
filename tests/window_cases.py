"""Ops over windows with the arguments that matter for a split of space, as samples for tests/opinfo_cases.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from opinfo_cases import Sample
from torch import Tensor


def rand(*shape: int) -> Tensor:
    return (torch.rand(*shape, dtype=torch.float64) * 0.8 + 0.1).requires_grad_()


def convolutions() -> Iterator[Sample]:
    """(input, weight, arguments behind the bias): strides, paddings, dilations, groups, single points."""
    for target, x, w, *rest in (
        ("conv1d.default", (2, 4, 12), (6, 4, 3), [1], [1]),
        ("conv1d.default", (4, 12), (6, 4, 3), [1], [1]),
        ("conv2d.default", (2, 4, 12, 12), (6, 4, 3, 3), [1, 1], [1, 1], [1, 1], 1),
        ("conv2d.default", (2, 4, 12, 12), (6, 2, 3, 3), [2, 2], [1, 1], [1, 1], 2),
        ("conv2d.default", (2, 4, 12, 6), (6, 4, 5, 3), [1, 1], [2, 1]),
        ("conv2d.default", (2, 4, 12, 12), (6, 4, 3, 3), [1, 1], [2, 2], [2, 2]),
        ("conv2d.default", (2, 4, 12, 12), (6, 4, 1, 1), [2, 2], [0, 0]),
        ("conv2d.default", (2, 4, 12, 12), (6, 4, 4, 4), [4, 2], [0, 1]),
        ("conv2d.default", (2, 4, 8, 8), (6, 4, 3, 3), [1, 1], [0, 0]),
        ("conv2d.default", (2, 4, 14, 14), (6, 4, 3, 3), [1, 1], [0, 1]),
        ("conv2d.padding", (2, 4, 12, 12), (6, 4, 3, 2), [1, 1], "same"),
        ("conv2d.padding", (2, 4, 12, 12), (6, 4, 2, 4), [1, 1], "same", [1, 2]),
        ("conv2d.padding", (2, 4, 12, 12), (6, 4, 3, 1), [1, 1], "valid"),
        ("conv3d.default", (1, 2, 6, 6, 6), (6, 2, 3, 3, 3), [1, 1, 1], [1, 1, 1]),
        # stride, padding, output_padding, groups, dilation
        ("conv_transpose2d.input", (2, 4, 6, 6), (4, 6, 2, 2), [2, 2]),
        ("conv_transpose2d.input", (2, 4, 6, 6), (4, 6, 3, 3), [2, 2], [1, 1], [1, 1]),
        ("conv_transpose2d.input", (2, 4, 6, 6), (4, 6, 4, 4), [2, 2], [1, 1]),
        ("conv_transpose2d.input", (2, 4, 6, 6), (4, 3, 3, 3), [1, 1], [1, 1], [0, 0], 2),
        ("conv_transpose2d.input", (2, 4, 12, 6), (4, 6, 3, 3), [1, 1], [2, 2], [0, 0], 1, [2, 2]),
        ("conv_transpose1d.default", (2, 4, 6), (4, 6, 5), [3], [1], [0]),
        ("conv_transpose1d.default", (2, 4, 6), (4, 6, 2), [3], [0], [1]),
        ("conv_transpose1d.default", (2, 4, 6), (4, 6, 1), [2], [0], [1]),
    ):
        yield f"aten.{target}", (rand(*x), rand(*w), rand(6), *rest), {}
    yield "aten.conv2d.default", (rand(2, 4, 12, 12), rand(6, 4, 3, 3)), {"padding": [1, 1]}


def kernels() -> Iterator[Sample]:
    """(input, weight, arguments behind the bias): kernels that 2, 3 or 4 divide."""
    for target, x, w, *rest in (
        ("conv1d.default", (2, 4, 12), (6, 4, 4), [1], [2], [1]),
        ("conv1d.default", (2, 4, 13), (6, 2, 6), [2], [5], [2], 2),
        ("conv2d.default", (2, 4, 8, 8), (6, 4, 4, 4), [4, 4]),
        ("conv2d.default", (2, 4, 9, 8), (6, 4, 3, 2), [1, 2], [1, 0]),
        ("conv2d.padding", (2, 4, 9, 8), (6, 4, 3, 4), [1, 1], "same"),
        ("conv2d.padding", (2, 4, 9, 8), (6, 4, 3, 4), [1, 1], "valid", [2, 1]),
        ("conv3d.default", (1, 2, 4, 4, 4), (6, 2, 2, 3, 2)),
    ):
        yield f"aten.{target}", (rand(*x), rand(*w), rand(6), *rest), {}


def pools() -> Iterator[Sample]:
    for n in (1, 2, 3):
        x = rand(2, 3, *[12 if n < 3 else 6] * n)
        arguments: list[tuple[str, tuple[Any, ...]]] = [
            ("max_pool", ([2] * n, [2] * n)),
            ("max_pool", ([3] * n, [2] * n, [1] * n)),
            ("max_pool", ([3] * n, [1] * n, [1] * n, [1] * n, True)),
            ("max_pool", ([3] * n, [1] * n, [1] * n, [2] * n)),
            ("avg_pool", ([2] * n,)),
            ("avg_pool", ([3] * n, [2] * n, [1] * n)),
            # ceil_mode, count_include_pad: what lies outside counts, or does not
            ("avg_pool", ([3] * n, [2] * n, [1] * n, False, False)),
            ("avg_pool", ([3] * n, [1] * n, [1] * n, True, False)),
            ("avg_pool", ([3] * n, [2] * n, [0] * n, True, True)),
        ]
        for name, rest in arguments:
            yield f"aten.{name}{n}d.default", (x, *rest), {}
    yield "aten.avg_pool2d.default", (rand(2, 3, 12, 12), [3, 3], [1, 1], [1, 1], False, False, 5), {}
    yield "aten.max_pool2d_with_indices.default", (rand(2, 3, 12, 12), [3, 3], [1, 1], [1, 1]), {}
    for size in ([1, 1], [6, 6], [12, 12], [1, 6], [5, 4], [2, 3]):
        yield "aten.adaptive_avg_pool2d.default", (rand(2, 3, 12, 12), size), {}
    yield "aten.adaptive_avg_pool1d.default", (rand(2, 3, 12), [1]), {}


def resizings() -> Iterator[Sample]:
    for n in (1, 2, 3):
        for size, out in ((6, 12), (12, 6), (6, 9)):
            yield f"aten.upsample_nearest{n}d.default", (rand(2, 3, *[size] * n), [out] * n), {}
    for name, n in (("linear1d", 1), ("bilinear2d", 2), ("bicubic2d", 2), ("trilinear3d", 3)):
        for factor, align_corners in ((2, False), (3, False), (2, True)):
            yield f"aten.upsample_{name}.default", (rand(2, 3, *[6] * n), [6 * factor] * n, align_corners), {}
        yield f"aten.upsample_{name}.vec", (rand(2, 3, *[6] * n), None, False, [2.0] * n), {}
    for amounts in ([1, 1], [1, 1, 2, 2], [0, 0, -2, 2], [0, 1, 0, 0], [2, 0, 1, 1]):
        yield "aten.constant_pad_nd.default", (rand(2, 3, 12, 10), amounts, 0.5), {}
        yield "aten.pad.default", (rand(2, 3, 12, 10), amounts), {}
    yield "aten.pad.default", (rand(2, 3, 12, 10), [0, 0, 2, 2], "reflect"), {}


def norms() -> Iterator[Sample]:
    for shape in ((2, 6, 6), (2, 6, 6, 12)):
        yield "aten.group_norm.default", (rand(*shape), 3, rand(6), rand(6)), {}
        yield "aten.group_norm.default", (rand(*shape), 2), {"eps": 1e-3}
        yield "aten.instance_norm.default", (rand(*shape), rand(6), rand(6), None, None, True, 0.1, 1e-5, False), {}
    for shape, with_statistics, training in (
        ((4, 6, 6), True, True), ((4, 6, 6, 6), False, True), ((4, 6, 6, 6), True, True), ((4, 6, 6, 6), True, False)
    ):  # fmt: skip
        statistics = [rand(6).detach() if with_statistics else None for _ in range(2)]
        arguments = (rand(*shape), rand(6), rand(6), *statistics, training, 0.1, 1e-5, False)
        yield "aten.batch_norm.default", arguments, {}
