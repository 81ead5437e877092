"""Cases for tests/test_opinfo.py: samples as one-op graphs, and the comparison of a split op with the whole one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch.testing._internal import common_methods_invocations as invocations
from torch.testing._internal import common_utils

from autopar.graph import Graph, Op, Ref, Tensor, map_refs
from autopar.ops import resolve
from autopar.sharding.analysis import analysis
from autopar.sharding.emulate import EmulatedAxis, combine, dual, hand_out, on_every_rank
from autopar.sharding.local import localize
from autopar.sharding.placement import PARTIAL, REPLICATED, SHARED, Placement
from autopar.sharding.rule import partial_strategy, whole_strategies
from autopar.sharding.rules import DEFAULT
from autopar.sharding.strategies import strategies
from autopar.sharding.strategy import Strategy

Sample = tuple[str, tuple[Any, ...], dict[str, Any]]


def one_op_graph(target: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Graph, list[torch.Tensor]]:
    """A graph that is one op on these arguments, and its inputs; every occurrence of a tensor is an input."""
    values: list[torch.Tensor] = []

    def take(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            values.append(value)
            return Ref(f"in{len(values) - 1}")
        return tuple(take(v) for v in value) if isinstance(value, tuple | list) else value

    taken = take(tuple(args))
    named = tuple((key, take(value)) for key, value in kwargs.items())
    out = resolve(target)(*args, **kwargs)
    sequence = isinstance(out, tuple | list)
    tensors = {}
    for prefix, listed in (("in", values), ("out", list(out) if sequence else [out])):
        for i, v in enumerate(listed):
            name = f"{prefix}{i}"
            tensors[name] = Tensor(name, tuple(v.shape), v.dtype, "activation", v.requires_grad)
    outputs = tuple(name for name in tensors if name.startswith("out"))
    op = Op("op", target, taken, named, outputs, returns_sequence=sequence)
    graph = Graph("one", tensors, (op,), (), (), "out0", (), (), frozenset(), (), 1)
    return graph, values


def _call(function: Callable[..., Any], args: Any, kwargs: Any, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    taken, named = map_refs((args, tuple(v for _, v in kwargs)), lambda ref: values[int(ref.name[2:])])

    def lists(value: Any) -> Any:
        return [lists(v) for v in value] if isinstance(value, tuple) else value

    out = function(*map(lists, taken), **{k: lists(v) for (k, _), v in zip(kwargs, named, strict=True)})
    return list(out) if isinstance(out, tuple | list) else [out]


def place(whole: torch.Tensor, placement: Placement, degree: int) -> list[torch.Tensor]:
    """Local values; a PARTIAL becomes random summands."""
    if placement == PARTIAL and whole.dtype.is_floating_point:
        parts = [torch.randn_like(whole) for _ in range(degree - 1)]
        return [whole - sum(parts), *parts]
    return hand_out(whole, placement, degree)


@dataclass(frozen=True)
class Whole:
    """An op run as a whole: its outputs, random gradients of those that have any, and the gradients of its inputs."""

    outputs: list[torch.Tensor]
    seeds: list[torch.Tensor | None]
    gradients: list[Any]

    @classmethod
    def run(cls, graph: Graph, values: Sequence[torch.Tensor]) -> Whole:
        (op,) = graph.ops
        leaves = [v.detach().clone().requires_grad_(v.requires_grad) for v in values]
        outputs = _call(resolve(op.target), op.args, op.kwargs, leaves)
        seeds = [torch.randn_like(v) if v.requires_grad else None for v in outputs]
        return cls([v.detach() for v in outputs], seeds, _gradients(outputs, seeds, leaves))


def check_strategy(
    graph: Graph, values: Sequence[torch.Tensor], strategy: Strategy, degree: int, run_whole: Whole | None = None
) -> str:
    """Run the op split by `strategy`; what differs from the whole op, "" if nothing does."""
    (op,) = graph.ops
    whole = whole_strategies(analysis(graph).rule(op), analysis(graph).gradient(op))[0]
    run_whole = run_whole or Whole.run(graph, values)
    expected, seeds, wanted = run_whole.outputs, run_whole.seeds, run_whole.gradients

    local_inputs = [place(v.detach(), p, degree) for v, p in zip(values, strategy.inputs, strict=True)]
    local_seeds = [
        place(s, dual(p), degree) if s is not None else [None] * degree
        for s, p in zip(seeds, strategy.outputs, strict=True)
    ]
    call = localize(graph, op, whole, 1, [strategy], [degree])

    def run(axis: EmulatedAxis) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        mine = [
            part[axis.rank].clone().requires_grad_(v.requires_grad)
            for part, v in zip(local_inputs, values, strict=True)
        ]
        axes = [axis] * len(call.axes)
        out = _call(lambda *a, **k: call.function(*axes, *a, **k), call.args, call.kwargs, mine)
        return out, _gradients(out, [s[axis.rank] for s in local_seeds], mine)

    results = on_every_rank(degree, run, bool(call.axes))
    tolerance = 1e-6 if any(t.dtype == torch.float32 for t in expected) else 1e-8
    for i, placement in enumerate(strategy.outputs):
        problem = _compare([r[0][i].detach() for r in results], placement, expected[i], tolerance)
        if problem:
            return f"output {i} ({placement}): {problem}"
    for i, placement in enumerate(strategy.inputs):
        if wanted[i] is not None:
            parts = [r[1][i] if r[1][i] is not None else torch.zeros_like(local_inputs[i][0]) for r in results]
            problem = _compare(parts, dual(placement), wanted[i], tolerance)
            if problem:
                return f"gradient {i} ({placement}): {problem}"
    return ""


def _gradients(outs: Sequence[torch.Tensor], seeds: Sequence[Any], leaves: Sequence[torch.Tensor]) -> list[Any]:
    pairs = [(o, s) for o, s in zip(outs, seeds, strict=True) if s is not None and o.requires_grad]
    learn = [leaf for leaf in leaves if leaf.requires_grad]
    if not pairs or not learn:
        return [None] * len(leaves)
    found = torch.autograd.grad([o for o, _ in pairs], learn, [s for _, s in pairs], allow_unused=True)
    by_leaf = iter(found)
    return [next(by_leaf) if leaf.requires_grad else None for leaf in leaves]


def _compare(parts: list[torch.Tensor], placement: Placement, whole: torch.Tensor, tolerance: float) -> str:
    if placement in (REPLICATED, SHARED):
        joined = parts
    elif placement == PARTIAL and not whole.dtype.is_floating_point:
        joined = [torch.stack(parts).sum(0).to(whole.dtype)]
    else:
        joined = [combine(parts, placement)]
    for one in joined:
        if one.shape != whole.shape or one.dtype != whole.dtype:
            return f"{one.dtype} {tuple(one.shape)} instead of {whole.dtype} {tuple(whole.shape)}"
        if not torch.allclose(one, whole, rtol=1e-6, atol=tolerance, equal_nan=True):
            return f"largest difference {(one.double() - whole.double()).abs().max():.2e}"
    return ""


def check_sample(sample: Sample, degrees: Sequence[int] = (2, 3)) -> tuple[int, list[str]]:
    """How many splits of a sample were checked, and which of them went wrong."""
    target, args, kwargs = sample
    graph, values = one_op_graph(target, args, kwargs)
    (op,) = graph.ops
    found = analysis(graph)
    try:
        rule = found.rule(op)
    except Exception as error:
        return 0, [f"{target} {[tuple(v.shape) for v in values]} {op.args}: its rule raises {error!r}"]
    count, wrong = 0, []
    run_whole = None
    for degree in degrees:
        passing = [partial_strategy(rule, g, found.gradient(op)) for g in rule.linear]
        for strategy in (*strategies(graph, op, degree), *passing):
            count += strategy.key not in ("-", "shared")
            try:
                run_whole = run_whole or Whole.run(graph, values)
                problem = check_strategy(graph, values, strategy, degree, run_whole)
            except Exception as error:
                problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            if problem:
                shapes = [tuple(v.shape) for v in values]
                wrong.append(f"{target} {shapes} {op.args} {op.kwargs} {strategy.key} on {degree}: {problem}")
    return count, wrong


_REDUCTION = {"none": 0, "mean": 1, "sum": 2}


def _loss(name: str) -> Callable[..., Sample]:
    def adapt(*args: Any, reduction: str = "mean", **kwargs: Any) -> Sample:
        return _resolved(name, args, {**kwargs, "reduction": _REDUCTION[reduction]})

    return adapt


def _cross_entropy(
    input: Any, target: Any, weight: Any = None, ignore_index: int = -100, label_smoothing: float = 0.0, **_: Any
) -> Sample:
    return "autopar.cross_entropy_sum", (input, target, weight, ignore_index, label_smoothing), {}


def _batch_norm(
    x: Any, mean: Any, var: Any, weight: Any = None, bias: Any = None, training: bool = False,
    momentum: float = 0.1, eps: float = 1e-5,
) -> Sample:  # fmt: skip
    return "aten.batch_norm.default", (x, weight, bias, mean, var, training, momentum, eps, False), {}


def _pool(name: str) -> Callable[..., Sample]:
    def adapt(x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, **kw: Any) -> Sample:
        return _resolved(name, (x, kernel_size, stride or (), padding, dilation, kw.get("ceil_mode", False)), {})

    return adapt


_ELEMENTWISE_LOSSES = (
    "mse_loss",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "kl_div",
    "soft_margin_loss",
    "hinge_embedding_loss",
    "margin_ranking_loss",
)

_ADAPTERS: Mapping[str, Callable[..., Sample]] = {
    "nn.functional.cross_entropy": _cross_entropy,
    "nn.functional.batch_norm": _batch_norm,
    "nn.functional.embedding": lambda weight, indices, padding_idx=None, max_norm=None, norm_type=2.0, **rest: (
        "aten.embedding.default",
        (weight, indices, -1 if padding_idx is None else padding_idx % weight.shape[0]),
        {k: v for k, v in rest.items() if k == "scale_grad_by_freq"},
    ),
    "einsum": lambda tensors, equation: ("aten.einsum.default", (equation, list(tensors)), {}),
    "where": lambda x, condition, other: ("aten.where.self", (condition, x, other), {}),
    **{f"nn.functional.{n}": _pool(n) for n in ("max_pool1d", "max_pool2d", "max_pool3d")},
    **{f"nn.functional.{n}": _loss(n) for n in _ELEMENTWISE_LOSSES},
    "nn.functional.nll_loss": _loss("nll_loss_nd"),
}

# Draw random numbers, or return what depends on uninitialised memory.
_SKIPPED = frozenset(
    ("empty", "new_empty", "empty_like", "rrelu", "dropout", "alpha_dropout", "rand_like", "randn_like", "bernoulli")
)


def _resolved(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sample:
    overload = torch._C._jit_resolve_packet(f"aten::{name}", *args, **kwargs)
    return f"aten.{name}.{overload}", tuple(args), dict(kwargs)


def op_samples(per_op: int = 24) -> Iterator[Sample]:
    """Samples of every op of torch's database that has a rule, in float64 and with sizes that 2 and 3 divide."""
    sizes = {"S": 6, "M": 12, "L": 24, "XS": 3}
    # Samples are seeded one by one, and each time devices that were never used put the seed off, with a formatted stack;
    # and each looks through the whole stack for a unittest.TestCase.
    asides = [mock.patch.object(device, "manual_seed_all", _nothing) for device in (torch.cuda, torch.xpu, torch.mtia)]
    asides.append(mock.patch.object(common_utils, "extract_test_fn", _nothing))
    with contextlib.ExitStack() as patches:
        for patch in (mock.patch.multiple(invocations, **sizes), *asides):
            patches.enter_context(patch)
        for info in invocations.op_db:
            yield from _samples(info, per_op)


