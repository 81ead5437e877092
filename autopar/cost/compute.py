"""Seconds of kernels on a device, from measured rates where there are some, else from a roofline with its constants.

On devices that compute asynchronously the host dispatches ahead: a kernel has device seconds here, and its launch costs
the host (`host_s`); cost/block.py takes the longer of the two sums, block by block. On others the two add up, op by op.
Ignored: kernels that overlap one another, and caches beyond what measured rates show.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..cluster.rates import FLOP_CLASSES, OPTIMIZER_PASSES, rate_key
from ..cluster.spec import Device
from .constants import Constants
from .corrections import Corrections
from .kernels import Kernel
from .products import product_s

# Normalisations and softmax read their row twice; scattered rows use part of each memory transaction. Both are shares
# of the stream rate, assumed until they are measured.
_SHARE_OF_STREAM: Mapping[str, float] = {"softmax": 0.7, "norm": 0.7, "reduction": 0.7, "gather": 0.5, "loss": 0.6}
# Classes that compilers and hand-written kernels fuse with their neighbours.
_FUSED = frozenset({"pointwise", "transcendental", "gelu", "norm", "dropout", "copy", "reduction", "softmax"})
# A view is dispatched, but launches nothing: a third of the time, as profiles of eager torch show.
_VIEW = 0.3
# FlashAttention-2's backward does 2.5 times the forward's flops (Dao, 2023, section 3.1.2).
_ATTENTION_BACKWARD_FLOPS = 2.5


def kernel_s(device: Device, kernel: Kernel, backward: bool, corrections: Corrections, constants: Constants) -> float:
    """Seconds of one kernel on the device. backward: it runs in the backward pass. Launches count where the device
    does not compute asynchronously."""
    work_s = 0.0
    if kernel.amount > 0:
        rate = measured_rate(device, kernel)
        work_s = kernel.amount / rate if rate else roofline_s(device, kernel, constants)
    if not device.asynchronous:
        work_s += (device.backward_launch_s if backward else device.launch_s) * kernel.launches
    return work_s * corrections.seconds(kernel.compute_class, backward)


def host_s(device: Device, kernels: Iterable[Kernel], backward: bool, constants: Constants) -> float:
    """Seconds of the host to launch these on a device that computes asynchronously."""
    if not device.asynchronous:
        return 0.0
    own = device.backward_launch_s if backward else device.launch_s
    each_s = (constants.backward_launch_s if backward else constants.launch_s) or own
    return each_s * sum(kernel.launches * (_VIEW if kernel.compute_class == "view" else 1.0) for kernel in kernels)


def seconds_by_class(
    device: Device, kernels: Iterable[Kernel], backward: bool, corrections: Corrections, constants: Constants
) -> dict[str, float]:
    found: dict[str, float] = {}
    for kernel in kernels:
        seconds = kernel_s(device, kernel, backward, corrections, constants)
        found[kernel.compute_class] = found.get(kernel.compute_class, 0.0) + seconds
    return found


def optimizer_s(
    device: Device, parameters: Mapping[float, int], corrections: Corrections, constants: Constants
) -> float:
    """Seconds of an AdamW step over float32 parameter tensors. parameters: how many there are of each local size (bytes)."""
    passes = constants.optimizer_passes if device.asynchronous else float(OPTIMIZER_PASSES)
    return sum(
        count
        * kernel_s(
            device, Kernel("optimizer", passes * size, passes * size, "", launches=0), False, corrections, constants
        )
        for size, count in parameters.items()
        if size
    )


def measured_rate(device: Device, kernel: Kernel) -> float:
    """Units per second where the device has a curve, else 0."""
    if not device.rates:
        return 0.0
    keys = [rate_key(kernel.compute_class, kernel.dtype, kernel.adjoint)]
    if kernel.adjoint and kernel.compute_class != "attention":
        keys.append(rate_key(kernel.compute_class, kernel.dtype))
    if kernel.compute_class == "gelu":
        keys.append(rate_key("transcendental", backward=kernel.adjoint))
    for key in keys:
        if key in device.rates:
            return device.rates[key].at(kernel.at)
    return 0.0


def roofline_s(device: Device, kernel: Kernel, constants: Constants) -> float:
    """Seconds by a data sheet and the constants: the longer of computing and of moving the bytes."""
    stream = device.memory_bytes_per_s * constants.stream_share
    if kernel.compute_class not in FLOP_CLASSES:
        share = _SHARE_OF_STREAM.get(kernel.compute_class, 1.0)
        if kernel.compute_class in _FUSED:
            share /= constants.fusion
        return kernel.amount / (stream * share) + _least_s(device, kernel, constants)
    peak = device.flops_per_s.get(kernel.dtype, device.flops_per_s["float32"])
    moved_s = kernel.moved_bytes / stream
    if kernel.compute_class == "attention":
        return max(_attention_s(kernel, peak, constants), moved_s) + _least_s(device, kernel, constants)
    if kernel.compute_class == "matmul" and kernel.shape and device.asynchronous:
        share = kernel.amount / max(1.0, 2.0 * _numel(kernel.shape))
        return max(product_s(*kernel.shape, peak, constants) * share, moved_s)
    share = constants.matmul_share if kernel.compute_class == "matmul" else constants.convolution_share
    return max(kernel.amount / (peak * share), moved_s) + _least_s(device, kernel, constants)


def _least_s(device: Device, kernel: Kernel, constants: Constants) -> float:
    return constants.kernel_s * kernel.launches if device.asynchronous else 0.0


def _numel(shape: tuple[int, ...]) -> float:
    product = 1.0
    for size in shape:
        product *= size
    return product


def _attention_s(kernel: Kernel, peak: float, constants: Constants) -> float:
    """Fused attention: slower on short sequences, whose blocks are few, and on narrow heads."""
    share = constants.attention_backward_share if kernel.adjoint else constants.attention_share
    share *= constants.attention_scale
    if kernel.shape:
        length, width = kernel.shape[-2:]
        share *= length / (length + constants.attention_half_length) * width / (width + constants.attention_half_width)
    flops = kernel.amount * (_ATTENTION_BACKWARD_FLOPS if kernel.adjoint else 1.0)
    return flops / (peak * share)
