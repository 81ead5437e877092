"""What an op does, as kernels: its compute class and how much of that class's unit (flops or bytes), forward and
backward.

The classes and their units are those of cluster/rates.py. Bytes are what the eager kernels of torch read and write; one
op may be several kernels, as a power's backward is three elementwise passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..graph import Op, Shape, Tensor
from .storage import VIEWS, base_name


@dataclass(frozen=True, slots=True)
class Kernel:
    """amount: flops or bytes; at: the size at which to look up the rate; launches: calls that it takes.

    adjoint: look up the class's "_backward" rate. moved_bytes: what a class counted in flops reads and writes.
    shape: of a matmul, (batch, m, n, k); of attention, (batch x heads, query length, key length, head size); else ().
    weight: makes the gradient of a parameter, which a schedule with split backwards can put off.
    """

    compute_class: str
    amount: float
    at: float
    dtype: str
    launches: int = 1
    adjoint: bool = False
    moved_bytes: float = 0.0
    shape: tuple[int, ...] = ()
    weight: bool = False


@dataclass(frozen=True)
class Call:
    """An op with local shapes, in the order of its inputs and outputs.

    copies: a view op that cannot alias its input. shared_uses: per input, how many consumers add to its gradient.
    products_in: dtype that linear layers cast their operands to, "" for none. fused_loss, wide_loss, softmax_multiple,
    softmax_longest, loss_metrics: as in `Constants`.
    """

    op: Op
    tensors: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    shapes: tuple[Shape, ...]
    out_shapes: tuple[Shape, ...]
    copies: bool
    shared_uses: tuple[int, ...]
    products_in: str = ""
    fused_loss: bool = False
    wide_loss: bool = True
    softmax_multiple: int = 1
    softmax_longest: int = 0
    loss_metrics: int = 0

    @property
    def product_dtype(self) -> str:
        """What a product computes in: the tensors' dtype, unless linear layers cast their operands down."""
        return self.products_in if self.products_in and self.name == "linear" else self.dtype

    @property
    def name(self) -> str:
        return base_name(self.op.target)

    @property
    def dtype(self) -> str:
        return str(self.outputs[0].dtype).removeprefix("torch.")

    def bytes(self, index: int) -> int:
        return math.prod(self.shapes[index]) * self.tensors[index].dtype.itemsize

    def out_bytes(self, index: int = 0) -> int:
        return math.prod(self.out_shapes[index]) * self.outputs[index].dtype.itemsize

    @property
    def in_bytes(self) -> int:
        """Bytes of the distinct inputs; a broadcast or expanded input is read at its own size."""
        return sum({t.name: self.bytes(i) for i, t in enumerate(self.tensors)}.values())

    @property
    def differentiable(self) -> tuple[int, ...]:
        """Indices of the inputs that get a gradient from this op."""
        if self.op.no_grad or not any(t.requires_grad for t in self.outputs):
            return ()
        return tuple(i for i, t in enumerate(self.tensors) if t.requires_grad)

    def argument(self, position: int, name: str, default: object = None) -> object:
        if position < len(self.op.args):
            return self.op.args[position]
        return dict(self.op.kwargs).get(name, default)


Kernels = list[Kernel]


def kernels(call: Call) -> tuple[Kernels, Kernels]:
    """(forward, backward) kernels of an op on one rank."""
    forward, backward = _TABLE.get(call.name, _pointwise)(call)
    if not call.differentiable:
        return forward, []
    return forward, [*backward, *_accumulations(call)]


def _accumulations(call: Call) -> Iterator[Kernel]:
    """Gradients of a tensor with several consumers are added up: each consumer is charged its part of the additions."""
    for i in call.differentiable:
        uses = call.shared_uses[i]
        if uses > 1 and call.tensors[i].role != "parameter":
            yield _bytes("pointwise", 3 * call.bytes(i) * (uses - 1) / uses, at=3 * call.bytes(i))


