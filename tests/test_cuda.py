"""The runtime on CUDA devices over NCCL: what tests of gloo ranks show, on the device, against the module on a CPU.

    pytest tests/test_cuda.py --cuda

Ranks share devices where there are fewer of them; NCCL then talks over sockets.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import test_checkpoint
import test_compile
import test_model
import test_overlap
import test_parity
import test_precision
import test_stream
import test_whole_plans_gloo
import torch
import torch.distributed as dist
from test_experts import experts_step

from autopar.cluster.spec import Cluster
from autopar.schedule.orders import schedule_named
from autopar.timeline import Timeline

pytestmark = [pytest.mark.cuda, pytest.mark.processes]

LOSS, GRADIENT = 1e-5, 1e-4

PLANS: dict[int, list[dict[str, Any]]] = {
    1: [
        dict(data=1, tensor=1, pipeline=1, microbatches=1, recompute="none"),
        dict(data=1, tensor=1, pipeline=1, microbatches=4, recompute="mixed"),
    ],
    2: [
        dict(data=2, tensor=1, pipeline=1, microbatches=2, zero=0),
        dict(data=2, tensor=1, pipeline=1, microbatches=2, zero=1),
        dict(data=2, tensor=1, pipeline=1, microbatches=1, zero=2),
        dict(data=2, tensor=1, pipeline=1, microbatches=2, zero=3, recompute="full"),
        dict(data=1, tensor=2, pipeline=1, microbatches=1, recompute="mixed"),
        dict(data=1, tensor=1, pipeline=2, microbatches=4, schedule="1f1b"),
        dict(data=1, tensor=1, pipeline=2, microbatches=4, schedule="interleaved"),
        dict(data=1, tensor=1, pipeline=2, microbatches=4, schedule="zb-v"),
    ],
    4: [
        dict(data=4, tensor=1, pipeline=1, microbatches=2, zero=3, zero_group=2),
        dict(data=2, tensor=2, pipeline=1, microbatches=1, zero=3),
        dict(data=2, tensor=1, pipeline=2, microbatches=2, zero=1, schedule="zb-h1"),
        dict(data=1, tensor=2, pipeline=2, microbatches=4, schedule="1f1b"),
        dict(data=1, tensor=(2, 2), pipeline=1, microbatches=1),
    ],
}


@pytest.mark.parametrize("world_size", PLANS)
@pytest.mark.parametrize("name", ["build_llama", "build_conv_net", "build_tied_lm"])
def test_loss_and_gradients(pool, name: str, world_size: int) -> None:
    blocks = len(test_parity.graph_of(name).blocks)
    plans = [
        plan | dict(seed=number)
        for number, plan in enumerate(PLANS[world_size])
        if blocks >= plan["pipeline"] * (schedule_named(plan.get("schedule", "1f1b")).virtual or 2)
    ]
    results = pool.run(test_parity.one_step, name, plans, world_size=world_size, timeout_s=90)
    for rank, found in enumerate(results):
        for plan, (loss, gradient, evaluated) in zip(plans, found, strict=True):
            assert loss < LOSS and evaluated < LOSS and gradient < GRADIENT, (rank, plan, loss, gradient, evaluated)


@pytest.mark.parametrize("model_seed", range(3))
def test_random_plans(pool, model_seed: int) -> None:
    results = pool.run(test_whole_plans_gloo.train, model_seed, "cuda", world_size=4, timeout_s=90)
    for rank, found in enumerate(results):
        for number, (loss, gradient) in enumerate(found):
            assert loss < LOSS and gradient < GRADIENT, (rank, number, loss, gradient)


def test_mixtures_of_experts(pool) -> None:
    for name in ("build_experts", "build_uneven_experts"):
        for found in pool.run(experts_step, name, world_size=4, timeout_s=90):
            assert found[0] < LOSS and found[1] < GRADIENT and found[2] < LOSS, (name, found)


@pytest.mark.parametrize("index", [0, 3])
def test_streams(pool, index: int) -> None:
    options = dict(test_stream.CASES[index]) | dict(seed=index)
    name = options.pop("name")
    world = options["data"] * options["tensor"] * options["pipeline"]
    results = pool.run(test_stream.streamed, name, options, 6, None, world_size=world, timeout_s=90)
    for loss, weights, evaluated, steps in results:
        assert loss < LOSS and weights < GRADIENT and evaluated < LOSS and steps == 6, (loss, weights, evaluated)


@pytest.mark.parametrize("plan", [dict(data=1, tensor=1), dict(data=2, tensor=1, zero=3), dict(data=1, tensor=2)])
def test_bfloat16(pool, plan: dict[str, Any]) -> None:
    plan = plan | dict(pipeline=1, microbatches=2, seed=1)
    world = plan["data"] * plan["tensor"]
    for found in pool.run(test_precision.compare, "build_llama", "bfloat16", [plan], world_size=world, timeout_s=90):
        (loss, gradient), *_ = found
        assert loss < 5e-3 and gradient < 3e-2, (plan, loss, gradient)


def test_float16_with_a_scaler(pool) -> None:
    plan = dict(data=2, tensor=1, pipeline=1, microbatches=2, zero=3, seed=2)
    for ours, expected in pool.run(test_precision.scaled_steps, plan, True, world_size=2):
        for step, (mine, theirs) in enumerate(zip(ours, expected, strict=True)):
            assert mine[1:] == theirs[1:], (step, ours, expected)
            assert step == 2 or abs(mine[0] - theirs[0]) <= 1e-2 * abs(theirs[0]), (step, ours, expected)


def test_replicas_stay_equal_under_dropout(pool) -> None:
    plans = (
        dict(data=2, tensor=1, pipeline=1, microbatches=2, zero=0, recompute="full", seed=1),
        dict(data=1, tensor=2, pipeline=1, microbatches=2, recompute="mixed", seed=2),
    )
    for plan in plans:
        results = pool.run(test_model.dropout_run, plan, world_size=2, timeout_s=90)
        assert all(result[:2] == results[0][:2] for result in results), "ranks disagree about the loss"
        for name in set.intersection(*(set(parts) for *_, parts in results)):
            assert torch.equal(*(parts[name].cpu() for *_, parts in results)), f"replicas of {name} differ"


def test_moves(pool) -> None:
    plans = [
        dict(data=2, tensor=1, pipeline=1, microbatches=2, zero=3, seed=1),
        dict(data=1, tensor=2, pipeline=1, microbatches=1, seed=2),
        dict(data=1, tensor=1, pipeline=2, microbatches=4, seed=3),
    ]
    for found, expected in pool.run(test_model.move_between, plans, world_size=2, timeout_s=90):
        assert found == pytest.approx(expected, rel=1e-4)


def test_checkpoints_under_another_plan(pool, tmp_path: Path) -> None:
    before = dict(data=2, tensor=1, pipeline=1, microbatches=2, zero=3, seed=1)
    after = [dict(data=1, tensor=2, pipeline=1, microbatches=1, seed=2), test_checkpoint.ONE]
    path = str(tmp_path / "saved")
    saved = pool.run(test_checkpoint.save_and_go_on, path, "build_mlp", before, "adamw", world_size=2)
    for plan in after:
        world = test_checkpoint.world_of(plan)
        for losses, *_ in pool.run(test_checkpoint.load_and_go_on, path, "build_mlp", plan, "adamw", world_size=world):
            assert losses == pytest.approx(saved[0][0], rel=1e-5)


def test_compiled_blocks(pool) -> None:
    for plan in (
        dict(data=2, tensor=1, pipeline=1, microbatches=2, zero=3, recompute="mixed", seed=3),
        dict(data=1, tensor=2, pipeline=1, microbatches=1, seed=4),
    ):
        for loss, gradient, first, later, _ in pool.run(
            test_compile.compiled_step, plan, 1, world_size=2, timeout_s=90
        ):
            assert loss < LOSS and gradient < GRADIENT and first > 0 and later == 0, (plan, loss, gradient)


@pytest.mark.parametrize("pins", [dict(data=2, microbatches=2), dict(pipeline=2, microbatches=4, schedule="1f1b")])
def test_the_measured_timeline(pool, pins: dict[str, Any]) -> None:
    for line, losses in pool.run(test_overlap.measured, **pins):
        assert isinstance(line, Timeline) and losses[-1] < losses[0]
        kinds = {event.kind for event in line.events}
        assert {"F", "B"} <= kinds, kinds
        assert all(0 <= e.start_s <= e.end_s <= line.step_time_s * 1.5 for e in line.events)
        assert all(bytes_ > 0 for bytes_ in line.peak_memory_bytes.values()) and len(line.peak_memory_bytes) == 2


def probed(path: str) -> str:
    cluster = Cluster.probe()
    if dist.get_rank() == 0:
        cluster.save(path)
    device = torch.cuda.current_device()
    total = torch.cuda.get_device_properties(device).total_memory
    return json.dumps({"ranks": cluster.world_size, "bytes": cluster.device.memory_bytes, "total": total})


def test_probe(pool, tmp_path: Path) -> None:
    first, second = (json.loads(text) for text in pool.run(probed, str(tmp_path / "c.json"), timeout_s=90))
    assert first == second and first["ranks"] == 2 and first["bytes"] <= first["total"]
    cluster = Cluster.load(tmp_path / "c.json")
    # Every device that NCCL runs on computes faster than a core, and in half precision faster than in single.
    assert cluster.device.flops_per_s["bfloat16"] > cluster.device.flops_per_s["float32"] > 1e12
    assert cluster.device.memory_bytes_per_s > 1e11
