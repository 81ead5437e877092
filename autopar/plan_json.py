"""The plan file: a `Plan` as JSON and back, exactly.

Reading is strict: every field must be there with its type, and nothing else may be. Each error names the field by its
path in the file ("stages[1].zero"), what it holds, what was expected and what to do about it.
"""

from __future__ import annotations

import json
import os
import sys
import uuid
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .plan import SCHEMA, Plan

_REMAKE = "make the plan again with autopar.search(graph, cluster)"


def dump_plan(plan: Plan) -> str:
    """JSON text of a plan: one short line per stage, layout and candidate, so that files diff well."""
    lines = []
    for name in [f.name for f in fields(Plan)]:
        value = getattr(plan, name)
        if isinstance(value, tuple) and value:
            rows = ",\n".join("    " + json.dumps(_plain(row), allow_nan=False) for row in value)
            lines.append(f'  "{name}": [\n{rows}\n  ]')
        else:
            lines.append(f'  "{name}": {json.dumps(_plain(value), allow_nan=False)}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def parse_plan(text: str, source: str) -> Plan:
    """The inverse of `dump_plan`. `source` says in errors where the text came from."""
    try:
        data = json.loads(text)
    except (RecursionError, ValueError) as error:
        if not isinstance(error, json.JSONDecodeError):
            # nested without end, or a number of thousands of digits
            raise ValueError(f"plan file {source} is no plan ({type(error).__name__}); {_REMAKE}") from None
        where = f"line {error.lineno} column {error.colno}: {error.msg}"
        kind = "is truncated" if text.lstrip()[:1] == "{" and text.rstrip()[-1:] != "}" else "is not JSON"
        raise ValueError(
            f"plan file {source} {kind} ({where}); expected what Plan.save wrote; copy it again, or {_REMAKE}"
        ) from None
    if not isinstance(data, dict):
        raise ValueError(f"plan file {source} holds a {_kind(data)}, expected an object with the fields of a plan")
    if "schema" not in data:
        raise ValueError(f"plan file {source} has no field schema, so it is not a plan; expected schema {SCHEMA}")
    if data["schema"] != SCHEMA:
        raise ValueError(
            f"plan file {source}: schema is {data['schema']!r}, this version of autopar reads {SCHEMA}; {_REMAKE}"
        )
    try:
        return _parse(Plan, data, "")
    except ValueError as error:
        raise ValueError(f"plan file {source}: {error}") from None


def write_atomically(path: Path, text: str) -> None:
    """Write `text` under a temporary name beside `path`, then rename it into place."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _parse(kind: Any, value: Any, path: str) -> Any:
    """`value` of the JSON file as the annotated type `kind`; `path` names the field in errors."""
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _parse_fields(kind, value, path)
    if origin is tuple:
        if not isinstance(value, list):
            raise _wrong(path, value, "a list")
        return tuple(_parse(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is Literal:
        # JSON's true is Python's 1, so equality alone would let it through
        if isinstance(value, bool) or value not in arguments:
            raise _wrong(path, value, " or ".join(repr(a) for a in arguments))
        return value
    if origin is UnionType:
        if value is None:
            return None
        (kind,) = (a for a in arguments if a is not NoneType)
        return _parse(kind, value, path)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        # JSON in Python also knows NaN and Infinity, and whole numbers beyond any float
        if not abs(value) <= sys.float_info.max:
            raise _wrong(path, value, "a finite number")
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _wrong(path, value, {int: "an integer", str: "a string", float: "a number", bool: "a boolean"}[kind])
    return value


def _parse_fields(kind: type, value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(path or "the plan", value, f"an object with the fields of a {kind.__name__.lower()}")
    hints = get_type_hints(kind)
    dot = f"{path}." if path else ""
    missing = [name for name in hints if name not in value]
    if missing:
        raise ValueError(
            f"field {dot}{missing[0]} is missing; every field of a plan is written by Plan.save; {_REMAKE}"
        )
    unknown = [name for name in value if name not in hints]
    if unknown:
        raise ValueError(f"field {dot}{unknown[0]} is unknown; expected only {', '.join(hints)}; remove or rename it")
    return kind(**{name: _parse(hint, value[name], f"{dot}{name}") for name, hint in hints.items()})


def _wrong(path: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"field {path} is {json.dumps(value)[:80]}, expected {expected}")


def _kind(value: Any) -> str:
    return {list: "list", str: "string", bool: "boolean", NoneType: "null"}.get(type(value), "number")