def _bytes(
    compute_class: str, amount: float, *, at: float | None = None, adjoint: bool = False, launches: int = 1
) -> Kernel:
    return Kernel(compute_class, amount, amount if at is None else at, "", launches, adjoint)


# -- contractions

# Reading for the maximum, reading, and writing at half the width.
_CAST_PASSES = 2.5


def _products(
    call: Call, flops: float, compute_class: str = "matmul", shape: tuple[int, ...] = ()
) -> tuple[Kernels, Kernels]:
    """One product forward, and one per input (of the first two matrices) that needs a gradient backward.

    shape: (batch, m, n, k) of the forward; the gradients' products are (m, k, n) and (k, n, m).
    """
    moved = call.in_bytes + call.out_bytes()
    dtype = call.product_dtype if compute_class == "matmul" else call.dtype
    casts = dtype != call.dtype and compute_class == "matmul"
    forward = [Kernel(compute_class, flops, flops, dtype, moved_bytes=moved, shape=shape)]
    backward = []
    if casts:
        # Each operand's largest element is found and the operand is cast, in the forward, once for all products that read
        # it; in the backward the result's gradient is, and the operands are again, for they are needed turned.
        cast = sum(call.bytes(i) / max(1, call.shared_uses[i]) for i in range(min(2, len(call.tensors))))
        forward.append(_bytes("copy", _CAST_PASSES * cast))
        backward.append(_bytes("copy", _CAST_PASSES * (cast + call.out_bytes())))
    turns = [(0, 1, 3, 2), (0, 3, 2, 1)]
    matrices = 0
    for i in range(len(call.tensors)):
        matrix = len(call.shapes[i]) > 1
        matrices += matrix
        if i not in call.differentiable:
            continue
        if matrix:
            weight = call.tensors[i].role == "parameter"
            turned = tuple(shape[j] for j in turns[min(matrices, 2) - 1]) if shape else ()
            backward.append(
                Kernel(compute_class, flops, flops, dtype, adjoint=True, moved_bytes=moved, shape=turned, weight=weight)
            )
        else:  # a bias: its gradient is a sum over the rows of the result's
            backward.append(_bytes("reduction", call.out_bytes()))
    return forward, backward


def _linear(call: Call) -> tuple[Kernels, Kernels]:
    rows, width, out = math.prod(call.shapes[0][:-1]), call.shapes[0][-1], call.shapes[1][0]
    return _products(call, 2.0 * rows * width * out, shape=(1, rows, out, width))


def _matmul(call: Call) -> tuple[Kernels, Kernels]:
    out, inner = call.out_shapes[0], call.shapes[0][-1]
    flops = 2.0 * math.prod(out) * inner
    if len(call.shapes[0]) < 2 or len(call.shapes[1]) < 2:
        return _products(call, flops)
    return _products(call, flops, shape=(math.prod(out[:-2]), out[-2], out[-1], inner))


def _addmm(call: Call) -> tuple[Kernels, Kernels]:
    out, inner = call.out_shapes[0], call.shapes[1][-1]
    shape = (1, out[0], out[1], inner) if len(out) == 2 else ()
    return _products(call, 2.0 * math.prod(out) * inner, shape=shape)


