"""Random plans of random modules, every rank's real runtime in this process: exact, or refused.

And programs that no schedule would write: what the checker lets through ends, with the right numbers; what it refuses
does not.
"""

from __future__ import annotations

import functools
import math
import random

import pytest
import torch
from loopback import Deadlock
from loopback_plans import parallel_step
from plan_cases import unequal_plan
from random_models import BATCH, random_model
from torch import Tensor, nn

import autopar
from autopar.cluster.spec import Cluster
from autopar.graph import Graph
from autopar.plan import Plan
from autopar.schedule.build import program_for
from autopar.schedule.check import ScheduleError, check
from autopar.schedule.instructions import OptimizerStep, Program, Prologue, ReduceGradients
from autopar.schedule.orders import SCHEDULES

EXACT = (2e-6, 1e-5)
"""Relative errors of the loss and of a gradient against its norm."""


MOST_RANKS = 12  # each costs as much as any other: more plans say more


@functools.cache
def graph_of(seed: int) -> Graph:
    return autopar.capture(*random_model(seed))


def random_plan(graph: Graph, seed: int) -> Plan:
    """1 to 4 meshes and at most 12 ranks, mostly with uneven shares, under any schedule that finds blocks enough; recompute
    differs from block to block."""
    draw = random.Random(seed)
    microbatches = draw.choice([1, 2, 4])
    rows = BATCH // microbatches
    schedule = draw.choice(
        [name for name, one in SCHEDULES.items() if one.flushes and (one.virtual or 2) <= len(graph.blocks)]
    )
    most = min(4, len(graph.blocks) // (SCHEDULES[schedule].virtual or 2))
    meshes = [
        (draw.choice([d for d in (1, 1, 2, 3) if d <= rows]), draw.choice([1, 1, 2, 2, 4, (2, 2)]))
        for _ in range(draw.randint(1, most))
    ]
    while sum(data * math.prod(axes if isinstance(axes, tuple) else (axes,)) for data, axes in meshes) > MOST_RANKS:
        meshes.pop()
    uneven = draw.random() < 0.6 or any(rows % data for data, _ in meshes)
    return unequal_plan(
        graph,
        meshes,
        microbatches,
        shares="random" if uneven else (),
        schedule=schedule,
        recompute=draw.choice(["none", "mixed", "full"]),
        seed=seed,
    )


@pytest.mark.parametrize(
    "model_seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(6, 24))]
)
def test_random_plans_are_exact(model_seed: int) -> None:
    graph = graph_of(model_seed)
    module, example = random_model(model_seed)
    for seed in range(model_seed * 10, model_seed * 10 + 10):
        plan = random_plan(graph, seed)
        plan.validate(graph, Cluster.preset("cpu", hosts=1, devices_per_host=plan.world_size))
        errors = parallel_step(graph, module, example, plan)
        assert errors[0] < EXACT[0] and errors[1] < EXACT[1], (seed, plan, errors)


@autopar.opaque
class Scan(nn.Module):
    """Goes on from the state in its attribute, as a decoder does from token to token."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.state = None

    def forward(self, x: Tensor) -> Tensor:
        self.state = self.layer(x).sum(1) + (0.0 if self.state is None else self.state)
        return x + self.state[:, None]


class Decoder(nn.Module):
    """Clears the state of what it calls, in code that does not outlast the capture."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scan = nn.Linear(8, 8), Scan()

    def forward(self, x: Tensor) -> Tensor:
        self.scan.state = None
        return self.scan(self.first(x)).square().mean()


@pytest.mark.filterwarnings("ignore:The tensor attribute")
def test_a_state_in_an_attribute_does_not_pass_from_call_to_call() -> None:
    torch.manual_seed(0)
    module, example = Decoder(), {"x": torch.randn(8, 4, 8)}
    graph = autopar.capture(module, example)
    plan = unequal_plan(graph, [(1, 1), (2, 1)], 2)
    for _ in range(2):
        errors = parallel_step(graph, module, example, plan)
        assert errors[0] < EXACT[0] and errors[1] < EXACT[1], errors


def disturbed(program: Program, draw: random.Random) -> Program:
    """One or two instructions of a row put elsewhere in it, left out or given twice.

    The optimizer's step and the prologue stay, because runs do not depend on where the first one stands, nor on the second
    one where a loss needs no count; and gradients are not reduced twice, because nothing may be left to reduce.
    """
    rows = [list(row) for row in program.actions]
    for _ in range(draw.choice([1, 1, 2])):
        row = draw.choice(rows)
        movable = [i for i, action in enumerate(row) if not isinstance(action, OptimizerStep | Prologue)]
        source, target = draw.choice(movable), draw.choice(movable)
        how = draw.choice(["move", "move", "leave out", "give twice"])
        if how == "leave out":
            row.pop(source)
        elif how == "give twice" and not isinstance(row[source], ReduceGradients):
            row.insert(target, row[source])
        else:
            row.insert(target, row.pop(source))
    return Program(tuple(map(tuple, rows)))


def pipelined(graph: Graph, draw: random.Random) -> Plan:
    """2 or 3 sets of ranks, with more than scalars crossing: a microbatch's summand of the loss may be mistaken for
    another's. Every stage has something to learn, or nobody would miss its reduction."""
    while True:
        meshes = [(draw.choice([1, 2]), draw.choice([1, 1, 2])) for _ in range(draw.choice([2, 2, 3]))]
        schedule, seed = draw.choice([name for name, one in SCHEDULES.items() if one.flushes]), draw.randrange(1000)
        if len(meshes) * (SCHEDULES[schedule].virtual or 2) > len(graph.blocks):
            continue
        plan = unequal_plan(graph, meshes, draw.choice([2, 4]), schedule=schedule, seed=seed)
        crossing = [graph.blocks[stage.stop - 1].outputs for stage in plan.stages[:-1]]
        learns = [
            any(
                graph.tensors[name].requires_grad
                for block in graph.blocks[s.start : s.stop]
                for name in block.parameters
            )
            for s in plan.stages
        ]
        if all(learns) and all(any(graph.tensors[name].shape for name in names) for names in crossing):
            return plan


def ends_well(graph: Graph, seed: int, plan: Plan, program: Program) -> tuple[bool, str]:
    module, example = random_model(seed)
    try:
        errors = parallel_step(graph, module, example, plan, program)
    except Deadlock:
        return False, "deadlock"
    except Exception as error:
        return False, f"{type(error).__name__}: {error}"
    return errors[0] < EXACT[0] and errors[1] < EXACT[1], f"errors {errors}"


def test_the_checker_agrees_with_what_happens() -> None:
    verdicts = {True: 0, False: 0}
    deadlocks = 0
    # Stages that share a parameter meet in the reduction of its gradient, of which programs do not tell.
    untied = [seed for seed in range(16) if not graph_of(seed).shared_parameters][:8]
    for seed in range(100):
        model_seed = untied[seed % len(untied)]
        graph = graph_of(model_seed)
        draw = random.Random(seed)
        plan = pipelined(graph, draw)
        program = disturbed(program_for(plan), draw)
        try:
            check(program)
            legal, reason = True, ""
        except ScheduleError as error:
            legal, reason = False, error.reason
        ended, how = ends_well(graph, model_seed, plan, program)
        assert ended == legal, f"seed {seed}: the checker says {reason or 'yes'}, the run {how}\n{program}"
        verdicts[legal] += 1
        deadlocks += how == "deadlock"
    assert min(*verdicts.values(), deadlocks) > 10, (verdicts, deadlocks)