def _nothing(*_: Any) -> None:
    pass


def _samples(info: Any, per_op: int) -> Iterator[Sample]:
    name = info.name.removeprefix("nn.functional.")
    packet = name.replace("special.", "special_").replace("linalg.", "linalg_")
    if packet in _SKIPPED or torch.float64 not in info.dtypes:
        return
    if info.name not in _ADAPTERS and not hasattr(torch.ops.aten, packet):
        return
    taken = 0
    for sample in _drawn(info):
        try:
            if info.name in _ADAPTERS:
                case = _ADAPTERS[info.name](sample.input, *sample.args, **sample.kwargs)
            else:
                case = _resolved(packet, (sample.input, *sample.args), sample.kwargs)
            if DEFAULT.find(case[0]) is None:
                continue
            graph, values = one_op_graph(*case)
            usable = not case[2].get("dropout_p") and all(
                v.layout == torch.strided and not v.is_complex() and 0 < v.numel() < 40_000 for v in values
            )
        except Exception:
            continue  # what torch's own call does before the operator; not ours to check
        if usable:
            yield case
            taken += 1
        if taken == per_op:
            return


def _drawn(info: Any) -> Iterator[Any]:
    try:
        yield from info.sample_inputs("cpu", torch.float64, requires_grad=info.supports_autograd)
    except Exception:
        return  # a generator that cannot do with other sizes


