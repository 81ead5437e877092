"""Checkpoints: written once under any plan, read under any other plan and world size.

A checkpoint is a folder. It is written under a hidden name beside its final one and renamed when every rank's files
are on the disk, so that its name never stands for half of one. Loading checks the model, the optimizer and every file's
checksum first, and reads into fresh memory; only when all ranks have everything is the running state changed.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from . import checkpoint_optimizer
from .agree import from_rank_zero, on_every_rank
from .background import Saving
from .checkpoint_files import (
    INDEX,
    Part,
    dtype_name,
    fingerprint,
    read_index,
    read_parts,
    verify_file,
    write_index,
    write_parts,
)
from .ownership import Ownership
from .torch_private import local_tensor

if TYPE_CHECKING:
    from ..parallelize import Model

_MOST_NAMES = 5


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says besides the state itself: the `step` and `extra` that `save` was given."""

    step: int
    extra: Any


def save(
    path: str | Path,
    model: Model,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    step: int = 0,
    extra: Any = None,
    background: bool = False,
) -> Saving:
    """Write parameters, buffers, random seeds and the optimizer's state and options to the folder `path`.

    All ranks call it with a path on storage that they share; rank 0's `step` and `extra` (anything JSON can say: the
    data position, a scheduler's state) are kept. A checkpoint at `path` is replaced when the new one is complete.

    background: copy the state to host memory, return, and write while training goes on; `wait()` on what is returned
    says that it is written, or raises why it could not be. The next `save` waits for this one first.

    ValueError for an optimizer that is not elementwise, an `extra` that JSON cannot say, and a `path` at which something
    else lies; OSError where it cannot be written; the same on every rank.
    """
    target = Path(path).absolute()
    model.saving.wait()
    rank = dist.get_rank()
    parameters = model.runtime.storage.parameters
    described = checkpoint_optimizer.describe(optimizer, parameters) if optimizer is not None else None

    def prepare() -> tuple[Path, str]:
        try:
            facts = json.dumps({"step": int(step), "extra": extra})
        except (TypeError, ValueError) as error:
            raise ValueError(f"step={step!r}, extra={extra!r}: expected a number and JSON-able data: {error}") from None
        if target.exists() and not (target / INDEX).is_file():
            raise ValueError(f"{target} exists and is no checkpoint; save to another path, or remove it")
        temporary = target.with_name(f".{target.name}.partial-{uuid.uuid4().hex[:8]}")
        temporary.mkdir(parents=True)
        return temporary, facts

    temporary, facts = from_rank_zero(prepare)
    index = {
        **json.loads(facts),
        "seed": model.seeds.seed,
        "seed_step": model.seeds.step,
        "model": _facts(model),
        "optimizer": described,
    }
    model.share_buffers()
    with _removed_on_failure(temporary, rank):
        parts: list[Part] = []

        def collect() -> None:
            parts.extend(_owned_parts(model, rank))
            if optimizer is not None and described is not None:
                parts.extend(checkpoint_optimizer.owned_parts(optimizer, parameters, described, rank))
            if background:
                parts[:] = [replace(part, local=part.local.to("cpu", copy=True)) for part in parts]

        on_every_rank(collect)

    def write() -> None:
        group = model.saving.group
        with _removed_on_failure(temporary, rank):
            tensors = write_parts(temporary, parts, group)
            names = sorted({piece[2] for about in tensors.values() for piece in about["pieces"]})
            mine = names[rank :: dist.get_world_size()]
            found = on_every_rank(lambda: {name: fingerprint(temporary / name) for name in mine}, group)
            files = {name: about for part in found for name, about in part.items()}
            whole = {**index, "files": files, "tensors": tensors}
            from_rank_zero(lambda: _publish(temporary, target, whole), group)

    model.saving = model.saving.follow_up(write, str(target), background)
    return model.saving


@contextmanager
def _removed_on_failure(temporary: Path, rank: int) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def load(path: str | Path, model: Model, optimizer: torch.optim.Optimizer | None = None) -> CheckpointInfo:
    """Bring `model` (and `optimizer`, made over its parameters) to the state that `save` wrote, whatever the plans.

    All ranks call it. Each reads what its own parts overlap, into host memory first.
    ValueError, the same on every rank and before anything is changed, for what is no checkpoint or one of another model
    or optimizer, and for files that are missing or corrupt, by name.
    """
    model.saving.wait()
    folder = Path(from_rank_zero(lambda: str(_standing(Path(path).absolute()))))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    parameters = model.runtime.storage.parameters
    index = from_rank_zero(lambda: read_index(folder))
    described = index["optimizer"]

    mine = list(index["files"].items())[rank::world_size]
    parts: list[Part] = []

    def misfits() -> list[str]:
        found = _mismatches(index["model"], _facts(model))
        if optimizer is not None and not found:
            found = checkpoint_optimizer.mismatches(optimizer, parameters, described)
        return found

    def damages() -> list[str]:
        found = [verify_file(folder, name, expected) for name, expected in mine]
        return [complaint for complaint in found if complaint]

    def read() -> list[str]:
        parts.extend(_wanted_parts(model, rank))
        if optimizer is not None:
            parts.extend(checkpoint_optimizer.wanted_parts(parameters, described, rank))
        return read_parts(folder, index["tensors"], parts)

    for attempt in (misfits, damages, read):
        _refuse_complaints(folder, attempt)

    values = {part.key: part.local for part in parts}
    with torch.no_grad():
        for fqn, parameter in parameters.items():
            local_tensor(parameter.detach()).copy_(values[f"parameter/{fqn}"])
        for fqn, buffer in model.named_buffers():
            buffer.copy_(values[f"buffer/{fqn}"])
        if optimizer is not None:
            checkpoint_optimizer.install(optimizer, parameters, described, values)
    model.seeds.seed, model.seeds.step = index["seed"], index["seed_step"]
    return CheckpointInfo(index["step"], index["extra"])


