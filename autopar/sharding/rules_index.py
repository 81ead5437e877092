"""Rules of ops that choose elements by index: gather, index, scatter, embedding."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from ..graph import Ref
from .call import Call
from .rule import Rule, Special
from .rules_pointwise import RuleFunction, full
from .trace import counts_rows


def gather(call: Call) -> Rule:
    """Places along `dim` are chosen by the index; other dims correspond, where they are equally long."""
    shape, index = call.shape("self"), call.shape("index")
    if not shape:
        return call.rule({n: tuple(() for _ in call.shape(n)) for n in call.positions()}, [tuple(() for _ in call.out)])
    dim = call.dim("dim", len(shape))
    same = [i != dim and size == shape[i] for i, size in enumerate(index)]
    ins = tuple((f"d{i}",) if same[i] else (f"x{i}",) for i in range(len(shape)))
    outs = tuple((f"d{i}",) if same[i] or i == dim else (f"y{i}",) for i in range(len(shape)))
    blocked = {f"x{i}": "places along it are chosen by an index" for i in range(len(shape))}
    blocked |= {f"y{i}": "the index covers a part of it" for i in range(len(shape))}
    return call.rule({"self": ins, "index": outs}, [outs], blocked=blocked, linear=[["self"]])


def index_select(call: Call) -> Rule:
    shape = call.shape("self")
    if not shape:
        return call.rule({"self": (), "index": tuple(() for _ in call.shape("index"))}, [()], linear=[["self"]])
    dim = call.dim("dim", len(shape))
    ins = tuple(("x",) if i == dim else d for i, d in enumerate(full(shape)))
    index = (("n",),) if call.shape("index") else ()
    outs = tuple((("n",) if index else ()) if i == dim else d for i, d in enumerate(full(shape)))
    blocked = {"x": "places along it are chosen by an index"}
    return call.rule({"self": ins, "index": index}, [outs], blocked=blocked, linear=[["self"]])


def index(call: Call) -> Rule | None:
    """self[i, j, :, ...] with integer tensors that broadcast to the dims t0, t1, ... of the result.

    Where an index merely counts the rows of a dim (it derives from arange over the whole of it), that dim and the
    index's dim are one: a split keeps rows and their numbers together, and the offset is taken off ("index_rows").
    """
    shape, entries = call.shape("self"), call["indices"]
    tensors = {i: call.graph.tensors[e.name] for i, e in enumerate(entries) if isinstance(e, Ref)}
    if any(t.dtype in (torch.bool, torch.uint8) for t in tensors.values()) or not tensors:
        return None
    broadcast = torch.broadcast_shapes(*(t.shape for t in tensors.values()))
    at = list(tensors)
    together = at == list(range(at[0], at[-1] + 1))
    front = at[0] if together else 0
    kept = [i for i in range(len(shape)) if i not in tensors]
    named = tuple((f"t{i}",) for i in range(len(broadcast)))
    rows: dict[int, int] = {}
    for i, t in tensors.items():
        row = counts_rows(call.graph, t.name, shape[i])
        if row is not None and row + len(broadcast) - len(t.shape) not in rows.values():
            rows[i] = row + len(broadcast) - len(t.shape)
    ins = tuple(
        (f"t{rows[i]}",) if i in rows else (f"x{i}",) if i in tensors else (f"d{i}",) for i in range(len(shape))
    )
    indices = [
        tuple(
            named[len(broadcast) - len(t.shape) + k] if s == broadcast[len(broadcast) - len(t.shape) + k] else ()
            for k, s in enumerate(t.shape)
        )
        for t in tensors.values()
    ]
    before = [i for i in kept if i < front] if together else []
    after = [i for i in kept if i not in before]
    outs = (*(ins[i] for i in before), *named, *(ins[i] for i in after))
    blocked = {f"x{i}": "places along it are chosen by an index" for i in tensors}
    specials = {f"t{place}": Special("index_rows") for place in rows.values()}
    return call.rule({"self": ins, "indices": indices}, [outs], blocked=blocked, specials=specials, linear=[["self"]])


def index_put(call: Call) -> Rule | None:
    """self with values written (or added) at the places self[i, j, :, ...]; dims that no index names correspond."""
    shape, entries = call.shape("self"), call["indices"]
    tensors = {i: call.graph.tensors[e.name] for i, e in enumerate(entries) if isinstance(e, Ref)}
    if not tensors or any(t.dtype in (torch.bool, torch.uint8) for t in tensors.values()):
        return None
    broadcast = torch.broadcast_shapes(*(t.shape for t in tensors.values()))
    at = list(tensors)
    together = at == list(range(at[0], at[-1] + 1))
    kept = [i for i in range(len(shape)) if i not in tensors]
    before = [i for i in kept if i < at[0]] if together else []
    after = [i for i in kept if i not in before]
    out = tuple((f"x{i}",) if i in tensors else (f"d{i}",) for i in range(len(shape)))
    written = (*(out[i] for i in before), *((f"t{i}",) for i in range(len(broadcast))), *(out[i] for i in after))
    sizes = (*(shape[i] for i in before), *broadcast, *(shape[i] for i in after))
    values = call.shape("values")
    offset = len(written) - len(values)
    lacks = tuple(written[offset + k] if s == sizes[offset + k] else () for k, s in enumerate(values))
    indices = [
        tuple((f"t{len(broadcast) - len(t.shape) + k}",) if s != 1 else () for k, s in enumerate(t.shape))
        for t in tensors.values()
    ]
    blocked = {f"x{i}": "places along it are chosen by an index" for i in tensors}
    blocked |= {f"t{i}": "they are written to places chosen by an index" for i in range(len(broadcast))}
    return call.rule(
        {"self": out, "indices": indices, "values": lacks}, [out], blocked=blocked, linear=[["self", "values"]]
    )


def index_write(call: Call) -> Rule | None:
    """index_add, index_copy, index_fill: places along `dim` are chosen by the index, others correspond.

    Additions to one place add up, so that index_add may also be split along what it adds.
    """
    shape = call.shape("self")
    if not shape:
        return None
    dim = call.dim("dim", len(shape))
    out = tuple(("x",) if i == dim else d for i, d in enumerate(full(shape)))
    index = (("n",),) if call.shape("index") else ()
    inputs = {"self": out, "index": index}
    blocked = {"x": "places along it are chosen by an index"}
    adds = call.packet == "aten.index_add"
    if not adds:
        blocked["n"] = "they are written to places chosen by an index"
    if call.has("source"):
        inputs["source"] = tuple((("n",) if index else ()) if i == dim else d for i, d in enumerate(full(shape)))
    elif call.has("value"):
        inputs["value"] = ()
    return call.rule(
        inputs,
        [out],
        sums={"n"} if adds and index else (),
        additive=["self"] if adds else (),
        blocked=blocked,
        linear=[["self", "source"]] if call.has("source") else (),
    )


def embedding(call: Call) -> Rule:
    """weight [v, h], indices [..] -> [.., h]. Split on rows of the weight, each rank looks up its own."""
    lead = tuple((f"d{i}",) for i in range(len(call.shape("indices"))))
    blocked = {}
    if call["scale_grad_by_freq"] or call["sparse"]:
        blocked = {n[0]: "gradients depend on how often an index occurs" for n in (*lead, ("v",))}
    return call.rule(
        {"weight": (("v",), ("h",)), "indices": lead},
        [(*lead, ("h",))],
        blocked=blocked,
        sums={"v"},
        specials={"v": Special("vocab_embedding")},
    )


def scatter(call: Call) -> Rule | None:
    """self with values written (or added) at places along `dim`; other dims correspond where all are equally long."""
    shape = call.shape("self")
    if not shape:
        return None
    dim = call.dim("dim", len(shape))
    others = [call.shape(name) for name in ("index", "src") if call.has(name)]
    same = [i != dim and all(o[i] == shape[i] for o in others) for i in range(len(shape))]
    inputs = {
        name: tuple((f"d{i}",) if same[i] else (f"{name}{i}",) for i in range(len(shape)))
        for name in call.positions()
        if name != "value"
    }
    blocked = {f"{name}{i}": "places along it are chosen by an index" for name in inputs for i in range(len(shape))}
    out = inputs["self"]
    inputs |= {"value": ()} if call.has("value") else {}
    linear = [["self", "src"]] if call.has("src") and call.get("reduce") is None else ()
    return call.rule(inputs, [out], blocked=blocked, linear=linear)


RULES: Mapping[str, RuleFunction] = MappingProxyType(
    {
        "aten.gather": gather,
        "aten.index_select": index_select,
        "aten.index": index,
        "aten.scatter": scatter,
        "aten.scatter_add": scatter,
        "aten.scatter_reduce": scatter,
        "aten.index_put": index_put,
        **{f"aten.index_{name}": index_write for name in ("add", "copy", "fill")},
        "aten.embedding": embedding,
    }
)
