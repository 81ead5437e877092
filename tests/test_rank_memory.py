"""One rank's peak memory, counted tensor by tensor in a world that is only pretended, against the predicted one."""

from __future__ import annotations

import math
import multiprocessing as mp
from typing import Any

import pytest
import torch

import autopar
from autopar.cluster.spec import Cluster
from autopar.simulate import simulate
from benchmarks.rank_memory import RankMemory, rank_memory, with_stages
from launch.model import LanguageModel, ModelConfig

# (model, precision, what the search is held to, what its stages are given besides, the rank to look at)
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], int]] = {
    "replicas": ("llama", "float32", {"data": 8, "zero": 0, "microbatches": 2}, {}, 3),
    "zero 1": ("llama", "float32", {"data": 8, "zero": 3, "microbatches": 2}, {"zero": 1}, 0),
    "zero 3": ("llama", "float32", {"data": 64, "zero": 3}, {}, 1),
    "tensor": ("llama", "float32", {"data": 2, "tensor": 4, "zero": 0}, {}, 5),
    "context": ("llama", "float32", {"pipeline": 2, "context": 4, "microbatches": 2}, {}, 1),
    "three axes": ("llama", "float32", {"pipeline": 2, "data": 8, "tensor": 2, "microbatches": 4, "zero": 3}, {}, 31),
    "zero 2": ("gpt", "bfloat16", {"data": 8, "zero": 3}, {"zero": 2}, 7),
    "recomputed": ("gpt", "bfloat16", {"data": 8, "zero": 3, "microbatches": 2}, {"recompute": "full"}, 0),
    "pipeline": ("gpt", "bfloat16", {"pipeline": 4, "data": 2, "microbatches": 8, "zero": 0}, {}, 7),
}  # fmt: skip


def build(model: str) -> tuple[torch.nn.Module, Any]:
    tokens = torch.randint(0, 256, (64, 33))
    if model == "llama":
        with torch.device("meta"):
            module = LanguageModel(ModelConfig(256, 4, 128, 4, 2, 256))
        return module, (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=256, n_positions=32, n_embd=128, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config), {"input_ids": tokens[:, 1:], "labels": tokens[:, 1:].clone()}


def measure(results: Any) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    captured: dict[tuple[str, str], Any] = {}
    for name, (model, precision, pins, given, rank) in CASES.items():
        if (model, precision) not in captured:
            module, batch = build(model)
            captured[model, precision] = module, batch, autopar.capture(module, batch, precision=precision)
        module, batch, graph = captured[model, precision]
        pins = {"data": 1, "tensor": 1, "pipeline": 1, "recompute": "none", "schedule": "1f1b"} | pins
        hosts = math.prod(pins.get(axis, 1) for axis in ("data", "tensor", "context", "pipeline")) // 8
        hardware = Cluster.preset("cpu", hosts=hosts, devices_per_host=8)
        plan = with_stages(autopar.search(graph, hardware, progress=False, **pins), given)
        results.put((name, rank_memory(graph, plan, hardware, module, batch, rank, torch.device("cpu"))))
    results.put(None)


@pytest.mark.processes
def test_the_predicted_peak_is_within_five_percent_of_the_measured_one() -> None:
    context = mp.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=measure, args=(results,))
    process.start()
    found: list[tuple[str, RankMemory]] = []
    while (result := results.get(timeout=300)) is not None:
        found.append(result)
    process.join()
    assert {name for name, _ in found} == set(CASES)
    wrong = [f"{name}: {m} ({m.error:+.1%})" for name, m in found if abs(m.error) > 0.05]
    assert not wrong, "\n".join(wrong)
    # what a model measures itself, in one step of training, is what was counted from its making on
    assert all(abs(m.counted_bytes / m.measured_bytes - 1) < 0.02 for _, m in found), found


# MiB of the allocator's peak on an H200 (benchmarks/records/2026-11-26-one-gpu.md).
ON_A_GPU = [
    ("float32", {"data": 8, "zero": 3}, "none", 18959.8),
    ("float32", {"data": 8, "zero": 3}, "selective", 16015.7),
    ("bfloat16", {"data": 64, "zero": 3}, "none", 4166.1),
    ("bfloat16", {"data": 8, "zero": 3, "microbatches": 4}, "full", 8407.9),
]


@pytest.mark.parametrize(("precision", "pins", "recompute", "measured_mib"), ON_A_GPU)
def test_what_a_gpu_measured(precision: str, pins: dict[str, int], recompute: str, measured_mib: float) -> None:
    """Attention in float32 with grouped heads keeps its scores there."""
    config = ModelConfig(
        layers=4, vocabulary=128256, hidden=4096, heads=32, kv_heads=8, feed_forward=14336, rotary_base=500000.0
    )
    with torch.device("meta"):
        module, tokens = LanguageModel(config), torch.empty(64, 512, dtype=torch.int64)
    graph = autopar.capture(module, (tokens, tokens), precision=precision)
    hardware = Cluster.preset("h200-141gb", hosts=pins["data"] // 8, devices_per_host=8, software="")
    pins = {"tensor": 1, "pipeline": 1, "recompute": "none"} | pins
    plan = with_stages(autopar.search(graph, hardware, progress=False, **pins), {"recompute": recompute})
    predicted = simulate(graph, plan, hardware).peak_memory_bytes[0] / 2**20
    assert predicted == pytest.approx(measured_mib, rel=0.02)
