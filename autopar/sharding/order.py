"""Rows in an order of each chunk's own: what sorting rows means where the batch is cut.

A mixture of experts sorts its rows by expert, computes group by group, and puts the rows back. Across the chunks of a
batch the sorted rows are other rows, but what comes back is the same, because all that lies between treats rows alike.
So a chunk may sort its own rows, as long as three things hold, and this module keeps account of them:

- Rows meet only rows of the same order: an op takes operands in the order of one sort, or in the batch's, never both.
- Numbers of rows (what a sort returns, and its inverse) count within the chunk. They pick rows of the tensors that they
  number, and go through casts, views and the division that turns k choices of a row into the row; no other arithmetic.
- Counts of rows by group add up over chunks (`Rule.counts`).

Anything else brings rows of different chunks together, which is a conflict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..graph import Graph, Op
from .call import Call
from .placement import Placement, Split
from .strategy import Strategy
from .trace import KEEPS_VALUES, counts_rows

_ROWS = Split(0)
_SHAPE_ONLY = ("zeros_like", "empty_like", "ones_like", "full_like", "new_zeros", "new_empty", "new_ones", "new_full")


@dataclass(frozen=True, slots=True)
class Ordering:
    """What is known of a tensor that is cut by rows, besides its placement.

    order: the name of the sort whose order its rows have; "" for the batch's own.
    numbers: None; or (order, size) where its values number, within a chunk, the rows of tensors that have `size` rows
        over all chunks, in that order.
    """

    order: str = ""
    numbers: tuple[str, int] | None = None


PLAIN = Ordering()


class Disordered(Exception):
    """Rows of different orders meet, or numbers of rows are used as if they were more; the argument says how."""


def sorts_rows(op: Op) -> bool:
    return op.target.split(".")[1] in ("sort", "argsort") and op.target.startswith("aten.")


def reorder(
    graph: Graph, op: Op, have: Sequence[Placement], rows: Sequence[Ordering], shards: int
) -> tuple[Strategy, tuple[Ordering, ...]] | None:
    """How an op that makes or follows an order of rows runs on one chunk; None for any other op."""
    kind = op.target.split(".")[1]
    if not op.target.startswith("aten."):
        return None
    call = Call.of(graph, op)
    if sorts_rows(op):
        return _sort(op, call, have, rows, shards)
    if kind in ("index", "index_select", "gather"):
        return _pick(op, call, have, rows, shards)
    if kind in ("index_put", "index_copy", "index_add"):
        return _put(graph, op, call, have, rows, shards)
    return None


def follow(
    graph: Graph, op: Op, strategy: Strategy, have: Sequence[Placement], rows: Sequence[Ordering], shards: int
) -> tuple[Ordering, ...]:
    """What is known of the outputs of any other op, run as `strategy`; raises Disordered."""
    cut = [r if isinstance(p, Split) else PLAIN for p, r in zip(have, rows, strict=True)]
    orders = {r.order for r, want in zip(cut, strategy.inputs, strict=True) if isinstance(want, Split)}
    if len(orders) > 1:
        names = " and ".join(f"the order of {name}" if name else "the order of the batch" for name in sorted(orders))
        raise Disordered(f"{op.target} brings rows in {names} together")
    order = next(iter(orders), "")
    if order:
        _check_rows(graph, op, strategy, order)
    numbers = _numbers(graph, op, cut, shards)
    return tuple(Ordering(order, numbers) if isinstance(p, Split) else PLAIN for p in strategy.outputs)


def _check_rows(graph: Graph, op: Op, strategy: Strategy, order: str) -> None:
    """Rows that are not the batch's must stay one by one: neighbours in a chunk are not neighbours in the whole."""
    if strategy.special:
        raise Disordered(f"{op.target} needs to know which rows it has, and these are in the order of {order}")
    placed = zip((*op.inputs, *op.outputs), (*strategy.inputs, *strategy.outputs), strict=True)
    counts = {graph.tensors[t].shape[p.dim] for t, p in placed if isinstance(p, Split)}
    if len(counts) > 1:
        raise Disordered(f"{op.target} groups neighbouring rows, and these are in the order of {order}")


