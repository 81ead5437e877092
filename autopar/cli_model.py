"""What `--model` says: a Hugging Face model by config or class, or a callable in a Python file; built on meta tensors."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

FORM = "hf:<path of config.json, or class of transformers> or <file.py>:<callable>"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Built:
    """A module and one global batch, both without data, and the loss where the module does not return it."""

    module: nn.Module
    example: Any
    loss: Callable[..., Any] | None = None


def build_model(text: str, batch: int | None, seq: int | None, dtype: str | None = None) -> Built:
    """The model that `text` names, on the meta device.

    batch, seq: rows and tokens of the global batch; a Python callable gets those given as arguments of these names.
    dtype: of the parameters of a transformers model, by default what its config says.
    ValueError, in one line, for a model that does not exist or cannot be built.
    """
    kind, _, rest = text.partition(":")
    if kind == "hf" and rest:
        return _build_hf(rest, batch, seq, dtype)
    path, _, name = text.rpartition(":")
    if path.endswith(".py") and name:
        if dtype is not None:
            raise ValueError(f"--dtype is for hf: models; let {name} in {path} choose the dtype of its parameters")
        return _build_python(Path(path), name, batch, seq)
    raise ValueError(f"--model {text!r} is of neither form: {FORM}")


def _build_hf(text: str, batch: int | None, seq: int | None, dtype: str | None) -> Built:
    for name, value in (("batch", batch), ("seq", seq)):
        if value is None:
            raise ValueError(f"--{name} is missing: a model of transformers needs the shape of its batch")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype!r}: expected one of {', '.join(DTYPES)}{nearest(dtype, DTYPES)}")
    transformers = _transformers()
    config, cls = _hf_config(transformers, text)
    chosen = DTYPES[dtype] if dtype else getattr(config, "dtype", None)
    try:
        with torch.device("meta"), _default_dtype(chosen or torch.float32):
            module = cls(config) if cls else transformers.AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a config can be wrong in any way; transformers raises whatever it stumbles over
        raise ValueError(f"transformers cannot build {text}: {one_line(error)}") from error
    taken = inspect.signature(module.forward).parameters
    if not {"input_ids", "labels"} <= taken.keys():
        raise ValueError(
            f"the forward of {type(module).__name__} must take input_ids and labels; it takes {', '.join(taken)}; name a "
            "class with a loss, or build the model and its batch in a Python file (--model file.py:callable)"
        )
    ids = torch.zeros(batch, seq, dtype=torch.int64, device="meta")
    labels = ids[:, 0] if _one_label_per_row(transformers, type(module)) else ids
    return Built(module, {"input_ids": ids, "labels": labels.clone()})


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError:
        raise ValueError(
            "hf: models need the package transformers, which is not installed: pip install 'autopar[hf]', or build the "
            "model in a Python file (--model file.py:callable)"
        ) from None
    transformers.logging.set_verbosity_error()
    return transformers


def _hf_config(transformers: ModuleType, text: str) -> tuple[Any, type | None]:
    """(config, model class or None for the causal language model of that config)."""
    path = Path(text)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".json" or path.is_file():
        return _config_of_file(transformers, path)
    models = [name for name in dir(transformers) if name.endswith("Config") or "For" in name or "LMHead" in name]
    found = getattr(transformers, text, None)
    try:
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedConfig):
            return found(), None
        if isinstance(found, type) and issubclass(found, nn.Module):
            return found.config_class(), found
    except Exception as error:
        raise ValueError(f"transformers cannot make a default {text}: {one_line(error)}") from error
    raise ValueError(
        f"--model hf:{text}: no such file, and transformers has no config or model class of that name"
        f"{nearest(text, models)}"
    )


def _config_of_file(transformers: ModuleType, path: Path) -> tuple[Any, type | None]:
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is truncated or not JSON ({error}); expected a config.json of transformers") from None
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
    if not isinstance(data, dict) or not isinstance(data.get("model_type"), str):
        raise ValueError(f"{path} has no model_type; expected a config.json of transformers, such as of type llama")
    kind = data.pop("model_type")
    if kind not in known:
        raise ValueError(f"{path}: transformers knows no model_type {kind!r}{nearest(kind, known)}")
    try:
        config = transformers.AutoConfig.for_model(kind, **data)
    except Exception as error:
        raise ValueError(f"{path} is no {kind} config: {one_line(error)}") from error
    named = (data.get("architectures") or [None])[0]
    if named is None:
        return config, None
    cls = getattr(transformers, named, None) if isinstance(named, str) else None
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ValueError(
            f"{path}: transformers has no architecture {named!r}{nearest(str(named), dir(transformers))}; code that comes "
            "with a model is not run"
        )
    return config, cls


def _one_label_per_row(transformers: ModuleType, cls: type) -> bool:
    return cls in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.values()


def _build_python(path: Path, name: str, batch: int | None, seq: int | None) -> Built:
    if not path.is_file():
        raise ValueError(f"--model {path}:{name}: there is no file {path}")
    source = _load(path)
    function = getattr(source, name, None)
    if not callable(function):
        public = [key for key, value in vars(source).items() if callable(value) and not key.startswith("_")]
        raise ValueError(
            f"{path} has no callable {name!r}{nearest(name, public)}; it has {', '.join(public) or 'none'}"
        )
    sizes = {key: value for key, value in (("batch", batch), ("seq", seq)) if value is not None}
    taken = inspect.signature(function).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    for key in sizes:
        if key not in taken and not takes_any:
            raise ValueError(f"{name} of {path} takes no argument {key!r}; leave out --{key}, or give it that argument")
    try:
        with torch.device("meta"):
            made = function(**sizes)
    except Exception as error:
        raise ValueError(f"{name} of {path}: {one_line(error)}") from error
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[0], nn.Module):
        raise ValueError(
            f"{name} of {path} must return (module, example) or (module, example, loss); got {_kind(made)}"
        )
    return Built(*made)


def _load(path: Path) -> ModuleType:
    """The module in a file, which may import its neighbours as a script may."""
    # Dataclasses look their module up by name; the prefix keeps it from hiding another.
    spec = importlib.util.spec_from_file_location(f"autopar_model_{path.stem}", path)
    source = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    sys.modules[spec.name] = source
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(source)
    except Exception as error:
        raise ValueError(f"{path} cannot be loaded: {one_line(error)}") from error
    finally:
        sys.path.remove(folder)
    return source


def _kind(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(type(item).__name__ for item in value)})"
    return type(value).__name__


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def one_line(error: BaseException) -> str:
    """The type and the message of an error, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean a or b?", or nothing where nothing is near."""
    near = difflib.get_close_matches(name, list(known), 3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""
