"""Asynchronous pipelines: PipeDream's definition by hand, programs, and training against delayed gradients on one device."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import models
import pytest
import torch
from plan_cases import random_plan
from test_parity import call, graph_of
from torch import Tensor, nn

import autopar
from autopar.cluster.spec import Cluster
from autopar.cost.types import StageCost
from autopar.graph import Graph
from autopar.plan import Plan, Stage
from autopar.runtime.torch_private import local_tensor
from autopar.schedule.build import build_program, build_stream, program_for
from autopar.schedule.check import ScheduleError, check
from autopar.schedule.instructions import Program, RestoreWeights, StashWeights, Update, parse_instruction
from autopar.simulate import simulate, simulate_program

ZERO = StageCost(*[0.0] * 4, 0, *[0.0] * 4, *[0] * 7)


# ----------------------------------------------------------------------------------------------------------- programs


def shapes(seed: int) -> tuple[int, int, str, int]:
    rng = random.Random(seed)
    stages, name = rng.randint(1, 6), rng.choice(("pipedream", "2bw"))
    return stages, 1 if name == "pipedream" else stages + rng.randint(0, 3), name, rng.randint(1, 9)


@pytest.mark.parametrize("seed", range(40))
def test_versions_are_those_of_the_papers(seed: int) -> None:
    stages, microbatches, name, batches = shapes(seed)
    program = build_stream(stages, microbatches, name, batches)
    assert Program.parse(str(program)) == program
    for s, row in enumerate(program.actions):
        alive: set[int] = set()
        updates, most = 0, 1
        for i in row:
            if isinstance(i, StashWeights):
                m = i.microbatch
                expected = max(0, m - (stages - 1 - s)) if name == "pipedream" else max(0, m // microbatches - 1)
                assert i.version == expected
            if isinstance(i, StashWeights | RestoreWeights):
                alive.add(i.version)
            if isinstance(i, Update):
                updates += 1
                needed = {
                    j.version for j in row[row.index(i) :] if isinstance(j, RestoreWeights) and j.version <= updates
                }
                most = max(most, len(needed | {updates}))
        assert most <= (2 if name == "2bw" else stages - s)
        assert updates == batches


def test_a_stream_without_end_is_a_longer_program_of_the_same_order() -> None:
    short, long = build_stream(3, 1, "pipedream", 9), build_stream(3, 1, "pipedream", 20)
    for a, b in zip(short.actions, long.actions, strict=True):
        steady = len(a) - 3 * 8
        assert a[:steady] == b[:steady]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("1WS2@2", "1WS2@3", "names weights that have not come into being"),
        ("0WR2@1", "0WR2@0", "restores other weights than those of 1"),
        ("0WS1@0", None, "0F1 uses what 0WS1 has not produced yet"),
        ("1WR3@3", None, "1B3 uses what 1WR3 has not produced yet"),
        ("0U1", None, "0WS3@2 names weights that have not come into being"),
        ("0U0", "0U1", "0U1 stands where update 0 is due"),
        ("1U3", None, "1U3 is missing|are not"),
        ("0P2", None, "0P2 is missing"),
    ],
)
def test_faults_of_streams_are_found(old: str, new: str | None, reason: str) -> None:
    rows = [list(row) for row in build_stream(2, 1, "pipedream", 4).actions]
    row = rows[int(old[0])]
    index = row.index(parse_instruction(old))
    row[index : index + 1] = [parse_instruction(new)] if new else []
    with pytest.raises(ScheduleError, match=reason):
        check(Program(tuple(map(tuple, rows))))


def test_what_a_stream_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="so a batch is one: set microbatches to 1"):
        build_stream(2, 2, "pipedream", 3)
    with pytest.raises(ValueError, match="at least as many microbatches as stages, 4, not 3"):
        build_stream(4, 3, "2bw", 3)
    with pytest.raises(ValueError, match="'2bw' has no step"):
        build_program(2, 2, "2bw")


def test_the_simulator_shows_a_steady_batch() -> None:
    """Equal stages never wait for each other: a batch takes M (f + b), an update and nothing else."""
    costs = [
        replace(ZERO, forward_s=1.0, backward_s=2.0, optimizer_s=0.5, activation_bytes=10, parameter_bytes=1000)
    ] * 4

    class Costs:
        def stage(self, plan: Plan, index: int) -> StageCost:
            return costs[index]

    for name, microbatches, copies in (("pipedream", 1, (4, 3, 2, 1)), ("2bw", 6, (2, 2, 2, 2))):
        stages = tuple(Stage(s, s + 1, (s,), 1) for s in range(4))
        plan = Plan("m", "f", 4, 24, microbatches, name, stages)
        line = simulate(None, plan, None, model=Costs())
        assert line.step_time_s == pytest.approx(3.0 * microbatches + 0.5)
        assert line.bubble_fraction() == pytest.approx(0.0, abs=1e-9)
        assert line.peak_memory_bytes == {s: 1000 * copies[s] + 10 * (4 - s) for s in range(4)}
        # Started and stopped for each batch, the pipeline would wait (S - 1)(f + b) each time.
        whole = simulate_program(program_for(plan), costs)
        assert whole.step_time_s > line.step_time_s
        assert all(e.start_s >= 0 and e.end_s <= line.step_time_s + 1e-9 for e in line.events)


# ------------------------------------------------------------------------------------------------------------- by hand


class Chain(nn.Module):
    """y = b (a x) with numbers a and b; the loss is y."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.a.weight, 2.0)
        nn.init.constant_(self.b.weight, 3.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)).sum()


