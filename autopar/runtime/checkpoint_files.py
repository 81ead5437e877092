"""Checkpoint files: pieces of tensors in torch.distributed.checkpoint's format, and an index of them in JSON.

Each rank writes the boxes that count on it (`Ownership.counts`), so every element is written once, whatever the plan. A
piece of a tensor carries its offsets in the global tensor; a reader under another plan takes what overlaps its boxes.
torch's own `.metadata` is left in the folder for its tools, but it is a pickle and never read here: the index says the
same, with the length and the checksum of every file and one of its own.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from .ownership import Segment, Segments
from .torch_private import place_of, stored_at

INDEX = "autopar.json"
FORMAT = 1
PIECE_BYTES = 64 * 2**20
"""The reader holds one stored piece at a time besides what it keeps; so a piece is never longer than this."""

_READ_BYTES = 2**22


@dataclass(frozen=True)
class Part:
    """This rank's part of a global tensor of `shape`; `local` lies as `segments` say."""

    key: str
    shape: tuple[int, ...]
    segments: Segments
    local: Tensor

    @classmethod
    def whole(cls, key: str, tensor: Tensor) -> Part:
        """A tensor that this rank has all of."""
        return cls(key, tuple(tensor.shape), tuple((Segment(0, 0, n),) if n else () for n in tensor.shape), tensor)

    def boxes(self) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """(offsets in the global tensor, view of `local`) of every box, in order of the dims' segments."""
        for runs in itertools.product(*self.segments):
            view = self.local
            for dim, run in enumerate(runs):
                view = view.narrow(dim, run.local, run.length)
            yield tuple(run.start for run in runs), view


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """torch.float32 for "float32"."""
    return getattr(torch, name)


def write_parts(folder: Path, parts: Iterable[Part], group: dist.ProcessGroup | None = None) -> dict[str, Any]:
    """Write this rank's parts into `folder`, which exists; all ranks of `group` call it. The index's "tensors".

    OSError, on every rank, names the ranks that could not write and why.
    """
    planner = _Saver(parts)
    try:
        writer = _Writer(folder)
        metadata = dcp.save({}, storage_writer=writer, planner=planner, process_group=group)
    except dcp.CheckpointException as error:
        failures = [f"rank {rank}: {type(e).__name__}: {e}" for rank, (e, _) in sorted(error.failures.items())]
        raise OSError(f"the checkpoint could not be written to {folder.parent}: {'; '.join(failures[:3])}") from error
    tensors: dict[str, Any] = {}
    for key, about in metadata.state_dict_metadata.items():
        pieces = []
        for chunk in about.chunks:
            file, start, length = place_of(metadata.storage_data[MetadataIndex(key, chunk.offsets)])
            pieces.append([list(chunk.offsets), list(chunk.sizes), file, start, length])
        tensors[key] = {"dtype": dtype_name(about.properties.dtype), "shape": list(about.size), "pieces": pieces}
    return tensors


class _Writer(dcp.FileSystemWriter):
    """Says where the pieces lie in the metadata that it is given, which torch before 2.12 says only in its file's."""

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        metadata.storage_data = {result.index: result.storage_data for of_rank in results for result in of_rank}


