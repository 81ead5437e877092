"""Text as a language model's data: bytes as tokens, a fixed tenth of the files held out.

Shape legend: S sequence.
"""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

HELD_OUT_SHARE = 10
"""Every tenth file is held out; of a single file, its last tenth."""


def standard_library_files() -> list[Path]:
    """The source files of the running Python's standard library, sorted; packages installed beside it are left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(path for path in root.rglob("*.py") if "site-packages" not in path.parts)


def files_under(path: Path) -> list[Path]:
    """`path` itself if it is a file, else every file below it, sorted. ValueError if there is none."""
    files = [path] if path.is_file() else sorted(found for found in path.rglob("*") if found.is_file())
    if not files:
        raise ValueError(f"--data {path}: expected a file of text, or a folder with at least one file in it")
    return files


def read_split(files: Sequence[Path]) -> tuple[Tensor, Tensor]:
    """The bytes of `files` as (training, held-out), two one-dimensional uint8 tensors."""
    contents = [path.read_bytes() for path in files]
    if len(contents) < HELD_OUT_SHARE:
        whole = b"".join(contents)
        cut = len(whole) - len(whole) // HELD_OUT_SHARE
        parts = whole[:cut], whole[cut:]
    else:
        held_out = contents[HELD_OUT_SHARE - 1 :: HELD_OUT_SHARE]
        training = [text for index, text in enumerate(contents) if index % HELD_OUT_SHARE != HELD_OUT_SHARE - 1]
        parts = b"".join(training), b"".join(held_out)
    if not all(parts):
        raise ValueError(f"{len(contents)} files hold {sum(map(len, contents))} bytes, too few to hold a tenth out")
    training_text, held_out_text = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts)
    return training_text, held_out_text


def unigram_entropy(text: Tensor) -> float:
    """Nats per byte of the best predictor that sees no context: what a model must beat to have learned anything."""
    shares = torch.bincount(text.long(), minlength=256).double() / len(text)
    return -sum(share * math.log(share) for share in shares.tolist() if share)


class Windows(Dataset):
    """`count` windows of a text, as {"tokens": S, "targets": S}, the targets being the tokens one byte further on.

    With a seed the windows start at random places, the same for the same seed; without one they are spread evenly.
    """

    def __init__(self, text: Tensor, seq: int, count: int, seed: int | None = None) -> None:
        last = len(text) - seq - 1
        if last < 0:
            raise ValueError(
                f"a text of {len(text)} bytes is too short for windows of {seq + 1}; lower --seq or add text"
            )
        self.text = text
        self.seq = seq
        if seed is None:
            self.starts = torch.linspace(0, last, count).long()
        else:
            self.starts = torch.randint(last + 1, (count,), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = int(self.starts[index])
        window = self.text[start : start + self.seq + 1].long()
        return {"tokens": window[:-1], "targets": window[1:]}