def by_hand(schedule: str, microbatches: int, values: list[list[float]]) -> tuple[list[float], dict[str, float]]:
    """Losses and this rank's weights after SGD with rate 1/8 on two ranks, a on the first and b on the second."""
    torch.manual_seed(0)
    module, example = Chain(), torch.zeros(len(values[0]), 1)
    graph = autopar.capture(module, example)
    cut = next(
        i for i, block in enumerate(graph.blocks) if any(p[0] == "b" for p in map(graph_fqn(graph), block.parameters))
    )
    stages = (Stage(0, cut, (0,), 1), Stage(cut, len(graph.blocks), (1,), 1))
    plan = Plan(graph.name, graph.fingerprint, 2, len(values[0]), microbatches, schedule, stages)
    model = autopar.parallelize(module, example, plan=plan, cluster=Cluster.preset("cpu", hosts=1, devices_per_host=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.125)
    losses = [loss.item() for loss in model.stream([torch.tensor(v)[:, None] for v in values], optimizer)]
    return losses, {name: p.item() for name, p in model.named_parameters()}


def graph_fqn(graph: Graph) -> Callable[[str], str]:
    return lambda name: graph.tensors[name].fqn


def test_pipedream_by_hand(pool) -> None:
    """Two stages, weights a and b, loss b a x, rate 1/8; da = b x and db = a x with the weights of the forward.

    Stage 0 has V(m) = max(0, m - 1), stage 1 has V(m) = m.
    x = 1: a0 = 2, b0 = 3: loss 6; da = 3, db = 2: a1 = 2 - 3/8 = 1.625, b1 = 3 - 2/8 = 2.75.
    x = 2: a0 = 2, b1 = 2.75: loss 11; da = 5.5, db = 4: a2 = 1.625 - 5.5/8 = 0.9375, b2 = 2.75 - 4/8 = 2.25.
    x = 1: a1 = 1.625, b2 = 2.25: loss 3.65625; da = 2.25, db = 1.625: a3 = 0.9375 - 2.25/8 = 0.65625, b3 = 2.046875.
    """
    for losses, weights in pool.run(by_hand, "pipedream", 1, [[1.0], [2.0], [1.0]], world_size=2, timeout_s=60):
        assert losses == [6.0, 11.0, 3.65625]
        assert weights in ({"a.weight": 0.65625}, {"b.weight": 2.046875})


def test_double_buffered_weights_by_hand(pool) -> None:
    """Batches of two microbatches, all with the weights before the latest: V = 0, 0, 1.

    x = (1, 1): a0, b0: loss 12; da = 6, db = 4: a1 = 2 - 6/8 = 1.25, b1 = 3 - 4/8 = 2.5.
    x = (2, 0): a0, b0: loss 12; da = 6, db = 4: a2 = 1.25 - 6/8 = 0.5, b2 = 2.5 - 4/8 = 2.
    x = (1, 1): a1, b1: loss 6.25; da = 5, db = 2.5: a3 = 0.5 - 5/8 = -0.125, b3 = 2 - 2.5/8 = 1.6875.
    """
    values = [[1.0, 1.0], [2.0, 0.0], [1.0, 1.0]]
    for losses, weights in pool.run(by_hand, "2bw", 2, values, world_size=2, timeout_s=60):
        assert losses == [12.0, 12.0, 6.25]
        assert weights in ({"a.weight": -0.125}, {"b.weight": 1.6875})


# ------------------------------------------------------------------------------------------------- against one device


def batches_of(example: Any, count: int) -> list[Any]:
    """The example with its rows in other orders: other batches of its kind."""

    def shuffled(value: Tensor, seed: int) -> Tensor:
        return value[torch.randperm(len(value), generator=torch.Generator().manual_seed(seed))].roll(seed, -1)

    made = []
    for seed in range(count):
        if isinstance(example, dict):
            made.append({k: shuffled(v, seed) for k, v in example.items()})
        elif isinstance(example, tuple):
            made.append(
                tuple(v[torch.randperm(len(v), generator=torch.Generator().manual_seed(seed))] for v in example)
            )
        else:
            made.append(shuffled(example, seed))
    return made


def delayed(
    module: nn.Module, loss: Any, batches: list[Any], stage_of: dict[str, int], stages: int, schedule: str, lr: float
) -> list[float]:
    """Train `module` on one device, each batch with the weights v(stage, batch) of its schedule; returns the losses."""
    parameters = dict(module.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=lr)
    history = [{name: p.detach().clone() for name, p in parameters.items()}]
    losses = []
    for b, batch in enumerate(batches):
        with torch.no_grad():
            for name, p in parameters.items():
                late = stages - 1 - stage_of[name] if schedule == "pipedream" else 1
                p.copy_(history[max(0, b - late)][name])
        optimizer.zero_grad()
        value = call(module, batch, loss)
        value.backward()
        losses.append(value.item())
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(history[b][name])
        optimizer.step()
        history.append({name: p.detach().clone() for name, p in parameters.items()})
    return losses


def streamed(name: str, options: dict[str, Any], count: int, stop: int | None) -> tuple[float, float, float, int]:
    """(loss error, weight error, evaluation error) against delayed gradients, and how many batches were trained on."""
    module, example, loss = getattr(models, name)()
    graph = graph_of(name)
    plan = random_plan(graph, **options)
    model = autopar.parallelize(
        module, example, loss, plan=plan, cluster=Cluster.preset("cpu", hosts=1, devices_per_host=plan.world_size)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    taken: list[None] = []
    optimizer.register_step_post_hook(lambda *_: taken.append(None))
    batches = batches_of(example, count)
    found = []
    for value in model.stream(batches, optimizer):
        found.append(value.item())
        if stop is not None and len(found) == stop:
            break
    steps = len(taken)
    stage_of = {
        graph.tensors[p].fqn: s
        for s, stage in enumerate(plan.stages)
        for block in graph.blocks[stage.start : stage.stop]
        for p in block.parameters
    }
    expected = delayed(module, loss, batches[:steps], stage_of, len(plan.stages), plan.schedule, 1e-2)
    assert len(found) == (stop or count), found
    errors = [abs(a - b) / abs(b) for a, b in zip(found, expected, strict=False)]
    weights = 0.0
    oracle = dict(module.named_parameters())
    for fqn, p in model.named_parameters():
        whole = p.autopar.ownership.take(oracle[fqn].detach(), model.runtime.groups.rank)
        weights = max(weights, float((local_tensor(p.detach()).cpu() - whole).norm() / oracle[fqn].norm()))
    with torch.no_grad():
        evaluated = call(model.eval(), example).item()
        wanted = call(module.eval(), example, loss).item()
    return max(errors), weights, abs(evaluated - wanted) / abs(wanted), steps


CASES = [
    dict(name="build_llama", data=1, tensor=1, pipeline=2, microbatches=1, schedule="pipedream"),
    dict(name="build_mlp", data=1, tensor=1, pipeline=4, microbatches=1, schedule="pipedream"),
    dict(name="build_llama", data=2, tensor=1, pipeline=2, microbatches=1, schedule="pipedream", recompute="full"),
    dict(name="build_mlp", data=1, tensor=1, pipeline=4, microbatches=4, schedule="2bw"),
    dict(name="build_llama", data=1, tensor=2, pipeline=2, microbatches=4, schedule="2bw", recompute="full"),
    dict(name="build_conv_net", data=2, tensor=1, pipeline=2, microbatches=2, schedule="2bw"),
]


@pytest.mark.parametrize("stop", [None, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "index", [i if i in (0, 3) else pytest.param(i, marks=pytest.mark.slow) for i in range(len(CASES))]
)
def test_training_is_that_of_delayed_gradients(pool, index: int, stop: int | None) -> None:
    options = dict(CASES[index])
    name = options.pop("name")
    world = options["data"] * options["tensor"] * options["pipeline"]
    results = pool.run(streamed, name, options | dict(seed=index), 6, stop, world_size=world, timeout_s=120)
    assert len({steps for *_, steps in results}) == 1, "every rank ends with the same batch"
    for loss, weights, evaluated, steps in results:
        assert loss < 1e-5 and weights < 1e-5 and evaluated < 1e-5, (loss, weights, evaluated)
        assert steps == 6 if stop is None else stop <= steps <= 6


def endless(options: dict[str, Any], count: int) -> tuple[list[float], int]:
    """The first losses of a stream whose batches do not end, and how many batches have been taken for them."""
    module, example, loss = models.build_mlp()
    plan = random_plan(graph_of("build_mlp"), **options)
    cluster = Cluster.preset("cpu", hosts=1, devices_per_host=plan.world_size)
    model = autopar.parallelize(module, example, loss, plan=plan, cluster=cluster)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    taken = itertools.count()
    stream = model.stream((example for _ in taken), optimizer)
    losses = [value.item() for value in itertools.islice(stream, count)]
    before_end = next(taken)
    stream.close()
    model.runtime.close()
    return losses, before_end


@pytest.mark.parametrize("schedule", ["pipedream", "2bw"])
def test_a_stream_takes_no_more_batches_than_it_works_on(pool, schedule: str) -> None:
    options = dict(data=1, tensor=1, pipeline=2, microbatches=1 if schedule == "pipedream" else 2, schedule=schedule)
    results = pool.run(endless, options, 3, world_size=2)
    assert results[0][0] == results[1][0]
    assert all(taken <= 3 + 2 for _, taken in results), results


def refused(name: str, options: dict[str, Any]) -> list[str]:
    module, example, loss = getattr(models, name)()
    cluster = Cluster.preset("cpu", hosts=1, devices_per_host=2)
    model = autopar.parallelize(module, example, loss, plan=random_plan(graph_of(name), **options), cluster=cluster)
    said = []
    for attempt in (
        lambda: call(model, example),
        lambda: model.stream([example], torch.optim.SGD(model.parameters(), 0.1)),
    ):
        try:
            attempt()
        except ValueError as error:
            said.append(str(error))
    return said


def test_calls_and_streams_each_name_the_other(pool) -> None:
    options = dict(data=1, tensor=1, pipeline=2, microbatches=1)
    for (said,) in pool.run(refused, "build_mlp", options | dict(schedule="pipedream"), world_size=2):
        assert "model.stream(batches, optimizer)" in said
    for (said,) in pool.run(refused, "build_mlp", options | dict(schedule="1f1b"), world_size=2):
        assert "stream wants 'pipedream' or '2bw'" in said


def test_plans_without_versions_to_keep_are_refused() -> None:
    graph = graph_of("build_tied_lm")
    cluster = Cluster.preset("cpu", hosts=1, devices_per_host=2)
    plan = random_plan(graph, 1, 1, 2, 1, schedule="pipedream")
    with pytest.raises(ValueError, match="stages 0, 1 share .*each stage has its own version"):
        plan.validate(graph, cluster)
    plan = random_plan(graph_of("build_mlp"), 1, 1, 2, 2, schedule="pipedream")
    with pytest.raises(ValueError, match="plan.microbatches: .*so a batch is one"):
        plan.validate(graph_of("build_mlp"), cluster)
    plan = random_plan(graph_of("build_mlp"), 2, 1, 2, 2, schedule="2bw", zero=3)
    with pytest.raises(ValueError, match="zero is 3, but schedule '2bw' keeps whole versions"):
        plan.validate(graph_of("build_mlp"), Cluster.preset("cpu", hosts=1, devices_per_host=4))
