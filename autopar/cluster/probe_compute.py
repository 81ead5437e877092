"""Rates of the compute classes of cluster/rates.py on this device, measured the way that training uses it.

Each class runs as a chain under autograd whose outputs together exceed the caches. So an op finds its input in the
cache when the op before has just made it, but writes its output to memory that has not been touched for long, and the
backward finds its gradient in the cache but not the values that the forward saved: all as in training, where a step
touches far more memory than caches hold. Timing one op again and again would measure the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .rates import OPTIMIZER_PASSES, rate_key
from .spec import Curve

# A chain's outputs together: about the last-level cache of today's CPUs, which all ranks of a host share. Short of that
# only for the smallest tensors, whose models live in the cache as well.
CHAIN_BYTES = 32 << 20
# On a device so slow that one sample takes this long, one or two must do.
_SLOW_S = 0.3
MAX_DEPTH = 32

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Sampler:
    """Times callables on one device. `together` brings the ranks in step, so that they compete as they do in training.

    clock: seconds, as time.perf_counter.
    """

    device: torch.device
    clock: Callable[[], float]
    together: Callable[[], None]
    sample_s: float = 0.02

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds_once(self, call: Callable[[], object]) -> float:
        return self._timed(call)[0]

    def _timed(self, call: Callable[[], object]) -> tuple[float, object]:
        self.synchronize()
        start = self.clock()
        value = call()
        self.synchronize()
        return self.clock() - start, value

    def pair(self, forward: Callable[[], object], backward: Callable[[object], object]) -> tuple[float, float]:
        """Lower quartiles of (forward, backward), run alternately; backward gets what forward returned."""
        forwards: list[float] = []
        backwards: list[float] = []
        spent = 0.0
        self.together()
        for repeat in range(12):
            forward_s, value = self._timed(forward)
            backward_s, _ = self._timed(lambda value=value: backward(value))
            del value
            if repeat == 0 and forward_s + backward_s < _SLOW_S:
                continue
            forwards.append(forward_s)
            backwards.append(backward_s)
            spent += forward_s + backward_s
            if spent > self.sample_s and (len(forwards) >= 3 or spent > _SLOW_S):
                break
        return lower_quartile(forwards), lower_quartile(backwards)

    def chain(self, op: Callable[[Tensor], Tensor], start: Tensor, depth: int) -> tuple[float, float]:
        """Seconds per op, forward and backward, of `op` applied `depth` times to `start`, with its gradient."""

        def forward() -> Tensor:
            value = start
            for _ in range(depth):
                value = op(value)
            return value

        def backward(value: Tensor) -> None:
            torch.autograd.backward(value, torch.ones_like(value))

        forward_s, backward_s = self.pair(forward, backward)
        return forward_s / depth, backward_s / depth


def lower_quartile(samples: list[float]) -> float:
    return sorted(samples)[len(samples) // 4]


@dataclass(frozen=True)
class ComputeProbe:
    """What was measured: rates by `rate_key`, launch costs, best matmul rate by dtype, bandwidth of large tensors."""

    rates: dict[str, Curve]
    launch_s: float
    backward_launch_s: float
    flops_per_s: dict[str, float]
    memory_bytes_per_s: float


def probe_compute(sampler: Sampler) -> ComputeProbe:
    """Measure every class on `sampler.device`; a few seconds."""
    cuda = sampler.device.type == "cuda"
    launch_s, backward_launch_s = _launch(sampler)
    rates: dict[str, Curve] = {}
    flops_per_s: dict[str, float] = {}

    def record(name: str, dtype: str, points: Iterator[tuple[float, float, float, float]]) -> None:
        """points: (size, forward_s, backward size, backward_s); backward size 0 where there is none."""
        forward: Points = []
        backward: Points = []
        for size, forward_s, backward_size, backward_s in points:
            forward.append((size, size / _net(forward_s, launch_s, cuda)))
            if backward_size:
                backward.append((backward_size, backward_size / _net(backward_s, backward_launch_s, cuda)))
        rates[rate_key(name, dtype)] = Curve(tuple(sorted(forward)))
        if backward:
            rates[rate_key(name, dtype, backward=True)] = Curve(tuple(sorted(backward)))

    dtypes = [torch.float32, torch.bfloat16, torch.float16] if cuda else [torch.float32, torch.bfloat16]
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        record("matmul", name, _matmul(sampler, dtype))
        flops_per_s[name] = max(rate for _, rate in rates[rate_key("matmul", name)].points)
        if cuda or dtype is torch.float32:
            record("attention", name, _attention(sampler, dtype))
            record("convolution", name, _convolution(sampler, dtype))
    for name, points in _memory_classes(sampler):
        record(name, "", points)
    record("optimizer", "", _optimizer(sampler))
    large = max(rate for size, rate in rates["pointwise"].points if size > CHAIN_BYTES)
    return ComputeProbe(rates, launch_s, backward_launch_s, flops_per_s, large)


def _net(seconds: float, launch_s: float, asynchronous: bool) -> float:
    """Time net of launch. Never below a tenth of what was measured: the launch cost is itself an average over ops."""
    return seconds if asynchronous else max(seconds - launch_s, seconds / 10)


def _launch(sampler: Sampler) -> tuple[float, float]:
    """Seconds per small op of the kinds that models consist of, forward and backward; on GPUs without synchronising.

    In the forward each run of small ops follows an op that pushes code and data out of the inner caches, as a model's
    large ops do: small ops alone, again and again, take a third of what they take in a model. The backward is one call,
    so it is timed alone and scaled by what that made of the forward.
    """
    weight = torch.randn(8, 8, device=sampler.device, requires_grad=True)
    start = torch.randn(4, 8, device=sampler.device, requires_grad=True)
    large = torch.randn(1 << 19, device=sampler.device)
    rounds, ops = 10, 7

    def small(value: Tensor) -> Tensor:
        value = F.linear(value, weight)
        value = value.view(2, 2, 8).transpose(0, 1)
        value = torch.cat((value[..., 4:], value[..., :4]), -1)
        return (value + 1.0).reshape(4, 8)

    def alone() -> Tensor:
        value = start
        for _ in range(rounds):
            value = small(value)
        return value.sum()

    alone_forward_s, alone_backward_s = sampler.pair(alone, lambda value: value.backward())
    between = []
    value = start
    for _ in range(4 * rounds):
        large.mul_(1.0)
        begin = sampler.clock()
        value = small(value)
        between.append(sampler.clock() - begin)
    launch_s = max(lower_quartile(between), alone_forward_s / rounds) / ops
    return launch_s, launch_s * alone_backward_s / alone_forward_s


def _matmul(sampler: Sampler, dtype: torch.dtype) -> Iterator[tuple[float, float, float, float]]:
    """Up and down projections of tokens, as in a feed-forward block; hidden sizes that are no powers of two, because
    those meet cache conflicts on CPUs that few models have."""
    sizes = [(32, 32, 96), (256, 96, 256), (1024, 160, 480), (2048, 320, 864)]
    if sampler.device.type == "cuda":
        sizes = [*sizes, (4096, 1024, 4096), (8192, 4096, 14336)]
    elif dtype is not torch.float32:
        sizes = sizes[:3]
    for tokens, hidden, inner in sizes:
        make = {"device": sampler.device, "dtype": dtype}
        start = torch.randn(2, tokens // 2, hidden, **make).requires_grad_()
        up = (torch.randn(inner, hidden, **make) / hidden**0.5).requires_grad_()
        down = (torch.randn(hidden, inner, **make) / inner**0.5).requires_grad_()
        forward_s, backward_s = sampler.chain(lambda x, up=up, down=down: F.linear(F.linear(x, up), down), start, 1)
        flops = 2.0 * tokens * hidden * inner
        yield flops, forward_s / 2, flops, backward_s / 4


def _attention(sampler: Sampler, dtype: torch.dtype) -> Iterator[tuple[float, float, float, float]]:
    """Causal self-attention, head size 64, laid out [B, S, H, D] and transposed, as projections give it."""
    head_dim = 64
    for length, rows, heads in [(64, 16, 4), (256, 4, 4), (1024, 1, 2)]:
        if sampler.device.type == "cuda":
            rows, heads, length = rows * 8, heads * 4, length * 2
        make = {"device": sampler.device, "dtype": dtype}
        parts = [torch.randn(rows, length, heads, head_dim, **make).requires_grad_() for _ in range(3)]

        def forward(parts=parts) -> Tensor:
            query, key, value = (part.transpose(1, 2) for part in parts)
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)

        forward_s, backward_s = sampler.pair(forward, lambda out: torch.autograd.backward(out, torch.ones_like(out)))
        head_flops = 2.0 * length * length * head_dim
        share = 1 / (rows * heads)
        yield head_flops, forward_s * share, head_flops, backward_s * share


def _convolution(sampler: Sampler, dtype: torch.dtype) -> Iterator[tuple[float, float, float, float]]:
    for rows, channels, size in [(4, 16, 16), (8, 32, 32)]:
        make = {"device": sampler.device, "dtype": dtype}
        start = torch.randn(rows, channels, size, size, **make).requires_grad_()
        weight = (torch.randn(channels, channels, 3, 3, **make) / (3 * channels**0.5)).requires_grad_()
        forward_s, backward_s = sampler.chain(lambda x, w=weight: F.conv2d(x, w, padding=1), start, 2)
        flops = 2.0 * start.numel() * channels * 9
        yield flops, forward_s, flops, backward_s / 2


def _memory_classes(sampler: Sampler) -> Iterator[tuple[str, Iterator[tuple[float, float, float, float]]]]:
    """(class, points) of the classes counted in bytes."""
    widths = [(64, 256), (1024, 256), (4096, 480)]
    if sampler.device.type == "cuda":
        widths = [*widths, (8192, 1024), (16384, 4096)]

    def depth_of(size: int) -> int:
        return max(2, min(MAX_DEPTH, CHAIN_BYTES // size))

    def elementwise(
        make_op: Callable[[Tensor], Callable[[Tensor], Tensor]],
        forward_n: float,
        backward_n: float,
        larger: tuple[tuple[int, int], ...] = (),
    ):
        for tokens, width in (*widths, *larger):
            start = torch.randn(tokens, width, device=sampler.device).requires_grad_()
            size = start.numel() * start.element_size()
            forward_s, backward_s = sampler.chain(make_op(start), start, depth_of(size))
            yield forward_n * size, forward_s, backward_n * size, backward_s

    def multiply(start: Tensor) -> Callable[[Tensor], Tensor]:
        factor = torch.randn_like(start)
        return lambda x: x * factor

    def reductions():
        for tokens, width in widths:
            size = 4 * tokens * width
            parts = [torch.randn(tokens, width, device=sampler.device).requires_grad_() for _ in range(depth_of(size))]

            def backward(means: list[Tensor], parts: list[Tensor] = parts) -> None:
                for part in parts:
                    part.grad = None
                torch.autograd.backward(means, [torch.ones_like(m) for m in means])

            forward_s, backward_s = sampler.pair(lambda p=parts: [part.mean(-1, keepdim=True) for part in p], backward)
            yield size, forward_s / len(parts), size, backward_s / len(parts)

    def normalize(start: Tensor) -> Callable[[Tensor], Tensor]:
        weight = torch.ones(start.shape[-1], device=sampler.device, requires_grad=True)
        bias = torch.zeros(start.shape[-1], device=sampler.device, requires_grad=True)
        return lambda x: F.layer_norm(x, weight.shape, weight, bias)

    def relayout(start: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: x.view(2, -1, 8, x.shape[-1] // 8).transpose(1, 2).contiguous().view(x.shape)

    mask_share = 1.0 if sampler.device.type == "cuda" else 4.0
    # The C library maps an allocation above 32 MiB anew each time, and its pages fault; below, it reuses memory.
    yield "pointwise", elementwise(multiply, 3, 3, ((8192, 960), (8192, 1120)))
    yield "transcendental", elementwise(lambda _: F.silu, 2, 3)
    yield "gelu", elementwise(lambda _: lambda x: F.gelu(x, approximate="tanh"), 2, 3)
    yield "softmax", elementwise(lambda _: lambda x: F.softmax(x, -1), 2, 3)
    yield "norm", elementwise(normalize, 2, 3)
    yield "reduction", reductions()
    yield "copy", elementwise(relayout, 2, 0)
    yield "dropout", elementwise(lambda _: lambda x: F.dropout(x, 0.1), 2 + mask_share / 4, 2 + mask_share / 4)
    yield "gather", _gather(sampler)
    yield "loss", _loss(sampler)


def _gather(sampler: Sampler) -> Iterator[tuple[float, float, float, float]]:
    for rows, width, tokens in [(256, 256, 512), (4096, 320, 4096)]:
        table = torch.randn(rows, width, device=sampler.device, requires_grad=True)
        tokens_ids = torch.arange(tokens, device=sampler.device) * 7919 % rows

        def backward(out: Tensor, table: Tensor = table) -> None:
            table.grad = None
            torch.autograd.backward(out, torch.ones_like(out))

        forward_s, backward_s = sampler.pair(lambda i=tokens_ids, t=table: F.embedding(i, t), backward)
        size = 4.0 * tokens * width
        yield 2 * size, forward_s, 2 * size + 4.0 * rows * width, backward_s


def _loss(sampler: Sampler) -> Iterator[tuple[float, float, float, float]]:
    for tokens, classes in [(256, 256), (4096, 256), (512, 8192)]:
        logits = torch.randn(tokens, classes, device=sampler.device, requires_grad=True)
        target = torch.arange(tokens, device=sampler.device) % classes
        forward_s, backward_s = sampler.pair(
            lambda x=logits, y=target: F.cross_entropy(x, y), lambda loss: loss.backward()
        )
        size = 4.0 * tokens * classes
        yield 2 * size, forward_s, 5 * size, backward_s


def _optimizer(sampler: Sampler) -> Iterator[tuple[float, float, float, float]]:
    """torch.optim.AdamW as a user makes it, over several tensors of one size, after a backward has used the caches."""
    sizes = [1 << 10, 1 << 14, 1 << 17, 1 << 20]
    if sampler.device.type == "cuda":
        sizes = [*sizes, 1 << 24]
    ballast = torch.zeros(2 * CHAIN_BYTES // 4, device=sampler.device)
    for numel in sizes:
        count = 32 if numel <= 1 << 14 else 8
        tensors = [torch.randn(numel, device=sampler.device).requires_grad_() for _ in range(count)]
        for tensor in tensors:
            tensor.grad = torch.randn_like(tensor)
        optimizer = torch.optim.AdamW(tensors)
        _, seconds = sampler.pair(lambda: ballast.add_(1.0), lambda _, step=optimizer.step: step())
        seconds /= count
        yield OPTIMIZER_PASSES * 4.0 * numel, seconds, 0, 0.0