def _owned_parts(model: Model, rank: int) -> list[Part]:
    """Parameters and buffers that this rank writes. Buffers are whole on every rank, and rank 0's count."""
    parts = []
    for fqn, parameter in model.runtime.storage.parameters.items():
        ownership: Ownership = parameter.autopar.ownership
        if ownership.counts(rank):
            local = local_tensor(parameter.detach())
            parts.append(Part(f"parameter/{fqn}", ownership.shape, ownership.segments(rank), local))
    if rank == 0:
        parts += [Part.whole(f"buffer/{fqn}", buffer) for fqn, buffer in dict(model.named_buffers()).items()]
    return parts


def _wanted_parts(model: Model, rank: int) -> list[Part]:
    """Parts like this rank's parameters and buffers, on the CPU, to be filled."""
    parts = []
    for fqn, parameter in model.runtime.storage.parameters.items():
        ownership: Ownership = parameter.autopar.ownership
        local = torch.empty(ownership.local_shape(rank), dtype=parameter.dtype)
        parts.append(Part(f"parameter/{fqn}", ownership.shape, ownership.segments(rank), local))
    for fqn, buffer in dict(model.named_buffers()).items():
        parts.append(Part.whole(f"buffer/{fqn}", torch.empty(buffer.shape, dtype=buffer.dtype)))
    return parts


def _facts(model: Model) -> dict[str, dict[str, Any]]:
    """[shape, dtype] of every parameter that the model uses, and of every buffer; the same under every plan."""
    graph = model.graph
    used = {name: graph.tensors[name] for block in graph.blocks for name in block.parameters}
    buffers = [tensor for tensor in graph.tensors.values() if tensor.role == "buffer"]
    return {
        kind: {t.fqn: [list(t.shape), dtype_name(t.at_rest)] for t in tensors}
        for kind, tensors in (("parameters", used.values()), ("buffers", buffers))
    }


def _mismatches(saved: Mapping[str, Mapping[str, Any]], own: Mapping[str, Mapping[str, Any]]) -> list[str]:
    found = []
    for kind in ("parameters", "buffers"):
        theirs, ours = saved[kind], own[kind]
        differing = [
            f"{fqn} ({_told(theirs[fqn])} there, {_told(ours[fqn])} here)"
            for fqn in ours
            if fqn in theirs and theirs[fqn] != ours[fqn]
        ]
        for names, what in (
            (sorted(set(ours) - set(theirs)), "it lacks the"),
            (sorted(set(theirs) - set(ours)), "the model lacks its"),
            (differing, "these differ among the"),
        ):
            if names:
                more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
                found.append(f"{what} {kind} {', '.join(names[:_MOST_NAMES])}{more}")
    return ["it is of another model: " + "; ".join(found)] if found else []


def _told(fact: Sequence[Any]) -> str:
    return f"{fact[1]} {tuple(fact[0])}"


def _refuse_complaints(folder: Path, attempt: Callable[[], list[str]]) -> None:
    """One ValueError on every rank if any rank's attempt has a complaint; what it raises is raised everywhere too."""
    everyone = on_every_rank(attempt)
    found = sorted({text for part in everyone for text in part})
    if found:
        more = f" (and {len(found) - _MOST_NAMES} more)" if len(found) > _MOST_NAMES else ""
        raise ValueError(f"the checkpoint {folder} cannot be loaded: {'; '.join(found[:_MOST_NAMES])}{more}")


def _standing(folder: Path) -> Path:
    """`folder`, or the checkpoint that `_publish` had set aside when it was killed between its two renames."""
    if folder.exists():
        return folder
    aside = [p for p in folder.parent.glob(f".{folder.name}.old-*") if (p / INDEX).is_file()]
    return max(aside, key=lambda p: p.stat().st_mtime, default=folder)


def _publish(temporary: Path, target: Path, index: Mapping[str, Any]) -> None:
    """Complete the checkpoint and give it its name; what had the name before goes only then."""
    write_index(temporary, index)
    if not target.exists():
        temporary.rename(target)
    else:
        # A folder cannot be renamed over another one that is not empty.
        old = target.with_name(f".{target.name}.old-{uuid.uuid4().hex[:8]}")
        target.rename(old)
        try:
            temporary.rename(target)
        except OSError:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