def _routed(call: Call) -> tuple[Kernels, Kernels]:
    """Grouped products of rows, which are gathered from the tokens and put back. Groups are taken to be equally full."""
    num_operands, num_weights, num_groups = len(call.op.args[2]), len(call.op.args[3]), call.op.args[7]
    first = 2 + num_operands
    weights = [(i, call.shapes[i]) for i in range(first, first + num_weights)]
    rows = call.out_shapes[0][0] * weights[0][1][0] / num_groups
    products = [(i, shape) for i, shape in weights if len(shape) == 3]
    itemsize = call.outputs[0].dtype.itemsize
    forward, backward = [], []
    for i, (groups, inner, out) in products:
        flops = 2.0 * rows * inner * out
        moved = rows * (inner + out) * itemsize + call.bytes(i)
        shape = (groups, max(1, round(rows / groups)), out, inner)
        forward.append(Kernel("matmul", flops, flops, call.dtype, moved_bytes=moved, shape=shape))
        for turned in ((groups, shape[1], inner, out), (groups, inner, out, shape[1])):
            backward.append(Kernel("matmul", flops, flops, call.dtype, adjoint=True, moved_bytes=moved, shape=turned))
    travelled = 2 * rows * math.prod(call.shapes[0][1:]) * itemsize
    forward.append(_bytes("gather", travelled + 2 * call.out_bytes()))
    backward.append(_bytes("gather", travelled + 2 * call.out_bytes(), adjoint=True))
    return forward, backward


def _einsum(call: Call) -> tuple[Kernels, Kernels]:
    """2 x the product of all letters' sizes; an ellipsis counts as one letter."""
    terms = str(call.op.args[0]).replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, call.shapes, strict=False):
        if "..." not in term:
            sizes.update(zip(term, shape, strict=False))
        else:
            before, after = term.split("...")
            sizes.update(zip(before, shape, strict=False))
            sizes.update(zip(reversed(after), reversed(shape), strict=False))
            sizes["..."] = math.prod(shape[len(before) : len(shape) - len(after)])
    return _products(call, 2.0 * math.prod(sizes.values()))


def _convolution(call: Call) -> tuple[Kernels, Kernels]:
    weight = call.shapes[1]  # [out, in / groups, kernel...]
    flops = 2.0 * math.prod(call.out_shapes[0]) * math.prod(weight[1:])
    return _products(call, flops, "convolution")


def _transposed(call: Call) -> tuple[Kernels, Kernels]:
    weight = call.shapes[1]  # [in, out / groups, kernel...]
    return _products(call, 2.0 * math.prod(call.shapes[0]) * math.prod(weight[1:]), "convolution")


def _attention(call: Call) -> tuple[Kernels, Kernels]:
    """Fused attention; with dropout on CPUs torch materialises the scores, which this counts as softmax and dropout."""
    query, key, value = call.shapes[:3]
    heads = math.prod(query[:-2])
    head_flops = 2.0 * query[-2] * key[-2] * (query[-1] + value[-1])
    if call.argument(5, "is_causal", False):
        head_flops /= 2
    flops = heads * head_flops
    shape = (heads, query[-2], key[-2], query[-1])
    forward = [Kernel("attention", flops, head_flops, call.dtype, shape=shape)]
    backward = [Kernel("attention", flops, head_flops, call.dtype, adjoint=True, shape=shape)]
    return forward, backward


# -- views and copies


def _view(call: Call) -> tuple[Kernels, Kernels]:
    size = sum(call.out_bytes(i) for i in range(len(call.outputs)))
    forward = [_bytes("copy", 2 * size) if call.copies else _bytes("view", 0)]
    if call.name in ("slice", "select", "narrow", "diagonal", "unfold"):
        # Zeros of the whole, and the gradient copied into its place.
        whole = call.bytes(0)
        return forward, [] if whole == size else [_bytes("copy", whole + 2 * size, launches=2)]
    if call.name in ("split", "split_with_sizes", "chunk", "unbind"):
        return forward, [_bytes("copy", 2 * size)]
    if call.name in ("expand", "expand_as") and size > call.bytes(0):
        return forward, [_bytes("reduction", size)]
    return forward, [_bytes("copy", 2 * size) if call.copies else _bytes("view", 0)]


def _copy(call: Call) -> tuple[Kernels, Kernels]:
    size = call.in_bytes + call.out_bytes()
    return [_bytes("copy", size)], [_bytes("view", 0)]