class _Saver(dcp.DefaultSavePlanner):
    """Plans pieces instead of a state dict; the default planner checks that together they are whole tensors."""

    def __init__(self, parts: Iterable[Part]) -> None:
        super().__init__(flatten_state_dict=False)
        self._views: dict[MetadataIndex, Tensor] = {}
        self._items: list[WriteItem] = []
        for part in parts:
            for start, box in part.boxes():
                for offsets, view in _pieces(start, box):
                    index = MetadataIndex(part.key, offsets)
                    chunk = dcp.ChunkStorageMetadata(torch.Size(offsets), view.size())
                    data = TensorWriteData(chunk, TensorProperties(dtype=view.dtype), torch.Size(part.shape))
                    self._views[index] = view
                    self._items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(self._items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._views[index]


def _pieces(start: tuple[int, ...], box: Tensor) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """The box cut along its longest dims until no piece exceeds PIECE_BYTES."""
    if box.numel() * box.element_size() <= PIECE_BYTES or box.numel() == 1:
        yield start, box
        return
    dim = max(range(box.ndim), key=lambda d: box.shape[d])
    half = box.shape[dim] // 2
    yield from _pieces(start, box.narrow(dim, 0, half))
    moved = (*start[:dim], start[dim] + half, *start[dim + 1 :])
    yield from _pieces(moved, box.narrow(dim, half, box.shape[dim] - half))


def read_parts(folder: Path, tensors: Mapping[str, Any], parts: Sequence[Part]) -> list[str]:
    """Fill the parts from the files that `tensors` of the index names; returns complaints, each naming a file."""
    targets: dict[MetadataIndex, Tensor] = {}
    plans: dict[str, list[dcp.ReadItem]] = {}
    stored: dict[MetadataIndex, Any] = {}
    complaints: list[str] = []
    for part in parts:
        known = tensors.get(part.key, {"dtype": dtype_name(part.local.dtype), "pieces": []})
        chunks = []
        files: dict[tuple[int, ...], str] = {}
        for offsets, sizes, file, start, length in known["pieces"]:
            chunks.append(dcp.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            files[tuple(offsets)] = file
            stored[MetadataIndex(part.key, offsets)] = stored_at(file, start, length)
        wanted = []
        for start, view in part.boxes():
            targets[MetadataIndex(part.key, start)] = view
            wanted.append(dcp.ChunkStorageMetadata(torch.Size(start), view.size()))
        properties = TensorProperties(dtype=dtype_of(known["dtype"]))
        about = dcp.TensorStorageMetadata(properties, torch.Size(part.shape), chunks)
        items = create_read_items_for_chunk_list(part.key, about, wanted)
        if sum(math.prod(item.lengths) for item in items) != part.local.numel():
            complaints.append(f"{INDEX}: does not say where all of {part.key} lies")
        for item in items:
            plans.setdefault(files[tuple(item.storage_index.offset)], []).append(item)
    if complaints:
        return complaints
    metadata = dcp.Metadata({}, storage_data=stored)
    for file, items in sorted(plans.items()):
        reader = dcp.FileSystemReader(folder)
        reader.set_up_storage_reader(metadata, True)
        try:
            reader.read_data(dcp.LoadPlan(items), _Loader(targets)).wait()
        except Exception as error:  # torch raises whatever the damage looks like to it
            complaints.append(f"{file}: {type(error).__name__}: {error}")
    return complaints


class _Loader(dcp.DefaultLoadPlanner):
    """Hands out the views that are to be filled."""

    def __init__(self, targets: Mapping[MetadataIndex, Tensor]) -> None:
        super().__init__()
        self._targets = targets

    def resolve_tensor(self, read_item: dcp.ReadItem) -> Tensor:
        target = self._targets[read_item.dest_index]
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dim, start, length)
        return target

    def commit_tensor(self, read_item: dcp.ReadItem, tensor: Tensor) -> None:
        """Nothing to do: views were filled in place."""


def fingerprint(file: Path) -> tuple[int, int]:
    """(bytes, CRC-32) of a file."""
    num_bytes = checksum = 0
    with file.open("rb") as stream:
        while data := stream.read(_READ_BYTES):
            num_bytes += len(data)
            checksum = zlib.crc32(data, checksum)
    return num_bytes, checksum


def verify_file(folder: Path, name: str, expected: Sequence[int]) -> str | None:
    """What is wrong with one file of the checkpoint, None if nothing is."""
    try:
        num_bytes, checksum = fingerprint(folder / name)
    except FileNotFoundError:
        return f"{name}: the file is missing"
    except OSError as error:
        return f"{name}: cannot be read: {error}"
    if num_bytes != expected[0]:
        return f"{name}: has {num_bytes} bytes, but {expected[0]} were written"
    if checksum != expected[1]:
        return f"{name}: is corrupt (its checksum is {checksum:08x}, but {expected[1]:08x} was written)"
    return None


def write_atomically_with(path: Path, write: Callable[[Path], Any]) -> None:
    """`write(temporary)` beside `path`, brought to the disk and then renamed to `path`."""
    temporary = path.with_name(f".{path.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        write(temporary)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_index(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the index, to the disk itself."""
    body = json.dumps(content)
    with (folder / INDEX).open("w", encoding="utf-8") as stream:
        json.dump({"autopar checkpoint": FORMAT, "crc32": zlib.crc32(body.encode()), "content": body}, stream)
        stream.flush()
        os.fsync(stream.fileno())


def read_index(folder: Path) -> dict[str, Any]:
    """The index of the checkpoint in `folder`. ValueError for what is none, or of another format, or damaged."""
    file = folder / INDEX
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(
            f"{folder} is no checkpoint: it has no {INDEX}; expected a folder that autopar.save wrote"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the checkpoint's {file} cannot be read: {error}") from error
    try:
        outer = json.loads(text)
        version, checksum, body = outer["autopar checkpoint"], outer["crc32"], outer["content"]
        if version != FORMAT:
            raise ValueError(f"the checkpoint's {file} has format {version}; this autopar reads format {FORMAT}")
        damaged = zlib.crc32(body.encode()) != checksum
        content = {} if damaged else json.loads(body)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeEncodeError) as error:
        raise ValueError(f"the checkpoint's {file} is corrupt: {type(error).__name__}: {error}") from error
    if damaged:
        raise ValueError(f"the checkpoint's {file} is corrupt: its checksum is not the one that was written")
    for name in content["files"]:
        if Path(name).name != name:
            raise ValueError(f"the checkpoint's {file} names a file outside the checkpoint: {name!r}")
    return content
