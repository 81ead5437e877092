"""The console: `autopar plan`, `simulate`, `compare` and `probe`.

What a user got wrong ends with one line on stderr and exit status 2. Nothing here needs a GPU or a process group, but
for `probe`, which measures the world that it runs in.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from .capture.export import capture
from .cli_cluster import FORM as CLUSTER_FORM
from .cli_cluster import read_cluster
from .cli_compare import compare_methods
from .cli_model import DTYPES, build_model, nearest
from .cli_model import FORM as MODEL_FORM
from .cluster.spec import Cluster
from .graph import Graph
from .plan import Plan
from .planner.budget import Budget
from .planner.constraints import Constraints
from .planner.pins import WORDS
from .planner.search import METHODS, search
from .report.html import save_report
from .report.prediction import prediction_text
from .report.trace import save_trace
from .schedule.orders import SCHEDULES
from .simulate import simulate

USAGE_ERROR = 2
INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, told by `main`."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for what the user can mend, 130 when interrupted."""
    try:
        arguments = _parser().parse_args(argv)
        arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"autopar: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("autopar: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="autopar", description="Plans how a PyTorch module trains on a cluster.", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="command", parser_class=_Parser)

    plan = commands.add_parser("plan", help="search the fastest plan that fits in memory", allow_abbrev=False)
    _add_task(plan)
    _add_constraints(plan)
    plan.add_argument("--method", default="auto", help=f"of the search: {', '.join(METHODS)} (default: auto)")
    plan.add_argument("--out", type=Path, default=Path("plan.json"), help="the plan file (default: plan.json)")
    _add_views(plan)
    plan.set_defaults(run=_plan)

    simulation = commands.add_parser("simulate", help="predict a step of a plan file", allow_abbrev=False)
    simulation.add_argument("--plan", type=Path, required=True, help="a file written by autopar plan or Plan.save")
    _add_task(simulation)
    _add_views(simulation)
    simulation.set_defaults(run=_simulate)

    comparison = commands.add_parser("compare", help="run every search method side by side", allow_abbrev=False)
    _add_task(comparison)
    _add_constraints(comparison)
    comparison.set_defaults(run=_compare)

    probe = commands.add_parser("probe", help="measure this machine, or the world of torchrun", allow_abbrev=False)
    probe.add_argument("--out", type=Path, help="write the cluster as a file that --cluster takes")
    probe.set_defaults(run=_probe)
    return parser


def _add_task(parser: argparse.ArgumentParser) -> None:
    task = parser.add_argument_group("task")
    task.add_argument("--model", required=True, help=f"{MODEL_FORM}, which returns (module, example[, loss])")
    task.add_argument("--cluster", required=True, nargs="+", help=f"a cluster file, or {CLUSTER_FORM}")
    task.add_argument("--batch", type=_count, help="rows of the global batch")
    task.add_argument("--seq", type=_count, help="tokens of a row")
    task.add_argument("--dtype", help=f"of the parameters of an hf: model: {', '.join(DTYPES)} (default: the config's)")
    task.add_argument("--no-progress", action="store_false", dest="progress", help="show no progress bar")


