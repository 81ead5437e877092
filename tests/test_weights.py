"""safetensors in and out: what Hugging Face reads and writes, under any plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_parity import call, parallel

import autopar
from autopar.runtime.weights import INDEX, SINGLE

PLANS = [
    dict(data=1, tensor=1, pipeline=1, microbatches=1),
    dict(data=2, tensor=1, pipeline=1, microbatches=1, zero=3),
    dict(data=1, tensor=2, pipeline=2, microbatches=2, seed=5),
]
NAMES = ["build_llama", "build_gpt2", "build_tied_lm"]


def world_of(plan: dict[str, Any]) -> int:
    return plan["data"] * plan["tensor"] * plan["pipeline"]


def write(folder: str, name: str, plan: dict[str, Any], max_file_bytes: int) -> None:
    model, _, _, _ = parallel(name, plan)
    autopar.save_safetensors(folder, model, max_file_bytes=max_file_bytes)


def read(folder: str, name: str, plan: dict[str, Any], seed: int) -> tuple[float, float]:
    """(loss with the weights of the folder, loss before)."""
    torch.manual_seed(seed)
    model, example, _, _ = parallel(name, plan)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
        before = call(model, example).item()
        autopar.load_safetensors(folder, model)
        return call(model, example).item(), before


@pytest.mark.parametrize(
    "name", [n if n == "build_tied_lm" else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
)
@pytest.mark.parametrize("plan", PLANS, ids=["one", "zero", "mixed"])
def test_files_are_the_state_dict(pool, tmp_path: Path, name: str, plan: dict[str, Any]) -> None:
    pool.run(write, str(tmp_path), name, plan, 20_000, world_size=world_of(plan))
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    assert len(set(weight_map.values())) > 2
    assert {p.name for p in tmp_path.iterdir()} == {INDEX, *weight_map.values()}
    found: dict[str, torch.Tensor] = {}
    for file in set(weight_map.values()):
        part = load_file(tmp_path / file)
        assert {weight_map[key] for key in part} == {file}
        found |= part
    module, _, _ = getattr(models, name)()
    wanted = module.state_dict()
    assert all(torch.equal(found[key], wanted[key]) for key in found)
    # a tied tensor is stored once
    assert {t.data_ptr() for t in wanted.values()} == {wanted[key].data_ptr() for key in found}
    left_out = module.load_state_dict(found, strict=False)
    assert not left_out.unexpected_keys


@pytest.mark.parametrize("name", NAMES)
def test_what_transformers_wrote_is_read(pool, tmp_path: Path, name: str) -> None:
    module, example, loss = getattr(models, name)()
    expected = call(module, example, loss).item()
    if hasattr(module, "save_pretrained"):
        module.save_pretrained(tmp_path)
    else:
        save_file({k: v.clone() for k, v in module.state_dict().items()}, tmp_path / SINGLE)
    for plan in PLANS:
        for after, before in pool.run(read, str(tmp_path), name, plan, 7, world_size=world_of(plan)):
            assert after == pytest.approx(expected, rel=1e-6) and before != pytest.approx(expected, rel=1e-4)


def refusals(folder: str) -> dict[str, str]:
    path = Path(folder)
    model, example, module, _ = parallel("build_mlp", dict(data=1, tensor=2, pipeline=1, microbatches=1))
    good = {k: v.clone() for k, v in module.state_dict().items()}
    name = next(iter(good))
    cases = {
        "missing": {k: v for k, v in good.items() if k != name},
        "unknown": {**good, "extra.weight": torch.zeros(2)},
        "shape": {**good, name: torch.zeros(3, 5)},
    }
    found = {}
    before = call(model, example).item()
    for what in ("nothing", *cases, "truncated", "index"):
        there = path / what
        if torch.distributed.get_rank() == 0:
            there.mkdir()
            if what != "nothing":
                save_file(cases.get(what, good), there / SINGLE)
            if what == "truncated":
                (there / SINGLE).write_bytes((there / SINGLE).read_bytes()[:-50])
            if what == "index":
                (there / INDEX).write_text(json.dumps({"weight_map": {name: "../other.safetensors"}}))
        torch.distributed.barrier()
        try:
            autopar.load_safetensors(there, model)
            found[what] = "nothing was refused"
        except ValueError as error:
            found[what] = str(error)
        assert call(model, example).item() == before, what
    return found


def test_what_cannot_be_loaded_changes_nothing(pool, tmp_path: Path) -> None:
    first, second = pool.run(refusals, str(tmp_path), world_size=2)
    assert first == second
    for what, words in {
        "nothing": "holds neither",
        "missing": "weight is missing",
        "unknown": "extra.weight is unknown to the model",
        "shape": "has shape (3, 5)",
        "truncated": "model.safetensors: is corrupt",
        "index": "outside the folder",
    }.items():
        assert words in first[what], (what, first[what])
