"""The console, in process: what it prints and writes, and one line with status 2 for what a user got wrong."""

from __future__ import annotations

import html.parser
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import autopar
from autopar import cli_compare
from autopar.cli import main
from autopar.cli_cluster import preset_name, read_cluster
from autopar.cli_model import build_model
from autopar.cluster.presets import PRESETS
from autopar.graph import Graph
from autopar.planner.search import METHODS
from autopar.report.html import report_page
from autopar.report.timeline_svg import SPAN_WIDTH, WIDTH, timeline_svg
from autopar.timeline import Event, Timeline

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
PYTHON_MODEL = """
from __future__ import annotations

from dataclasses import dataclass

import torch
from net_sizes import WIDTH

@dataclass
class Sizes:
    hidden: int = 2 * WIDTH

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(16, Sizes().hidden), torch.nn.Linear(Sizes().hidden, 16)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))

def build(batch):
    return Net(), (torch.zeros(batch, 16), torch.zeros(batch, 16)), torch.nn.functional.mse_loss

def wrong(**sizes):
    return Net()

def broken(batch, seq):
    raise RuntimeError("no luck\\nat all")
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(LLAMA))
    return path


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("python") / "net.py"
    path.write_text(PYTHON_MODEL)
    path.with_name("net_sizes.py").write_text("WIDTH = 16")
    return path


@pytest.fixture(scope="module")
def planned(config: Path) -> tuple[Graph, autopar.Plan, autopar.Cluster]:
    built = build_model(f"hf:{config}", 8, 16)
    graph = autopar.capture(built.module, built.example)
    cluster = read_cluster("1xh100x8")
    return graph, autopar.search(graph, cluster, pipeline=2, data=2, tensor=2, microbatches=4), cluster


def task(model: object, cluster: str = "1xh100-80gbx4", batch: int = 8, seq: int | None = 16) -> list[str]:
    sizes = ["--batch", str(batch)] + (["--seq", str(seq)] if seq else [])
    return ["--model", str(model), "--cluster", cluster, *sizes, "--no-progress"]


class Page(html.parser.HTMLParser):
    """Collects tags, addresses and text; checks that tags nest."""

    VOID = frozenset({"meta", "br", "rect", "line"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.loads: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        if tag not in self.VOID or tag == "rect":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_plan_writes_a_plan_that_simulate_agrees_with(config: Path, tmp_path: Path, capsys) -> None:
    files = {name: tmp_path / name for name in ("plan.json", "trace.json", "report.html")}
    shape = ["--pipeline", "2", "--tensor", "2", "--microbatches", "4"]
    views = ["--trace", str(files["trace.json"]), "--report", str(files["report.html"])]
    assert main(["plan", *task(f"hf:{config}"), *shape, "--out", str(files["plan.json"]), *views]) == 0
    out = capsys.readouterr().out
    assert "pipeline 2 x data 1 x tensor 2, 4 microbatches" in out and "Candidates" in out
    plan = autopar.Plan.load(files["plan.json"])
    assert (plan.pipeline, plan.microbatches, plan.stages[0].tensor, plan.world_size) == (2, 4, 2, 4)
    tokens = {event["name"] for event in json.loads(files["trace.json"].read_text())["traceEvents"]}
    assert {f"{stage}{kind}{m}" for stage in (0, 1) for kind in "FB" for m in range(4)} <= tokens
    page = Page(files["report.html"].read_text())
    assert page.loads == [] and page.tags.count("svg") == 3

    assert main(["simulate", "--plan", str(files["plan.json"]), *task(f"hf:{config}")]) == 0
    out = capsys.readouterr().out
    said = float(re.search(r"Predicted step time: ([\d.]+) ms", out)[1])
    assert said == pytest.approx(plan.prediction.step_time_s * 1e3, rel=5e-3)
    idle = float(re.search(r"idle for ([\d.]+)% of the step", out)[1])
    assert 0 < idle < 100
    assert re.search(r"^1 +2-3 ", out, re.MULTILINE)


def test_a_python_file_may_give_the_model_and_its_loss(net: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "plan.json"
    assert main(["plan", *task(f"{net}:build", "1xcpux2", 12, None), "--data", "2", "--out", str(out)]) == 0
    plan = autopar.Plan.load(out)
    assert (plan.model, plan.batch_size, plan.stages[0].data) == ("Net", 12, 2)


def test_plan_takes_pins_by_name_and_a_time_limit(config: Path, tmp_path: Path, capsys) -> None:
    pins = ["--layout", "*.q_proj=column", "--layout", "*attn=heads", "--stage", "model.layers.1.*=1", "--zero", "1"]
    pins += ["--pipeline", "2", "--data", "2", "--memory-reserve", "0.2", "--time-limit", "60"]
    files = [str(tmp_path / "plan.json"), str(tmp_path / "report.html")]
    arguments = ["plan", *task(f"hf:{config}", "1xh100x8"), *pins, "--out", files[0], "--report", files[1]]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "Where the step goes" in out and "in short: pipeline 2 (1F1B); data 2 with ZeRO 1; tensor 2" in out
    plan = autopar.Plan.load(files[0])
    assert [stage.zero for stage in plan.stages] == [1, 1] and plan.stages[1].start <= 2
    page = Page(Path(files[1]).read_text())
    assert page.loads == [] and "Where the step goes" in page.text


def test_plan_takes_degrees_of_axes_with_roles(config: Path, tmp_path: Path, capsys) -> None:
    pins = ["--context", "2", "--tensor", "1", "--data", "2", "--pipeline", "1", "--expert", "1"]
    assert main(["plan", *task(f"hf:{config}"), *pins, "--out", str(tmp_path / "plan.json")]) == 0
    assert "context 2 by" in capsys.readouterr().out
    assert [stage.axes for stage in autopar.Plan.load(tmp_path / "plan.json").stages] == [(2,)]


def test_compare_shows_every_method_and_auto_equals_the_oracle(net: Path, capsys) -> None:
    assert main(["compare", *task(f"{net}:build", "1xcpux2", seq=None)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: re.split(r"  +", line) for line in lines if line.split() and line.split()[0] in METHODS}
    assert rows.keys() == METHODS.keys()
    assert rows["auto"][2] == rows["exhaustive"][2]


def test_compare_says_that_it_skips_the_oracle(net: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(cli_compare, "MAX_EXHAUSTIVE_PLANS", 1)
    assert main(["compare", *task(f"{net}:build", "1xcpux2", seq=None)]) == 0
    assert "exhaustive was skipped: it would simulate" in capsys.readouterr().out


def test_probe_prints_and_saves_the_cluster(tmp_path: Path, capsys, monkeypatch) -> None:
    found = autopar.Cluster.preset("cpu", hosts=1, devices_per_host=1)
    monkeypatch.setattr(autopar.Cluster, "probe", classmethod(lambda cls: found))
    assert main(["probe", "--out", str(tmp_path / "cluster.json")]) == 0
    assert found.describe() in capsys.readouterr().out
    assert read_cluster(str(tmp_path / "cluster.json")) == found


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "T5ForConditionalGeneration", "GPT2LMHeadModel"])
def test_models_whose_forward_takes_labels_are_built_without_memory(name: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    kind = {"L": "llama", "T": "t5", "G": "gpt2"}[name[0]]
    sizes = LLAMA if kind == "llama" else {"vocab_size": 64, "num_layers": 1, "d_model": 32, "pad_token_id": 0}
    sizes = {**sizes, "model_type": kind, "architectures": [name], "pad_token_id": 0, "decoder_start_token_id": 0}
    path.write_text(json.dumps({**sizes, "n_embd": 32, "n_head": 4, "n_layer": 1} if kind == "gpt2" else sizes))
    built = build_model(f"hf:{path}", 4, 8, "bfloat16")
    assert type(built.module).__name__ == name
    assert {p.device.type for p in built.module.parameters()} == {"meta"}
    assert str(next(built.module.parameters()).dtype) == "torch.bfloat16"
    graph = autopar.capture(built.module, built.example)
    assert graph.batch_size == 4
    labels = graph.tensors[graph.inputs[graph.input_keys.index("labels")]]
    assert labels.shape == ((4,) if "Classification" in name else (4, 8))


def test_a_class_of_transformers_may_be_named() -> None:
    assert type(build_model("hf:GPT2Config", 2, 8).module).__name__ == "GPT2LMHeadModel"
    assert type(build_model("hf:BertForMaskedLM", 2, 8).module).__name__ == "BertForMaskedLM"


def test_clusters_are_named_in_full_or_by_an_unambiguous_beginning() -> None:
    for preset in PRESETS:
        assert preset_name(preset.upper()) == preset
        cluster = read_cluster(f"3x{preset}x5")
        assert (cluster.device.kind, cluster.num_hosts, cluster.devices_per_host) == (preset, 3, 5)
        beginning = preset.split("-")[0]
        if sum(other.startswith(f"{beginning}-") for other in PRESETS) > 1:
            with pytest.raises(ValueError, match=f"could be .*{preset}"):
                preset_name(beginning)
        else:
            assert preset_name(beginning) == preset


def test_the_page_shows_every_rank_block_and_alternative(planned) -> None:
    graph, plan, cluster = planned
    line = autopar.simulate(graph, plan, cluster)
    text = report_page(graph, plan, cluster, line)
    page = Page(text)
    said = " ".join(page.text)
    for stage in plan.stages:
        assert f"ranks {stage.ranks[0]}-{stage.ranks[-1]}" in said
    for parameter in graph.parameters:
        assert parameter.fqn in said
    for event in line.events:
        if event.kind in ("F", "B"):
            assert event.token in said
    assert all(one.verdict in said for one in plan.candidates)
    assert page.loads == [] and not re.search(r"https?://|url\(|@import", text)


def test_the_picture_of_a_long_step_stays_small_and_in_its_frame() -> None:
    events = tuple(Event(0, f"0{'FB'[i % 2]}{i // 2}", i * 1e-3, (i + 1) * 1e-3) for i in range(20))
    many = tuple(Event(0, f"0F{i}", i * 1e-6, (i + 1) * 1e-6) for i in range(50_000))
    for given in (events, many):
        line = Timeline(given, given[-1].end_s)
        picture = timeline_svg(line, {0: "<one & all>"})
        assert "&lt;one &amp; all&gt;" in picture and len(picture) < 800_000
        bars = re.findall(r'<rect x="([\d.]+)" y="\d+" width="([\d.]+)" height="\d+" fill', picture)
        assert max(float(x) + float(width) for x, width in bars) <= WIDTH
        # However the events are drawn, together they cover the step.
        assert sum(float(width) for _, width in bars) == pytest.approx(SPAN_WIDTH, rel=0.01)


BAD = {
    "preset": (["--cluster", "2xh10x8"], "h100-80gb"),
    "ambiguous preset": (["--cluster", "2xa100x8"], "a100-40gb or a100-80gb"),
    "no hosts": (["--cluster", "0xh100x8"], "num_hosts of a cluster must be a whole number of at least 1"),
    "no devices": (["--cluster", "2xh100x0"], "devices_per_host"),
    "cluster form": (["--cluster", "h100"], "<hosts>x<preset>x<devices per host>"),
    "cluster file that is none": (["--cluster", str(Path(__file__).parent / "conftest.py")], "is not JSON"),
    "cluster file": (["--cluster", "nowhere/cluster.json"], "nowhere/cluster.json"),
    "method": (["--method", "exhaustiv"], "did you mean exhaustive?"),
    "schedule": (["--schedule", "1f2b"], "did you mean '1f1b'?"),
    "zero": (["--zero", "7"], "expected one of 0, 1, 2, 3"),
    "degrees": (["--data", "3"], "data=3"),
    "contradiction": (["--data", "2", "--tensor", "4", "--pipeline", "2"], "but the cluster has 4 devices"),
    "zero devices": (["--pipeline", "0"], "expected a whole number of at least 1; got '0'"),
    "negative memory": (["--memory-limit-gib", "-1"], "--memory-limit-gib must be a positive number"),
    "memory": (["--memory-limit-gib", "1e-5", "--pipeline", "1", "--data", "1"], "the smallest"),
    "folder": (["--out", "no/such/folder/plan.json"], "there is no folder"),
    "model file": (["--model", "hf:no/config.json"], "no/config.json"),
    "model class": (["--model", "hf:LlamaForCausalML"], "did you mean LlamaForCausalLM"),
    "model form": (["--model", "llama"], "is of neither form"),
    "reserve": (["--memory-reserve", "1.5"], "memory_reserve=1.5: expected a share"),
    "both memories": (["--memory-reserve", "0.5", "--memory-limit-gib", "9"], "say the same thing twice"),
    "time": (["--time-limit", "-1"], "time_limit_s=-1.0: expected a number of seconds"),
    "layout form": (["--layout", "column"], "expected a pattern of modules' names"),
    "layout word": (["--layout", "*.q_proj=colum"], "did you mean 'column'"),
    "layout module": (["--layout", "*.q_porj=column"], "has such a name; names are like"),
    "stage number": (["--stage", "*layers.0*=first"], "expected the number of a stage"),
    "stage": (["--stage", "*embed_tokens=1"], "stage['*embed_tokens']=1 is impossible"),
    "no schedule of it": (["--method", "alpa", "--schedule", "2bw"], "schedule='2bw': method='alpa' makes plans with"),
    "three clash": (["--zero", "3", "--tensor", "2", "--pipeline", "2"], "contradict each other"),
    "no labels": (["--model", "hf:BertModel"], "must take input_ids and labels"),
    "dtype": (["--dtype", "float23"], "did you mean float32"),
    "option": (["--bath", "3"], "--bath"),
}


def fails_with_one_line(arguments: list[str], words: str, capsys) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("autopar: error: ") and error.count("\n") == 1, error


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(case: str, config: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    changes, words = BAD[case]
    fails_with_one_line(["plan", *task(f"hf:{config}"), *changes], words, capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name, words",
    [
        ("bild", "did you mean build"),
        ("build", "no argument 'seq'"),
        ("wrong", "must return"),
        ("broken", "no luck at all"),
    ],
)
def test_a_python_file_that_gives_no_model(name: str, words: str, net: Path, tmp_path: Path, capsys) -> None:
    fails_with_one_line(["plan", *task(f"{net}:{name}"), "--out", str(tmp_path / "plan.json")], words, capsys)


@pytest.mark.parametrize(
    "text, words",
    [
        (json.dumps(LLAMA)[:50], "truncated"),
        ("[]", "no model_type"),
        (json.dumps(LLAMA | {"model_type": "lama"}), "did you mean llama"),
        (json.dumps(LLAMA | {"hidden_size": "wide"}), "hidden_size"),
        (json.dumps(LLAMA | {"architectures": ["LlamaForCausalML"]}), "did you mean LlamaForCausalLM"),
    ],
)
def test_a_config_that_is_none(text: str, words: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    fails_with_one_line(["compare", *task(f"hf:{path}")], words, capsys)


def test_plan_files_that_are_none(planned, config: Path, tmp_path: Path, capsys) -> None:
    _, plan, _ = planned
    path = tmp_path / "plan.json"
    common = ["simulate", "--plan", str(path)]
    fails_with_one_line([*common, *task(f"hf:{config}")], "plan.json", capsys)
    path.write_text(plan.to_json()[:300])
    fails_with_one_line([*common, *task(f"hf:{config}")], "is truncated", capsys)
    path.write_bytes(b"\x80\x04\x95pickle")
    fails_with_one_line([*common, *task(f"hf:{config}")], "is not JSON", capsys)
    plan.save(path)
    fails_with_one_line([*common, *task(f"hf:{config}")], "the cluster has 4 devices", capsys)
    fails_with_one_line([*common, *task(f"hf:{config}", "1xh100x8", seq=32)], "fingerprint", capsys)


def test_no_transformers_is_told(config: Path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    fails_with_one_line(["plan", *task(f"hf:{config}")], "autopar[hf]", capsys)


def test_no_command_and_missing_options_are_one_line(capsys) -> None:
    fails_with_one_line([], "command", capsys)
    fails_with_one_line(["plna"], "plna", capsys)
    fails_with_one_line(["plan", "--model", "hf:GPT2Config", "--cluster", "1xh100x1"], "--batch is missing", capsys)


def test_it_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "autopar", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in ("plan", "simulate", "compare", "probe"))
