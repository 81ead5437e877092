"""A Plan: who computes which part, as frozen plain data that round-trips through JSON.

A plan names blocks, ranks, degrees, strategies and placements; never process groups. Ranks of a stage form a
(data, tensor) mesh in row-major order: `ranks[d * tensor + t]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SCHEMA = 1

Recompute = Literal["none", "full"]
Zero = Literal[0, 3]


@dataclass(frozen=True, slots=True)
class Layout:
    """One block on one model axis of `degree` ranks.

    strategies: key of the chosen `Strategy` per op, in `Block.ops` order.
    inputs, outputs: placement token of `Block.inputs` as they arrive and of `Block.outputs` as they leave.
    parameters: placement token at rest, per `Block.parameters`.
    """

    degree: int
    strategies: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Stage:
    """Blocks [start, stop) executed by `ranks` as a (data, tensor) mesh.

    layouts: per block of the stage, an index into `Plan.layouts`; empty when tensor == 1.
    recompute: "full" keeps only block inputs of the forward and computes each block again in the backward.
    zero: 0 replicates parameters, gradients and optimizer state over the data axis; 3 shards all three.
    """

    start: int
    stop: int
    ranks: tuple[int, ...]
    data: int
    tensor: int
    layouts: tuple[int, ...] = ()
    recompute: Recompute = "none"
    zero: Zero = 0


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the search expected of the plan: step time (optimizer included) and peak bytes of the fullest rank."""

    step_time_s: float
    peak_memory_bytes: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan that the search considered: its degrees in words, what it would cost, and why it lost ("" if chosen)."""

    name: str
    step_time_s: float
    peak_memory_bytes: int
    verdict: str


@dataclass(frozen=True, slots=True)
class Plan:
    """model, fingerprint: the graph's name and identity. batch_size: global rows, over data x microbatches.

    The batch is cut first over the data axis (rank d owns rows [d B/D, (d+1) B/D)), then in time.
    """

    model: str
    fingerprint: str
    world_size: int
    batch_size: int
    microbatches: int
    schedule: str
    stages: tuple[Stage, ...]
    layouts: tuple[Layout, ...] = ()
    prediction: Prediction | None = None
    candidates: tuple[Candidate, ...] = ()
    schema: int = SCHEMA
