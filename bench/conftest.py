"""``pytest bench/ --benchmark-only [--bench-out FILE]``: the cases under pytest-benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora_kernels.bench.common import Settings
from qlora_kernels.bench.contenders import Lab

from . import results as result_files
from . import tables

_RESULTS = pytest.StashKey[dict[str, dict[str, Any]]]()  # by suite


def pytest_addoption(parser: pytest.Parser) -> None:
    default = Settings()
    group = parser.getgroup("qlora_kernels bench")
    group.addoption(
        "--bench-out",
        metavar="FILE",
        help="write what was measured here, as JSON; optimizers to optimizer-FILE",
    )
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
    pytestconfig.stash[_RESULTS] = {suite: result_files.begin(settings, suite) for suite in result_files.PREFIXES}
    return Lab(settings)


@pytest.fixture
def results(lab: Lab, pytestconfig: pytest.Config) -> list[dict[str, Any]]:
    """Where a test leaves what it measured."""
    return pytestconfig.stash[_RESULTS]["linear"]["cases"]


@pytest.fixture
def optimizer_results(lab: Lab, pytestconfig: pytest.Config) -> list[dict[str, Any]]:
    """Likewise, of optimizers."""
    return pytestconfig.stash[_RESULTS]["optimizer"]["cases"]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    out = config.getoption("--bench-out")
    for suite, measured in config.stash.get(_RESULTS, {}).items():
        if not measured["cases"]:
            continue
        if out:
            path = Path(out)
            result_files.save(measured, path if suite == "linear" else path.with_name(f"{suite}-{path.name}"))
        try:
            terminalreporter.write_line("\n" + tables.terminal(measured))
        except ValueError as problem:  # a selection of the cases was run
            terminalreporter.write_line(f"no table: {problem}")
