"""The worker pool as a fixture, and the three tiers that tests/run.sh runs one after the other."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from pool import Pool

TIERS = ("in-process", "processes", "alone")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tier",
        choices=TIERS,
        help="only the tests that stay in pytest's process, only those that start others, or of these only those that "
        "bear nothing beside them (default: all)",
    )
    parser.addoption(
        "--cuda", action="store_true", help="only the tests of CUDA devices; without it, none sees a device"
    )
    parser.addoption("--slow", action="store_true", help="with --tier: those marked slow too")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--cuda"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    config.addinivalue_line("markers", "cuda: runs on CUDA devices, with --cuda only")
    config.addinivalue_line("markers", "slow: left out of the tiers unless --slow is given")
    config.addinivalue_line("markers", "processes: starts processes of its own; tests that use `pool` have it implied")
    config.addinivalue_line("markers", "alone: held against a clock, so nothing runs beside it")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "pool" in getattr(item, "fixturenames", ()):
            item.add_marker("processes")
    tier, cuda, with_slow = (config.getoption(name) for name in ("--tier", "--cuda", "--slow"))
    kept = [item for item in items if (item.get_closest_marker("cuda") is not None) == cuda]
    if tier is not None:
        kept = [item for item in kept if _tier(item) == tier and (with_slow or item.get_closest_marker("slow") is None)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_collection_finish(session: pytest.Session) -> None:
    """The thousands of objects that imports and collection leave stay for good: without them, and seldomer, a tenth less time
    goes by in the search for garbage."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def _tier(item: pytest.Item) -> str:
    return next((tier for tier in ("alone", "processes") if item.get_closest_marker(tier)), "in-process")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Importing all modules takes longer than most of the few tests that are alone."""
    if config.getoption("--tier") == "alone" and collection_path.suffix == ".py":
        return "pytest.mark.alone" not in collection_path.read_text() or None
    return None


@pytest.fixture(scope="session")
def pool(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """`pool.run(function, *args, world_size=2, **kwargs)` gives one result per rank; see tests/pool.py."""
    folder = tmp_path_factory.getbasetemp()
    # A worker of pytest-xdist has a folder of its own in the session's.
    session = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    pool = Pool(request.config.getoption("--cuda"), session / "captures")
    yield pool
    pool.close()