def _cast(call: Call) -> tuple[Kernels, Kernels]:
    """A change of dtype, or nothing."""
    if call.tensors and call.tensors[0].dtype == call.outputs[0].dtype and not call.copies:
        return [_bytes("view", 0)], [_bytes("view", 0)]
    size = call.in_bytes + call.out_bytes()
    return [_bytes("copy", size)], [_bytes("copy", size)]


# -- elementwise, by passes of n (the bytes of the result) that the gradient of one input takes

_PASSES: dict[str, tuple[float, int]] = {
    "add": (0, 0),
    "sub": (0, 0),
    "rsub": (2, 1),
    "neg": (2, 1),
    "mul": (3, 1),
    "div": (3, 1),
    "pow": (7, 3),
    "rsqrt": (7, 3),
    "sqrt": (5, 2),
    "square": (7, 3),
    "reciprocal": (5, 2),
    "relu": (3, 1),
    "leaky_relu": (3, 1),
    "where": (3, 1),
    "masked_fill": (3, 1),
    "abs": (5, 2),
    "clamp": (5, 2),
}


def _pointwise(call: Call) -> tuple[Kernels, Kernels]:
    """Elementwise ops, and any op that is not in the table: it reads its inputs and writes its outputs once."""
    size = sum(call.out_bytes(i) for i in range(len(call.outputs)))
    forward = [_bytes("pointwise", call.in_bytes + size)]
    passes, launches = _PASSES.get(call.name, (3, 1))
    if call.name in ("mul", "div") and len(call.tensors) < 2:
        passes = 2
    backward: Kernels = []
    for i in call.differentiable:
        backward.append(_bytes("pointwise", passes * size, adjoint=True, launches=max(launches, 1)))
        if math.prod(call.shapes[i]) < math.prod(call.out_shapes[0]):  # broadcast: summed back
            backward.append(_bytes("reduction", size))
    return forward, backward


def _streaming(compute_class: str) -> Callable[[Call], tuple[Kernels, Kernels]]:
    """Ops with a result of their input's size, whose backward reads the gradient and a saved value and writes one."""

    def found(call: Call) -> tuple[Kernels, Kernels]:
        size = call.out_bytes()
        return [_bytes(compute_class, 2 * size)], [_bytes(compute_class, 3 * size, adjoint=True)]

    return found


def _softmax(call: Call) -> tuple[Kernels, Kernels]:
    """Of attention scores in a narrow type, one kernel with their mask only for the shapes that the stack's own kernel
    takes; otherwise they are cast to float32, masked, normalised and cast back, each by a kernel of its own."""
    found = _streaming("softmax")(call)
    shape = call.out_shapes[0]
    if len(shape) < 4 or call.outputs[0].dtype.itemsize >= 4:
        return found
    if math.prod(shape[:-2]) % call.softmax_multiple == 0 and shape[-1] <= (call.softmax_longest or shape[-1]):
        return found
    size, wide = call.out_bytes(), 4 * math.prod(shape)
    ends = [_bytes("copy", size + wide), _bytes("copy", size + wide), _bytes("pointwise", 2 * wide)]
    return [*ends, _bytes("softmax", 2 * wide)], [*ends, _bytes("softmax", 3 * wide, adjoint=True)]


def _reduction(call: Call) -> tuple[Kernels, Kernels]:
    size = call.in_bytes
    return [_bytes("reduction", size)], [_bytes("reduction", size, adjoint=True)]


def _pool(call: Call) -> tuple[Kernels, Kernels]:
    size = call.in_bytes + sum(call.out_bytes(i) for i in range(len(call.outputs)))
    return [_bytes("reduction", size)], [_bytes("pointwise", size, adjoint=True)]


def _gather(call: Call) -> tuple[Kernels, Kernels]:
    """Rows of a table; the backward writes a dense gradient of the whole table."""
    size = call.out_bytes()
    table = max((call.bytes(i) for i in call.differentiable), default=0)
    return [_bytes("gather", 2 * size)], [_bytes("gather", table + 2 * size, adjoint=True)]


