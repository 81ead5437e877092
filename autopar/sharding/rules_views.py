"""Rules of ops that move elements without arithmetic: views, joins, cuts. All are linear in what they move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from ..graph import Shape
from .call import Call
from .notation import Dims
from .rule import Rule
from .rules_pointwise import RuleFunction, aligned, full
from .views import view_dims


def reshape(call: Call) -> Rule:
    """view, reshape, flatten, unflatten, squeeze, unsqueeze: groups of dims from the shapes alone."""
    ins, outs = view_dims(call.shape("self"), call.out)
    return call.rule({"self": ins, "other": outs}, [outs], linear=[["self"]])


def _moved(call: Call, source: Sequence[int]) -> Rule:
    """Output dim i is input dim source[i]."""
    ins = full(call.shape("self"))
    return call.rule({"self": ins}, [tuple(ins[i] for i in source)], linear=[["self"]])


def squeeze(call: Call) -> Rule:
    shape = call.shape("self")
    dims = call.get("dim")
    if dims is None:
        dropped = {i for i, size in enumerate(shape) if size == 1}
    else:
        listed = dims if isinstance(dims, tuple | list) else (dims,)
        dropped = {d % max(len(shape), 1) for d in listed if shape and shape[d] == 1}
    ins = tuple(() if i in dropped else (f"d{i}",) for i in range(len(shape)))
    return call.rule({"self": ins}, [tuple(d for i, d in enumerate(ins) if i not in dropped)], linear=[["self"]])


def unsqueeze(call: Call) -> Rule:
    ins = full(call.shape("self"))
    at = call["dim"] % (len(ins) + 1)
    return call.rule({"self": ins}, [(*ins[:at], (), *ins[at:])], linear=[["self"]])


def transpose(call: Call) -> Rule:
    rank = len(call.shape("self"))
    order = list(range(rank))
    if rank:
        a, b = (call["dim0"] % rank, call["dim1"] % rank) if "dim0" in call.arguments else (0, rank - 1)
        order[a], order[b] = order[b], order[a]
    return _moved(call, order)


def swap_last(call: Call) -> Rule:
    rank = len(call.shape("self"))
    return _moved(call, [*range(rank - 2), rank - 1, rank - 2])


def permute(call: Call) -> Rule:
    return _moved(call, [d % len(call.out) for d in call["dims"]])


def movedim(call: Call) -> Rule:
    rank = len(call.out)
    source = call["source"] if isinstance(call["source"], tuple | list) else (call["source"],)
    target = call["destination"] if isinstance(call["destination"], tuple | list) else (call["destination"],)
    moved = {t % rank: s % rank for s, t in zip(source, target, strict=True)}
    rest = iter(i for i in range(rank) if i not in moved.values())
    return _moved(call, [moved[i] if i in moved else next(rest) for i in range(rank)])


def expand(call: Call) -> Rule:
    """Broadcasting: dims that the input lacks are made, so each rank can make its part."""
    inputs = {name: aligned(call.shape(name), call.out) for name in call.positions()}
    return call.rule(inputs, [full(call.out)], linear=[["self"]])


def repeat(call: Call) -> Rule | None:
    """[.., n] -> [.., (r n)]: output dim i is r_i copies of the input's, one after the other."""
    shape, out = call.shape("self"), call.out
    if 0 in out:
        return None
    offset = len(out) - len(shape)
    copies = [size if i < offset else size // max(shape[i - offset], 1) for i, size in enumerate(out)]
    ins = tuple((f"d{offset + i}",) for i in range(len(shape)))
    outs = tuple(
        (f"r{i}",) if i < offset else (f"r{i}", f"d{i}") if copies[i] > 1 else (f"d{i}",) for i in range(len(out))
    )
    sizes = {f"r{i}": copies[i] for i in range(len(out))} | {f"d{offset + i}": s for i, s in enumerate(shape)}
    return call.rule({"self": ins}, [outs], linear=[["self"]], sizes=sizes)


def repeat_interleave(call: Call) -> Rule | None:
    """[.., n] -> [.., (n r)] for a whole number of repeats along one dim."""
    if call.overload != "self_int" or call["dim"] is None:
        return None
    shape = call.shape("self")
    dim = call.dim("dim", len(shape))
    ins = full(shape)
    outs = tuple((*d, "r") if i == dim else d for i, d in enumerate(ins))
    sizes = {f"d{i}": s for i, s in enumerate(shape)} | {"r": call["repeats"]}
    blocked = {"r": "each rank would need every element"}
    return call.rule({"self": ins}, [outs], linear=[["self"]], sizes=sizes, blocked=blocked)


def _except(call: Call, dims: Mapping[int, str], sizes_change: bool = True) -> Rule:
    """Every dim passes through but some, which `dims` names with the reason why they stay whole."""
    ins = tuple((f"x{i}",) if i in dims else (f"d{i}",) for i in range(len(call.shape("self"))))
    outs = tuple((f"y{i}" if sizes_change else f"x{i}",) if i in dims else (f"d{i}",) for i in range(len(call.out)))
    blocked = {f"{c}{i}": reason for i, reason in dims.items() for c in "xy"}
    return call.rule({"self": ins}, [outs], blocked=blocked, linear=[["self"]])


def slice_(call: Call) -> Rule:
    shape = call.shape("self")
    dim = call.dim("dim", len(shape))
    return _except(call, {} if call.out == shape and call["step"] == 1 else {dim: "a slice picks places along it"})


def narrow(call: Call) -> Rule | None:
    if call.has("start"):
        return None
    dim = call.dim("dim", len(call.out))
    return _except(call, {} if call.out == call.shape("self") else {dim: "a slice picks places along it"})


def select(call: Call) -> Rule:
    dim = call.dim("dim", len(call.shape("self")))
    ins = tuple(("x",) if i == dim else (f"d{i}",) for i in range(len(call.shape("self"))))
    blocked = {"x": "one place is picked along it"}
    outs = tuple(d for i, d in enumerate(ins) if i != dim)
    return call.rule({"self": ins}, [outs], blocked=blocked, linear=[["self"]])


def split(call: Call) -> Rule | None:
    """Cuts a dim into pieces. Equal pieces: input (part, piece), so that every piece can be split alike."""
    if len(call.inputs) > 1:
        return None  # the places to cut are data
    shape = call.shape("self")
    dim = call.dim("dim", len(shape))
    pieces = [t.shape[dim] for t in call.outputs]
    sizes = {f"d{i}": s for i, s in enumerate(shape) if i != dim}
    if len(set(pieces)) == 1:
        ins = tuple(("part", f"d{i}") if i == dim else (f"d{i}",) for i in range(len(shape)))
        sizes |= {"part": len(pieces), f"d{dim}": pieces[0]}
        outs = [full(shape)] * len(pieces)
        blocked = {"part": "pieces are separate results"}
    else:
        ins = tuple((f"x{i}",) if i == dim else (f"d{i}",) for i in range(len(shape)))
        outs = [tuple((f"y{n}",) if i == dim else d for i, d in enumerate(full(shape))) for n in range(len(pieces))]
        blocked = {name: "pieces differ in size" for name in (f"x{dim}", *(f"y{n}" for n in range(len(pieces))))}
    return call.rule({"self": ins}, outs, sizes=sizes, blocked=blocked, linear=[["self"]])


def part_scatter(call: Call) -> Rule:
    """slice_scatter, select_scatter, diagonal_scatter: `self` with `src` written over places along some dims."""
    shape = call.shape("self")
    named = ("dim1", "dim2") if "dim1" in call.arguments else ("dim",)
    dims = {call.dim(name, len(shape)) for name in named}
    if call.packet == "aten.slice_scatter" and call.shape("src") == shape:
        dims = set()
    kept = [i for i in range(len(shape)) if i not in dims]
    whole = tuple((f"x{i}",) if i in dims else (f"d{i}",) for i in range(len(shape)))
    if call.packet == "aten.slice_scatter":
        part = tuple((f"y{i}",) if i in dims else (f"d{i}",) for i in range(len(shape)))
    else:
        rest = [(f"y{i}",) for i in range(len(call.shape("src")) - len(kept))]
        part = (*((f"d{i}",) for i in kept), *rest)
    names = {name for dim in (*whole, *part) for name in dim if name[0] in "xy"}
    blocked = dict.fromkeys(names, "places along it are written over")
    return call.rule({"self": whole, "src": part}, [whole], blocked=blocked, linear=[["self", "src"]])


def unbind(call: Call) -> Rule:
    shape = call.shape("self")
    dim = call.dim("dim", len(shape))
    ins = tuple(("part",) if i == dim else (f"d{i}",) for i in range(len(shape)))
    outs = [tuple(d for i, d in enumerate(ins) if i != dim)] * len(call.outputs)
    return call.rule({"self": ins}, outs, blocked={"part": "pieces are separate results"}, linear=[["self"]])


def cat(call: Call) -> Rule:
    """Joins along a dim. Equal pieces: output (part, piece). Pieces of shape [0] (legacy) carry no name."""
    shapes, out = call.shapes("tensors"), call.out
    dim = call.dim("dim", len(out))
    real = [s for s in shapes if len(s) == len(out)]
    equal = len({s[dim] for s in real}) == 1
    sizes = {"part": len(real), f"d{dim}": real[0][dim]} if equal else {}
    names = iter(range(len(shapes)))

    def piece(shape: Shape) -> Dims:
        if len(shape) != len(out):
            return tuple(() for _ in shape)
        own = f"d{dim}" if equal else f"x{next(names)}"
        return tuple((own,) if i == dim else d for i, d in enumerate(full(shape)))

    ins = [piece(s) for s in shapes]
    joined = (("part", f"d{dim}") if len(real) > 1 else (f"d{dim}",)) if equal else ("y",)
    outs = tuple(joined if i == dim else d for i, d in enumerate(full(out)))
    blocked = {"part": "pieces are joined along it", "y": "pieces differ in size"}
    blocked |= {f"x{n}": "pieces differ in size" for n in range(len(shapes))}
    return call.rule({"tensors": ins}, [outs], sizes=sizes, blocked=blocked, linear=[["tensors"]])


def stack(call: Call) -> Rule:
    out = call.out
    dim = call.dim("dim", len(out))
    outs = tuple(("part",) if i == dim else d for i, d in enumerate(full(out)))
    ins = tuple(d for i, d in enumerate(outs) if i != dim)
    return call.rule({"tensors": ins}, [outs], blocked={"part": "pieces are joined along it"}, linear=[["tensors"]])


def roll(call: Call) -> Rule:
    rank = len(call.shape("self"))
    dims = call["dims"] or range(rank)
    return _except(call, {d % rank: "elements move along it" for d in dims} if rank else {}, sizes_change=False)


def unfold(call: Call) -> Rule:
    """Tensor.unfold: windows along a dim become one dim more, at the end."""
    rank = len(call.shape("self"))
    dim = call.dim("dimension", rank)
    ins = tuple(("x",) if i == dim else (f"d{i}",) for i in range(rank))
    outs = (*(("y",) if i == dim else (f"d{i}",) for i in range(rank)), ("w",))
    blocked = dict.fromkeys("xyw", "windows of neighbouring places overlap")
    return call.rule({"self": ins}, [outs], blocked=blocked, linear=[["self"]])


def complex_view(call: Call) -> Rule:
    """view_as_complex and view_as_real: the last dim of the real tensor is the pair of parts."""
    rank = min(len(call.shape("self")), len(call.out))
    dims = tuple((f"d{i}",) for i in range(rank))
    pair: Dims = (*dims, ("pair",))
    real_in = len(call.shape("self")) > rank
    blocked = {"pair": "the two parts make one number"}
    ins, outs = (pair, dims) if real_in else (dims, pair)
    return call.rule({"self": ins}, [outs], blocked=blocked, linear=[["self"]])


def shuffle_pixels(call: Call) -> Rule:
    """pixel_shuffle, pixel_unshuffle: channels and space are mixed, leading dims are not."""
    lead = len(call.shape("self")) - 3
    ins = (*full(call.shape("self")[:lead]), *((f"x{i}",) for i in range(3)))
    outs = (*full(call.out[:lead]), *((f"y{i}",) for i in range(3)))
    blocked = {f"{c}{i}": "channels and space are mixed" for i in range(3) for c in "xy"}
    return call.rule({"self": ins}, [outs], blocked=blocked, linear=[["self"]])


def flip(call: Call) -> Rule:
    rank = len(call.shape("self"))
    return _except(call, {d % rank: "elements move along it" for d in call["dims"]} if rank else {}, sizes_change=False)


def triangle(call: Call) -> Rule:
    rank = len(call.out)
    return _except(call, {d: "what is kept depends on the place" for d in (rank - 2, rank - 1)}, sizes_change=False)


CUTS = ("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_chunk", "unsafe_split")

RULES: Mapping[str, RuleFunction] = MappingProxyType(
    {
        **{
            f"aten.{n}": reshape
            for n in ("view", "reshape", "flatten", "unflatten", "_unsafe_view", "view_as", "reshape_as", "ravel")
        },
        "aten.squeeze": squeeze,
        "aten.unsqueeze": unsqueeze,
        "aten.transpose": transpose,
        "aten.swapaxes": transpose,
        "aten.t": transpose,
        "aten.numpy_T": transpose,
        "aten.mT": swap_last,
        "aten.adjoint": swap_last,
        "aten.permute": permute,
        "aten.movedim": movedim,
        "aten.moveaxis": movedim,
        "aten.expand": expand,
        "aten.expand_as": expand,
        "aten.broadcast_to": expand,
        "aten.repeat": repeat,
        "aten.tile": repeat,
        "aten.repeat_interleave": repeat_interleave,
        "aten.slice": slice_,
        "aten.narrow": narrow,
        "aten.select": select,
        **{f"aten.{n}": split for n in CUTS},
        **{f"aten.{n}_scatter": part_scatter for n in ("slice", "select", "diagonal")},
        "aten.unbind": unbind,
        "aten.cat": cat,
        "aten.concat": cat,
        "aten.concatenate": cat,
        "aten.stack": stack,
        "aten.unfold": unfold,
        "aten.view_as_complex": complex_view,
        "aten.view_as_real": complex_view,
        "aten.pixel_shuffle": shuffle_pixels,
        "aten.pixel_unshuffle": shuffle_pixels,
        "aten.roll": roll,
        "aten.flip": flip,
        "aten.tril": triangle,
        "aten.triu": triangle,
    }
)
