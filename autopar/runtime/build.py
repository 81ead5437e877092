"""From a plan to everything that one rank needs to run it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..graph import Graph, torch_dtype
from ..ops import mutated_inputs
from ..plan import Plan, Stage
from ..schedule.build import program_for
from ..schedule.delivered import delivered, delivered_in_stream
from ..schedule.instructions import Instruction
from ..schedule.orders import schedule_named
from ..schedule.posting import Postings, postings, stream_postings
from ..sharding.axes import Places
from ..sharding.placement import REPLICATED
from .compiled import Backend, Functions, compile_blocks
from .executor import Executor, StagePart, block_function
from .groups import Groups, build_groups
from .ownership import Holder, Ownership
from .rank_storage import RankStorage
from .recorder import Recorder
from .replicas import Replicas
from .routes import route
from .shards import Shards
from .stage import CompiledStage, compile_stage, handovers, placed
from .storage import ParameterSpec, StageAxes, Storage
from .transport import Transport
from .versions import Versions


@dataclass(frozen=True)
class Row:
    """One rank's row of a program. postings: when its receives are posted, None where the transport may choose."""

    actions: tuple[Instruction, ...]
    postings: Postings | None


@dataclass(frozen=True, eq=False)
class Runtime:
    """One rank's part of a plan, ready to run. training, evaluation: its rows of the programs.

    compiled: the stages that the rank runs, by index. specs: their parameters, each once. losses: all ranks, where losses
    are summed in the background.
    """

    plan: Plan
    groups: Groups
    compiled: Mapping[int, CompiledStage]
    storage: RankStorage
    executor: Executor
    recorder: Recorder
    specs: tuple[ParameterSpec, ...]
    training: Row
    evaluation: Row
    losses: dist.ProcessGroup | None = None

    @property
    def first(self) -> CompiledStage:
        """The first of this rank's stages; all of them have the same rows and batch inputs."""
        return self.compiled[self.groups.stage]

    def abandon(self) -> None:
        """After a failure: let go of what is under way and of the groups.

        Gloo closes a group's connections when the last reference to it goes, and only then do ranks that wait fail.
        """
        self.executor.transport.abandon()
        self.groups.abandon()

    def close(self) -> None:
        """Close the groups once another runtime has taken over. All ranks of the world call it."""
        self.groups.destroy()
        if self.losses is not None:
            dist.destroy_process_group(self.losses)


def parameter_specs(graph: Graph, plan: Plan) -> dict[int, tuple[ParameterSpec, ...]]:
    """Per stage, its parameters in order of first use, and where every rank of every stage holds them."""
    at_rest: dict[str, dict[int, Places]] = {}
    for s, stage in enumerate(plan.stages):
        for block, layouts in zip(graph.blocks[stage.start : stage.stop], plan.layouts_of(stage), strict=True):
            for name, places in zip(block.parameters, placed(layouts, "parameters", block.parameters), strict=True):
                at_rest.setdefault(name, {}).setdefault(s, places)
    found: dict[int, list[ParameterSpec]] = {s: [] for s in range(len(plan.stages))}
    for name, by_stage in at_rest.items():
        tensor = graph.tensors[name]
        # Stages of the same ranks hold it once.
        holders = tuple(dict.fromkeys(_holder(plan.stages[s], places) for s, places in by_stage.items()))
        ownership = Ownership(tensor.shape, holders)
        spec = ParameterSpec(tensor.fqn, tensor.at_rest, ownership, tensor.requires_grad, tensor.dtype)
        for s in by_stage:
            found[s].append(spec)
    return {s: tuple(specs) for s, specs in found.items()}


def _holder(stage: Stage, places: Places) -> Holder:
    first, *inner = zip(places, stage.axes, strict=True) if places else [(REPLICATED, 1)]
    shards = (stage.zero_group or stage.data) if stage.zero else 1
    return Holder(stage.ranks, stage.data, stage.tensor, first[0], shards, tuple(inner))


def ownerships(graph: Graph, plan: Plan) -> dict[str, Ownership]:
    """Where every parameter of the model lies under `plan`, by original name, in one order on all ranks."""
    return {spec.fqn: spec.ownership for specs in parameter_specs(graph, plan).values() for spec in specs}


def updated_buffers(graph: Graph, plan: Plan) -> dict[str, int]:
    """The buffers that a step writes, by original name, each with a rank whose copy is up to date."""
    found = {}
    for stage in plan.stages:
        for block in graph.blocks[stage.start : stage.stop]:
            for op in graph.block_ops(block):
                for name in mutated_inputs(op):
                    tensor = graph.tensors[graph.tensors[name].base or name]
                    if tensor.role == "buffer":
                        found[tensor.fqn] = stage.ranks[0]
    return found


