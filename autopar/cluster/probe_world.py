"""The running world: this process's device, and its process group."""

from __future__ import annotations

import torch
import torch.distributed as dist


def join_world() -> torch.device:
    """This rank's device; joins the launcher's process group, or makes a world of one, if nobody has."""
    cuda = torch.cuda.is_available()
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        if dist.is_torchelastic_launched():
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if not cuda:
        return torch.device("cpu")
    # A launcher that gave this process a device of its own has set it; else ranks take the host's devices in turn.
    if torch.cuda.current_device() == 0:
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    return torch.device("cuda", torch.cuda.current_device())
