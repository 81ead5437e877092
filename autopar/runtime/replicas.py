"""ZeRO 0: every data rank holds the whole (tensor-local) parameter, and gradients are all-reduced in buckets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .buckets import BUCKET_BYTES
from .leaves import Leaves, to_host
from .storage import BlockFunction, ParameterSpec, StageAxes, at_rest


class Replicas:
    """The `Storage` of a stage with ZeRO 0.

    specs: the stage's parameters in order of first use. blocks: per block index, the names of its parameters.
    values: local tensors at rest, taken over. reduction: dtype in which gradients are summed where blocks compute in a
        narrower one than lies at rest. offload: parameters and their gradients at rest lie in host memory.
    """

    def __init__(
        self,
        specs: Sequence[ParameterSpec],
        blocks: Mapping[int, Sequence[str]],
        values: Mapping[str, Tensor],
        axes: StageAxes,
        bucket_bytes: int = BUCKET_BYTES,
        reduction: torch.dtype = torch.float32,
        offload: bool = False,
    ):
        self.parameters: dict[str, nn.Parameter] = at_rest(specs, to_host(values) if offload else values, axes)
        self._leaves = Leaves(specs, self.parameters, axes, bucket_bytes, reduction, offload)
        self._of_block = {index: tuple(self._leaves.tensors[fqn] for fqn in fqns) for index, fqns in blocks.items()}
        self._calls: dict[int, Callable[..., Any]] = {}

    def bind(self, index: int, function: BlockFunction) -> None:
        self._calls[index] = partial(function, self._of_block[index])

    def block(self, index: int) -> Callable[..., Any]:
        return self._calls[index]

    def forward(self, function: Callable[..., Any], *activations: Any) -> Any:
        return function(*activations)

    def buffers(self) -> list[Tensor]:
        return self._leaves.buffers()

    def begin_step(self) -> None:
        self._leaves.begin_step()

    def begin_evaluation(self) -> None:
        self._leaves.refresh()

    def end_evaluation(self) -> None:
        pass

    def begin_last_backward(self) -> None:
        self._leaves.begin_last_backward()

    def begin_input_half(self, last: bool) -> None:
        pass

    @contextmanager
    def weight_half(self, last: bool) -> Iterator[None]:
        if last:
            self._leaves.begin_last_backward()
        yield

    def finish(self) -> dict[str, Tensor]:
        return self._leaves.finish()
