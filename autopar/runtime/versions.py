"""Versions of the weights of one stage: what asynchronous pipelines compute with (schedule/pipedream.py).

Parameters at rest are the latest version, which the optimizer steps on. A version that is still wanted when its successor
comes into being keeps its memory, and the parameters at rest move to memory of their own; so there are as many copies as
versions in use, and nothing is copied where the latest is the only one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .axis import Axis
from .storage import BlockFunction, ParameterSpec, StageAxes, at_rest, deliver, reduction_axis
from .torch_private import local_tensor, replace_local


class Versions:
    """The `Storage` of a stage whose microbatches use different versions. Arguments as `Replicas`.

    keeps: how many versions before the latest stay although no microbatch uses them now.
    """

    def __init__(
        self,
        specs: Sequence[ParameterSpec],
        blocks: Mapping[int, Sequence[str]],
        values: Mapping[str, Tensor],
        axes: StageAxes,
        keeps: int,
    ):
        self.parameters: dict[str, nn.Parameter] = at_rest(specs, values, axes)
        self.latest = 0
        self._keeps = keeps
        self._axis_of = {s.fqn: reduction_axis(s, axes) for s in specs if s.requires_grad}
        self._blocks = {index: tuple(fqns) for index, fqns in blocks.items()}
        self._functions: dict[int, BlockFunction] = {}
        self._leaves: dict[int, dict[str, Tensor]] = {0: self._views()}
        self._users: Counter[int] = Counter()
        self._using = self._updating = 0

    def _views(self) -> dict[str, Tensor]:
        # `.data` and not `detach`: a version counter of its own, so that autograd does not take the next version, in other
        # memory, for a change of this one.
        return {fqn: local_tensor(p).data.requires_grad_(p.requires_grad) for fqn, p in self.parameters.items()}

    def bind(self, index: int, function: BlockFunction) -> None:
        self._functions[index] = function

    def block(self, index: int) -> Callable[..., Any]:
        leaves = self._leaves[self._using]
        return partial(self._functions[index], tuple([leaves[fqn] for fqn in self._blocks[index]]))

    def forward(self, function: Callable[..., Any], *activations: Any) -> Any:
        return function(*activations)

    def buffers(self) -> list[Tensor]:
        return [leaf for version, of in self._leaves.items() if version != self.latest for leaf in of.values()]

    def begin_step(self) -> None:
        raise AssertionError("weights in versions are updated inside a stream, not step by step")

    def begin_evaluation(self) -> None:
        self._using = self.latest

    def end_evaluation(self) -> None: ...

    def begin_last_backward(self) -> None:
        """Nothing: an update reduces when it is due."""

    def begin_input_half(self, last: bool) -> None:
        raise AssertionError("streams have whole backwards")

    def weight_half(self, last: bool) -> AbstractContextManager[None]:
        raise AssertionError("streams have whole backwards")

    def finish(self) -> dict[str, Tensor]:
        raise AssertionError("weights in versions are updated inside a stream, not step by step")

    def stash(self, version: int) -> None:
        """The next forward uses `version`."""
        assert version in self._leaves, (version, sorted(self._leaves))
        self._users[version] += 1
        self._using = version

    def restore(self, version: int) -> None:
        """The next backward is of a forward that used `version`, the same for all backwards of one update."""
        self._users[version] -= 1
        self._updating = version

    def update(self, optimizer: torch.optim.Optimizer) -> int:
        """One step with the gradients of the version restored last: the latest version plus 1. Returns the bytes reduced."""
        leaves = self._leaves[self._updating]
        gradients = {fqn: leaf.grad for fqn, leaf in leaves.items() if leaf.grad is not None}
        for leaf in leaves.values():
            leaf.grad = None
        reduced_bytes = self._reduce(gradients)
        optimizer.zero_grad(set_to_none=True)
        deliver(self.parameters, gradients)
        old = self.latest
        if self._users[old] or self._keeps:
            for parameter in self.parameters.values():
                if parameter.requires_grad:
                    replace_local(parameter, local_tensor(parameter).detach().clone())
        else:
            del self._leaves[old]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.latest = old + 1
        self._leaves[self.latest] = self._views()
        for version in [v for v in self._leaves if v < self.latest - self._keeps and not self._users[v]]:
            del self._leaves[version]
        return reduced_bytes

    def begin(self) -> None:
        """In front of a stream and behind it: the weights as they are now are version 0, and the only one."""
        assert not any(self._users.values())
        self.latest = self._using = self._updating = 0
        self._leaves = {0: self._views()}

    @torch.no_grad()
    def _reduce(self, gradients: dict[str, Tensor]) -> int:
        """Sum over the ranks that hold summands, one collective for each axis and dtype."""
        members: dict[tuple[int, torch.dtype], tuple[Axis, list[str]]] = {}
        for fqn, gradient in gradients.items():
            axis = self._axis_of[fqn]
            if axis is not None:
                members.setdefault((id(axis), gradient.dtype), (axis, []))[1].append(fqn)
        reduced_bytes = 0
        for axis, fqns in members.values():
            flat = axis.all_reduce(torch.cat([gradients[fqn].reshape(-1) for fqn in fqns]))
            reduced_bytes += flat.numel() * flat.element_size()
            runs = flat.split([gradients[fqn].numel() for fqn in fqns])
            gradients |= {fqn: run.view(gradients[fqn].shape) for fqn, run in zip(fqns, runs, strict=True)}
        return reduced_bytes
