"""Constants of the cost model, by hardware kind and by software stack: the only place that has any.

They describe accelerators that compute asynchronously; measured rates and links of a probe take precedence, and CPUs
use none of them. Those in the tables below are fitted on published training runs by benchmarks/fit_published.py, all
rows of one kind of hardware or software together; the others have their source beside them.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from ..cluster.spec import Cluster


@dataclass(frozen=True, slots=True)
class Constants:
    """Hardware.

    multiprocessors: units among which the tiles of a product are dealt out; 0 where not known. matmul_share: of the
        peak, inside full waves of tiles. matmul_setup_s: of one product, to fill and drain the units; wave_setup_s: of
        each wave of its tiles.
        unaligned_share, half_aligned_share: what is left of the rate where a dim is no multiple of 8, of 64 elements.
        convolution_share: of the peak.
    attention_share, attention_backward_share: of the peak, for long sequences and wide heads; half_length and
        half_width: of the keys and of a head, at which half of it is reached.
    stream_share: of the nominal memory bandwidth. kernel_s: least time of a kernel on the device.
    link_share, network_share: of the nominal bandwidth inside and between hosts that collectives reach.
    collective_s: least time of a collective on the device.

    Software.

    launch_s, backward_launch_s: host time per kernel, forward and backward; 0: the device's own. collective_launch_s:
        host time of a collective. fusion: share of the elementwise traffic that is left after kernels are fused.
    product_scale, attention_scale: factors on the hardware's shares, for slower or faster kernels of the stack.
    overlap, gather_overlap, tensor_overlap: share of a gradient reduction, of a ZeRO gather and of a model-axis
        collective that hides behind compute; the rest is what the transfer costs the compute beside it.
    scatter_sends: whether a boundary that all ranks of a tensor axis hold whole is cut up among them to be sent, and
        gathered where it arrives (Narayanan et al. 2021, section 4.1; DeepSpeed's partitioned pipe messages).
    update_overlap: share of ZeRO 1's and 2's gather of updated parameters that hides.
    fused_loss: whether the cross entropy reads narrow logits as they are and writes their gradient in their place.
    wide_loss: whether the cross entropy else computes on a copy of narrow logits in float32, as under torch.autocast.
    loss_metrics: how often the training loop computes the loss once more of the logits, in float32, for its metrics.
    softmax_multiple, softmax_longest: of which multiple of batch x heads, and up to how many keys (0: any), the stack
        has one kernel for the masked softmax of narrow scores (Megatron-LM, fused_softmax.py, is_kernel_available).
    gathers_ahead: whether in a forward the next block's parameters set out when this block's have come, as on hosts in
        autopar's runtime, or when its turn comes, beside what is still computed.
    scatter_hides: whether ZeRO's scatter of gradients runs beside compute; on hosts fully_shard waits for it.
    scatter_each: with ZeRO 3, whether gradients are scattered after each microbatch, or after the last alone.
    whole_scores: whether attention in float32 with fewer key than query heads keeps its matrix of scores.
    keeps_buffers: without ZeRO, whether the buffers that gradients are summed in stay from step to step.
    slices_at_rest: with ZeRO 1 and 2, whether parameters at rest are slices too, and a step gathers what it computes with.
    pipeline_keeps: whether in a pipeline of several microbatches what ZeRO 3 gathers stays whole to the step's end and
        gradients are summed whole, so that neither travels more than once a step (torchtitan's default of
        `reshard_after_forward`; torch.distributed.pipelining, which defers the reduction to the last microbatch).
    selective_kept: share of products whose results selective recomputation keeps (torchtitan: every other one).
    selective_gathers: whether it does all-gathers again.
    recompute_stops: whether a block that is computed again stops when all is there that its backward reads, and so
        leaves out its last product (torch.utils.checkpoint's early stop, since torch 2.1; dead code to XLA).
    microbatch_s, step_s: host time per microbatch, and per step: data loading, logging, zeroing of gradients.
    optimizer_passes: reads and writes of a float32 parameter by the optimizer step; AdamW needs 7.
    parameter_bytes, gradient_bytes, optimizer_bytes: at rest per parameter where blocks compute in a narrow type.
    narrow_copy: whether a whole copy of the parameters in that type lies beside them (unless ZeRO 3 shards them).
    reduced_bytes: of a gradient element as reduced over data; 0: the computing type's.
    allocator_share: what the caching allocator holds beyond the tensors that come and go, as a share of them.
    context_bytes: of the driver's context, workspaces and communication buffers.
    products_in: what linear layers cast their operands to, "" for nothing.
    """

    # Of hardware, what the kinds that were fitted reach, about: a kind that no run was seen of is taken to be like them.
    multiprocessors: float = 0
    matmul_share: float = 0.68
    matmul_setup_s: float = 3e-6
    wave_setup_s: float = 2e-6
    unaligned_share: float = 0.6
    half_aligned_share: float = 0.75
    convolution_share: float = 0.55
    attention_share: float = 0.6
    attention_backward_share: float = 0.4
    attention_half_length: float = 300.0
    attention_half_width: float = 16.0
    stream_share: float = 0.85
    kernel_s: float = 2e-6
    link_share: float = 0.87
    network_share: float = 0.9
    collective_s: float = 20e-6

    launch_s: float = 0.0
    backward_launch_s: float = 0.0
    collective_launch_s: float = 20e-6
    fusion: float = 1.0
    product_scale: float = 1.0
    attention_scale: float = 1.0
    overlap: float = 1.0
    gather_overlap: float = 1.0
    tensor_overlap: float = 0.0
    update_overlap: float = 0.0
    scatter_sends: bool = False
    fused_loss: bool = False
    wide_loss: bool = True
    loss_metrics: int = 0
    softmax_multiple: int = 1
    softmax_longest: int = 0
    gathers_ahead: bool = False
    scatter_hides: bool = True
    scatter_each: bool = False
    keeps_buffers: bool = True
    whole_scores: bool = False
    slices_at_rest: bool = False
    pipeline_keeps: bool = False
    selective_kept: float = 1.0
    selective_gathers: bool = False
    recompute_stops: bool = True
    microbatch_s: float = 0.0
    step_s: float = 0.0
    optimizer_passes: float = 7.5
    parameter_bytes: float = 4.0
    gradient_bytes: float = 4.0
    optimizer_bytes: float = 8.0
    narrow_copy: bool = True
    reduced_bytes: float = 0.0
    products_in: str = ""
    allocator_share: float = 0.0
    context_bytes: float = 0.0


_A100 = {
    "multiprocessors": 108, "matmul_share": 0.73, "unaligned_share": 0.45, "half_aligned_share": 0.6,
    "attention_share": 0.69, "attention_backward_share": 0.5, "attention_half_length": 275, "stream_share": 0.92,
    "link_share": 0.86, "network_share": 0.85,
}  # fmt: skip
_H100 = {
    "multiprocessors": 132, "matmul_share": 0.6, "half_aligned_share": 0.8, "attention_share": 0.47,
    "attention_backward_share": 0.24, "attention_half_length": 320, "link_share": 0.88,
}  # fmt: skip

# Kinds are matched by the beginning of their name. Multiprocessors: NVIDIA's data sheets.
HARDWARE: Mapping[str, Mapping[str, float]] = {
    "p100": {"multiprocessors": 56, "matmul_share": 0.7},
    "v100": {
        "multiprocessors": 80, "matmul_share": 0.64, "half_aligned_share": 0.75, "stream_share": 0.8, "link_share": 0.89,
    },
    "a100": _A100,
    "a800": _A100,
    "h100": _H100,
    "h100hbm2e": {
        "multiprocessors": 132, "matmul_share": 0.69, "half_aligned_share": 0.8, "attention_share": 0.6,
        "attention_backward_share": 0.28, "attention_half_length": 310, "stream_share": 0.8, "link_share": 0.88,
    },
    "h100pcie": _H100 | {"multiprocessors": 114},
    "h800": _H100,
    "h200": _H100,
    # Of these no published run was fitted: their multiprocessors, and what the kind before them reaches.
    "b200": _H100 | {"multiprocessors": 148},
    "l40s": _A100 | {"multiprocessors": 142},
    "l4": _A100 | {"multiprocessors": 58},
    "a10-": _A100 | {"multiprocessors": 72},
    "rtxa6000": _A100 | {"multiprocessors": 84},
    "rtx3090": _A100 | {"multiprocessors": 82},
    "rtx4090": _A100 | {"multiprocessors": 128},
    "t4": {"multiprocessors": 40, "matmul_share": 0.6},
    "mi250x": {"multiprocessors": 110, "matmul_share": 0.6},
    "mi300x": {"multiprocessors": 304, "matmul_share": 0.55},
}  # fmt: skip

_TORCH_COMPILE = {
    "launch_s": 5e-6, "backward_launch_s": 4e-6, "fusion": 0.9, "product_scale": 1.0, "attention_scale": 0.68,
    "gather_overlap": 1.2, "scatter_each": True, "slices_at_rest": True, "pipeline_keeps": True, "selective_kept": 0.5,
    "selective_gathers": True, "context_bytes": 2e9, "allocator_share": 0.2,
}  # fmt: skip

_TORCH = {
    "launch_s": 10e-6, "backward_launch_s": 8e-6, "fusion": 1.05, "product_scale": 0.97, "attention_scale": 0.87,
    "gather_overlap": 0.96, "scatter_each": True, "slices_at_rest": True, "context_bytes": 2e9,
}  # fmt: skip
_RUNTIME = {
    "scatter_each": True,
    "slices_at_rest": True,
    "wide_loss": False,
    "keeps_buffers": False,
    "whole_scores": True,
}
# The same on hosts, over gloo.
_HOST = {"keeps_buffers": True, "whole_scores": False, "gathers_ahead": True, "scatter_hides": False}

SOFTWARE: Mapping[str, Mapping[str, float | bool | str]] = {
    # autopar's own runtime (eager torch, fully_shard) where the hardware's rates have been measured through torch.
    "": _RUNTIME,
    # The same where they are nominal, the default of presets; and with blocks through torch.compile.
    # What hides of a tensor axis is not fitted but taken to be what Megatron's runs show, who does the same. Compiled
    # blocks do not: their products are not taken apart.
    "autopar": _TORCH | _RUNTIME | {"fusion": 1.5, "optimizer_passes": 9.0, "tensor_overlap": 0.33},
    "autopar-compile": _TORCH | _RUNTIME | {
        "launch_s": 5e-6, "backward_launch_s": 4e-6, "fusion": 0.75, "optimizer_passes": 9.0,
    },
    # Eager torch and fully_shard.
    "torch": _TORCH,
    # Eager torchtitan: its rotary embedding and RMSNorm are several kernels each, with results in float32. What is
    # recomputed, and by which attention kernel, is as under torch.compile.
    "torchtitan": _TORCH_COMPILE | {"launch_s": 10e-6, "backward_launch_s": 8e-6, "fusion": 1.6},
    "torch-compile": _TORCH_COMPILE,
    "torch-compile-async-tp": _TORCH_COMPILE | {"tensor_overlap": 0.3},
    "composer": {
        "launch_s": 12e-6, "backward_launch_s": 8e-6, "fusion": 0.95, "product_scale": 1.02, "attention_scale": 0.68,
        "optimizer_passes": 8.0, "gather_overlap": 0.72, "fused_loss": True, "loss_metrics": 2, "scatter_each": True,
        "context_bytes": 2e9,
    },
    # The same on torch before 2.1.
    "composer-torch1": {
        "launch_s": 12e-6, "backward_launch_s": 8e-6, "fusion": 0.76, "product_scale": 0.965, "attention_scale": 0.68,
        "gather_overlap": 0.75, "fused_loss": True, "loss_metrics": 2, "scatter_each": True, "recompute_stops": False,
        "context_bytes": 2e9,
    },
    "internevo": {
        "launch_s": 12e-6, "backward_launch_s": 8e-6, "fusion": 1.14, "overlap": 0.96, "scatter_each": True,
        "recompute_stops": False,
        # Its optimizer lays the gradients of its part flat, and then in float32, beside master weights and moments
        # (hybrid_zero_optim.py, _step): 12 + 2 + 4.
        "context_bytes": 9e9, "parameter_bytes": 2.0, "gradient_bytes": 2.0, "optimizer_bytes": 18.0,
        "narrow_copy": False,
    },
    # In a backward the collective for the gradient of a product's input runs beside the product for its weight's
    # (Korthikanti et al. 2022, section 4.2.2; Megatron's async_tensor_model_parallel_allreduce): a third of all.
    "megatron": {
        "launch_s": 10e-6, "backward_launch_s": 8e-6, "fusion": 0.8, "product_scale": 1.03, "overlap": 0.0,
        "tensor_overlap": 0.33, "scatter_sends": True,
        "recompute_stops": False, "softmax_multiple": 4, "softmax_longest": 16384,
        "parameter_bytes": 2.0, "gradient_bytes": 2.0, "optimizer_bytes": 12.0, "narrow_copy": False,
    },
    "megatron-deepspeed": {
        "launch_s": 72e-6, "backward_launch_s": 17e-6, "kernel_s": 2.8e-6, "fusion": 0.69, "product_scale": 1.06,
        "collective_s": 2.8e-5, "microbatch_s": 3.6e-4, "step_s": 1e-3, "optimizer_passes": 4.9, "overlap": 0.0,
        "scatter_sends": True, "recompute_stops": False, "softmax_multiple": 4, "softmax_longest": 2048,
        "parameter_bytes": 2.0, "gradient_bytes": 2.0, "optimizer_bytes": 16.0, "narrow_copy": False,
        "context_bytes": 4e9, "allocator_share": 0.15,
    },
    "alpa": {
        "launch_s": 5e-6, "backward_launch_s": 5e-6, "overlap": 0.0, "fusion": 0.92, "product_scale": 0.98,
        "context_bytes": 5e8, "parameter_bytes": 2.0, "gradient_bytes": 2.0, "optimizer_bytes": 12.0,
        "narrow_copy": False,
    },
}  # fmt: skip

# On Hopper, stacks with kernels written for it: its own matrix instructions in attention (cuDNN 9 in Transformer Engine;
# Shah et al. 2024, "FlashAttention-3", figures 5 and 6: 600 to 660 and 500 to 550 of 989 TFLOP/s for long causal
# sequences) and a cuBLAS that knows it (as `h100hbm2e`'s runs had). `_H100` was fitted on a stack that had neither.
_HOPPER = ("h100", "h100pcie", "h800", "h200", "b200")
# autopar's were measured on an H200 with torch 2.11 (benchmarks/records/2026-11-26-one-gpu.md): 766 TFLOP/s in a
# model's products, 567 and 436 in cuDNN's attention over 8192 keys, forward and backward.
_NEW_TORCH = {"matmul_share": 0.82, "attention_share": 0.77, "attention_backward_share": 0.59}
_HOPPER_KERNELS: Mapping[str, Mapping[str, float]] = {
    "autopar": _NEW_TORCH,
    "autopar-compile": _NEW_TORCH,
    "megatron": {"matmul_share": 0.69, "attention_share": 0.7, "attention_backward_share": 0.55},
}

# The same stacks with linear layers in float8 (torchao, Transformer Engine): a suffix of their names.
FLOAT8 = "+float8"


def constants_of(cluster: Cluster) -> Constants:
    """What holds for the cluster's kind of device and its software. ValueError for software that is not known."""
    if not cluster.device.asynchronous:
        return replace(Constants(), **SOFTWARE[""] | _HOST)
    return named_constants(cluster.device.kind, cluster.software)


@lru_cache(maxsize=256)
def named_constants(kind: str, software: str) -> Constants:
    base = software.removesuffix(FLOAT8)
    if base not in SOFTWARE:
        near = difflib.get_close_matches(software, SOFTWARE, 1, 0.3)
        raise ValueError(
            f"software={software!r} is not known; {f'did you mean {near[0]!r}? ' if near else ''}"
            f"Known: {', '.join(map(repr, SOFTWARE))}"
        )
    name = next((name for name in sorted(HARDWARE, key=len, reverse=True) if kind.startswith(name)), "")
    hardware = dict(HARDWARE.get(name, {}))
    if name in _HOPPER:
        hardware |= _HOPPER_KERNELS.get(base, {})
    products_in = {"products_in": "float8"} if base != software else {}
    return replace(Constants(), **hardware, **SOFTWARE[base], **products_in)