_UNARY = """absolute arccos arccosh arcsin arcsinh arctan arctanh negative fix log_sigmoid
    special_digamma special_erf special_erfc special_erfinv special_exp2 special_expit special_expm1 special_gammaln
    special_i0 special_log1p special_logit special_psi special_round special_sinc alias detach zero lift_fresh_copy
"""
_BINARY = """multiply divide subtract arctan2 greater greater_equal less less_equal not_equal special_xlogy
    type_as"""
_BITWISE = ("__and__", "__or__", "__xor__", "__lshift__", "__rshift__")


def generated_samples() -> Iterator[Sample]:
    """Cases for ops with a rule for which the database has no sample that splits."""

    def rand(*shape: int) -> torch.Tensor:
        return (torch.rand(*shape, dtype=torch.float64) * 0.8 + 0.1).requires_grad_()

    def whole(limit: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, limit, shape)

    for name in _UNARY.split():
        yield _resolved(name, (rand(6, 4) + (1.0 if name == "arccosh" else 0.0),), {})
    for name in _BINARY.split():
        for shape in ((6, 4), (6, 1), (4,)):
            yield _resolved(name, (rand(6, 4), rand(*shape)), {})
    for name in _BITWISE:
        yield _resolved(name, (whole(8, 6, 4), whole(3, 6, 1)), {})
    yield _resolved("bitwise_not", (whole(8, 6, 4),), {})
    for name in ("_softmax", "_log_softmax"):
        yield _resolved(name, (rand(6, 4), 0, False), {})
    yield _resolved("_safe_softmax", (rand(6, 4), 1), {})
    yield _resolved("_to_copy", (rand(6, 4),), {"dtype": torch.float32})
    yield _resolved("_prelu_kernel", (rand(6, 4), rand(1, 4)), {})
    yield _resolved("_unsafe_view", (rand(6, 4), [2, 3, 4]), {})
    for name, spatial in (("adaptive_max_pool", (4,)), ("adaptive_max_pool", (4, 6)), ("adaptive_max_pool", (4, 4, 4))):
        yield _resolved(f"{name}{len(spatial)}d", (rand(2, 6, *spatial), [2] * len(spatial)), {})
    for n in (1, 2, 3):
        yield _resolved(f"max_pool{n}d_with_indices", (rand(2, 6, *[4] * n), [2] * n), {})
        if n < 3:
            yield _resolved(f"upsample_nearest{n}d", (rand(2, 6, *[4] * n), [8] * n), {})
    yield _resolved("upsample_bilinear2d", (rand(2, 6, 4, 4), [8, 8], False), {})
    yield _resolved("_adaptive_avg_pool2d", (rand(2, 6, 4, 4), [2, 2]), {})
    for name in ("concat", "concatenate"):
        yield _resolved(name, ([rand(6, 4), rand(6, 4)], 1), {})
    yield _resolved("adjoint", (rand(2, 6, 4),), {})
    yield _resolved("numpy_T", (rand(2, 6, 4),), {})
    yield _resolved("moveaxis", (rand(2, 6, 4), 0, 2), {})
    yield _resolved("swapaxes", (rand(2, 6, 4), 0, 2), {})
    yield _resolved("ger", (rand(6), rand(4)), {})
    yield _resolved("linalg_vector_norm", (rand(6, 4), 2, [1]), {})
    yield _resolved("view_as_complex", (rand(6, 4, 2),), {})
    yield _resolved("view_as_real", (torch.view_as_complex(rand(6, 4, 2).detach()).requires_grad_(),), {})
    for name, size in (("linear1d", 1), ("bicubic2d", 2), ("nearest3d", 3), ("trilinear3d", 3)):
        arguments = (rand(2, 6, *[4] * size), [8] * size) + (() if name == "nearest3d" else (False,))
        yield _resolved(f"upsample_{name}", arguments, {})
    yield "aten.upsample_nearest2d.vec", (rand(2, 6, 4, 4), None, [2.0, 2.0]), {}
    yield "aten.feature_dropout.default", (rand(6, 4, 2), 0.5, False), {}
    for name, count in (("rnn_tanh", 1), ("rnn_relu", 1), ("gru", 3), ("lstm", 4)):
        weights = [rand(4 * count, 6), rand(4 * count, 4), rand(4 * count), rand(4 * count)]
        states = [rand(1, 6, 4), rand(1, 6, 4)] if name == "lstm" else rand(1, 6, 4)
        for first in (True, False):
            yield f"aten.{name}.input", (rand(6, 6, 6), states, weights, True, 1, 0.0, True, False, first), {}
    for name in ("dropout", "alpha_dropout", "native_dropout"):
        yield _resolved(name, (rand(6, 4), 0.5, False), {})
    for training in (True, False):
        statistics = (None, None) if training else (rand(6).detach(), rand(6).detach())
        yield "aten.instance_norm.default", (
            rand(2, 6, 4), rand(6), rand(6), *statistics, training, 0.1, 1e-5, False,
        ), {}  # fmt: skip
    for reduction in (0, 2):
        yield _resolved("cross_entropy_loss", (rand(6, 4), whole(4, 6), None, reduction), {})
        yield _resolved("nll_loss_nd", (rand(6, 4, 2), whole(4, 6, 2), None, reduction), {})
    yield _resolved("poisson_nll_loss", (rand(6, 4), rand(6, 4), True, False, 1e-8, 1), {})
    yield _resolved("one_hot", (whole(4, 6, 4), 4), {})
    yield from _index_samples(rand, whole)
    for dtype in (torch.int64, torch.float64):
        target = whole(4, 6) if dtype == torch.int64 else rand(6, 4).detach()
        yield "autopar.target_count", (target,), {}
        yield "autopar.target_count", (target, rand(4).detach()), {}
        yield "autopar.cross_entropy_sum", (rand(6, 12), whole(12, 6), None, 3, 0.1), {}
    yield "autopar.target_count", (whole(4, 6, 2), None, 1), {}
    yield "autopar.nll_loss_sum", (rand(6, 12), whole(12, 6), rand(12).detach(), 3), {}
    yield "autopar.cross_entropy_sum", (rand(6, 12, 4), whole(12, 6, 4), None, 5, 0.0), {}
    yield "autopar.cross_entropy_sum", (rand(12), whole(12), None, -100, 0.2), {}
    for padding in (-1, 0, 5, 11):
        yield "aten.embedding.default", (rand(12, 4), whole(12, 6, 2), padding), {}
    for shape in ((6, 6), (6, 12)):
        query, key = rand(2, 4, shape[0], 8), rand(2, 4, shape[1], 8)
        yield "aten.scaled_dot_product_attention.default", (query, key, rand(2, 4, shape[1], 6), None, 0.0, True), {}
    grouped = (rand(2, 12, 6, 8), rand(2, 6, 6, 8), rand(2, 6, 6, 8), None, 0.0, True)
    yield "aten.scaled_dot_product_attention.default", grouped, {"enable_gqa": True}
    mask = torch.rand(2, 1, 6, 6) > 0.3
    yield "aten.scaled_dot_product_attention.default", (*(rand(2, 4, 6, 8) for _ in range(3)), mask | mask.mT), {}


def _index_samples(rand: Callable[..., torch.Tensor], whole: Callable[..., torch.Tensor]) -> Iterator[Sample]:
    """self[indices] with indices in one place and in several, broadcast, together and apart."""
    for indices in (
        [whole(6, 4)],
        [None, whole(4, 6)],
        [whole(6, 6, 1), whole(4, 2)],
        [whole(6, 6), None, whole(2, 6)],
        [None, whole(4, 6, 4), whole(2, 6, 4)],
    ):
        yield "aten.index.Tensor", (rand(6, 4, 2), indices), {}