def build_runtime(
    graph: Graph,
    plan: Plan,
    values: Callable[[Sequence[ParameterSpec]], Mapping[str, Tensor]],
    state: Mapping[str, Tensor],
    device: torch.device,
    random: Callable[[str], AbstractContextManager[Any]],
    compile_with: Backend | None = None,
    wanted: frozenset[str] = frozenset(),
) -> Runtime:
    """Build this rank's runtime; all ranks of the world must call it with the same plan.

    values(specs): this rank's local parts of these parameters, by original name. state: buffers and constants on
    `device`, by tensor name. random(key): a context in which random ops draw from the stream of that key.
    compile_with: torch.compile's backend for the blocks; None: they run as they are. wanted: outputs of the module that
    programs leave in `Executor.given`.
    """
    rank, schedule = dist.get_rank(), schedule_named(plan.schedule)
    groups = build_groups(plan)
    by_stage = parameter_specs(graph, plan)
    compiled: dict[int, CompiledStage] = {}
    functions: Functions = {}
    specs: dict[int, tuple[ParameterSpec, ...]] = {}
    for s, mesh in groups.meshes.items():
        compiled[s] = compile_stage(
            graph, plan, s, mesh.data.rank, mesh.model, device, wanted, compile_with is not None
        )
        if compile_with is not None:
            compiled[s] = replace(compiled[s], blocks=compile_blocks(compiled[s].blocks, compile_with, functions))
        specs[s] = _with_reductions(graph, compiled[s], by_stage[s], rank)
    union: dict[str, ParameterSpec] = {}
    for of_stage in specs.values():
        for spec in of_stage:
            union.setdefault(spec.fqn, spec)
    tied = {s.fqn: s for specs in by_stage.values() for s in specs if len(s.ownership.holders) > 1 and s.requires_grad}
    if not any(rank in s.ownership.ranks for s in tied.values()):
        tied = {}

    options = {"reduction": torch_dtype(plan.reduction), "offload": plan.offload}

    def build_storage(s: int, values: Mapping[str, Tensor]) -> Storage:
        stage, mesh = plan.stages[s], groups.meshes[s]
        lines = mesh.lines if len(stage.axes) > 1 else {}
        axes = StageAxes(mesh.data, mesh.tensor, mesh.all_of_stage, rank, device, lines, mesh.hybrid)
        names = {i: tuple(graph.tensors[t].fqn for t, _ in b.parameters) for i, b in enumerate(compiled[s].blocks)}
        storage: Storage
        if schedule.delay is not None:
            storage = Versions(specs[s], names, values, axes, keeps=schedule.delay)
        elif stage.zero:
            storage = Shards(specs[s], names, values, axes, level=stage.zero, **options)
        else:
            storage = Replicas(specs[s], names, values, axes, **options)
        for i in names:
            storage.bind(i, block_function)
        return storage

    storage = RankStorage(specs, build_storage, values(tuple(union.values())))
    recorder = Recorder(rank, device)
    for mesh in groups.meshes.values():
        for axis in (*mesh.lines.values(), *(mesh.hybrid or ())):
            axis.on_transfer, axis.on_wait = recorder.transfer, recorder.wait
    executor = Executor(
        graph=graph,
        parts={s: StagePart(compiled[s], mesh, storage.stages[s]) for s, mesh in groups.meshes.items()},
        microbatches=plan.microbatches,
        groups=groups,
        transport=_transport(graph, plan, groups, device, recorder),
        storage=storage,
        recorder=recorder,
        state=state,
        random=random,
        tied={fqn: s.ownership for fqn, s in tied.items()},
        tied_dtypes={fqn: s.dtype for fqn, s in tied.items()},
    )
    return Runtime(
        plan=plan,
        groups=groups,
        compiled=compiled,
        storage=storage,
        executor=executor,
        recorder=recorder,
        specs=tuple(union.values()),
        training=_row(plan, groups, device, True),
        evaluation=_row(plan, groups, device, False),
        losses=None if schedule.flushes else dist.new_group(),
    )


def _row(plan: Plan, groups: Groups, device: torch.device, training: bool) -> Row:
    group = plan.groups.index(plan.stages[groups.stage].ranks)
    program = program_for(plan, training=training)
    actions = program.actions[group]
    if device.type != "cuda":
        return Row(actions, None)
    if training and not schedule_named(plan.schedule).flushes:
        return Row(actions, stream_postings(len(plan.stages), plan.microbatches, plan.schedule, groups.stage))
    places = postings(program, group)
    return Row(actions, lambda instruction: places.get(instruction, ()))


def _with_reductions(
    graph: Graph, compiled: CompiledStage, specs: Sequence[ParameterSpec], rank: int
) -> tuple[ParameterSpec, ...]:
    """The specs with SHARED in place of REPLICATED on this stage where gradients are summands per rank of a model axis."""
    reduced = {graph.tensors[t].fqn: numbers for block in compiled.blocks for t, numbers in block.reduced.items()}
    found = []
    for spec in specs:
        if spec.fqn in reduced:
            holders = tuple(h.with_sums(reduced[spec.fqn]) if rank in h.ranks else h for h in spec.ownership.holders)
            spec = replace(spec, ownership=Ownership(spec.ownership.shape, holders))
        found.append(spec)
    return tuple(found)


def _transport(graph: Graph, plan: Plan, groups: Groups, device: torch.device, recorder: Recorder) -> Transport:
    """With the routes of activations and gradients over every boundary of this rank's stages."""
    routes = {}
    for first, second in zip(range(len(plan.stages) - 1), range(1, len(plan.stages)), strict=True):
        ranks = plan.stages[first].ranks, plan.stages[second].ranks
        if ranks[0] == ranks[1] or groups.rank not in (*ranks[0], *ranks[1]):
            continue
        crossing = handovers(graph, plan, first)
        dtypes = {name: graph.tensors[name].dtype for name in crossing}
        routes[first, second] = route(list(crossing.values()), list(dtypes.values()), groups.rank)
        returning = {name: h.of_gradient() for name, h in crossing.items() if graph.tensors[name].requires_grad}
        routes[second, first] = route(list(returning.values()), [dtypes[name] for name in returning], groups.rank)
    transport = Transport(groups, device, routes, _delivered(plan, groups), recorder.transfer)
    transport.connect()
    return transport


def _delivered(plan: Plan, groups: Groups) -> Callable[[Instruction], Iterable[Instruction]]:
    if not schedule_named(plan.schedule).flushes:
        return partial(delivered_in_stream, num_stages=len(plan.stages))
    found = delivered(program_for(plan), plan.groups.index(plan.stages[groups.stage].ranks))
    return lambda receive: found.get(receive, ())
