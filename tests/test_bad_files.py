"""Readers against files that are cut off, corrupted, foreign or missing: an answer or one clear error, never anything else."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import autopar
from autopar.cli import main
from autopar.cluster.presets import preset
from autopar.plan import Candidate, Layout, Plan, Prediction, Stage, StageMemory, Term
from autopar.planner.inputs.aceso_tables import read_aceso, read_aceso_table
from autopar.planner.inputs.pipedream_text import read_pipedream
from autopar.planner.inputs.piper_json import read_piper

PLAN = Plan(
    "Net", "0123456789abcdef", 4, 8, 2, "1f1b",
    (Stage(0, 2, (0, 1), 1, (2,), ((0, 0),)), Stage(2, 3, (2, 3), 2, (), (), ("full",), 3)),
    (Layout(2, ("-", "o"), ("R",), ("S1",), ("S0", "R")),),
    Prediction(0.5, 2**30, 0.4, (Term("compute", 0.5),), (StageMemory(1, 2, 3, 4, 5),), ("with 2 times",)),
    (Candidate("a plan", 0.5, 2**30, "chosen"),),
)  # fmt: skip


def piper_text() -> str:
    def configuration(name: str, **sync) -> dict:
        return {
            "id": name, "timePerSample": 1.5, "memoryUsageA": 10, "memoryUsageB": 20, "parameterSize": 5,
            "syncTimeFw": sync.get("fw", {}), "syncTimeBw": sync.get("bw", {}),
        }  # fmt: skip

    nodes = [
        {"id": 7, "name": "first", "TMPCs": {"1": [configuration("plain", bw={"9": 1.0})]}},
        {"id": 9, "name": "second", "TMPCs": {"1": [configuration("plain", fw={"7": 1.0})]}},
    ]
    edges = [{"sourceId": 7, "destId": 9, "communicationCost": 3.0}]
    machine = {"maxDevices": 2, "maxMemoryPerDevice": 1e9, "bandwidth": 1e9, "mbsInBatch": 4}
    return json.dumps({**machine, "nodes": nodes, "edges": edges})


PIPEDREAM = (
    "node1 -- Input0 -- forward_compute_time=0.0, backward_compute_time=0.0, activation_size=0.0, parameter_size=0.0\n"
    "node2 -- Linear(3, 4) -- forward_compute_time=1.5, backward_compute_time=2.5, activation_size=[8.0; 4.0], "
    "parameter_size=64.0\n"
    "node3 -- ReLU -- forward_compute_time=0.5, backward_compute_time=0.5, activation_size=8.0, parameter_size=0.0\n"
    "\tnode1 -- node2\n\tnode2 -- node3\n"
)
ACESO = (
    "op_name,forward-compute,backward-compute,input_size,output_size,weights,activations,fwd_reserved,bwd_reserved\n"
    "enc-embedding,10.5,20.25,1,2,3,4,5,6\nenc-qkv,11.5,21.25,1,2,3,4,5,6\n"
)


def _beside(path: Path) -> Path:
    """The folder of a file of collectives, with a table beside it; what is not there is missed."""
    path.read_bytes()
    path.with_name("gpt_mbs1_tp1_algo0.csv").write_text(ACESO)
    path.with_name("prim_gpt_all_reduce_2gpus.csv").write_bytes(path.read_bytes())
    return path.parent


READERS: dict[str, tuple[Callable, str]] = {
    "cluster": (autopar.Cluster.load, ""),
    "plan": (Plan.load, PLAN.to_json()),
    "piper": (read_piper, piper_text()),
    "pipedream": (read_pipedream, PIPEDREAM),
    "gpt_mbs1_tp1_algo0": (read_aceso_table, ACESO),
    "prim_gpt_all_reduce_2gpus": (
        lambda path: read_aceso(_beside(path), "gpt"),
        "data_size(MB),time(ms)\n1,0.5\n2,0.75\n",
    ),
}


def written(name: str, path: Path) -> bytes:
    """A whole file of the kind, which its reader takes."""
    if name == "cluster":
        preset("h100-80gb", 2, 4).save(path)
    else:
        path.write_text(READERS[name][1])
    READERS[name][0](path)
    return path.read_bytes()


def corruptions(whole: bytes, draw: random.Random, count: int) -> list[bytes]:
    """Cut off anywhere; bytes flipped, taken out, doubled; numbers and words made others; foreign and binary files."""
    found = [b"", b"\n", b"null", b"[]", b"{}", b"3", b'"text"', b"\x80\x04\x95pickle", bytes(range(256)), b"[" * 5000]
    numbers = list(re.finditer(rb"-?\d[\d.e+]*", whole))
    words = list(re.finditer(rb'"[^"]*"', whole)) or list(re.finditer(rb"[A-Za-z_]+", whole))
    values = (b"-1", b"0", b"1e999", b"NaN", b"null", b'"x"', b"[]", b"{}", b"true", b"0.5", b"9" * 400)
    for _ in range(count):
        at = draw.randrange(len(whole))
        one, other = draw.choice(numbers), draw.choice(words)
        found += [
            whole[:at],
            whole[:at] + bytes([draw.randrange(256)]) + whole[at + 1 :],
            whole[:at] + whole[at + draw.randrange(1, 20) :],
            whole[:at] + whole[max(0, at - 9) :],
            whole[: one.start()] + draw.choice(values) + whole[one.end() :],
            whole[: other.start()] + draw.choice((*values, b'"other"')) + whole[other.end() :],
        ]
    return found


@pytest.mark.parametrize("name", READERS)
def test_a_reader_answers_or_says_what_is_wrong(name, tmp_path):
    path, draw = tmp_path / f"{name}{'.csv' if 'gpt' in name else '.json'}", random.Random(name)
    whole = written(name, path)
    refused = 0
    for data in corruptions(whole, draw, 80):
        path.write_bytes(data)
        try:
            READERS[name][0](path)
        except ValueError as error:
            refused += 1
            assert not isinstance(error, UnicodeError), data[:200]
            said = str(error)
            assert path.name in said and len(said) < 1500, (said, data[:200])
    assert refused > 200
    with pytest.raises(OSError):
        READERS[name][0](tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["cluster", "plan"])
def test_the_console_tells_it_in_one_line(name, tmp_path, capsys):
    model = tmp_path / "net.py"
    model.write_text(
        "import torch\ndef build(batch):\n    return torch.nn.Linear(4, 4), (torch.zeros(batch, 4), torch.zeros(batch, 4)), "
        "torch.nn.functional.mse_loss\n"
    )
    path, draw = tmp_path / f"{name}.json", random.Random(1)
    whole = written(name, path)
    task = ["--model", f"{model}:build", "--batch", "8", "--no-progress"]
    for data in corruptions(whole, draw, 3):
        path.write_bytes(data)
        arguments = (
            ["plan", *task, "--cluster", str(path), "--out", str(tmp_path / "out.json")]
            if name == "cluster"
            else ["simulate", *task, "--plan", str(path), "--cluster", "1xcpux4"]
        )
        status = main(arguments)
        error = capsys.readouterr().err
        assert status in (0, 2)
        if status:
            assert error.startswith("autopar: error: ") and error.count("\n") == 1 and "Traceback" not in error, error


def test_nothing_unpickles():
    """Readers read text; the words for anything else stand nowhere in the package but where torch's files are read safely."""
    for path in Path(autopar.__file__).parent.rglob("*.py"):
        text = path.read_text()
        if path.name == "agree.py":
            # tries whether an error of this process can be sent to another
            continue
        assert not re.search(r"\bimport (pickle|marshal|shelve|dill|cloudpickle|joblib)\b|\bpickle\.loads?\(", text), (
            path
        )
        for call in re.finditer(r"torch\.load\(([^)]*)\)", text):
            assert "weights_only=True" in call[1], path
        assert "allow_pickle=True" not in text, path
