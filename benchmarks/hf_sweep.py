"""Every causal language model of the installed transformers, small, under four plans, against its own eager step.

    python benchmarks/hf_sweep.py                        all, resuming where the last run stopped
    python benchmarks/hf_sweep.py --no-resume            from the beginning
    python benchmarks/hf_sweep.py --only mixtral,mamba   names that contain one of these
    python benchmarks/hf_sweep.py --retry                again, what did not pass the last time
    python benchmarks/hf_sweep.py --table                only print what the file says, and write the record

Each model has a process and a time limit of its own, and writes one line of JSON to the results file. It is built from
its config class with small sizes and random weights (tests/hf_models.py), runs one eager step in training mode, and is
then captured and trained for one step under tensor=2, pipeline=2, data=2 and tensor=2 x pipeline=2, on gloo ranks that its
process forks (tests/forked.py). Tensor-parallel plans come from the search (for a cluster whose links are fast, so that it
splits what it can) and, as a second opinion, from a random draw of a strategy for every op. Parity: loss within 1e-5
relative, each gradient within 1e-4 of its norm, in float32.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import multiprocessing as mp
import os
import platform
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import hf_models  # noqa: E402
from forked_parity import errors, reference  # noqa: E402
from plan_cases import random_plan  # noqa: E402

import autopar  # noqa: E402
from autopar.cluster.spec import Cluster  # noqa: E402
from autopar.graph import Graph  # noqa: E402
from autopar.plan import Plan  # noqa: E402
from autopar.sharding.batch import batch_layout  # noqa: E402

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4
MEMORY_BYTES = 8 * 2**30
"""Address space of each process: a config that stayed large is an error, not the end of the machine."""

COLUMNS = ("tensor=2", "tensor=2 random", "pipeline=2", "data=2", "tensor=2 x pipeline=2")


@dataclasses.dataclass(frozen=True)
class Case:
    """One plan to try: its degrees, and who chooses the layouts."""

    data: int
    tensor: int
    pipeline: int
    microbatches: int
    random: bool = False

    def plan(self, graph: Graph) -> Plan:
        degrees = {"data": self.data, "tensor": self.tensor, "pipeline": self.pipeline}
        if self.random or self.tensor == 1:
            return random_plan(graph, **degrees, microbatches=self.microbatches)
        world = self.data * self.tensor * self.pipeline
        cluster = Cluster.preset("h100-80gb", hosts=1, devices_per_host=world)
        return autopar.search(graph, cluster, progress=False, microbatches=self.microbatches, rewrites=False, **degrees)


CASES = dict(
    zip(
        COLUMNS,
        (Case(1, 2, 1, 1), Case(1, 2, 1, 1, True), Case(1, 1, 2, 2), Case(2, 1, 1, 1), Case(1, 2, 2, 2)),
        strict=True,
    )
)


def examine(name: str, limit_s: float) -> Iterator[dict[str, Any]]:
    """What is known of one model, growing; `at` is the step under way."""
    found: dict[str, Any] = {"name": name, "plans": {}}
    yield {**found, "at": "build"}
    module, example = hf_models.build(name)
    found["parameters"] = sum(p.numel() for p in module.parameters())
    yield {**found, "at": "eager"}
    expected = reference(module, example)
    if not expected.norm > 0:
        raise RuntimeError(f"the norm of the gradient is {expected.norm}")
    yield {**found, "at": "capture"}
    graph = autopar.capture(module, example)
    found |= {"ops": len(graph.ops), "blocks": len(graph.blocks)}
    conflict = batch_layout(graph, 2).conflict
    if conflict:
        found["conflict"] = str(conflict)
    for column, case in CASES.items():
        yield {**found, "at": column}
        if conflict and case.data * case.microbatches > 1:
            found["plans"][column] = f"one part of the batch only: {conflict}"
            if case.data > 1:
                continue
            case = dataclasses.replace(case, microbatches=1)
        seen = errors(module, example, graph, case.plan(graph), expected, timeout_s=limit_s)
        passed = seen.within(LOSS_TOLERANCE, GRADIENT_TOLERANCE)
        figures = f"loss {seen.loss:.1e}, gradient {seen.gradient:.1e}"
        found["plans"][column] = "parity" if passed else f"{figures} of {seen.parameter}"
        if passed:
            found["worst"] = max(found.get("worst", 0.0), seen.gradient)
    yield {**found, "at": "done"}


def serve(name: str, limit_s: float, pipe: Any) -> None:
    """In a process of its own: send what is known after each step, and at last the error if there was one."""
    os.setsid()  # so that the ranks can be stopped with their parent
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {"name": name, "at": "build"}
    try:
        for found in examine(name, limit_s):
            pipe.send(found)
    except BaseException as error:
        text = traceback.format_exc().splitlines()
        pipe.send({**found, "error": f"{type(error).__name__}: {error}"[:2000], "trace": text[-24:]})


def run_model(name: str, limit_s: float) -> dict[str, Any]:
    """The last word on one model; a process that takes longer than the limit is stopped."""
    context = mp.get_context("fork")  # transformers is imported once, in the parent
    receive, send = context.Pipe(duplex=False)
    worker = context.Process(target=serve, args=(name, limit_s, send))
    start_s = time.perf_counter()
    worker.start()
    send.close()
    found: dict[str, Any] = {"name": name, "at": "build"}
    while True:
        left_s = limit_s - (time.perf_counter() - start_s)
        try:
            if left_s <= 0 or not receive.poll(left_s):
                found["error"] = f"stopped after {limit_s:.0f} s"
                break
            found = receive.recv()
        except EOFError:
            if found["at"] != "done" and "error" not in found:
                worker.join()
                found["error"] = f"the process ended with code {worker.exitcode}"
            break
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.join()
    return {**found, "seconds": round(time.perf_counter() - start_s, 1)}


def trains(result: dict[str, Any]) -> bool:
    """Whether the model builds from its config and trains in eager mode."""
    return result["at"] not in ("build", "eager")


def passes(result: dict[str, Any]) -> bool:
    return result["at"] == "done" and all(result["plans"].get(c) == "parity" for c in COLUMNS)


def reason(result: dict[str, Any]) -> str:
    """Why it does not pass, in one line."""
    if "error" in result:
        lines = [line.strip() for line in result["error"].splitlines() if line.strip()]
        return f"{result['at']}: {lines[0] if lines else ''}"
    return "; ".join(f"{c}: {v}" for c, v in result.get("plans", {}).items() if v != "parity")


def report(results: Sequence[dict[str, Any]]) -> str:
    """Figures and table, as Markdown."""
    able = [r for r in results if trains(r)]
    passed = [r for r in able if passes(r)]
    share = len(passed) / max(len(able), 1)
    captured = sum(r["at"] != "capture" for r in able)
    lines = [
        f"{len(results)} models; {len(able)} build from a small config and train in eager mode; of these {captured} are "
        f"captured and {len(passed)} ({share:.1%}) train in parity under every plan.",
        "",
        "| plan | in parity |",
        "|---|---|",
        *(f"| {c} | {sum(r.get('plans', {}).get(c) == 'parity' for r in able)} of {len(able)} |" for c in COLUMNS),
        "",
        "## Not in parity under every plan",
        "",
        *(f"- {r['name']}: {_clipped(reason(r))}" for r in able if not passes(r)),
        "",
        "## Not counted: no small model, or no eager step",
        "",
        *(f"- {r['name']}: {_clipped(reason(r))}" for r in results if not trains(r)),
        "",
        "## All",
        "",
        "| model | parameters | ops | blocks | " + " | ".join(COLUMNS) + " | worst gradient error |",
        "|---|---|---|---|" + "---|" * (len(COLUMNS) + 1),
    ]
    for r in able:
        marks = ["yes" if r["plans"].get(c) == "parity" else "no" if c in r["plans"] else "" for c in COLUMNS]
        worst = f"{r['worst']:.0e}" if "worst" in r else ""
        cells = [r["name"], r["parameters"], r.get("ops", ""), r.get("blocks", ""), *marks, worst]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _clipped(text: str, limit: int = 300) -> str:
    site = str(Path(sys.prefix))
    text = text.replace(site, "").replace(str(ROOT), "")
    return text if len(text) <= limit else text[:limit] + " ..."


def write_record(results: Sequence[dict[str, Any]], folder: Path) -> Path:
    import transformers

    today = date.today().isoformat()
    seconds = sum(r.get("seconds", 0.0) for r in results)
    head = [
        f"# {today}: causal language models of transformers",
        "",
        f"Hardware: {mp.cpu_count()} cores of {platform.machine()}, one thread in use, shared with other programs. Software: "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}.",
        "",
        "    OMP_NUM_THREADS=1 python benchmarks/hf_sweep.py",
        "",
        f"{seconds / 60:.0f} minutes in all. Parity: loss within {LOSS_TOLERANCE:g} relative, gradients within "
        f"{GRADIENT_TOLERANCE:g} of their norm, float32, one step, {hf_models.ROWS} rows of {hf_models.LENGTH} tokens.",
        "",
    ]
    path = folder / f"{today}-hf-sweep.md"
    path.write_text("\n".join(head) + report(results) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names that contain one of these, separated by commas")
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "hf_sweep.jsonl")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--retry", action="store_true", help="run again what did not pass")
    parser.add_argument("--limit-s", type=float, default=180.0, help="for one model")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--record", type=Path, default=ROOT / "benchmarks" / "records", help="folder of the record")
    options = parser.parse_args()
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as names

    parts = [part for part in options.only.split(",") if part]
    chosen = [n for n in names if not parts or any(part in n for part in parts)]
    tqdm.monitor_interval = 0  # its thread would not survive the forks
    known: dict[str, dict[str, Any]] = {}
    if options.results.exists() and (options.resume or options.table):
        known = {r["name"]: r for r in map(json.loads, options.results.read_text().splitlines())}
    elif options.results.exists():
        options.results.unlink()
    is_known: Callable[[str], bool] = lambda n: n in known and not (options.retry and not passes(known[n]))  # noqa: E731
    todo = [] if options.table else [n for n in chosen if not is_known(n)]
    options.results.parent.mkdir(parents=True, exist_ok=True)
    with options.results.open("a") as file:
        for name in (bar := tqdm(todo, unit="model")):
            bar.set_postfix_str(name)
            known[name] = run_model(name, options.limit_s)
            file.write(json.dumps(known[name]) + "\n")
            file.flush()
            if not passes(known[name]):
                bar.write(f"{name}: {_clipped(reason(known[name]))}")
    results = [known[n] for n in chosen if n in known]
    print(report(results))
    if len(results) == len(names):
        print("\nrecord:", write_record(results, options.record))


if __name__ == "__main__":
    main()
