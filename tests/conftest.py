"""The worker pool as a fixture, and the two tiers that tests/run.sh runs one after the other."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from pool import Pool


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tier",
        choices=("in-process", "processes"),
        help="only the tests that stay in pytest's process, or only those that start others (default: all)",
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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "pool" in getattr(item, "fixturenames", ()):
            item.add_marker("processes")
    tier, cuda, with_slow = (config.getoption(name) for name in ("--tier", "--cuda", "--slow"))
    kept = [item for item in items if (item.get_closest_marker("cuda") is not None) == cuda]
    if tier is not None:
        kept = [
            item
            for item in kept
            if (item.get_closest_marker("processes") is not None) == (tier == "processes")
            and (with_slow or item.get_closest_marker("slow") is None)
        ]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


@pytest.fixture(scope="session")
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    """`pool.run(function, *args, world_size=2, **kwargs)` gives one result per rank; see tests/pool.py."""
    pool = Pool(request.config.getoption("--cuda"))
    yield pool
    pool.close()
