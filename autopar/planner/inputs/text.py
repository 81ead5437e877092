"""What the readers share: a file's text, and errors that name the file and what is wrong with it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def read_text(path: str | Path, expected: str) -> str:
    """The text of a file. ValueError unless it is UTF-8 text that is not empty; OSError if it cannot be read."""
    data = Path(path).read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not text, expected {expected}") from None
    if not text.strip():
        raise ValueError(f"{path}: the file is empty, expected {expected}")
    return text


def read_json(path: str | Path, expected: str) -> Any:
    """The value of a JSON file. ValueError where it is truncated or no JSON."""
    text = read_text(path, expected)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON, or truncated ({error}); expected {expected}") from None


def number(path: str | Path, where: str, value: Any, least: float = 0.0) -> float:
    """`value` as a float of at least `least`; a string is parsed. ValueError that names the place."""
    try:
        found = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        found = math.nan
    if not (math.isfinite(found) and found >= least):
        raise ValueError(f"{path}: {where} is {_short(value)}, expected a number of at least {least:g}")
    return found


def member(path: str | Path, where: str, value: Any, key: str, kind: type = object) -> Any:
    """value[key] of a JSON object, of that kind. ValueError that names the place."""
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {where} is {_short(value)}, expected an object")
    if key not in value:
        raise ValueError(f"{path}: {where} has no {key!r}; it has {', '.join(map(repr, value)) or 'nothing'}")
    if not isinstance(value[key], kind):
        raise ValueError(f"{path}: {key!r} of {where} is {_short(value[key])}, expected a {_KINDS[kind]}")
    return value[key]


_KINDS = {dict: "JSON object", list: "JSON list", str: "string", object: "value"}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
