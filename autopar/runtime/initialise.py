"""The values that parameters and buffers start with, of which each rank keeps its own part.

A real module's tensors are rank 0's, sent one at a time. A module on the meta device is filled submodule by submodule:
only the tensors that a submodule holds directly are made, on the CPU, from a generator seeded by (seed, its name), with
the initialisation that building the real module would have run:
`reset_parameters` of the submodule and then of the modules around it, then `_init_weights(submodule)` of the nearest
enclosing model that has one (the convention of Hugging Face's transformers), likewise outwards.
Modules around it act on whatever else they own as on meta tensors, that is not at all. So weights depend on the seed
and the names alone: not on the plan, the world size or the order, and no rank ever makes more than one submodule.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..graph import Graph
from .random import Stream, seed_of
from .storage import ParameterSpec

Initialise = Callable[[nn.Module, str], None]
"""initialise(submodule, name) fills the parameters and buffers that the submodule holds directly, in place."""


def local_values(
    specs: Sequence[ParameterSpec],
    module: nn.Module,
    rank: int,
    seed: int,
    device: torch.device,
    initialise: Initialise | None = None,
) -> dict[str, Tensor]:
    """This rank's part of each parameter, on `device`, by name. All ranks of the world must call it, with their specs.

    ValueError, on every rank alike, names the parameters that nothing initialises.
    """
    ownerships = {spec.fqn: spec.ownership for spec in specs}
    values: dict[str, Tensor] = {}

    def keep(name: str, whole: Tensor) -> None:
        values[name] = ownerships[name].take(whole, rank).to(device)

    parameters = dict(module.named_parameters(remove_duplicate=False))
    _deal(parameters, ownerships, device, keep)
    missing = [name for name in ownerships if name not in values]
    _raise_together(_fill(module, missing, seed, initialise, keep))
    return values


def local_state(
    graph: Graph, module: nn.Module, device: torch.device, seed: int = 0, initialise: Initialise | None = None
) -> dict[str, Tensor]:
    """The graph's buffers and constants, whole, on `device`, by tensor name. All ranks of the world must call it.

    Buffers of a module on the meta device that its initialisation leaves alone (tables made by a constructor) come from
    building the submodule anew, where its constructor's arguments can be read back from its attributes.
    """
    state = {name: value.to(device) for name, value in graph.constants.items()}
    names: dict[str, list[str]] = {}
    for tensor in graph.tensors.values():
        if tensor.role == "buffer" and tensor.name not in state:
            names.setdefault(tensor.fqn, []).append(tensor.name)
    values: dict[str, Tensor] = {}

    def keep(name: str, whole: Tensor) -> None:
        values[name] = whole.to(device)

    _deal(dict(module.named_buffers(remove_duplicate=False)), names, device, keep)
    _raise_together(_fill(module, [n for n in names if n not in values], seed, initialise, keep))
    for fqn, tensors in names.items():
        for name in tensors:
            # The module's own buffer may be this very memory, and training must not write into the user's module.
            state[name] = values[fqn].clone()
    return state


def _deal(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Any], device: torch.device, keep: Callable[[str, Tensor], None]
) -> None:
    """Send rank 0's real tensors to everyone, one at a time, and keep the wanted ones."""
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    real = [[name for name, tensor in tensors.items() if not tensor.is_meta]]
    if not alone:
        dist.broadcast_object_list(real, src=0)
    for name in real[0]:
        if alone:
            if name in wanted:
                keep(name, tensors[name].detach())
            continue
        whole = tensors[name].detach()
        if dist.get_rank() == 0:
            whole = whole.to(device).contiguous()
        else:
            whole = torch.empty(whole.shape, dtype=whole.dtype, device=device)
        dist.broadcast(whole, src=0)
        if name in wanted:
            keep(name, whole)


def _fill(
    module: nn.Module,
    names: Iterable[str],
    seed: int,
    initialise: Initialise | None,
    keep: Callable[[str, Tensor], None],
) -> list[str]:
    """Make the named meta tensors, one owner after the other; returns complaints about those that could not be made."""
    owners: dict[str, list[str]] = {}
    for name in names:
        owners.setdefault(name.rpartition(".")[0], []).append(name.rpartition(".")[2])
    complaints: list[str] = []
    for owner, wanted in owners.items():
        try:
            made = _make(module, owner, seed, initialise)
        except (NotImplementedError, RuntimeError) as error:
            complaints.append(f"{owner or 'the module'}: {error}")
            continue
        for key in wanted:
            name = f"{owner}.{key}" if owner else key
            if key in made:
                keep(name, made[key])
            else:
                complaints.append(name)
    return complaints


