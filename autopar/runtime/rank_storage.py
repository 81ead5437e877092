"""The storages of all stages that one rank runs, as one: each parameter once, whatever the number of stages that use it.

A parameter that two stages of a rank use (tied embeddings under a V-shaped schedule) lies alike in both. The first stage's
is the parameter that the optimizer sees; the others compute with its memory, or with a copy that is renewed in front of
every program where the storage has memory of its own. The gradients of all of them are summed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .storage import ParameterSpec, Storage
from .torch_private import local_tensor


class RankStorage:
    """parameters: at rest, by original name, in the order of the stages."""

    def __init__(
        self,
        stages: Mapping[int, Sequence[ParameterSpec]],
        build: Callable[[int, Mapping[str, Tensor]], Storage],
        values: Mapping[str, Tensor],
    ):
        """build(stage, values): the storage of one stage, which takes the values over. values: local parts at rest."""
        self.stages: dict[int, Storage] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        self._copies: list[tuple[Tensor, Tensor]] = []
        for stage, specs in stages.items():
            held = {s.fqn: local_tensor(self.parameters[s.fqn].detach()) for s in specs if s.fqn in self.parameters}
            storage = build(stage, {s.fqn: held.get(s.fqn, values.get(s.fqn)) for s in specs})
            self.stages[stage] = storage
            for fqn, parameter in storage.parameters.items():
                own = local_tensor(parameter.detach())
                if fqn not in held:
                    self.parameters[fqn] = parameter
                elif own.data_ptr() != held[fqn].data_ptr():
                    self._copies.append((own, held[fqn]))

    @torch.no_grad()
    def begin(self) -> None:
        """In front of every program: what a stage holds a copy of is as the optimizer, or a checkpoint, has left it."""
        for copy, source in self._copies:
            copy.copy_(source)

    def buffers(self) -> list[Tensor]:
        """What is held besides the parameters from step to step."""
        return [t for storage in self.stages.values() for t in storage.buffers()] + [copy for copy, _ in self._copies]


def add_gradients(total: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    """Add one stage's gradients to those of the stages before."""
    for fqn, gradient in more.items():
        if fqn in total:
            total[fqn].add_(gradient)
        else:
            total[fqn] = gradient
