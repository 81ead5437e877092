"""`parallelize`: the one place where capture, planner, simulator and runtime meet."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .capture.export import capture
from .cluster.probe_world import join_world
from .cluster.spec import Cluster
from .cost.model import Corrections, CostModel
from .graph import Graph, Precision, torch_dtype
from .plan import Plan
from .planner.search import search
from .refine import Refinement, refine
from .runtime.agree import from_rank_zero
from .runtime.background import Saving
from .runtime.build import build_runtime, ownerships
from .runtime.compiled import Backend
from .runtime.initialise import Initialise, local_state, local_values
from .runtime.loader import RankLoader
from .runtime.model import ParallelModule
from .runtime.optimizer_state import move_optimizer
from .runtime.outputs import check_outputs
from .runtime.random import Seeds
from .runtime.reshard import reshard
from .runtime.storage import ParameterSpec
from .runtime.torch_private import local_tensor
from .runtime.watchdog import TIMEOUT_S
from .runtime.weights import state_names
from .simulate import simulate


class Model(ParallelModule):
    """A parallel module that can also feed itself and change its plan; what `parallelize` returns.

    cluster: the hardware as probed or given. corrections: what measured steps have taught since.
    saving: the latest checkpoint that was saved. state_names: the names in the module's state dict of what it holds.
    """

    def __init__(
        self,
        graph: Graph,
        plan: Plan,
        cluster: Cluster,
        module: nn.Module,
        *,
        seed: int,
        device: torch.device,
        initialise: Initialise | None,
        constraints: Mapping[str, Any],
        compile_with: Backend | None = None,
        timeout_s: float = TIMEOUT_S,
        outputs: Literal["loss", "all"] = "loss",
    ) -> None:
        self.cluster = cluster
        self.corrections = Corrections()
        self.constraints = dict(constraints)
        self.seeds = Seeds(seed)
        self._compile_with = compile_with
        self._wanted = frozenset(name for _, name in graph.outputs) if outputs == "all" else frozenset()
        start_s = time.perf_counter()
        state = local_state(graph, module, device, seed, initialise)

        def values(specs: Sequence[ParameterSpec]) -> Mapping[str, Tensor]:
            return local_values(specs, module, dist.get_rank(), seed, device, initialise)

        runtime = build_runtime(graph, plan, values, state, device, self._stream(device), compile_with, self._wanted)
        super().__init__(graph, runtime, simulate(graph, plan, cluster), device, timeout_s, outputs)
        self.build_s = time.perf_counter() - start_s
        self.saving = Saving()
        self.state_names = state_names(module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The loss of the batch; see `ParallelModule`."""
        self.seeds.next_step()
        return super().forward(*args, **kwargs)

    def stream(self, batches: Iterable[Any], optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
        """Train without flushes; see `ParallelModule.stream`."""
        self.seeds.next_step()
        return super().stream(batches, optimizer)

    def _stream(self, device: torch.device) -> Callable[[str], AbstractContextManager[Any]]:
        seeds = self.seeds  # not self: the runtime must not keep the model alive
        return lambda key: seeds.stream(key, device)

    def loader(self, dataset: Any, batch_size: int, shuffle: bool = False, **options: Any) -> RankLoader:
        """Batches of just this rank's rows, `batch_size` being global; see runtime/loader.py."""
        return RankLoader(dataset, batch_size, self.runtime.first.rows, shuffle=shuffle, **options)

    def refine(self, optimizer: torch.optim.Optimizer, remaining_steps: int | None = None) -> Refinement:
        """Hold the measured timeline against the predicted one, correct the cost model, search again, and move to the new
        plan when that pays over `remaining_steps` (default: as many as have been run). All ranks must call it.

        Parameters and the optimizer's state are moved in memory; `optimizer` stays the same object.
        """
        return refine(self, optimizer, remaining_steps)

    def move(self, plan: Plan, optimizer: torch.optim.Optimizer, costs: CostModel) -> float:
        """Run `plan` from now on, with the parameters and the optimizer's state as they are; returns the seconds it took.

        All ranks must call it. `optimizer` keeps its identity, its options and its state.
        """
        start_s = time.perf_counter()
        self.share_buffers()
        old, rank = self.runtime, dist.get_rank()
        before, after = (ownerships(self.graph, p) for p in (old.plan, plan))
        dtypes = {t.fqn: t.at_rest for t in self.graph.parameters}
        held = {fqn: local_tensor(p.detach()) for fqn, p in old.storage.parameters.items()}

        def values(specs: Sequence[ParameterSpec]) -> Mapping[str, Tensor]:
            return reshard(held, before, after, dtypes, rank, self.device)

        state = old.executor.state
        stream = self._stream(self.device)
        runtime = build_runtime(self.graph, plan, values, state, self.device, stream, self._compile_with, self._wanted)
        move_optimizer(optimizer, old.storage.parameters, runtime.storage.parameters, before, after, rank, self.device)
        self.measurement.close()
        self.install(runtime)
        old.close()
        self.prediction = simulate(self.graph, plan, self.cluster, costs)
        return time.perf_counter() - start_s


def parallelize(
    module: nn.Module,
    example: Any,
    loss: Callable[..., Tensor] | None = None,
    plan: Plan | str | Path | None = None,
    cluster: Cluster | None = None,
    *,
    initialise: Initialise | None = None,
    timeout_s: float = TIMEOUT_S,
    precision: Precision | None = None,
    reduce_dtype: Precision = "float32",
    offload: bool = False,
    compile: bool | Backend = False,
    outputs: Literal["loss", "all"] = "loss",
    **constraints: Any,
) -> Model:
    """Make `module` train on the whole world, by the plan expected to be fastest among those that fit in memory.

    module: real (equal on all ranks, or rank 0's is taken), or on the meta device (then initialised shard by shard).
    example: one global batch: a tensor, a tuple of positional or a dict of keyword arguments, real or on meta.
    loss: None if the module returns the scalar loss, or an object with `.loss`; else called as loss(output, *targets), the
        targets being the example entries that `module.forward` does not take.
    plan: a Plan or a plan file to use instead of a search. cluster: hardware, probed if None.
    initialise: for modules on the meta device, how to fill a submodule; see runtime/initialise.py.
    timeout_s: how long one instruction of a step may take before the run is ended on all ranks, with the rank that hangs or
        has died named.
    precision: "bfloat16" or "float16": compute in it from float32 parameters at rest, cast at use; what the module itself
        computes in float32 stays so. By default what the plan says, else "float32": every dtype as the module has it.
        With "float16", torch.amp.GradScaler works as ever.
    reduce_dtype: what gradients of parameters that are cast so are summed in. offload: parameters at rest, gradients and
        the optimizer's state stay in host memory, and the optimizer runs there. A given plan says these two itself.
    compile: run blocks through torch.compile, each kind of block once; True is its default backend, and another may be
        named or given. An instruction may then take ten times timeout_s, because the first ones compile.
    outputs: "loss", or "all": a call returns what the module returns (with a loss function: an object with `loss` and, as
        `output`, that), its tensors whole on every rank, which costs their communication; no gradient flows into them.
    constraints: data=, tensor=, context=, expert=, pipeline=, microbatches=, schedule=, zero=, recompute=,
        memory_limit_bytes=, memory_reserve=, layout= and stage= (by pattern of modules' names) pin a choice of the search
        each, and time_limit_s= ends it; see `autopar.search`.
    Under torchrun all ranks must call it alike; without a launcher the world is this process. ValueError for what cannot
    be done, the same on every rank.
    """
    device = join_world()
    if plan is not None and constraints:
        raise ValueError(f"plan= is a whole plan, so it excludes {sorted(constraints)}; give one or the other")
    if outputs not in ("loss", "all"):
        raise ValueError(f"outputs={outputs!r}: expected 'loss' or 'all'")
    torch_dtype(reduce_dtype)
    given = from_rank_zero(lambda: plan if plan is None or isinstance(plan, Plan) else Plan.load(plan))
    graph = capture(module, example, loss, precision=precision or (given.precision if given else "float32"))
    if cluster is None:
        cluster = Cluster.probe()
    if cluster.world_size != dist.get_world_size():
        raise ValueError(
            f"the cluster has {cluster.world_size} devices but {dist.get_world_size()} processes run; "
            "start one process per device, or pass cluster=None to probe what is there"
        )
    if compile and cluster.software == "autopar":
        cluster = replace(cluster, software="autopar-compile")
    chosen = given or from_rank_zero(
        lambda: replace(search(graph, cluster, **constraints), reduction=reduce_dtype, offload=offload)
    )
    chosen.validate(graph, cluster)
    graph = chosen.graph_of(graph)
    if outputs == "all":
        check_outputs(graph)
    seed = from_rank_zero(torch.initial_seed)
    return Model(
        graph,
        chosen,
        cluster,
        module,
        seed=seed,
        device=device,
        initialise=initialise,
        constraints=constraints,
        compile_with="inductor" if compile is True else compile or None,
        timeout_s=timeout_s * (10 if compile else 1),
        outputs=outputs,
    )