def _make(module: nn.Module, name: str, seed: int, initialise: Initialise | None) -> dict[str, Tensor]:
    """The meta tensors that one submodule holds directly, initialised, without those that nothing wrote to."""
    owner = module.get_submodule(name)
    stores = [(store, key, t) for store in (owner._parameters, owner._buffers) for key, t in store.items()]
    meta = [(store, key, t) for store, key, t in stores if t is not None and t.is_meta]
    real: dict[str, Tensor] = {}
    try:
        for store, key, tensor in meta:
            unset = float("nan") if tensor.is_floating_point() or tensor.is_complex() else 0
            real[key] = torch.full(tensor.shape, unset, dtype=tensor.dtype, device="cpu")
            store[key] = nn.Parameter(real[key], tensor.requires_grad) if store is owner._parameters else real[key]
        with torch.no_grad(), Stream(seed_of("initialise", seed, name), torch.default_generator):
            if initialise is not None:
                initialise(owner, name)
            else:
                _run_initialisers(module, name)
        # An initialiser may also have put a new tensor in place of ours.
        made = {key: store[key].detach() for store, key, _ in meta if _written(store[key])}
    finally:
        for store, key, tensor in meta:
            store[key] = tensor
    if len(made) < len(meta) and initialise is None:
        with Stream(seed_of("rebuild", seed, name), torch.default_generator):
            made |= {key: t for key, t in _rebuilt_buffers(owner).items() if key not in made}
    return made


def _run_initialisers(module: nn.Module, name: str) -> None:
    """What building the module would have run on this submodule, from the inside out."""
    path = name.split(".") if name else []
    chain = [module.get_submodule(".".join(path[:depth])) for depth in range(len(path), -1, -1)]
    for part in chain:
        reset = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
        if callable(reset):
            reset()
    for position, part in enumerate(chain):
        model = next((m for m in chain[position:] if callable(getattr(m, "_init_weights", None))), None)
        if model is not None:
            model._init_weights(part)


def _written(tensor: Tensor) -> bool:
    if tensor.is_floating_point() or tensor.is_complex():
        return not bool(tensor.isnan().any())
    return tensor._version > 0


def _rebuilt_buffers(owner: nn.Module) -> dict[str, Tensor]:
    """Buffers of a parameterless module built anew on the CPU; {} where that is not certain to give the same module.

    Certain: every argument of its constructor is an attribute of that name, or has a default and is none, and the plain
    attributes, buffer shapes and dtypes of the new module equal the old one's.
    """
    if any(True for _ in owner.parameters()):
        return {}
    arguments = {}
    for parameter in list(inspect.signature(type(owner).__init__).parameters.values())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if hasattr(owner, parameter.name):
            arguments[parameter.name] = getattr(owner, parameter.name)
        elif parameter.default is parameter.empty:
            return {}
    try:
        with torch.device("cpu"):
            anew = type(owner)(**arguments)
    except Exception:
        # The constructor is not ours, and whatever it says, the answer is that the buffers cannot be made this way.
        return {}
    plain = (bool, int, float, str, tuple, type(None))

    def facts(module: nn.Module) -> dict[str, Any]:
        attributes = {k: v for k, v in vars(module).items() if isinstance(v, plain) and k != "training"}
        shapes = {k: (b.shape, b.dtype) for k, b in module._buffers.items() if b is not None}
        return attributes | shapes

    if facts(anew) != facts(owner):
        return {}
    return {key: buffer for key, buffer in anew._buffers.items() if buffer is not None and not buffer.is_meta}


def _raise_together(complaints: Sequence[str]) -> None:
    """Raise one error on every rank if any rank has a complaint."""
    found = [list(complaints)]
    if dist.is_initialized() and dist.get_world_size() > 1:
        found = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(found, list(complaints))
    names = sorted({name for part in found for name in part})
    if names:
        raise ValueError(
            f"the module is on the meta device and nothing initialises {len(names)} of its tensors: "
            f"{'; '.join(names[:8])}{' ...' if len(names) > 8 else ''}. Expected a reset_parameters() on the module "
            "that holds them, or an _init_weights(module) on a module around it, that writes to all of them. Pass "
            "initialise=function(submodule, name) to autopar.parallelize, or build the module on a real device"
        )
