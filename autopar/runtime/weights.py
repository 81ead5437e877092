"""Weights in and out as Hugging Face keeps them: safetensors files under the names of the module's state dict.

A folder holds model.safetensors, or several files and model.safetensors.index.json, which says where each tensor lies.
No rank needs more memory than one file to write, and when reading each takes the boxes that it holds and no more.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..sharding.placement import REPLICATED
from .agree import from_rank_zero, on_every_rank
from .build import ownerships
from .checkpoint_files import Part, write_atomically_with
from .ownership import Holder, Ownership
from .reshard import reshard
from .torch_private import local_tensor

if TYPE_CHECKING:
    from ..parallelize import Model

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MOST_NAMES = 5


def state_names(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """For every parameter and persistent buffer, by each of its names, all names that it has in the state dict.

    Tied parameters have several, and files of different origin keep different ones.
    """
    state = module.state_dict(keep_vars=True)
    by_tensor: dict[int, list[str]] = {}
    for name, tensor in state.items():
        if isinstance(tensor, Tensor):
            by_tensor.setdefault(id(tensor), []).append(name)
    return {name: tuple(names) for names in by_tensor.values() for name in names}


def save_safetensors(
    folder: str | Path, model: Model, *, dtype: torch.dtype | None = None, max_file_bytes: int = 5 * 10**9
) -> None:
    """Write the parameters and persistent buffers that the model uses, each under one of its names, to `folder`.

    All ranks call it with a folder on storage that they share. dtype: of floating-point tensors in the files, theirs if
    None. Files of `max_file_bytes` at most, as far as one tensor allows; each appears under its name when it is whole,
    the index last. Files of an earlier save that the new one does not use are left.
    OSError where a file cannot be written, the same on every rank.
    """
    target, rank, world_size = Path(folder), dist.get_rank(), dist.get_world_size()
    from_rank_zero(lambda: target.mkdir(parents=True, exist_ok=True))
    model.share_buffers()
    held = {fqn: local_tensor(p.detach()) for fqn, p in model.runtime.storage.parameters.items()}
    buffers = {fqn: buffer for fqn, buffer in model.named_buffers() if fqn in model.state_names}
    dtypes = {t.fqn: t.at_rest for t in model.graph.parameters}
    before = ownerships(model.graph, model.plan)
    sizes = {fqn: torch.Size(o.shape).numel() * _stored(dtypes[fqn], dtype).itemsize for fqn, o in before.items()}
    sizes |= {fqn: buffer.numel() * _stored(buffer.dtype, dtype).itemsize for fqn, buffer in buffers.items()}
    files = list(_cut(sizes, max_file_bytes))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files):
        file = SINGLE if len(files) == 1 else f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        writer = number % world_size
        weight_map |= dict.fromkeys(names, file)
        parameters = [name for name in names if name in before]
        after = {fqn: Ownership(before[fqn].shape, (Holder((writer,), 1, 1, REPLICATED),)) for fqn in parameters}
        whole = reshard(held, {fqn: before[fqn] for fqn in parameters}, after, dtypes, rank, model.device)

        def write(file: str = file, whole: Mapping[str, Tensor] = whole, names: Iterable[str] = names) -> None:
            content = {}
            for name in names:
                tensor = whole[name] if name in whole else buffers[name]
                content[name] = tensor.detach().to("cpu", _stored(tensor.dtype, dtype), copy=True).contiguous()
            write_atomically_with(target / file, lambda path: save_file(content, path, metadata={"format": "pt"}))

        on_every_rank(write if rank == writer else lambda: None)
    if len(files) > 1:
        about = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        text = json.dumps(about, indent=2) + "\n"
        from_rank_zero(lambda: write_atomically_with(target / INDEX, lambda path: path.write_text(text)))


def load_safetensors(folder: str | Path, model: Model, *, prefix: str = "", strict: bool = True) -> None:
    """Fill the parameters and persistent buffers of this rank from the safetensors files of `folder`.

    All ranks call it. prefix: what the files' names have in front of the module's own, "model." for instance.
    Values are converted to the parameters' dtypes. ValueError, the same on every rank and before anything is changed, for
    no such files, damaged ones, other shapes, and, where `strict`, for tensors that are missing or unknown.
    """
    path = Path(folder)
    weight_map: dict[str, str] = from_rank_zero(lambda: _weight_map(path))
    parts: list[Part] = []

    def read() -> list[str]:
        return list(_read(path, weight_map, model, prefix, strict, parts))

    complaints = sorted({text for found in on_every_rank(read) for text in found})
    if complaints:
        more = f" (and {len(complaints) - _MOST_NAMES} more)" if len(complaints) > _MOST_NAMES else ""
        raise ValueError(f"the weights in {path} cannot be loaded: {'; '.join(complaints[:_MOST_NAMES])}{more}")
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for part in parts:
            local_tensor(own[part.key].detach()).copy_(part.local)


def _stored(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and own.is_floating_point else own


def _cut(sizes: Mapping[str, int], max_bytes: int) -> Iterator[list[str]]:
    """Names in order, cut into runs of at most `max_bytes`, or of one tensor."""
    run: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if run and filled + size > max_bytes:
            yield run
            run, filled = [], 0
        run.append(name)
        filled += size
    if run:
        yield run


def _weight_map(folder: Path) -> dict[str, str]:
    """The file of every tensor."""
    if (folder / INDEX).is_file():
        try:
            found = json.loads((folder / INDEX).read_text())["weight_map"]
            outside = [file for file in found.values() if Path(file).name != file]
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise ValueError(f"{folder / INDEX} is corrupt: {type(error).__name__}: {error}") from None
        if outside:
            raise ValueError(f"{folder / INDEX} names a file outside the folder: {outside[0]!r}")
        return found
    if not (folder / SINGLE).is_file():
        raise ValueError(f"{folder} holds neither {SINGLE} nor {INDEX}; expected a folder of safetensors files")
    with _opened(folder / SINGLE) as file:
        return dict.fromkeys(file.keys(), SINGLE)


@dataclass
class _opened:
    """`safe_open` whose complaints name the file."""

    path: Path

    def __enter__(self) -> Any:
        try:
            self._file = safe_open(self.path, framework="pt")
            return self._file.__enter__()
        except FileNotFoundError:
            raise ValueError(f"{self.path.name}: the file is missing") from None
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path.name}: is corrupt or cannot be read: {error}") from None

    def __exit__(self, *exception: Any) -> None:
        self._file.__exit__(*exception)


def _read(
    folder: Path, weight_map: Mapping[str, str], model: Model, prefix: str, strict: bool, parts: list[Part]
) -> Iterator[str]:
    """Read this rank's parts into `parts`; yields complaints."""
    wanted = list(_wanted(model))
    by_file: dict[str, list[tuple[str, Part]]] = {}
    for part in wanted:
        stored = [prefix + name for name in model.state_names[part.key] if prefix + name in weight_map]
        if stored:
            by_file.setdefault(weight_map[stored[0]], []).append((stored[0], part))
        elif strict:
            yield f"{prefix}{part.key} is missing"
    if strict:
        known = {prefix + name for name in model.state_names}
        yield from (f"{name} is unknown to the model" for name in weight_map if name not in known)
    for file, members in by_file.items():
        try:
            with _opened(folder / file) as content:
                for name, part in members:
                    slices = content.get_slice(name)
                    shape = tuple(slices.get_shape())
                    if shape != part.shape:
                        yield f"{name} has shape {shape} in {file}, {part.shape} in the model"
                        continue
                    for start, box in part.boxes():
                        index = tuple(slice(a, a + n) for a, n in zip(start, box.shape, strict=True))
                        box.copy_(slices[index] if index else content.get_tensor(name))
                    parts.append(part)
        except ValueError as error:
            yield str(error)
        except SafetensorError as error:
            yield f"{file}: {error}"


def _wanted(model: Model) -> Iterator[Part]:
    """This rank's parts of what a state dict holds, on the CPU, to be filled."""
    rank = dist.get_rank()
    for fqn, parameter in model.runtime.storage.parameters.items():
        ownership: Ownership = parameter.autopar.ownership
        local = torch.empty(ownership.local_shape(rank), dtype=parameter.dtype)
        yield Part(fqn, tuple(ownership.shape), ownership.segments(rank), local)
    for fqn, buffer in model.named_buffers():
        if fqn in model.state_names:
            yield Part.whole(fqn, torch.empty(buffer.shape, dtype=buffer.dtype))
