"""Checkpoints: training goes on under another plan as if nothing had happened, and what cannot be loaded changes nothing."""

from __future__ import annotations

import copy
import json
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from plan_cases import random_plan
from test_parity import call, parallel
from torch import Tensor, nn

import autopar
from autopar.cluster.spec import Cluster
from autopar.runtime import checkpoint, checkpoint_files
from autopar.runtime.agree import on_every_rank
from autopar.runtime.torch_private import local_tensor
from autopar.sharding.placement import Split

STEPS = 3
EXTRA = {"epoch": 2, "seen": [1, 2.5, None, "ä"]}
ONE = dict(data=1, tensor=1, pipeline=1, microbatches=1)
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda groups, lr: torch.optim.AdamW(groups, lr=lr, betas=(0.8, 0.99), amsgrad=True),
    "sgd": lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9),
}


def optimizer_of(model: autopar.Model, kind: str, lr: float) -> torch.optim.Optimizer:
    """Two groups, by name: weight decay for weights alone."""
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if n.endswith("weight")], "weight_decay": 10 * lr},
        {"params": [p for n, p in named if not n.endswith("weight")], "weight_decay": 0.0},
    ]
    return OPTIMIZERS[kind](groups, lr)


def train(model: autopar.Model, example: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    for _ in range(STEPS):
        loss = call(model, example)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def save_and_go_on(
    path: str, name: str, plan: dict[str, Any], kind: str, piece_bytes: int = 1000
) -> tuple[list[float], bool]:
    """Losses after the checkpoint, and whether a parameter of this rank lies in runs, not in one block."""
    model, example, _, _ = parallel(name, plan)
    optimizer = optimizer_of(model, kind, 0.02)
    train(model, example, optimizer)
    with mock.patch.object(checkpoint_files, "PIECE_BYTES", piece_bytes):
        autopar.save(path, model, optimizer, step=STEPS, extra=EXTRA)
    splits = [h.split for p in model.parameters() for h in p.autopar.ownership.holders]
    return train(model, example, optimizer), any(isinstance(s, Split) and s.blocks > 1 for s in splits)


def load_and_go_on(
    path: str, name: str, plan: dict[str, Any], kind: str
) -> tuple[list[float], autopar.CheckpointInfo, list[float], int]:
    """Losses after loading into a model and an optimizer that were elsewhere."""
    model, example, _, _ = parallel(name, plan)
    optimizer = optimizer_of(model, kind, 0.7)
    train(model, example, optimizer)
    model.seeds.seed = 77
    info = autopar.load(path, model, optimizer)
    step = model.seeds.step
    return train(model, example, optimizer), info, [g["lr"] for g in optimizer.param_groups], step


def world_of(plan: dict[str, Any]) -> int:
    return plan["data"] * plan["tensor"] * plan["pipeline"]


CASES = [
    (
        "build_mlp",
        "adamw",
        dict(data=2, tensor=1, pipeline=2, microbatches=2, zero=3),
        [dict(data=1, tensor=2, pipeline=1, microbatches=1, seed=4), ONE],
    ),
    (
        "build_tied_lm",
        "adamw",
        dict(data=1, tensor=2, pipeline=2, microbatches=2, seed=8),
        [
            dict(data=2, tensor=1, pipeline=1, microbatches=1, zero=3),
            dict(data=1, tensor=2, pipeline=1, microbatches=2, seed=8),
        ],
    ),
    (
        "build_gpt2",
        "sgd",
        dict(data=1, tensor=2, pipeline=1, microbatches=1, seed=7),
        [
            dict(data=4, tensor=1, pipeline=1, microbatches=2, zero=3, zero_group=2, seed=3),
            dict(data=2, tensor=2, pipeline=1, microbatches=2, zero=1, seed=3),
        ],
    ),
    (
        "build_conv_net",
        "sgd",
        dict(data=4, tensor=1, pipeline=1, microbatches=1, zero=2, zero_group=2),
        [
            ONE,
            dict(data=1, tensor=2, pipeline=2, microbatches=4, seed=5),
            dict(data=2, tensor=1, pipeline=1, microbatches=1),
        ],
    ),
]


@pytest.mark.parametrize("name,kind,before,afters", CASES, ids=[case[0] for case in CASES])
def test_training_goes_on_under_another_plan(
    pool, tmp_path: Path, name: str, kind: str, before: dict[str, Any], afters: list[dict[str, Any]]
) -> None:
    path = str(tmp_path / "folder" / "saved")
    (expected, _), *others = saved = pool.run(save_and_go_on, path, name, before, kind, world_size=world_of(before))
    if name in ("build_tied_lm", "build_gpt2"):
        assert any(runs for _, runs in saved), "choose a seed that splits the fused projection in blocks"
    assert all(losses == expected for losses, _ in others)
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["saved"]
    for after in afters:
        for losses, info, rates, step in pool.run(
            load_and_go_on, path, name, after, kind, world_size=world_of(after), timeout_s=120
        ):
            assert losses == pytest.approx(expected, rel=1e-5), after
            assert info == autopar.CheckpointInfo(STEPS, EXTRA)
            assert rates == [0.02, 0.02] and step == STEPS


def test_dropout_goes_on(pool, tmp_path: Path) -> None:
    """Under the same plan the random numbers are those that would have come."""
    plan = dict(data=2, tensor=1, pipeline=1, microbatches=2)
    args = (str(tmp_path / "saved"), "build_dropout_mlp", plan, "adamw")
    (expected, _), _ = pool.run(save_and_go_on, *args, world_size=2)
    for losses, *_ in pool.run(load_and_go_on, *args, world_size=2):
        assert losses == pytest.approx(expected, rel=1e-6)


def save_meanwhile(folder: str, plan: dict[str, Any]) -> dict[str, Any]:
    """Save in the background, held up until training has gone on; then a save that fails, and one that replaces."""
    model, example, _, _ = parallel("build_mlp", plan)
    optimizer = optimizer_of(model, "adamw", 0.02)
    train(model, example, optimizer)
    path = Path(folder) / "saved"
    go_on = threading.Event()
    original = checkpoint.write_parts
    with mock.patch.object(checkpoint, "write_parts", lambda *a: go_on.wait(60) and original(*a)):
        saving = autopar.save(path, model, optimizer, step=1, background=True)
        losses = train(model, example, optimizer)
        found = {"losses": losses, "early": saving.done or path.exists()}
        go_on.set()
        saving.wait()
    assert saving.done
    dist.barrier()
    patched = mock.patch.object(checkpoint, "fingerprint", side_effect=OSError("disk on fire"))
    with patched if dist.get_rank() == 1 else mock.MagicMock(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        autopar.save(path, model, optimizer, step=2, background=True)
        while not model.saving.done:
            train(model, example, optimizer)
            dist.barrier()
            if on_every_rank(lambda: model.saving.done).count(True):
                break
        try:
            autopar.save(path, model, optimizer, step=3)
            found["failed"] = "nothing was said"
        except OSError as error:
            found["failed"] = str(error)
    info = autopar.load(path, model, optimizer)
    found |= {"step": info.step, "again": train(model, example, optimizer)}
    if dist.get_rank() == 0:  # as if the process had been killed between the two renames of a replacement
        path.rename(path.with_name(".saved.old-1234"))
    dist.barrier()
    found["aside"] = autopar.load(path, model, optimizer).step
    return found


def test_training_goes_on_while_a_checkpoint_is_written(pool, tmp_path: Path) -> None:
    plan = dict(data=2, tensor=1, pipeline=1, microbatches=2, zero=3)
    for found in pool.run(save_meanwhile, str(tmp_path), plan, world_size=2):
        assert not found["early"]
        assert found["again"] == pytest.approx(found["losses"], rel=1e-6)
        assert "disk on fire" in found["failed"]
        assert found["step"] == found["aside"] == 1


class Odd(nn.Module):
    """A scalar parameter, rows that four ranks cannot share, a frozen weight and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.rows = nn.Parameter(torch.randn(3, 8))
        self.frozen = nn.Parameter(torch.randn(8, 8), requires_grad=False)
        self.register_buffer("shift", torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return (((x @ self.frozen + self.shift) @ self.rows.t()) * self.scale).square().mean()


def odd_run(path: str, plan: dict[str, Any], kind: str, loads: bool) -> tuple[list[float], float, list[Tensor]]:
    """Losses, the scalar's last momentum, and the buffer and frozen weight where they are whole."""
    torch.manual_seed(5 if loads else 0)
    module, example = Odd(), torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    cluster = Cluster.preset("cpu", hosts=1, devices_per_host=world_of(plan))
    graph = autopar.capture(module, example)
    model = autopar.parallelize(module, example, plan=random_plan(graph, **plan), cluster=cluster)
    optimizer = OPTIMIZERS[kind](model.parameters(), 0.001)
    if loads:
        autopar.load(path, model, optimizer)
    else:
        train(model, example, optimizer)
        autopar.save(path, model, optimizer)
    losses = train(model, example, optimizer)
    named = dict(model.named_parameters())
    state = optimizer.state[named["scale"]]["momentum_buffer" if kind == "sgd" else "exp_avg"]
    fixed = [dict(model.named_buffers())["shift"], named["frozen"].detach()]
    return losses, local_tensor(state).item(), [t.clone() for t in fixed if type(t) is Tensor]


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_parameters_that_are_hard_to_share(pool, tmp_path: Path, kind: str) -> None:
    sharded = dict(data=4, tensor=1, pipeline=1, microbatches=1, zero=3)
    whole = dict(data=2, tensor=1, pipeline=1, microbatches=2)
    for number, (before, after) in enumerate(((sharded, whole), (whole, sharded))):
        path = str(tmp_path / str(number))
        (losses, momentum, fixed), *_ = pool.run(odd_run, path, before, kind, False, world_size=world_of(before))
        for again, same_momentum, same in pool.run(odd_run, path, after, kind, True, world_size=world_of(after)):
            assert again == pytest.approx(losses, rel=1e-5)
            assert same_momentum == pytest.approx(momentum, rel=1e-4)
            assert all(torch.equal(a, b) for a, b in zip(fixed, same, strict=False))


def state_of(model: autopar.Model, optimizer: torch.optim.Optimizer) -> list[Any]:
    """Everything that a load may change, copied."""
    named = [*model.named_parameters(), *model.named_buffers()]
    state = [local_tensor(t.detach()).clone() for _, t in named]
    for parameter in model.parameters():
        for value in optimizer.state.get(parameter, {}).values():
            state.append(local_tensor(value).clone() if isinstance(value, Tensor) else value)
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return [*state, copy.deepcopy(options), model.seeds.seed, model.seeds.step]


def equal(left: Any, right: Any) -> bool:
    return torch.equal(left, right) if isinstance(left, Tensor) else left == right


def damage(folder: Path, how: str) -> str:
    """Change a file of the checkpoint; its name."""
    files = sorted(p for p in folder.iterdir() if p.suffix == ".distcp")
    file = folder / checkpoint_files.INDEX if how.startswith("index") else files[-1]
    data = bytearray(file.read_bytes())
    if how.endswith("missing"):
        file.unlink()
    elif how.endswith("short"):
        file.write_bytes(data[: len(data) // 2])
    elif how.endswith("flipped"):
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif how == "index other":
        file.write_text(json.dumps({"autopar checkpoint": 99, "crc32": 0, "content": ""}))
    return file.name


DAMAGES = ["missing", "short", "flipped", "index missing", "index short", "index flipped", "index other"]


def damaged_loads(folder: str) -> list[tuple[str, str, bool]]:
    """(file, message, whether the state stayed) per damage; the checkpoint is written anew each time."""
    model, example, _, _ = parallel("build_mlp", dict(data=1, tensor=2, pipeline=1, microbatches=1))
    optimizer = optimizer_of(model, "adamw", 0.01)
    path = Path(folder) / "saved"
    found = []
    for how in DAMAGES:
        train(model, example, optimizer)
        autopar.save(path, model, optimizer)
        train(model, example, optimizer)
        names = [damage(path, how)] if dist.get_rank() == 0 else [""]
        dist.broadcast_object_list(names, src=0)
        before = state_of(model, optimizer)
        try:
            autopar.load(path, model, optimizer)
            message = "loaded"
        except ValueError as error:
            message = str(error)
        stayed = all(map(equal, before, state_of(model, optimizer)))
        found.append((names[0], message, stayed))
        dist.barrier()
        if dist.get_rank() == 0 and not (path / checkpoint_files.INDEX).exists():
            path.rename(path.with_name("set aside"))
        dist.barrier()
    return found


def test_damaged_checkpoints_are_refused_by_name(pool, tmp_path: Path) -> None:
    first, second = pool.run(damaged_loads, str(tmp_path), world_size=2)
    assert [text for _, text, _ in first] == [text for _, text, _ in second]
    for how, (file, message, stayed) in zip(DAMAGES, first, strict=True):
        assert file in message and str(tmp_path / "saved") in message, (how, message)
        assert stayed, how
    assert all(stayed for _, _, stayed in second)
    for how, word in (
        ("missing", "missing"),
        ("short", "bytes"),
        ("flipped", "checksum"),
        ("index other", "format 99"),
    ):
        assert word in first[DAMAGES.index(how)][1]


def refusals(folder: str) -> dict[str, str]:
    """Messages of what is asked for in vain, and of loads into other models and optimizers."""
    plan = dict(data=2, tensor=1, pipeline=1, microbatches=1, zero=3)
    model, example, _, _ = parallel("build_mlp", plan)
    other, _, _, _ = parallel("build_conv_net", plan)
    optimizer = optimizer_of(model, "adamw", 0.01)
    train(model, example, optimizer)
    path = Path(folder)
    autopar.save(path / "saved", model, optimizer, step=1)
    autopar.save(path / "bare", model)
    if dist.get_rank() == 0:
        (path / "mine").mkdir()
        (path / "mine" / "thesis").write_text("only copy")
    dist.barrier()
    lbfgs = torch.optim.LBFGS(model.parameters())
    lbfgs.state[next(iter(model.parameters()))]["history"] = [torch.zeros(3)]
    single = torch.optim.AdamW(model.parameters())
    swapped = torch.optim.AdamW([{"params": g["params"]} for g in optimizer.param_groups[::-1]])

    def write_failing() -> None:
        patched = mock.patch.object(checkpoint, "fingerprint", side_effect=OSError("disk on fire"))
        with patched if dist.get_rank() == 1 else mock.MagicMock():
            autopar.save(path / "saved", model, optimizer, step=2)

    attempts: dict[str, Callable[[], Any]] = {
        "other model": lambda: autopar.load(path / "saved", other),
        "other optimizer": lambda: autopar.load(path / "saved", model, optimizer_of(model, "sgd", 0.1)),
        "other number of groups": lambda: autopar.load(path / "saved", model, single),
        "other groups": lambda: autopar.load(path / "saved", model, swapped),
        "no optimizer": lambda: autopar.load(path / "bare", model, optimizer),
        "nothing there": lambda: autopar.load(path / "nowhere", model),
        "not elementwise": lambda: autopar.save(path / "new", model, lbfgs),
        "not JSON": lambda: autopar.save(path / "new", model, extra={"x": object()}),
        "something else there": lambda: autopar.save(path / "mine", model),
        "no folder": lambda: autopar.save(path / "mine" / "thesis" / "x", model),
        "write fails": write_failing,
    }
    found = {}
    for what, attempt in attempts.items():
        before = state_of(model, optimizer)
        try:
            attempt()
            found[what] = "nothing was refused"
        except (ValueError, OSError) as error:
            found[what] = f"{type(error).__name__}: {error}"
        assert all(map(equal, before, state_of(model, optimizer))), what
    found["kept"] = str(autopar.load(path / "saved", model, optimizer).step)
    found["left"] = " ".join(sorted(p.name for p in path.iterdir()))
    return found


def test_what_cannot_be_done_is_refused(pool, tmp_path: Path) -> None:
    first, second = pool.run(refusals, str(tmp_path), world_size=2)
    assert first == second
    for what, words in {
        "other model": ("ValueError", "another model", "lacks the parameters", "first.weight", "0.weight"),
        "other optimizer": ("ValueError", "AdamW", "SGD"),
        "other number of groups": ("ValueError", "2 parameter groups", "given 1"),
        "other groups": ("ValueError", "0.weight is in group 0", "in group 1 of the given"),
        "no optimizer": ("ValueError", "no optimizer state"),
        "nothing there": ("ValueError", "nowhere", "no checkpoint"),
        "not elementwise": ("ValueError", "LBFGS cannot be saved", "history"),
        "not JSON": ("ValueError", "JSON"),
        "something else there": ("ValueError", "mine exists and is no checkpoint"),
        "no folder": ("Error", "thesis"),
        "write fails": ("OSError", "disk on fire"),
    }.items():
        assert all(word in first[what] for word in words), (what, first[what])
    assert first["kept"] == "1" and first["left"] == "bare mine saved"
    assert (tmp_path / "mine" / "thesis").read_text() == "only copy"
