"""``pytest bench/ --benchmark-only [--bench-out FILE]``: the cases under pytest-benchmark."""

from __future__ import annotations

from typing import Any

import pytest

from . import results as result_files
from . import tables
from .common import Settings
from .contenders import Lab

_RESULTS = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    default = Settings()
    group = parser.getgroup("qlora_kernels bench")
    group.addoption("--bench-out", metavar="FILE", help="write what was measured here, as JSON")
    group.addoption("--bench-size", type=int, default=default.n, help="N = K (default %(default)s)")
    group.addoption("--bench-threads", type=int, default=default.threads, help="threads (default %(default)s)")
    group.addoption("--bench-seconds", type=float, default=default.seconds, help="for each case (default %(default)s)")


@pytest.fixture(scope="session")
def lab(pytestconfig: pytest.Config) -> Lab:
    size = pytestconfig.getoption("--bench-size")
    settings = Settings(
        n=size,
        k=size,
        threads=pytestconfig.getoption("--bench-threads"),
        seconds=pytestconfig.getoption("--bench-seconds"),
    )
    pytestconfig.stash[_RESULTS] = result_files.begin(settings)
    return Lab(settings)


@pytest.fixture
def results(lab: Lab, pytestconfig: pytest.Config) -> list[dict[str, Any]]:
    """Where a test leaves what it measured."""
    return pytestconfig.stash[_RESULTS]["cases"]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    measured = config.stash.get(_RESULTS, None)
    if not measured or not measured["cases"]:
        return
    path = config.getoption("--bench-out")
    if path:
        result_files.save(measured, path)
    try:
        terminalreporter.write_line("\n" + tables.terminal(measured))
    except ValueError as problem:  # a selection of the cases was run
        terminalreporter.write_line(f"no table: {problem}")
