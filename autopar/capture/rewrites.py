"""Algebraic rewrites of a captured graph: other ops, the same numbers, the same parameters under the same names.

    add-weights      x A' + x B'          ->  x (A + B)'             two products become one
    add-inputs       a W' + b W'          ->  (a + b) W'             likewise
    reduce-first     mean_S(x W' + b)     ->  mean_S(x) W' + b       over dims that the linear does not touch
    merge-parallel   x A', x B', ...      ->  slices of x [A; B; ...]'
    split-concat     [a, b] W'            ->  a W_1' + b W_2'        no concatenation to convert between layouts

A rewrite is named "<rule>:<op>,<op>", the ops being those that it replaces; names are stable, so that a plan can list
the rewrites that it was made for. Equal up to rounding: sums are taken in another order.

Reference: the substitutions of TASO (Jia et al., SOSP 2019) and Unity (Unger et al., OSDI 2022, section 4), of which
these are the ones that matter between linear layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from ..graph import Graph, Op, Ref
from .blocks import arrange, find_blocks
from .draft import Draft
from .observe import Observer, apply_survey

LINEAR, ADD, MEAN, CAT = "aten.linear.default", "aten.add.Tensor", "aten.mean.dim", "aten.cat.default"


def find_rewrites(graph: Graph) -> list[tuple[str, ...]]:
    """What can be done to the graph: rewrites that go together, because isomorphic blocks have them alike."""
    place = {name: (block.kind, i) for block in graph.blocks for i, name in enumerate(block.ops)}
    groups: dict[tuple, list[str]] = {}
    for rule, (find, _) in RULES.items():
        for ops in find(graph):
            if all(op in place for op in ops):
                key = (rule, *(place[op] for op in ops))
                groups.setdefault(key, []).append(f"{rule}:{','.join(ops)}")
    return [tuple(group) for group in groups.values()]


# Graphs made of one that are kept with it: a plan's is asked for wherever the plan goes.
MAX_KEPT = 8


def rewritten(graph: Graph, rewrites: Sequence[str]) -> Graph:
    """The graph after these rewrites, one after the other, cut into blocks anew; the same object for the same rewrites, as
    long as few others are asked for.

    ValueError for a rewrite that the graph has no place for.
    """
    if not rewrites:
        return graph
    kept: dict[tuple[str, ...], Graph] = vars(graph).setdefault("_rewritten", {})
    key = tuple(rewrites)
    made = kept.pop(key, None) or _rewrite(graph, key)
    kept[key] = made  # the latest last
    if len(kept) > MAX_KEPT:
        del kept[next(iter(kept))]
    return made


def _rewrite(graph: Graph, rewrites: tuple[str, ...]) -> Graph:
    draft = Draft(
        dict(graph.tensors), list(graph.ops), list(graph.inputs), dict(graph.constants), graph.loss, list(graph.outputs),
        _taken={*graph.tensors, *(op.name for op in graph.ops)},
    )  # fmt: skip
    now = graph
    for name in rewrites:
        rule, _, ops = name.partition(":")
        if rule not in RULES or tuple(ops.split(",")) not in set(RULES[rule][0](now)):
            raise ValueError(
                f"rewrite {name!r} has no place in {graph.name}; make the plan again with autopar.search(graph, cluster)"
            )
        _replace(draft, [now.op[op] for op in ops.split(",")], RULES[rule][1])
        now = replace(
            now, tensors=dict(draft.tensors), ops=tuple(draft.ops), loss=draft.loss, outputs=tuple(draft.outputs)
        )
    draft.drop_dead()
    apply_survey(draft, Observer().survey(draft))
    draft.ops = arrange(draft.ops, graph.side_ops, draft.tensors, draft.updated_buffers())
    return replace(
        now,
        tensors=draft.tensors,
        ops=tuple(draft.ops),
        blocks=find_blocks(draft.ops, graph.side_ops, draft.tensors, draft.loss),
    )


Build = Callable[[Draft, Sequence[Op]], tuple[list[Op], dict[str, str], str]]


def _replace(draft: Draft, ops: Sequence[Op], build: Build) -> None:
    """Put the new ops in the place of one of the old, let all read them, and drop the old ones."""
    new, renamed, where = build(draft, ops)
    at = next(i for i, op in enumerate(draft.ops) if op.name == where)
    gone = {op.name for op in ops}
    draft.ops = [
        *(op for op in draft.ops[:at] if op.name not in gone), *new, *(op for op in draft.ops[at:] if op.name not in gone)
    ]  # fmt: skip
    draft.rename(renamed)


# -- what the rules look for


def _inputs(op: Op) -> tuple[str, str, str]:
    """(input, weight, bias or "") of a linear."""
    names = [ref.name if isinstance(ref, Ref) else "" for ref in (*op.args, *(v for _, v in op.kwargs))]
    return names[0], names[1], names[2] if len(names) > 2 else ""


def _linears(graph: Graph) -> list[Op]:
    return [op for op in graph.ops if op.target == LINEAR and not op.no_grad]


def _only_for(graph: Graph, producer: str, consumer: Op) -> bool:
    kept = {graph.loss, *(name for _, name in graph.outputs)}
    return graph.consumers[producer] == (consumer,) and producer not in kept


def _sums(graph: Graph) -> Iterator[tuple[Op, Op, Op]]:
    """(linear, linear, plain sum of the two), the linears used for nothing else."""
    for op in graph.ops:
        if op.target != ADD or op.kwargs or len(op.inputs) != 2 or op.no_grad:
            continue
        makers = [graph.producer.get(name) for name in op.inputs]
        if any(maker is None or maker.target != LINEAR or maker.no_grad for maker in makers) or makers[0] is makers[1]:
            continue
        shapes = {graph.tensors[name].shape for name in op.inputs}
        if len(shapes) == 1 and all(_only_for(graph, name, op) for name in op.inputs):
            yield makers[0], makers[1], op


def _find_add_weights(graph: Graph) -> Iterator[tuple[str, ...]]:
    for one, other, add in _sums(graph):
        if _inputs(one)[0] == _inputs(other)[0]:
            yield one.name, other.name, add.name


def _find_add_inputs(graph: Graph) -> Iterator[tuple[str, ...]]:
    for one, other, add in _sums(graph):
        (a, weight, bias), (b, same, second) = _inputs(one), _inputs(other)
        if weight == same and a != b and not bias and not second:
            yield one.name, other.name, add.name


def _find_reduce_first(graph: Graph) -> Iterator[tuple[str, ...]]:
    for op in graph.ops:
        if op.target != MEAN or op.kwargs or op.no_grad or len(op.args) > 3:
            continue
        maker = graph.producer.get(op.inputs[0])
        if maker is None or maker.target != LINEAR or maker.no_grad or not _only_for(graph, op.inputs[0], op):
            continue
        last = len(graph.tensors[op.inputs[0]].shape) - 1
        dims = op.args[1] if isinstance(op.args[1], tuple) else ()
        if dims and all(dim % (last + 1) != last for dim in dims):
            yield maker.name, op.name


def _find_merge_parallel(graph: Graph) -> Iterator[tuple[str, ...]]:
    layer_of = _layers(graph)
    shared: dict[tuple[str, bool, int | None], list[Op]] = {}
    for op in _linears(graph):
        x, weight, bias = _inputs(op)
        if graph.tensors[weight].role == "parameter":
            shared.setdefault((x, bool(bias), layer_of.get(op.name)), []).append(op)
    for ops in shared.values():
        weights = {_inputs(op)[1] for op in ops}
        if len(ops) > 1 and len(weights) == len(ops):
            yield tuple(op.name for op in ops)


def _layers(graph: Graph) -> dict[str, int]:
    """A number for each op: of its layer, or of what lies between two layers. A layer is a block of several matrices whose
    kind comes more than once; blocks are those of the captured graph, whatever has been rewritten in them since.

    Products are not joined over layers. What an encoder puts out is read by every layer of its decoder, and one product of
    all of them would make a single block of these.
    """
    kinds = Counter(block.kind for block in graph.blocks)
    found: dict[str, int] = {}
    number = 0
    for block in graph.blocks:
        matrices = sum(len(graph.tensors[name].shape) == 2 for name in block.parameters)
        is_layer = kinds[block.kind] > 1 and matrices > 1
        number += is_layer
        found.update(dict.fromkeys(block.ops, number))
        number += is_layer
    return found


def _find_split_concat(graph: Graph) -> Iterator[tuple[str, ...]]:
    for op in _linears(graph):
        maker = graph.producer.get(_inputs(op)[0])
        if (
            maker is None
            or maker.target != CAT
            or maker.no_grad
            or len(set(maker.inputs)) != 2
            or len(maker.inputs) != 2
        ):
            continue
        dim = maker.args[1] if len(maker.args) > 1 else 0
        rank = len(graph.tensors[maker.outputs[0]].shape)
        if dim % rank == rank - 1 and _only_for(graph, maker.outputs[0], op):
            yield maker.name, op.name


# -- what they put there


def _like(draft: Draft, op: Op, target: str, args: tuple, shape: Sequence[int], wanted: str) -> Op:
    dtype = draft.tensors[op.outputs[0]].dtype
    return draft.new_op(op, target, args, shape, dtype, wanted)


def _add(draft: Draft, op: Op, a: str, b: str, wanted: str) -> Op:
    return _like(draft, op, ADD, (Ref(a), Ref(b)), draft.tensors[a].shape, wanted)


def _linear(draft: Draft, op: Op, x: str, weight: str, bias: str, wanted: str) -> Op:
    shape = (*draft.tensors[x].shape[:-1], draft.tensors[weight].shape[0])
    args = (Ref(x), Ref(weight), Ref(bias)) if bias else (Ref(x), Ref(weight))
    return _like(draft, op, LINEAR, args, shape, wanted)


def _build_add_weights(draft: Draft, ops: Sequence[Op]) -> tuple[list[Op], dict[str, str], str]:
    one, other, add = ops
    (x, a, first), (_, b, second) = _inputs(one), _inputs(other)
    new = [_add(draft, one, a, b, "weights")]
    bias = first or second
    if first and second:
        new.append(_add(draft, one, first, second, "biases"))
        bias = new[-1].outputs[0]
    new.append(_linear(draft, one, x, new[0].outputs[0], bias, "linear"))
    return new, {add.outputs[0]: new[-1].outputs[0]}, add.name


def _build_add_inputs(draft: Draft, ops: Sequence[Op]) -> tuple[list[Op], dict[str, str], str]:
    one, other, add = ops
    summed = _add(draft, add, _inputs(one)[0], _inputs(other)[0], "inputs")
    linear = _linear(draft, one, summed.outputs[0], _inputs(one)[1], "", "linear")
    return [summed, linear], {add.outputs[0]: linear.outputs[0]}, add.name


def _build_reduce_first(draft: Draft, ops: Sequence[Op]) -> tuple[list[Op], dict[str, str], str]:
    linear, mean = ops
    x, weight, bias = _inputs(linear)
    rank = len(draft.tensors[x].shape)
    dims = {dim % rank for dim in mean.args[1]}
    keep = len(mean.args) > 2 and mean.args[2]
    shape = [1 if d in dims else n for d, n in enumerate(draft.tensors[x].shape) if keep or d not in dims]
    first = _like(draft, mean, MEAN, (Ref(x), *mean.args[1:]), shape, "mean")
    new = _linear(draft, linear, first.outputs[0], weight, bias, "linear")
    return [first, new], {mean.outputs[0]: new.outputs[0]}, mean.name


def _build_merge_parallel(draft: Draft, ops: Sequence[Op]) -> tuple[list[Op], dict[str, str], str]:
    parts = [_inputs(op) for op in ops]
    sizes = [draft.tensors[weight].shape[0] for _, weight, _ in parts]
    width = draft.tensors[parts[0][1]].shape[1]
    first, x = ops[0], parts[0][0]
    refs = tuple(Ref(weight) for _, weight, _ in parts)
    new = [_like(draft, first, CAT, (refs, 0), (sum(sizes), width), "weights")]
    bias = ""
    if parts[0][2]:
        new.append(_like(draft, first, CAT, (tuple(Ref(b) for _, _, b in parts), 0), (sum(sizes),), "biases"))
        bias = new[-1].outputs[0]
    new.append(_linear(draft, first, x, new[0].outputs[0], bias, "linear"))
    whole, shape = new[-1].outputs[0], draft.tensors[new[-1].outputs[0]].shape
    renamed, start = {}, 0
    for op, size in zip(ops, sizes, strict=True):
        args = (Ref(whole), len(shape) - 1, start, start + size)
        new.append(_like(draft, op, "aten.slice.Tensor", args, (*shape[:-1], size), "slice"))
        renamed[op.outputs[0]] = new[-1].outputs[0]
        start += size
    return new, renamed, first.name


def _build_split_concat(draft: Draft, ops: Sequence[Op]) -> tuple[list[Op], dict[str, str], str]:
    cat, linear = ops
    _, weight, bias = _inputs(linear)
    out, width = draft.tensors[weight].shape
    at = draft.tensors[cat.inputs[0]].shape[-1]
    new: list[Op] = []
    halves = []
    for name, (start, stop) in zip(cat.inputs, ((0, at), (at, width)), strict=True):
        args = (Ref(weight), 1, start, stop)
        new.append(_like(draft, linear, "aten.slice.Tensor", args, (out, stop - start), "weight"))
        new.append(_linear(draft, linear, name, new[-1].outputs[0], "" if start else bias, "linear"))
        halves.append(new[-1].outputs[0])
    new.append(_add(draft, linear, *halves, "add"))
    return new, {linear.outputs[0]: new[-1].outputs[0]}, linear.name


RULES: Mapping[str, tuple[Callable[[Graph], Iterator[tuple[str, ...]]], Build]] = {
    "add-weights": (_find_add_weights, _build_add_weights),
    "add-inputs": (_find_add_inputs, _build_add_inputs),
    "reduce-first": (_find_reduce_first, _build_reduce_first),
    "merge-parallel": (_find_merge_parallel, _build_merge_parallel),
    "split-concat": (_find_split_concat, _build_split_concat),
}