def _numbers(graph: Graph, op: Op, rows: Sequence[Ordering], shards: int) -> tuple[str, int] | None:
    """What the values of the output number; raises Disordered where that cannot be said."""
    numbered = [r.numbers for r in rows if r.numbers is not None]
    kind = op.target.split(".")[1]
    if not numbered or kind in _SHAPE_ONLY:
        return None
    order, size = numbered[0]
    if kind in KEEPS_VALUES:
        return numbered[0]
    divisor = op.args[1] if len(op.args) > 1 else None
    floors = kind == "floor_divide" or dict(op.kwargs).get("rounding_mode") in ("floor", "trunc")
    if isinstance(divisor, int) and divisor > 0 and size // shards % divisor == 0:
        # A chunk has whole groups of `divisor` neighbouring rows.
        if floors:
            return order, size // divisor
        if kind in ("remainder", "fmod"):
            return None
    raise Disordered(f"{op.target} computes with numbers of rows, which differ when the batch is cut")


def _sort(
    op: Op, call: Call, have: Sequence[Placement], rows: Sequence[Ordering], shards: int
) -> tuple[Strategy, tuple[Ordering, ...]] | None:
    shape = call.shape("self")
    if len(shape) != 1 or have[0] != _ROWS or shape[0] % shards:
        return None
    source = rows[0]
    if source.numbers is not None:
        # A sort returns each number once, so that sorting these numbers again undoes it.
        order, size = source.numbers
        if size != shape[0] or len(op.outputs) != 1:
            return None
        found = [Ordering(order, (source.order, size))]
    else:
        found = [Ordering(op.name), Ordering(op.name, (source.order, shape[0]))][-len(op.outputs) :]
    return _on_rows(op, (_ROWS,), shards), tuple(found)


def _pick(
    op: Op, call: Call, have: Sequence[Placement], rows: Sequence[Ordering], shards: int
) -> tuple[Strategy, tuple[Ordering, ...]] | None:
    """self[numbers]"""
    if "indices" in call.arguments:
        if len(call["indices"]) != 1:
            return None
    elif not call.shape("self") or call.dim("dim", len(call.shape("self"))) != 0:
        return None
    numbers = rows[1].numbers
    if numbers is None or have[1] != _ROWS or have[0] != _ROWS:
        return None
    if numbers != (rows[0].order, call.shape("self")[0]):
        raise Disordered(f"{op.target} picks rows by the numbers of others")
    return _on_rows(op, (_ROWS, _ROWS), shards), (Ordering(rows[1].order, rows[0].numbers),)


def _put(
    graph: Graph, op: Op, call: Call, have: Sequence[Placement], rows: Sequence[Ordering], shards: int
) -> tuple[Strategy, tuple[Ordering, ...]] | None:
    """self[numbers] = values, or += values"""
    if len(op.inputs) != 3 or ("dim" in call.arguments and call.dim("dim", len(call.shape("self"))) != 0):
        return None
    numbers = rows[1].numbers
    if numbers is None or have[1] != _ROWS:
        return None
    order, size = numbers
    if call.shape("self")[:1] != (size,) or isinstance(have[0], Split) and have[0] != _ROWS:
        raise Disordered(f"{op.target} writes rows by the numbers of others")
    adds = call.packet == "aten.index_add" or bool(call.get("accumulate", False))
    # Numbers of all rows, each once, leave nothing of what was there.
    is_permutation = graph.tensors[op.inputs[1]].shape == (size,)
    if (adds or not is_permutation) and isinstance(have[0], Split) and rows[0].order != order:
        raise Disordered(f"{op.target} writes rows of one order among rows of another")
    if is_permutation and counts_rows(graph, op.inputs[2], size) == 0 and not adds:
        strategy = _on_rows(op, (_ROWS, _ROWS, have[2]), shards, "inverse_order")
        return strategy, (Ordering(order, (rows[1].order, size)),)
    if have[2] != _ROWS or rows[2].order != rows[1].order or rows[2].numbers is not None:
        raise Disordered(f"{op.target} writes rows that are not in the order of their numbers")
    return _on_rows(op, (_ROWS, _ROWS, _ROWS), shards), (Ordering(order),)


def _on_rows(op: Op, inputs: tuple[Placement, ...], shards: int, special: str = "") -> Strategy:
    return Strategy("rows", inputs, (_ROWS,) * len(op.outputs), 1 / shards, special, degree=shards)
