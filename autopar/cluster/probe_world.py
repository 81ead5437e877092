"""The running world: this process's device, and its process group."""

from __future__ import annotations

import atexit

import torch
import torch.distributed as dist


def join_world() -> torch.device:
    """This rank's device; joins the launcher's process group, or makes a world of one, if nobody has.

    A group made here is destroyed when the process exits; a rank that just ends would tear down others' connections.
    """
    cuda = torch.cuda.is_available()
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        if dist.is_torchelastic_launched():
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(_leave_world)
    if not cuda:
        return torch.device("cpu")
    # A launcher that gave this process a device of its own has set it; else ranks take the host's devices in turn.
    if torch.cuda.current_device() == 0:
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    return torch.device("cuda", torch.cuda.current_device())


def _leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
