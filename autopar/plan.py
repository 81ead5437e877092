"""A Plan: who computes which part, as frozen plain data that round-trips through JSON.

A plan names blocks, ranks, degrees, strategies and placements; never process groups. Ranks of a stage form a mesh of
(data, model axes ...) in row-major order: `ranks[d * tensor + t]`, where t counts through the model axes, the last
fastest.

Rows. A global batch of B rows is cut first in time: microbatch m of M is rows [m B/M, (m+1) B/M), the same rows on
every stage. Each stage cuts a microbatch over its own data ranks, in order, equally or by `Stage.shares`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .graph import Precision

if TYPE_CHECKING:
    from .cluster.spec import Cluster
    from .graph import Graph

SCHEMA = 3

Recompute = Literal["none", "selective", "full"]
Zero = Literal[0, 1, 2, 3]


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
    """Blocks [start, stop) executed by `ranks` as a mesh of (data, *axes).

    axes: degrees of the model axes, outermost first; () where a block runs on one rank of each data replica.
    layouts: per model axis, for each block of the stage an index into `Plan.layouts`. A tensor that several axes split
        along one dim is cut by the first axis first.
    recompute: per block; () is "none" for all. "full" keeps only the block's inputs of the forward and computes the
        block again in the backward; "selective" keeps the results of its expensive ops and computes the others again.
    zero: 0 replicates parameters, gradients and optimizer state over the data axis; 1 shards the optimizer state, 2 the
        gradients too, 3 the parameters too (Rajbhandari et al. 2020, ZeRO, section 5).
    zero_group: how many consecutive data ranks hold one copy of what ZeRO shards; 0: all of them. Fewer is the hybrid
        that replicates over the rest.
    shares: rows of a microbatch per data rank; () where they are equal.
    """

    start: int
    stop: int
    ranks: tuple[int, ...]
    data: int
    axes: tuple[int, ...] = ()
    layouts: tuple[tuple[int, ...], ...] = ()
    recompute: tuple[Recompute, ...] = ()
    zero: Zero = 0
    zero_group: int = 0
    shares: tuple[int, ...] = ()

    @property
    def num_blocks(self) -> int:
        return self.stop - self.start

    @property
    def tensor(self) -> int:
        """Ranks of one data replica: the product of the model axes."""
        return math.prod(self.axes)

    @property
    def block_recompute(self) -> tuple[Recompute, ...]:
        """The choice of every block."""
        return self.recompute or ("none",) * self.num_blocks


def same_recompute(choice: Recompute, num_blocks: int) -> tuple[Recompute, ...]:
    """`Stage.recompute` of a stage whose blocks all do the same."""
    return () if choice == "none" else (choice,) * num_blocks


def tensor_axes(degree: int) -> tuple[int, ...]:
    """`Stage.axes` of a stage with at most one model axis."""
    return (degree,) if degree > 1 else ()


@dataclass(frozen=True, slots=True)
class Term:
    """A part of the step time: seconds, the mean over stages. The terms of a prediction sum to its step time."""

    name: str
    seconds: float


@dataclass(frozen=True, slots=True)
class StageMemory:
    """What the peak of a rank of one stage is made of, in bytes.

    activations: of all microbatches in flight. working: what comes and goes while a block computes, and what is gathered.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.working


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the search expected of the plan: step time (optimizer included) and peak bytes of the fullest rank.

    lower_bound_s: no plan of the searched space is faster, which the plan is part of; None where the method proves nothing.
    terms: where the step time goes. memory: of each stage. changes: sentences on what would make another plan the best.
    """

    step_time_s: float
    peak_memory_bytes: int
    lower_bound_s: float | None = None
    terms: tuple[Term, ...] = ()
    memory: tuple[StageMemory, ...] = ()
    changes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan that the search considered: its degrees in words, what it would cost, and why it lost ("" if chosen)."""

    name: str
    step_time_s: float
    peak_memory_bytes: int
    verdict: str


@dataclass(frozen=True, slots=True)
class Plan:
    """model, fingerprint: the graph's name and identity. batch_size: global rows, over microbatches x data.

    stages: in the order of the blocks. The same ranks may run several of them, if the schedule has it so (interleaved,
    V-shaped). precision: what blocks compute in; parameters at rest and gradients stay as the module has them.
    reduction: what gradients are summed in, over microbatches and data ranks, where blocks compute in less than float32.
    offload: parameters at rest, their `.grad` and the optimizer's state lie in host memory, and the optimizer runs there;
        blocks compute with copies on the device (Ren et al. 2021, ZeRO-Offload).
    rewrites: what is done to the captured graph first (capture/rewrites.py); the fingerprint, the blocks and the layouts
        are those of the graph after them.
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
    precision: Precision = "float32"
    reduction: Precision = "float32"
    offload: bool = False
    rewrites: tuple[str, ...] = ()
    schema: int = SCHEMA

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The distinct sets of ranks, in the order of the first stage that each runs."""
        return tuple(dict.fromkeys(stage.ranks for stage in self.stages))

    @property
    def pipeline(self) -> int:
        """How many sets of ranks the blocks are spread over."""
        return len(self.groups)

    def layouts_of(self, stage: Stage) -> list[tuple[Layout, ...]]:
        """For every block of a stage of this plan, its layout on each model axis; () where there is no such axis."""
        if not stage.axes:
            return [()] * stage.num_blocks
        return [tuple(self.layouts[i] for i in indices) for indices in zip(*stage.layouts, strict=True)]

    def graph_of(self, graph: Graph) -> Graph:
        """The graph that the plan runs: the captured one after the plan's rewrites. A graph that is it already stays."""
        from .capture.rewrites import rewritten

        return graph if graph.fingerprint == self.fingerprint else rewritten(graph, self.rewrites)

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
