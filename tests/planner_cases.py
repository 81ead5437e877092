"""Seeded small planning problems with hand-made costs, for the tests of plans and of the stage search."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from models import build_gpt2, build_llama, build_tied_lm

from autopar import capture
from autopar.cluster.spec import Cluster, Device, Link
from autopar.cost.model import CostModel
from autopar.cost.types import StageCost
from autopar.graph import Block, Graph, Op, Ref, Tensor
from autopar.plan import Plan
from autopar.planner.chains import LayoutChains
from autopar.planner.inputs.table_problem import whole_layout
from autopar.planner.methods.exhaustive import every_plan
from autopar.planner.pricing import Piece, assemble
from autopar.planner.problem import Chain, Constraints, Problem, Shape
from autopar.simulate import simulate

WIDTH = 24


def chain_graph(kinds: tuple[int, ...], batch_size: int, name: str = "Chain") -> Graph:
    """Blocks of one to three linear layers, as their kind says; the last block sums to the loss."""
    tensors = {"x": Tensor("x", (batch_size, WIDTH), torch.float32, "input")}
    ops, blocks = [], []
    value = "x"
    for index, kind in enumerate(kinds):
        names, parameters, entered = [], [], value
        for layer in range(kind % 3 + 1):
            weight, out = f"w{index}_{layer}", f"y{index}_{layer}"
            tensors[weight] = Tensor(
                weight, (WIDTH, WIDTH), torch.float32, "parameter", True, f"layers.{index}.{layer}.weight"
            )
            tensors[out] = Tensor(out, (batch_size, WIDTH), torch.float32, "activation", True)
            ops.append(
                Op(
                    f"linear{index}_{layer}",
                    "aten.linear.default",
                    (Ref(value), Ref(weight)),
                    (),
                    (out,),
                    f"layers.{index}",
                )
            )
            names.append(ops[-1].name)
            parameters.append(weight)
            value = out
        last = index == len(kinds) - 1
        if last:
            tensors["loss"] = Tensor("loss", (), torch.float32, "activation", True)
            ops.append(Op("sum", "aten.sum.default", (Ref(value),), (), ("loss",)))
            names.append("sum")
        # the last block also has the loss, so it is of a kind of its own
        blocks.append(
            Block(
                index,
                kind + 1000 * last,
                tuple(names),
                (entered,) if index else (),
                () if last else (value,),
                tuple(parameters),
            )
        )
    return Graph(
        name, tensors, tuple(ops), ("x",), (0,), "loss", (), (), frozenset(), tuple(blocks), batch_size,
    )  # fmt: skip


def small_cluster(world_size: int, per_host: int | None = None, memory_bytes: int = 10**12) -> Cluster:
    per_host = per_host or world_size
    device = Device("test", memory_bytes, {"float32": 1e12}, 1e11, 1e-6, 1e-6)
    return Cluster(device, world_size // per_host, per_host, Link(1e-6, 1e11), Link(1e-5, 1e10), "test")


@dataclass
class MadeUpCosts:
    """Costs that are drawn once per kind of block; a stage adds up its blocks. `asked` counts the questions.

    They keep what planner/auto.py assumes: cutting, ZeRO and recomputation save no time, a tensor axis at most its
    share.
    """

    graph: Graph
    cluster: Cluster
    seed: int
    slow_network: float = 1.0
    asked: int = 0
    _kinds: dict = field(default_factory=dict)

    def _kind(self, kind: int) -> dict[str, float]:
        if kind not in self._kinds:
            draw = random.Random(f"{self.seed} {kind}")
            self._kinds[kind] = {
                "forward": draw.uniform(0.2, 2) * 1e-3,
                "backward": draw.uniform(0.5, 4) * 1e-3,
                "launch": draw.uniform(0, 0.5) * 1e-3,
                "efficiency": draw.uniform(0.3, 1.0),
                "gather": draw.uniform(0, 1) * 1e-3,
                "send": draw.uniform(0, 0.3) * 1e-3 * self.slow_network,
                "reduce": draw.uniform(0, 3) * 1e-3 * self.slow_network,
                "optimizer": draw.uniform(0, 1) * 1e-3,
                "parameters": draw.randrange(1, 100),
                "activations": draw.randrange(1, 100),
                "inputs": draw.randrange(0, 20),
                "peak": draw.randrange(0, 30),
                "again": draw.uniform(0.05, 0.6),
                "products": draw.uniform(0.1, 0.9),
                "weight": draw.uniform(0.2, 0.6),
                "deferred": draw.randrange(0, 40),
            }
        return self._kinds[kind]

    def stage(self, plan: Plan, index: int) -> StageCost:
        self.asked += 1
        stage = plan.stages[index]
        blocks = self.graph.blocks[stage.start : stage.stop]
        kinds = [self._kind(block.kind) for block in blocks]
        rows = plan.batch_size // stage.data / plan.microbatches
        share = [rows * stage.tensor ** -kind["efficiency"] for kind in kinds]
        forward_s = sum(k["launch"] + s * k["forward"] for k, s in zip(kinds, share, strict=True))
        backward_s = sum(k["launch"] + s * k["backward"] for k, s in zip(kinds, share, strict=True))
        reduce_s = sum(k["reduce"] for k in kinds) / stage.tensor * (1 - 1 / stage.data)
        after_s = 0.0
        if stage.zero == 3:
            gather_s = sum(k["gather"] for k in kinds)
            forward_s, backward_s = forward_s + gather_s, backward_s + 2 * gather_s
        elif stage.zero:
            after_s = sum(k["gather"] for k in kinds)
        if stage.zero == 2:
            backward_s, reduce_s = backward_s + reduce_s, 0.0
        for kind, part, choice in zip(kinds, share, stage.block_recompute, strict=True):
            again = {"none": 0.0, "selective": kind["again"], "full": 1.0}[choice]
            backward_s += again * (kind["launch"] + part * kind["forward"])
        last = index == len(plan.stages) - 1
        far = (
            1
            if last
            else 1 + abs(self.cluster.host(plan.stages[index + 1].ranks[0]) - self.cluster.host(stage.ranks[0]))
        )
        held = sum(k["parameters"] for k in kinds) // stage.tensor
        group = stage.zero_group or stage.data
        activations = sum(
            {
                "none": k["activations"],
                "selective": k["inputs"] + k["products"] * k["activations"],
                "full": k["inputs"],
            }[c]
            for k, c in zip(kinds, stage.block_recompute, strict=True)
        )
        return StageCost(
            forward_s=forward_s,
            backward_s=backward_s,
            prologue_s=1e-5 if last else 0.0,
            send_s=0.0 if last else kinds[-1]["send"] * rows * far,
            boundary_bytes=0 if last else int(8 * rows),
            reduce_s=reduce_s,
            reduce_overlap_s=min(reduce_s, backward_s) / 2,
            reduce_model_s=after_s,
            optimizer_s=sum(k["optimizer"] for k in kinds) / stage.tensor / (group if stage.zero else 1),
            parameter_bytes=held // (group if stage.zero == 3 else 1),
            gradient_bytes=held // (group if stage.zero >= 2 else 1),
            optimizer_bytes=2 * held // (group if stage.zero else 1),
            unsharded_bytes=max(k["parameters"] for k in kinds) if stage.zero == 3 else 0,
            activation_bytes=int(activations * rows),
            forward_peak_bytes=int(max(k["peak"] for k in kinds) * rows),
            backward_peak_bytes=int(2 * max(k["peak"] for k in kinds) * rows),
            backward_weight_s=sum(s * k["weight"] * k["backward"] for k, s in zip(kinds, share, strict=True)),
            deferred_bytes=int(sum(k["deferred"] for k in kinds) * rows),
        )


class WholeLayouts:
    """One chain in which no op uses the axis: made-up costs do not look at layouts."""

    def of(self, problem: Problem, shape: Shape) -> tuple[Chain, ...]:
        if shape.tensor == 1:
            return (Chain(),)
        return (Chain.of([whole_layout(block, shape.tensor) for block in problem.graph.blocks]),)

    def smallest(self, problem: Problem, shape: Shape) -> Chain:
        return self.of(problem, shape)[0]

    def pass_s(self, problem: Problem, tensor: int, shards: int) -> list[float]:
        shape = Shape(1, 1, tensor, shards, "1f1b", 0)
        (chain,) = self.of(problem, shape)
        costs = []
        for block in problem.graph.blocks:
            plan = assemble(problem, shape, chain, [Piece(block.index, block.index + 1, "none")])
            costs.append(problem.costs.stage(plan, 0))
        return [cost.forward_s + cost.backward_s for cost in costs]

    def least_s(self, problem: Problem, shape: Shape, most_bytes: float, enough_s: float) -> float:
        return sum(self.pass_s(problem, shape.tensor, shape.shards))


def is_in_wide_space(plan: Plan) -> bool:
    """Whether planner/wide.py has it: one mesh of one model axis, one storage, and one choice of recomputation per stage."""
    first = plan.stages[0]
    storage = (first.data, first.axes, first.zero, 0)
    return len(first.axes) < 2 and all(
        len(set(s.block_recompute)) == 1 and (s.data, s.axes, s.zero, s.zero_group) == storage for s in plan.stages
    )


PINS = [{}, {"schedule": "1f1b"}, {"zero": 0}, {"microbatches": 2}, {"recompute": "full"}, {"schedule": "gpipe"}]


def random_problem(seed: int, world_sizes=(1, 2, 3, 4, 6, 8), most_blocks: int = 6, **pinned) -> Problem:
    """A small problem: up to 6 blocks of up to 3 kinds, on up to 8 devices, some of them on two hosts."""
    draw = random.Random(seed)
    world = draw.choice(world_sizes)
    kinds = tuple(draw.randrange(3) for _ in range(draw.randrange(2, most_blocks + 1)))
    graph = chain_graph(kinds, draw.choice([4, 6, 8]))
    cluster = small_cluster(world, world // 2 if world % 2 == 0 and draw.random() < 0.5 else world)
    costs = MadeUpCosts(graph, cluster, seed, slow_network=draw.choice([0.1, 1, 10]))
    return Problem(graph, cluster, costs, WholeLayouts(), Constraints(**pinned))


def limited(problem: Problem, limit_bytes: int) -> Problem:
    return replace(problem, constraints=replace(problem.constraints, memory_limit_bytes=limit_bytes))


def simulated(problem: Problem, plans: Iterable[Plan] | None = None) -> list[tuple[float, int]]:
    """(step time, peak of the fullest rank) of every plan, by default of the exact search's space."""
    plans = every_plan(problem) if plans is None else plans
    lines = (simulate(problem.graph, plan, problem.cluster, model=problem.costs) for plan in plans)
    return [(line.step_time_s, max(line.peak_memory_bytes.values())) for line in lines]


def small_enough(seed: int, most_plans: int, plans: Callable[[Problem], Iterator[Plan]] = every_plan) -> Problem:
    """A random problem whose space the oracle can walk, pinned at random until it is."""
    draw = random.Random(seed)
    for _ in range(100):
        problem = random_problem(draw.randrange(10**6), **draw.choice(PINS))
        try:
            count = sum(1 for _ in itertools.islice(plans(problem), most_plans + 1))
        except ValueError:
            continue
        if 1 < count <= most_plans:
            return problem
    raise AssertionError("no small problem was drawn")


def language_models() -> dict[str, Graph]:
    """Captured models of several layers, by name."""
    return {
        "llama": capture(*build_llama(layers=5)),
        "gpt2": capture(*build_gpt2(layers=4)),
        "tied": capture(*build_tied_lm(layers=4)),
    }


def real_problem(graph: Graph, preset: str, hosts: int = 2, per_host: int = 8, **pinned) -> Problem:
    """With the cost model of a preset."""
    cluster = Cluster.preset(preset, hosts=hosts, devices_per_host=per_host)
    return Problem(graph, cluster, CostModel(graph, cluster), LayoutChains(), Constraints(**pinned))