def _add_constraints(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("constraints", "what is not given is searched")
    for name in ("data", "tensor", "context", "expert", "pipeline", "microbatches"):
        group.add_argument(f"--{name}", type=_count, metavar="N")
    group.add_argument("--schedule", help=f"one of {', '.join(SCHEDULES)}")
    group.add_argument("--zero", type=int, metavar="LEVEL", help="0, 1, 2 or 3")
    group.add_argument("--recompute", help="none, selective or full")
    group.add_argument("--memory-limit-gib", type=float, metavar="GIB", help="what a plan may use of each device")
    group.add_argument(
        "--memory-reserve", type=float, metavar="SHARE", help="what it must leave free of each device (default: 0.1)"
    )
    group.add_argument(
        "--layout",
        action="append",
        type=_pair,
        metavar="PATTERN=WORD",
        help=f"how modules lie on the model axis, such as '*.q_proj=column': {', '.join(WORDS)}; may be repeated",
    )
    group.add_argument(
        "--stage",
        action="append",
        type=_pair,
        metavar="PATTERN=NUMBER",
        help="which stage runs modules, such as 'model.layers.0.*=0', or -1 for the last; may be repeated",
    )
    group.add_argument(
        "--time-limit", type=float, metavar="SECONDS", help="take the best plan that the search has by then"
    )


def _add_views(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trace", type=Path, help="write the predicted step for https://ui.perfetto.dev")
    parser.add_argument("--report", type=Path, help="write one self-contained HTML page")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1; got {text!r}")
    return int(text)


def _pair(text: str) -> tuple[str, str]:
    pattern, is_pair, value = text.rpartition("=")
    if not (pattern and is_pair and value):
        raise argparse.ArgumentTypeError(f"expected a pattern of modules' names, =, and what is pinned; got {text!r}")
    return pattern, value


def _stages(pairs: Sequence[tuple[str, str]]) -> dict[str, int]:
    for pattern, number in pairs:
        if not number.removeprefix("-").isdecimal():
            raise ValueError(
                f"--stage {pattern}={number}: expected the number of a stage behind =, or -1 for the last one"
            )
    return {pattern: int(number) for pattern, number in pairs}


def _constraints(arguments: argparse.Namespace) -> dict[str, Any]:
    """The given constraints, each checked by itself before anything slow begins."""
    names = ("data", "tensor", "context", "expert", "pipeline", "microbatches", "schedule", "zero", "recompute")
    found = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    limit_gib = arguments.memory_limit_gib
    if limit_gib is not None:
        if not 0 < limit_gib < 2**30:
            raise ValueError(f"--memory-limit-gib must be a positive number of GiB; got {limit_gib}")
        found["memory_limit_bytes"] = max(1, int(limit_gib * 2**30))
    if arguments.memory_reserve is not None:
        found["memory_reserve"] = arguments.memory_reserve
    if arguments.layout:
        found["layout"] = dict(arguments.layout)
    if arguments.stage:
        found["stage"] = _stages(arguments.stage)
    Constraints(**found)
    Budget(arguments.time_limit)
    return found


def _plan(arguments: argparse.Namespace) -> None:
    if arguments.method not in METHODS:
        raise ValueError(
            f"--method {arguments.method!r}: expected one of {', '.join(METHODS)}{nearest(arguments.method, METHODS)}"
        )
    constraints = _constraints(arguments)
    _check_folders(arguments.out, arguments.trace, arguments.report)
    cluster, graph = _task(arguments)
    start_s = time.perf_counter()
    plan = search(
        graph,
        cluster,
        arguments.method,
        progress=arguments.progress,
        time_limit_s=arguments.time_limit,
        what_if=True,
        **constraints,
    )
    print(f"planned in {time.perf_counter() - start_s:.1f} s\n\n{plan.explain(graph)}\n")
    plan.save(arguments.out)
    print(f"plan: {arguments.out}")
    _write_views(arguments, graph, plan, cluster)


def _simulate(arguments: argparse.Namespace) -> None:
    _check_folders(arguments.trace, arguments.report)
    plan = Plan.load(arguments.plan)
    cluster, graph = _task(arguments)
    plan.validate(graph, cluster)
    print(prediction_text(plan, simulate(graph, plan, cluster), cluster))
    _write_views(arguments, graph, plan, cluster)


def _compare(arguments: argparse.Namespace) -> None:
    constraints = _constraints(arguments)
    cluster, graph = _task(arguments)
    print(compare_methods(graph, cluster, constraints, arguments.progress, arguments.time_limit))


def _probe(arguments: argparse.Namespace) -> None:
    _check_folders(arguments.out)
    cluster = Cluster.probe()
    joined = dist.is_initialized()
    if not joined or dist.get_rank() == 0:
        print(cluster.describe())
        if arguments.out is not None:
            cluster.save(arguments.out)
            print(f"cluster: {arguments.out}")
    if joined:
        dist.destroy_process_group()


def _task(arguments: argparse.Namespace) -> tuple[Cluster, Graph]:
    cluster = read_cluster("".join(arguments.cluster))
    built = build_model(arguments.model, arguments.batch, arguments.seq, arguments.dtype)
    start_s = time.perf_counter()
    graph = capture(built.module, built.example, built.loss)
    elements = sum(parameter.numel() for parameter in built.module.parameters())
    print(
        f"{graph.name}: {elements / 1e6:,.4g} million parameters, {len(graph.ops)} ops in {len(graph.blocks)} blocks, "
        f"batch of {graph.batch_size} rows; captured in {time.perf_counter() - start_s:.1f} s"
    )
    print(cluster.describe())
    return cluster, graph


def _write_views(arguments: argparse.Namespace, graph: Graph, plan: Plan, cluster: Cluster) -> None:
    if arguments.trace is None and arguments.report is None:
        return
    line = simulate(graph, plan, cluster)
    if arguments.trace is not None:
        save_trace(arguments.trace, line, None)
        print(f"trace: {arguments.trace}")
    if arguments.report is not None:
        save_report(arguments.report, graph, plan, cluster, line)
        print(f"report: {arguments.report}")


def _check_folders(*paths: Path | None) -> None:
    """Before a long search, that its results can be written."""
    for path in paths:
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            why = "is a folder" if path.is_dir() else f"cannot be written: there is no folder {path.absolute().parent}"
            raise ValueError(f"{path} {why}")
