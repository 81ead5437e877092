"""Seconds of kernels on a device: amount / rate + launch, from measured rates where there are some, else a roofline.

On devices that compute asynchronously the host dispatches ahead, so an op takes the longer of its launch and its work;
on others the two add up. Ignored: kernels that overlap one another, and caches beyond what the rates' sizes show.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from ..cluster.rates import FLOP_CLASSES, rate_key
from ..cluster.spec import Device
from .corrections import Corrections
from .kernels import Kernel

# Achieved share of the peak of a dense product on large shapes: cuBLAS reaches 70 to 85% of the A100's and H100's
# tensor peak (S. Williams et al., "Roofline", gives the model; NVIDIA's "Matrix multiplication background" the shapes).
_MATMUL_EFFICIENCY = 0.75
_CONVOLUTION_EFFICIENCY = 0.55
# FlashAttention-2 (Dao, 2023, section 4.1): up to 73% of the A100's peak forward and 63% backward on long sequences,
# about half of that at lengths of one or two thousand with a causal mask. Its backward does 2.5 times the forward's
# flops.
_ATTENTION_EFFICIENCY = 0.4
_ATTENTION_BACKWARD_FLOPS = 2.5
# BabelStream reaches 80 to 90% of nominal bandwidth on data-centre GPUs (Deakin et al., 2018).
_STREAM_EFFICIENCY = 0.8
# Normalisations and softmax read their row twice; scattered rows use part of each memory transaction. Both are shares
# of the stream rate, assumed until they are measured.
_SHARE_OF_STREAM: Mapping[str, float] = {"softmax": 0.7, "norm": 0.7, "reduction": 0.7, "gather": 0.5, "loss": 0.6}

# Work below which a kernel cannot fill the device: half the peak rate at this many seconds of peak work. The order of
# one wave of thread blocks on a GPU.
_HALF_RATE_S = 5e-6


def kernel_s(device: Device, kernel: Kernel, backward: bool, corrections: Corrections) -> float:
    """Seconds of one kernel, launches included. backward: it runs in the backward pass."""
    launch_s = (device.backward_launch_s if backward else device.launch_s) * kernel.launches
    work_s = kernel.amount / _rate(device, kernel) if kernel.amount > 0 else 0.0
    total_s = max(launch_s, work_s) if device.asynchronous else launch_s + work_s
    return total_s * corrections.seconds(kernel.compute_class, backward)


def seconds_by_class(
    device: Device, kernels: Iterable[Kernel], backward: bool, corrections: Corrections
) -> dict[str, float]:
    found: dict[str, float] = {}
    for kernel in kernels:
        seconds = kernel_s(device, kernel, backward, corrections)
        found[kernel.compute_class] = found.get(kernel.compute_class, 0.0) + seconds
    return found


def optimizer_s(device: Device, parameter_bytes: Iterable[float], corrections: Corrections) -> float:
    """Seconds of an AdamW step over parameter tensors of these local sizes (their optimizer state is float32)."""
    # A deep model has few distinct sizes.
    return sum(
        count * kernel_s(device, Kernel("optimizer", 7.0 * size, 7.0 * size, "", launches=0), False, corrections)
        for size, count in Counter(parameter_bytes).items()
        if size
    )


def _rate(device: Device, kernel: Kernel) -> float:
    """Units per second, measured where the device has a curve for it."""
    keys = [rate_key(kernel.compute_class, kernel.dtype, kernel.adjoint)]
    if kernel.adjoint and kernel.compute_class != "attention":
        keys.append(rate_key(kernel.compute_class, kernel.dtype))
    if kernel.compute_class == "gelu":
        keys.append(rate_key("transcendental", backward=kernel.adjoint))
    for key in keys:
        if key in device.rates:
            return device.rates[key].at(kernel.at)
    return roofline(device, kernel)


def roofline(device: Device, kernel: Kernel) -> float:
    """The rate that a data sheet and published efficiencies give."""
    if kernel.compute_class not in FLOP_CLASSES:
        share = _SHARE_OF_STREAM.get(kernel.compute_class, 1.0)
        return device.memory_bytes_per_s * _STREAM_EFFICIENCY * share
    peak = device.flops_per_s.get(kernel.dtype, device.flops_per_s["float32"])
    if kernel.compute_class == "attention":
        rate = peak * _ATTENTION_EFFICIENCY
        return rate / _ATTENTION_BACKWARD_FLOPS if kernel.adjoint else rate
    rate = peak * (_MATMUL_EFFICIENCY if kernel.compute_class == "matmul" else _CONVOLUTION_EFFICIENCY)
    if device.asynchronous:
        rate *= kernel.at / (kernel.at + peak * _HALF_RATE_S)
    if kernel.moved_bytes:
        rate = min(rate, kernel.amount * device.memory_bytes_per_s * _STREAM_EFFICIENCY / kernel.moved_bytes)
    return rate
