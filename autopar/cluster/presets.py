"""Clusters from published data sheets, for planning without the machine at hand.

Memory is what torch reports on these parts: gibibytes by the number they are sold with, less 1.5% that ECC and the driver
keep (79 GiB of an "80 GB" part). float32 is the rate outside tensor cores, because torch keeps TF32 off for matrix
products by default. Rates are peaks: cost/compute.py applies efficiencies.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from .spec import Cluster, Device, Link


@dataclass(frozen=True, slots=True)
class _Part:
    memory_bytes: float
    memory_bytes_per_s: float
    flops_per_s: Mapping[str, float]
    intra: Link
    inter: Link


# Protocol overhead leaves about 80% of a link's nominal rate: 370 of 450 GB/s on H100 (NCCL's maintainers, nccl-tests
# issue 212). The same share is assumed of PCIe and of networks.
_LINK_EFFICIENCY = 0.8

# Latency of one ring step with the simple protocol: `hwLat` in NCCL's src/graph/tuning.cc.
_NVLINK_LATENCY_S = 3.4e-6
_PCIE_LATENCY_S = 5.7e-6
_NETWORK_LATENCY_S = 14e-6

# Collectives on a stream of their own hide behind compute but for the SMs they take; 0.8 is an assumption.
_OVERLAP = 0.8


def _link(bytes_per_s: float, latency_s: float) -> Link:
    return Link(latency_s, bytes_per_s * _LINK_EFFICIENCY, _OVERLAP)


_PARTS: dict[str, _Part] = {
    # NVIDIA V100 data sheet, SXM2: 15.7 Tflop/s FP32, 125 Tflop/s tensor FP16, 900 GB/s, NVLink 300 GB/s both ways.
    # Network: DGX-1V, 4 x 100 Gb/s EDR for 8 GPUs.
    "v100-16gb": _Part(
        16e9,
        900e9,
        {"float32": 15.7e12, "float16": 125e12},
        _link(150e9, _NVLINK_LATENCY_S),
        _link(6.25e9, _NETWORK_LATENCY_S),
    ),
    "v100-32gb": _Part(
        32e9,
        900e9,
        {"float32": 15.7e12, "float16": 125e12},
        _link(150e9, _NVLINK_LATENCY_S),
        _link(6.25e9, _NETWORK_LATENCY_S),
    ),
    # NVIDIA A100 data sheet, SXM4: 19.5 Tflop/s FP32, 312 Tflop/s dense BF16/FP16, 1,555 and 2,039 GB/s, NVLink 600
    # GB/s both ways. Network: DGX A100, 8 x 200 Gb/s HDR.
    "a100-40gb": _Part(
        40e9,
        1555e9,
        {"float32": 19.5e12, "bfloat16": 312e12, "float16": 312e12},
        _link(300e9, _NVLINK_LATENCY_S),
        _link(25e9, _NETWORK_LATENCY_S),
    ),
    "a100-80gb": _Part(
        80e9,
        2039e9,
        {"float32": 19.5e12, "bfloat16": 312e12, "float16": 312e12},
        _link(300e9, _NVLINK_LATENCY_S),
        _link(25e9, _NETWORK_LATENCY_S),
    ),
    # NVIDIA A800 data sheet: an A100 with NVLink at 400 GB/s both ways.
    "a800-80gb": _Part(
        80e9,
        2039e9,
        {"float32": 19.5e12, "bfloat16": 312e12, "float16": 312e12},
        _link(200e9, _NVLINK_LATENCY_S),
        _link(25e9, _NETWORK_LATENCY_S),
    ),
    # NVIDIA H100 data sheet, SXM5: 67 Tflop/s FP32, 1,979 Tflop/s BF16/FP16 with sparsity (half of it dense), 3.35
    # TB/s, NVLink 900 GB/s both ways. Network: DGX H100, 8 x 400 Gb/s NDR.
    "h100-80gb": _Part(
        80e9,
        3350e9,
        {"float32": 67e12, "bfloat16": 989.5e12, "float16": 989.5e12, "float8": 1979e12},
        _link(450e9, _NVLINK_LATENCY_S),
        _link(50e9, _NETWORK_LATENCY_S),
    ),
    # An H100 with 96 GB of HBM2e at 2.4 TB/s and 500 W (torchtitan's measurements of 2024 name it).
    "h100hbm2e-96gb": _Part(
        96e9,
        2400e9,
        {"float32": 67e12, "bfloat16": 989.5e12, "float16": 989.5e12, "float8": 1979e12},
        _link(450e9, _NVLINK_LATENCY_S),
        _link(50e9, _NETWORK_LATENCY_S),
    ),
    # NVIDIA H800 data sheet: an H100 with NVLink at 400 GB/s both ways.
    "h800-80gb": _Part(
        80e9,
        3350e9,
        {"float32": 67e12, "bfloat16": 989.5e12, "float16": 989.5e12, "float8": 1979e12},
        _link(200e9, _NVLINK_LATENCY_S),
        _link(50e9, _NETWORK_LATENCY_S),
    ),
    # NVIDIA H200 data sheet, SXM: compute as H100, 141 GB at 4.8 TB/s.
    "h200-141gb": _Part(
        141e9,
        4800e9,
        {"float32": 67e12, "bfloat16": 989.5e12, "float16": 989.5e12, "float8": 1979e12},
        _link(450e9, _NVLINK_LATENCY_S),
        _link(50e9, _NETWORK_LATENCY_S),
    ),
    # NVIDIA A100 data sheet, PCIe: the SXM4 part's rates, 1,555 and 1,935 GB/s, PCIe 4.0 x16 at 64 GB/s both ways.
    # Networks of the PCIe parts: one 200 Gb/s port for two GPUs is assumed.
    "a100pcie-40gb": _Part(
        40e9,
        1555e9,
        {"float32": 19.5e12, "bfloat16": 312e12, "float16": 312e12},
        _link(32e9, _PCIE_LATENCY_S),
        _link(12.5e9, _NETWORK_LATENCY_S),
    ),
    "a100pcie-80gb": _Part(
        80e9,
        1935e9,
        {"float32": 19.5e12, "bfloat16": 312e12, "float16": 312e12},
        _link(32e9, _PCIE_LATENCY_S),
        _link(12.5e9, _NETWORK_LATENCY_S),
    ),
    # NVIDIA H100 data sheet, PCIe: 51 Tflop/s FP32, 1,513 Tflop/s BF16/FP16 with sparsity, 2 TB/s, PCIe 5.0 x16 at 128
    # GB/s both ways.
    "h100pcie-80gb": _Part(
        80e9,
        2000e9,
        {"float32": 51e12, "bfloat16": 756.5e12, "float16": 756.5e12, "float8": 1513e12},
        _link(64e9, _PCIE_LATENCY_S),
        _link(25e9, _NETWORK_LATENCY_S),
    ),
    # NVIDIA B200 in DGX B200 (data sheet: 1,440 GB, 64 TB/s, 72 Pflop/s FP8 and 36 BF16 with sparsity for 8): NVLink
    # 1,800 GB/s both ways. Network: 8 x 400 Gb/s.
    "b200-180gb": _Part(
        180e9,
        8000e9,
        {"float32": 80e12, "bfloat16": 2250e12, "float16": 2250e12, "float8": 4500e12},
        _link(900e9, _NVLINK_LATENCY_S),
        _link(50e9, _NETWORK_LATENCY_S),
    ),
    # NVIDIA A10 data sheet: 31.2 Tflop/s FP32, 125 Tflop/s BF16/FP16, 600 GB/s, PCIe 4.0 x16. Network: AWS g5.48xlarge,
    # 100 Gb/s for 8 GPUs.
    "a10-24gb": _Part(
        24e9,
        600e9,
        {"float32": 31.2e12, "bfloat16": 125e12, "float16": 125e12},
        _link(32e9, _PCIE_LATENCY_S),
        _link(1.5625e9, _NETWORK_LATENCY_S),
    ),
    # NVIDIA L4 data sheet: 30.3 Tflop/s FP32, 242 Tflop/s BF16/FP16 with sparsity, 300 GB/s, PCIe 4.0 x16. Network: AWS
    # g6.48xlarge, 100 Gb/s for 8 GPUs.
    "l4-24gb": _Part(
        24e9,
        300e9,
        {"float32": 30.3e12, "bfloat16": 121e12, "float16": 121e12, "float8": 242e12},
        _link(32e9, _PCIE_LATENCY_S),
        _link(1.5625e9, _NETWORK_LATENCY_S),
    ),
    # NVIDIA RTX A6000 data sheet: 38.7 Tflop/s FP32, 309.7 Tflop/s BF16/FP16 with sparsity, 768 GB/s, PCIe 4.0 x16.
    # Networks of workstation parts: 100 Gb/s for 8 GPUs are assumed.
    "rtxa6000-48gb": _Part(
        48e9,
        768e9,
        {"float32": 38.7e12, "bfloat16": 154.8e12, "float16": 154.8e12},
        _link(32e9, _PCIE_LATENCY_S),
        _link(1.5625e9, _NETWORK_LATENCY_S),
    ),
    # NVIDIA GA102 white paper, GeForce RTX 3090: 35.6 Tflop/s FP32, 71 Tflop/s BF16/FP16 with FP32 accumulation, 936 GB/s,
    # PCIe 4.0 x16.
    "rtx3090-24gb": _Part(
        24e9,
        936e9,
        {"float32": 35.6e12, "bfloat16": 71e12, "float16": 71e12},
        _link(32e9, _PCIE_LATENCY_S),
        _link(1.5625e9, _NETWORK_LATENCY_S),
    ),
    # NVIDIA Ada white paper, GeForce RTX 4090: 82.6 Tflop/s FP32, 165.2 Tflop/s BF16/FP16 with FP32 accumulation, 1,008
    # GB/s, PCIe 4.0 x16.
    "rtx4090-24gb": _Part(
        24e9,
        1008e9,
        {"float32": 82.6e12, "bfloat16": 165.2e12, "float16": 165.2e12, "float8": 330.3e12},
        _link(32e9, _PCIE_LATENCY_S),
        _link(1.5625e9, _NETWORK_LATENCY_S),
    ),
    # AMD MI250X data sheet, one of its two dies: 47.9 Tflop/s FP32 matrix, 191.5 Tflop/s FP16, 64 GB at 1,638 GB/s,
    # Infinity Fabric at 50 GB/s each way between dies of different packages. Network: Frontier, 4 x 200 Gb/s for 8 dies.
    "mi250x-64gb": _Part(
        64e9,
        1638e9,
        {"float32": 47.9e12, "bfloat16": 191.5e12, "float16": 191.5e12},
        _link(50e9, _PCIE_LATENCY_S),
        _link(12.5e9, _NETWORK_LATENCY_S),
    ),
    # AMD MI300X data sheet: 163.4 Tflop/s FP32 matrix, 1,307 Tflop/s BF16/FP16, 2,615 FP8, 192 GB at 5.3 TB/s, 7 Infinity
    # Fabric links of 64 GB/s each way. Network: 8 x 400 Gb/s.
    "mi300x-192gb": _Part(
        192e9,
        5300e9,
        {"float32": 163.4e12, "bfloat16": 1307e12, "float16": 1307e12, "float8": 2615e12},
        _link(448e9, _PCIE_LATENCY_S),
        _link(50e9, _NETWORK_LATENCY_S),
    ),
    # NVIDIA P100 data sheet, SXM2: 10.6 Tflop/s FP32, 21.2 Tflop/s FP16, 732 GB/s, NVLink 160 GB/s both ways.
    # Network: DGX-1, 4 x 100 Gb/s EDR for 8 GPUs.
    "p100-16gb": _Part(
        16e9,
        732e9,
        {"float32": 10.6e12, "float16": 21.2e12},
        _link(80e9, _NVLINK_LATENCY_S),
        _link(6.25e9, _NETWORK_LATENCY_S),
    ),
    # NVIDIA T4 data sheet: 8.1 Tflop/s FP32, 65 Tflop/s FP16, 300 GB/s, PCIe 3.0 x16 at 32 GB/s both ways.
    # Network: AWS g4dn.metal, 100 Gb/s for 8 GPUs.
    "t4-16gb": _Part(
        16e9,
        300e9,
        {"float32": 8.1e12, "float16": 65e12},
        _link(16e9, _PCIE_LATENCY_S),
        _link(1.5625e9, _NETWORK_LATENCY_S),
    ),
    # NVIDIA L40S data sheet: 91.6 Tflop/s FP32, 733 Tflop/s BF16/FP16 with sparsity (362 dense), 864 GB/s, PCIe 4.0 x16
    # at 64 GB/s both ways. Network: AWS g6e.48xlarge, 400 Gb/s for 8 GPUs.
    "l40s-48gb": _Part(
        48e9,
        864e9,
        {"float32": 91.6e12, "bfloat16": 362e12, "float16": 362e12},
        _link(32e9, _PCIE_LATENCY_S),
        _link(6.25e9, _NETWORK_LATENCY_S),
    ),
    # One core: AVX2 with two FMA units at 3 GHz (8 lanes x 2 units x 2 flops x 3e9), one channel of DDR4-3200 (JEDEC:
    # 25.6 GB/s). Links: gloo over loopback, and 10 Gb/s Ethernet, with TCP's latencies. Real CPUs should be probed.
    "cpu": _Part(
        8e9,
        25.6e9,
        {"float32": 96e9},
        Link(50e-6, 2e9, 0.0),
        Link(100e-6, 1.25e9 * _LINK_EFFICIENCY, 0.0),
    ),
}

_USABLE_MEMORY = 0.985

# Dispatch of an eager op: about 5 us of host time with its kernel launch, and about as much per backward node: the
# order that a probe of server CPUs gives (4 to 9 us).
_LAUNCH_S = 5e-6

PRESETS = tuple(_PARTS)


def _usable_bytes(name: str, sold_bytes: float) -> int:
    """Of an accelerator sold with this many gigabytes."""
    return int(sold_bytes) if name == "cpu" else int(sold_bytes / 1e9 * 2**30 * _USABLE_MEMORY)


def preset(
    name: str,
    hosts: int = 1,
    devices_per_host: int = 8,
    inter: Link | None = None,
    *,
    software: str = "autopar",
    intra_bytes_per_s: float | None = None,
    inter_bytes_per_s: float | None = None,
) -> Cluster:
    """A cluster of `hosts` x `devices_per_host` parts of one kind.

    inter: the link between hosts, per device, in place of the part's usual one. software: the stack that trains
    (cost/constants.py). intra_bytes_per_s, inter_bytes_per_s: nominal rates per device and direction, in place of the
    part's.
    Raises ValueError for a name that is not in `PRESETS`, naming the nearest.
    """
    part = _PARTS.get(name.lower())
    if part is None:
        near = difflib.get_close_matches(name.lower(), PRESETS, n=3, cutoff=0.3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"no preset {name!r}; {hint}Known: {', '.join(PRESETS)}")
    device = Device(
        kind=name.lower(),
        memory_bytes=_usable_bytes(name.lower(), part.memory_bytes),
        flops_per_s=part.flops_per_s,
        memory_bytes_per_s=part.memory_bytes_per_s,
        launch_s=_LAUNCH_S,
        backward_launch_s=_LAUNCH_S,
        asynchronous=name.lower() != "cpu",
    )
    intra, inter = part.intra, inter or part.inter
    if intra_bytes_per_s:
        intra = _link(intra_bytes_per_s, intra.latency_s)
    if inter_bytes_per_s:
        inter = _link(inter_bytes_per_s, inter.latency_s)
    return Cluster(device, hosts, devices_per_host, intra, inter, f"preset {name.lower()}", software)
