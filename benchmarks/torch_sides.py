"""What a user would write by hand in plain PyTorch, one class per kind of parallelism.

Each side is made from a module that every rank has whole and alike, owns its AdamW, and runs one training step of the
global batch; `step` returns this rank's view of the loss without waiting for the device, and `loss` (outside the timed
region, all ranks) makes the global mean of it. B batch rows, S sequence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B, ScheduleZBVZeroBubble
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from launch.model import LanguageModel, rotary_table


class Eager:
    """One rank, the module as it is."""

    def __init__(self, module: nn.Module, learning_rate: float) -> None:
        self.module = module
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate)

    def rows(self, batch: Tensor) -> Tensor:
        """This rank's rows of the global batch."""
        return batch

    def step(self, tokens: Tensor, targets: Tensor) -> Tensor:
        loss = self.module(self.rows(tokens), self.rows(targets))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def loss(self, value: Tensor) -> float:
        return value.item()


class DataParallel(Eager):
    """Equal shares of the rows: the mean of the ranks' means is the global mean, and so it is for gradients."""

    def rows(self, batch: Tensor) -> Tensor:
        return batch.chunk(dist.get_world_size())[dist.get_rank()]

    def loss(self, value: Tensor) -> float:
        total = value.clone()
        dist.all_reduce(total)
        return total.item() / dist.get_world_size()


class Replicated(DataParallel):
    """DistributedDataParallel with its defaults."""

    def __init__(self, module: nn.Module, learning_rate: float, device: torch.device) -> None:
        super().__init__(DistributedDataParallel(module, [device] if device.type == "cuda" else None), learning_rate)


class FullySharded(DataParallel):
    """fully_shard on each layer, then on the rest.

    keep: keep parameters gathered from forward to backward (ZeRO 2). half: compute in bfloat16, reduce in float32.
    """

    def __init__(
        self,
        module: LanguageModel,
        learning_rate: float,
        device: torch.device,
        keep: bool = False,
        half: bool = False,
    ) -> None:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()
        for layer in module.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=not keep, mp_policy=policy)
        fully_shard(module, mesh=mesh, reshard_after_forward=not keep, mp_policy=policy)
        if device.type == "cpu":
            # gloo has no averaging reduction: sum, and let fully_shard divide.
            for part in (*module.layers, module):
                part.set_force_sum_reduction_for_comms(True)
        super().__init__(module, learning_rate)


class TensorParallel(Eager):
    """The plan of torch's tensor-parallel tutorial: column then row in attention and feed-forward, and at the ends.

    shard_ends: also split the embedding by rows and the head by columns.
    """

    def __init__(self, module: LanguageModel, learning_rate: float, device: torch.device, shard_ends: bool) -> None:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        if shard_ends:
            ends = {
                "embedding": RowwiseParallel(input_layouts=Replicate()),
                "head": ColwiseParallel(output_layouts=Replicate()),
            }
            parallelize_module(module, mesh, ends)
        column = ("attention.query", "attention.key", "attention.value", "feed_forward.gate", "feed_forward.up")
        row = ("attention.output", "feed_forward.down")
        for layer in module.layers:
            layer_plan = {name: ColwiseParallel() for name in column} | {name: RowwiseParallel() for name in row}
            parallelize_module(layer, mesh, layer_plan)
        # Some parameters are now DTensors and others not, which fused and foreach kernels do not take together.
        sharded = [p for p in module.parameters() if hasattr(p, "to_local")]
        whole = [p for p in module.parameters() if not hasattr(p, "to_local")]
        super().__init__(module, learning_rate)
        groups = [{"params": group} for group in (sharded, whole) if group]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate)


class _Piece(nn.Module):
    """A run of layers, which may be empty, with the embedding before it or the head after it."""

    def __init__(self, module: LanguageModel, layers: range, is_first: bool, is_last: bool) -> None:
        super().__init__()
        self.config = module.config
        self.layers = nn.ModuleList(module.layers[i] for i in layers)
        self.embedding = module.embedding if is_first else None
        self.norm, self.head = (module.norm, module.head) if is_last else (None, None)

    def forward(self, x: Tensor) -> Tensor:
        if self.embedding is not None:
            x = self.embedding(x)
        table = rotary_table(self.config, torch.arange(x.shape[1], device=x.device))
        cosines, sines = (part.to(x.dtype) for part in table)
        for layer in self.layers:
            x = layer(x, cosines, sines)
        return x if self.head is None else self.head(self.norm(x))


class Pipeline:
    """torch.distributed.pipelining over one rank per set of stages.

    layers: of every stage, in order; embedding and head go with the ends. owners: the rank of every stage. schedule: by
        our name for it.
    """

    SCHEDULES = {"interleaved": ScheduleInterleaved1F1B, "zb-v": ScheduleZBVZeroBubble}

    def __init__(
        self,
        module: LanguageModel,
        learning_rate: float,
        device: torch.device,
        microbatches: int,
        layers: list[range],
        owners: list[int],
        schedule: str = "1f1b",
    ) -> None:
        last = len(layers) - 1
        own = [s for s, owner in enumerate(owners) if owner == dist.get_rank()]
        self.is_first, self.is_last = 0 in own, last in own
        self.pieces = [_Piece(module, layers[s], s == 0, s == last) for s in own]
        self.optimizer = torch.optim.AdamW([p for piece in self.pieces for p in piece.parameters()], lr=learning_rate)
        stages = [PipelineStage(p, s, len(layers), device) for p, s in zip(self.pieces, own, strict=True)]
        if schedule == "1f1b":
            self.schedule = Schedule1F1B(stages[0], microbatches, loss_fn=_mean_cross_entropy)
        else:
            self.schedule = self.SCHEDULES[schedule](stages, microbatches, loss_fn=_mean_cross_entropy)

    def step(self, tokens: Tensor, targets: Tensor) -> Tensor:
        losses: list[Tensor] = []
        inputs = (tokens,) if self.is_first else ()
        self.schedule.step(*inputs, **({"target": targets, "losses": losses} if self.is_last else {}))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return torch.stack(losses).mean().detach() if losses else torch.zeros((), device=tokens.device)

    def loss(self, value: Tensor) -> float:
        total = value.clone()
        dist.all_reduce(total)
        return total.item()


def _mean_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def layers_named(names: Iterable[str]) -> set[int]:
    """The numbers of the layers that parameters of these names belong to."""
    return {int(found.group(1)) for name in names if (found := re.match(r"layers\.(\d+)\.", name))}
