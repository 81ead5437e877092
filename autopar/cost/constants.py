"""Constants of the cost model, by hardware kind and by software stack: the only place that has any.

They describe accelerators that compute asynchronously and were not probed (measured rates and links take precedence;
CPUs use none of this beyond the defaults). Those marked "fit" are fitted by benchmarks/fit_published.py on published
training runs; the others have their source beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..cluster.spec import Cluster


@dataclass(frozen=True, slots=True)
class Constants:
    """Hardware.

    multiprocessors: units among which the tiles of a product are dealt out. matmul_share: of the peak, inside full
        waves of tiles. matmul_setup_s: of one product, to fill and drain the units. unaligned_share: what is left of
        the rate where a dim is no multiple of 8 elements. convolution_share: of the peak.
    attention_share, attention_backward_share: of the peak, for long sequences. attention_half_length: sequence length
        at which half of it is reached. stream_share: of the nominal memory bandwidth. kernel_s: least time of a kernel
        on the device.

    Software.

    launch_s, backward_launch_s: host time per kernel, forward and backward; 0: the device's own. collective_launch_s:
        host time of a collective. fusion: share of the elementwise traffic that is left after kernels are fused.
    overlap, gather_overlap, tensor_overlap: share of a gradient reduction, of a ZeRO gather and of a model-axis
        collective that hides behind compute. The rest is what the transfer costs the compute beside it.
    microbatch_s, step_s: host time per microbatch, and per step: data loading, logging, zeroing of gradients.
    optimizer_passes: reads and writes of a float32 parameter by the optimizer step, of which AdamW needs 7.
    gradient_element_bytes: of the gradients that are reduced over data; 0: the computing type's.
    """

    multiprocessors: int = 108
    matmul_share: float = 0.85
    matmul_setup_s: float = 3e-6
    unaligned_share: float = 0.7
    convolution_share: float = 0.55
    attention_share: float = 0.6
    attention_backward_share: float = 0.5
    attention_half_length: float = 300.0
    stream_share: float = 0.8
    kernel_s: float = 2e-6
    link_share: float = 0.8
    network_share: float = 0.8
    collective_s: float = 20e-6

    launch_s: float = 0.0
    backward_launch_s: float = 0.0
    collective_launch_s: float = 20e-6
    fusion: float = 1.0
    overlap: float = 0.8
    gather_overlap: float = 0.8
    tensor_overlap: float = 0.0
    microbatch_s: float = 0.0
    step_s: float = 0.0
    optimizer_passes: float = 7.0
    gradient_element_bytes: int = 0


_HARDWARE: Mapping[str, Mapping[str, float]] = {}
_SOFTWARE: Mapping[str, Mapping[str, float]] = {}

SOFTWARE = tuple(_SOFTWARE)


def constants_of(cluster: Cluster) -> Constants:
    return Constants()
