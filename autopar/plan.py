"""A Plan: who computes which part, as frozen plain data that round-trips through JSON.

A plan names blocks, ranks, degrees, strategies and placements; never process groups. Ranks of a stage form a
(data, tensor) mesh in row-major order: `ranks[d * tensor + t]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from .cluster.spec import Cluster
    from .graph import Graph

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

    @property
    def num_blocks(self) -> int:
        return self.stop - self.start


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

    @property
    def pipeline(self) -> int:
        return len(self.stages)

    def to_json(self) -> str:
        """The plan as JSON text; `Plan.from_json` gives back an equal plan."""
        from .plan_json import dump_plan

        return dump_plan(self)

    @classmethod
    def from_json(cls, text: str, source: str = "the text") -> Plan:
        """The plan that `to_json` wrote. ValueError, with the field named, for anything else."""
        from .plan_json import parse_plan

        return parse_plan(text, source)

    def save(self, path: str | Path) -> None:
        """Write the plan file; a reader never sees half of one, because it is renamed into place when whole."""
        from .plan_json import write_atomically

        write_atomically(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan file. OSError if it cannot be read; ValueError if it is truncated, of another schema, no plan."""
        return cls.from_json(Path(path).read_text(encoding="utf-8", errors="replace"), source=str(path))

    def validate(self, graph: Graph, cluster: Cluster) -> None:
        """ValueError unless the plan can run this graph on this cluster: the field, what it says, what it should."""
        from .plan_validate import validate_plan

        validate_plan(self, graph, cluster)

    def explain(self, graph: Graph | None = None) -> str:
        """The plan in words: degrees, stages, predictions, and why the other candidates lost.

        With the graph it was made for, layouts are told op by op and by their common names (column parallel, ...).
        """
        from .report.explain import explain_plan

        return explain_plan(self, graph)

    def diff(self, other: Plan) -> str:
        """What changes from this plan to `other`, one line per field; "" when nothing does."""
        from .report.plan_diff import diff_plans

        return diff_plans(self, other)