def _dropout(call: Call) -> tuple[Kernels, Kernels]:
    if not call.argument(1, "p", 0.5) or not call.argument(2, "train", True):
        return [_bytes("view", 0)], [_bytes("view", 0)]
    size = 3 * call.out_bytes()
    return [_bytes("dropout", size)], [_bytes("dropout", size, adjoint=True)]


def _loss(call: Call) -> tuple[Kernels, Kernels]:
    """On logits of a narrower type it computes in float32 on a copy, unless it takes them as they are."""
    size = call.bytes(0)
    wide = math.prod(call.shapes[0]) * 4
    if call.tensors[0].dtype.itemsize < 4 and call.fused_loss:
        metrics = call.loss_metrics * [_bytes("copy", size + wide), _bytes("loss", 2 * wide)]
        return [_bytes("loss", size), *metrics], [_bytes("loss", 2 * size, adjoint=True)]
    if call.tensors[0].dtype.itemsize < 4 and call.wide_loss:
        forward = [_bytes("copy", size + wide), _bytes("loss", 2 * wide)]
        return forward, [_bytes("loss", 5 * wide, adjoint=True), _bytes("copy", size + wide)]
    return [_bytes("loss", 2 * size)], [_bytes("loss", 5 * size, adjoint=True)]


def _create(call: Call) -> tuple[Kernels, Kernels]:
    return [_bytes("pointwise", sum(call.out_bytes(i) for i in range(len(call.outputs))))], []


_CLASSES: dict[Callable[[Call], tuple[Kernels, Kernels]], tuple[str, ...]] = {
    _view: tuple(sorted(VIEWS)),
    _linear: ("linear",),
    _matmul: ("matmul", "mm", "bmm", "mv", "dot"),
    _addmm: ("addmm", "baddbmm"),
    _einsum: ("einsum",),
    _routed: ("routed_rows",),
    _convolution: ("conv1d", "conv2d", "conv3d", "convolution"),
    _transposed: ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    _attention: ("scaled_dot_product_attention",),
    _copy: ("clone", "cat", "stack", "roll", "constant_pad_nd", "pad", "repeat", "flip", "tril", "triu"),
    _cast: ("to", "_to_copy", "type_as", "contiguous", "float", "lift_fresh"),
    _streaming("transcendental"): (
        *("exp", "log", "log1p", "tanh", "sigmoid", "silu", "sin", "cos", "erf"),
        *("softplus", "mish", "elu", "log_sigmoid", "hardswish"),
    ),
    _streaming("gelu"): ("gelu",),
    _softmax: ("softmax", "_softmax"),
    _streaming("softmax"): ("log_softmax", "_log_softmax"),
    _streaming("norm"): ("layer_norm", "native_layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm"),
    _reduction: (
        *("sum", "mean", "prod", "amax", "amin", "max", "min", "argmax", "argmin", "any", "all"),
        *("var", "std", "var_mean", "linalg_vector_norm", "norm", "cumsum", "logsumexp"),
    ),
    _pool: tuple(f"{name}{n}d" for name in ("max_pool", "avg_pool", "adaptive_avg_pool") for n in (1, 2, 3)),
    _gather: ("embedding", "index_select", "gather", "index", "index_put", "scatter", "take"),
    _dropout: ("dropout",),
    _loss: ("cross_entropy_sum", "cross_entropy_loss", "nll_loss_sum", "nll_loss", "nll_loss_nd"),
    _create: ("arange", "zeros", "ones", "full", "empty", "zeros_like", "ones_like", "full_like", "eye"),
}
_TABLE = {name: function for function, names in _CLASSES.items() for name in names}
_IN_FLOPS = frozenset(
    name for f in (_linear, _matmul, _addmm, _einsum, _convolution, _transposed, _attention) for name in _CLASSES[f]
)


def counted_in_flops(op: Op) -> bool:
    """Products, convolutions and attention: what selective recomputation keeps."""
    return base_name(op.target) in _IN_FLOPS
