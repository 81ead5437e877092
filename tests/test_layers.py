"""Imports go only towards the data types: the order of the rooms, read from the sources without importing them."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 450

DATA_TYPES = {
    "autopar.cluster.spec",
    "autopar.cost.types",
    "autopar.graph",
    "autopar.ops",
    "autopar.plan",
    "autopar.routed",
    "autopar.schedule.instructions",
    "autopar.sharding.placement",
    "autopar.sharding.strategy",
    "autopar.timeline",
}
# Highest first. A module imports of its own room and of lower ones when it is loaded.
ROOMS = (
    {"parallelize"},
    {"refine", "cli"},
    {"planner"},
    {"simulate", "runtime"},
    {"report", "plan_validate"},
    {"schedule"},
    {"cost"},
    {"sharding", "capture", "plan"},
    {"cluster"},
    {"data types"},
    {"torch_private"},
)
HEIGHTS = {name: -rank for rank, names in enumerate(ROOMS) for name in names}
# Usable on a machine without a process group, and cheap to import there.
WITHOUT_PROCESSES = ("graph", "cluster", "plan", "schedule", "simulate")
PROBE = "autopar.cluster.probe"


@dataclass(frozen=True)
class Import:
    """One imported module; `at_load` tells one at the top of a module from one inside a function."""

    target: str
    at_load: bool
    line: int


def sources() -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / "autopar").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


SOURCES = sources()


def part(module: str) -> str:
    """ "plan" for autopar.plan and autopar.plan_json, "cost" for autopar.cost.model, "" for autopar itself."""
    name = module.split(".")[1] if "." in module else ""
    return name if name in HEIGHTS else name.split("_")[0]


def room(module: str) -> str:
    return "data types" if module in DATA_TYPES else part(module)


def is_type_checking(node: ast.If) -> bool:
    return ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def statements(node: ast.AST, at_load: bool = True) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, at_load
        elif isinstance(child, ast.If) and is_type_checking(child):
            for other in child.orelse:
                yield from statements(other, at_load)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from statements(child, at_load and not inside)


@functools.cache
def imports(module: str) -> tuple[Import, ...]:
    found = []
    path = SOURCES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node, at_load in statements(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            base = node.module or ""
            if node.level:
                ancestors = package.split(".")
                base = ".".join(ancestors[: len(ancestors) - node.level + 1] + ([node.module] if node.module else []))
            # `from package import name` may name a module; torch.distributed counts as one for our purpose.
            targets = [
                f"{base}.{alias.name}" if f"{base}.{alias.name}" in {*SOURCES, "torch.distributed"} else base
                for alias in node.names
            ]
        found += [Import(target, at_load, node.lineno) for target in targets]
    return tuple(found)


def is_distributed(target: str) -> bool:
    return target == "torch.distributed" or target.startswith("torch.distributed.")


def chain_to(module: str, is_forbidden: Callable[[str], bool]) -> list[str] | None:
    """A chain of imports, even those inside functions, from `module` to a forbidden one; the probe is exempt."""
    chains = [[module]]
    seen = {module}
    for chain in chains:
        for entry in imports(chain[-1]):
            if is_forbidden(entry.target):
                return [*chain, entry.target]
            if entry.target in SOURCES and entry.target not in seen and not entry.target.startswith(PROBE):
                seen.add(entry.target)
                chains.append([*chain, entry.target])
    return None


MODULES = sorted(SOURCES)


@pytest.mark.parametrize("module", [m for m in MODULES if part(m) in WITHOUT_PROCESSES and not m.startswith(PROBE)])
def test_plain_data_never_reaches_torch_distributed(module: str) -> None:
    chain = chain_to(module, is_distributed)
    assert chain is None, " imports ".join(chain)


@pytest.mark.parametrize("module", [m for m in MODULES if room(m) == "planner"])
def test_the_planner_never_reaches_the_runtime(module: str) -> None:
    chain = chain_to(module, lambda target: room(target) == "runtime" and target.startswith("autopar"))
    assert chain is None, " imports ".join(chain)


def test_every_module_lies_in_a_room() -> None:
    assert [module for module in MODULES if room(module) not in {*HEIGHTS, ""}] == []
    assert set(MODULES) >= DATA_TYPES


@pytest.mark.parametrize("module", [m for m in MODULES if room(m)])
def test_lower_rooms_import_nothing_of_higher_ones(module: str) -> None:
    upward = [
        f"line {entry.line} imports {entry.target}"
        for entry in imports(module)
        if entry.at_load and entry.target in SOURCES and room(entry.target)
        if HEIGHTS[room(entry.target)] > HEIGHTS[room(module)]
    ]
    assert not upward, f"{SOURCES[module]}: {upward}"


def test_no_import_cycles() -> None:
    loads = {
        module: sorted(
            {entry.target for entry in imports(module) if entry.at_load and entry.target in SOURCES} - {module}
        )
        for module in MODULES
    }
    done: set[str] = set()

    def visit(path: list[str]) -> None:
        for target in loads[path[-1]]:
            assert target not in path, " imports ".join([*path[path.index(target) :], target])
            if target not in done:
                visit([*path, target])
        done.add(path[-1])

    for module in MODULES:
        visit([module])


def reads_environment(path: Path) -> list[int]:
    return [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv"))
        or (
            isinstance(node, ast.ImportFrom)
            and node.module == "os"
            and {a.name for a in node.names} & {"environ", "getenv"}
        )
    ]


@pytest.mark.parametrize("module", MODULES)
def test_only_launch_reads_the_environment(module: str) -> None:
    assert not reads_environment(SOURCES[module])


def test_the_environment_check_sees_launch_read_it() -> None:
    assert reads_environment(ROOT / "launch" / "train_lm.py")


FOLDERS = ("autopar", "launch", "tests", "benchmarks")


@pytest.mark.parametrize(
    "path",
    [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_files_hold_one_idea(path: Path) -> None:
    num_lines = len(path.read_text().splitlines())
    assert num_lines <= MAX_LINES, f"{num_lines} lines; at most {MAX_LINES}"
