"""Prices of blocks under their layouts: each kind, layout and cut of the batch is priced once and remembered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..cluster.span import span
from ..cluster.spec import Cluster
from ..graph import Block, Graph
from ..plan import Layout, Recompute
from ..sharding.axes import Places, absolute
from ..sharding.flow import Convert, Step, block_flow, layout_places
from ..sharding.placement import SHARED, conversion
from ..sharding.rows import Parts
from .block import BlockSeconds, Both, ModelAxes, Pricer, Structure
from .constants import Constants
from .corrections import Corrections
from .memory import BlockMemory, BlockView, block_memory


@dataclass(frozen=True, slots=True)
class Setting:
    """What a block's price depends on besides the block: the cut of the batch, and the model axes.

    shards: into how many parts such as the fullest data rank's the batch is cut (`stage_parts`).
    """

    shards: Parts
    axes: ModelAxes
    accumulate: bool
    precision: str

    def key(self, cluster: Cluster) -> tuple:
        spans = tuple(span(cluster, self.axes.ranks_of((i,))) for i in range(len(self.axes.degrees)))
        return self.shards, self.axes.degrees, spans, self.accumulate, self.precision


_Summed = Mapping[tuple[int, ...], float]


class BlockPrice:
    """One block on one rank and microbatch. shared_bytes: of gradients that are summed over model axes, by these."""

    def __init__(self, seconds: BlockSeconds, memory: BlockMemory, shared_bytes: _Summed) -> None:
        self.seconds, self.memory, self.shared_bytes = seconds, memory, shared_bytes
        self._passes: dict[str, tuple[Mapping[str, Both], Mapping[str, Both], Both]] = {}

    def passes(self, recompute: Recompute) -> tuple[Mapping[str, Both], Mapping[str, Both], Both]:
        """(compute, collectives, (forward, backward) seconds of all of it)."""
        if recompute not in self._passes:
            compute, collectives = self.seconds.passes(recompute)
            pairs = (*compute.values(), *collectives.values())
            self._passes[recompute] = compute, collectives, (sum(f for f, _ in pairs), sum(b for _, b in pairs))
        return self._passes[recompute]


class BlockPrices:
    """Prices of the blocks of one graph on one cluster, all of whose devices are alike. Not thread-safe."""

    def __init__(self, graph: Graph, cluster: Cluster, corrections: Corrections, constants: Constants) -> None:
        self.graph, self.cluster, self.corrections, self.constants = graph, cluster, corrections, constants
        self._pricers: dict[str, Pricer] = {}
        self._structures: dict[str, Structure] = {}
        self._flows: dict[tuple, tuple[tuple[Step, ...], BlockMemory, _Summed]] = {}
        self._layouts: dict[Layout, int] = {}
        self._layout_ids: dict[int, tuple[Layout, int]] = {}
        self._blocks: dict[tuple, BlockPrice] = {}

    def __len__(self) -> int:
        """How many were priced."""
        return len(self._blocks)

    def share(self, other: BlockPrices) -> None:
        """Remember together with prices of the same graph what neither cluster nor constants change."""
        self._structures, self._flows = other._structures, other._flows
        self._layouts, self._layout_ids = other._layouts, other._layout_ids

    def pricer(self, precision: str) -> Pricer:
        if precision not in self._pricers:
            if precision not in self._structures:
                self._structures[precision] = Structure(self.graph, precision)
            self._pricers[precision] = Pricer(
                self.graph,
                self.cluster,
                self.corrections,
                self.constants,
                precision,
                self._structures[precision],
            )
        return self._pricers[precision]

    def of(self, block: Block, layouts: tuple[Layout, ...], setting: Setting, where: tuple) -> BlockPrice:
        key = (block.kind, tuple(map(self.layout_number, layouts)), where)
        if key not in self._blocks:
            self._blocks[key] = self._price_block(block, layouts, setting)
        return self._blocks[key]

    def _price_block(self, block: Block, layouts: tuple[Layout, ...], setting: Setting) -> BlockPrice:
        pricer = self.pricer(setting.precision)
        numbers = tuple(map(self.layout_number, layouts))
        key = (block.kind, numbers, setting.shards, setting.axes.degrees, setting.accumulate, setting.precision)
        if key not in self._flows:
            self._flows[key] = self._flow(block, layouts, setting, pricer)
        steps, memory, summed = self._flows[key]
        at_rest = frozenset(block.parameters)
        return BlockPrice(pricer.block_seconds(steps, setting.shards, setting.axes, at_rest), memory, summed)

    def _flow(
        self, block: Block, layouts: tuple[Layout, ...], setting: Setting, pricer: Pricer
    ) -> tuple[tuple[Step, ...], BlockMemory, _Summed]:
        """The steps of a block, its memory, and the bytes of gradients that are summed over model axes."""
        steps = block_flow(self.graph, block, layouts, setting.shards.numerator)
        degrees = setting.axes.degrees
        edges: list[list[Places]] = [[()] * len(block.inputs), [()] * len(block.parameters)]
        if layouts:
            edges = [layout_places(layouts, field) for field in ("inputs", "parameters")]
            edges = [[absolute(places, degrees) for places in edge] for edge in edges]
        local = pricer.local(setting.shards)
        view = BlockView(
            self.graph, block, steps, local, degrees, pricer.storages, tuple(edges[0]), tuple(edges[1]),
            self.constants.fused_loss, self.constants.wide_loss, self.constants.whole_scores,
        )  # fmt: skip
        rest = dict(zip(block.parameters, edges[1], strict=True))
        memory = block_memory(view, setting.accumulate)
        return steps, memory, self._summed_bytes(steps, rest, lambda name: local.held_bytes(name, rest[name], degrees))

    def _summed_bytes(self, steps: tuple[Step, ...], rest: Mapping[str, Places], size: Callable[[str], int]) -> _Summed:
        """Bytes of parameters whose gradients are summands on model axes, to be reduced once per step, by axes."""
        summed: dict[str, set[int]] = {
            name: {i for i, place in enumerate(places) if place == SHARED} for name, places in rest.items()
        }
        for step in steps:
            if (
                isinstance(step, Convert)
                and step.tensor in rest
                and conversion(step.have, step.want).backward == "all_reduce"
            ):
                summed[step.tensor].update(step.axes)
        found: dict[tuple[int, ...], float] = {}
        for name, axes in summed.items():
            if axes and self.graph.tensors[name].requires_grad:
                key = tuple(sorted(axes))
                found[key] = found.get(key, 0.0) + size(name)
        return found

    def layout_number(self, layout: Layout) -> int:
        """Layouts are long tuples of strings; a search asks with the same objects again and again."""
        found = self._layout_ids.get(id(layout))
        if found is None or found[0] is not layout:
            number = self._layouts.setdefault(layout, len(self._layouts))
            found = self._layout_ids[id(layout)] = (layout, number)
        return found[1]
