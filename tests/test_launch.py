"""One real torchrun through launch/train_lm.py, and the shell functions that the two commands share."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import autopar

ROOT = Path(__file__).resolve().parent.parent
STEPS = 12
TINY = f"--layers=2 --hidden=32 --heads=4 --seq=32 --batch=8 --lr=1e-2 --held-out-batches=2 --steps={STEPS}".split()
TIMEOUT_S = 150


def torchrun(arguments: list[str], cwd: Path) -> tuple[int, str]:
    """launch/train_lm.py on 2 ranks; exit status and everything printed. All of it is killed after TIMEOUT_S."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*command, str(ROOT / "launch" / "train_lm.py"), *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"still running after {TIMEOUT_S} s:\n{output}")
    return process.returncode, output


@pytest.mark.processes
def test_train_lm_trains_and_leaves_a_run_folder(tmp_path: Path) -> None:
    data = tmp_path / "text.txt"
    data.write_text("the quick brown fox jumps over the lazy dog; " * 400)
    run_dir = tmp_path / "run"
    status, output = torchrun(["--data", str(data), "--run-dir", str(run_dir), *TINY], cwd=tmp_path)
    assert status == 0, output

    plan = autopar.Plan.load(run_dir / "plan.json")
    assert plan.world_size == 2
    assert plan.batch_size == 8
    assert len(plan.candidates) > 1
    marked = re.findall(r"^\* +(\S.*?)  ", output, re.MULTILINE)
    assert len(marked) == 1, output
    assert marked[0] in [candidate.name for candidate in plan.candidates]

    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    assert all(record["step_time_s"] > 0 and record["grad_norm"] > 0 for record in steps)
    before, after = (record["held_out_loss"] for record in records if "held_out_loss" in record)
    assert after < before - 0.5
    assert f"before training: {before:.3f}" in output
    assert f"after {STEPS} steps: {after:.3f}" in output

    trace = json.loads((run_dir / "trace.json").read_text())
    events = trace["traceEvents"] if isinstance(trace, dict) else trace
    processes = {event["args"]["name"].split()[0] for event in events if event.get("name") == "process_name"}
    assert len({event["pid"] for event in events}) >= 2, "predicted and measured are two process groups"
    assert {"predicted", "measured"} <= {name.strip(":,").lower() for name in processes}

    for printed in (
        "Cluster (probe)",
        "step time",
        "peak memory, rank 0",
        "peak memory, rank 1",
        f"run folder: {run_dir}",
    ):
        assert output.count(printed) == 1, f"{printed!r} is printed once, by rank 0:\n{output}"


@pytest.mark.processes
def test_a_plan_that_cannot_be_is_one_clear_error(tmp_path: Path) -> None:
    data = tmp_path / "text.txt"
    data.write_text("words " * 1000)
    status, output = torchrun(["--data", str(data), "--tensor=3", *TINY], cwd=tmp_path)
    assert status != 0
    assert "ValueError" in output
    assert not (tmp_path / "runs").exists()


# A stand-in for the environment's interpreter: writes down how it is called, and answers pip's dry run.
FAKE_PYTHON = """#!/usr/bin/env bash
echo "$@" >>"$CALLS"
case "$*" in
    *--dry-run*) echo "$REPORT" ;;
esac
"""
TOOLS = ("bash", "cat", "cksum", "dirname", "grep", "mv", "sort")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What environment.sh reads, in a folder with a space in its name; the interpreter only writes down its calls."""
    root = tmp_path / "a checkout"
    (root / "launch").mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "constraints.txt", "launch/environment.sh"):
        shutil.copy(ROOT / name, root / name)
    python = root / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in TOOLS:
        (tools / tool).symlink_to(shutil.which(tool))
    return root


def ensure(checkout: Path, extras: str, report: str = "{}") -> tuple[int, str, list[str]]:
    """Status, what was printed and the interpreter's calls of `ensure_environment extras`, called from elsewhere."""
    calls = checkout / "calls"
    calls.write_text("")
    tools = checkout.parent / "tools"
    done = subprocess.run(
        [str(tools / "bash"), "-c", f'source "{checkout}/launch/environment.sh" && ensure_environment "{extras}"'],
        cwd=checkout.parent,
        env={"PATH": str(tools), "CALLS": str(calls), "REPORT": report},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr, calls.read_text().splitlines()


def test_the_environment_is_installed_once(checkout: Path) -> None:
    status, output, calls = ensure(checkout, "")
    assert status == 0, output
    assert [call for call in calls if "torch" in call.split() and "--dry-run" not in call] == calls[1:2], (
        "torch comes first"
    )
    assert calls[-1].endswith(f"--editable {checkout}")
    assert ensure(checkout, "") == (0, "", [])
    _, _, calls = ensure(checkout, "[test]")
    assert calls[-1].endswith(f"--editable {checkout}[test]")
    assert ensure(checkout, "[test]") == (0, "", [])
    assert ensure(checkout, "") == (0, "", [])


@pytest.mark.parametrize("name", ["setup.py", "constraints.txt"])
def test_a_change_of_what_is_needed_installs_anew(checkout: Path, name: str) -> None:
    ensure(checkout, "[test]")
    with open(checkout / name, "a") as file:
        file.write("# changed\n")
    for extras in ("", "[test]"):
        status, _, calls = ensure(checkout, extras)
        assert status == 0 and calls
    assert ensure(checkout, "") == (0, "", [])


def test_no_cuda_build_without_a_gpu(checkout: Path) -> None:
    report = json.dumps({"install": [{"metadata": {"name": "torch"}}, {"metadata": {"name": "nvidia-cublas"}}]})
    status, output, calls = ensure(checkout, "", report)
    assert status != 0
    assert "PIP_EXTRA_INDEX_URL" in output
    assert len(calls) == 1, "nothing was installed"
    assert ensure(checkout, "")[0] == 0, "and nothing remembers the attempt"
