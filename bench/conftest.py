"""``pytest bench/ --benchmark-only [--bench-sweep quick] [--bench-out FILE]``: the cases under pytest-benchmark."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from qlora_kernels.bench.case import Settings
from qlora_kernels.bench.options import largest_cache
from qlora_kernels.bench.points import SWEEPS
from qlora_kernels.bench.report import results as result_files
from qlora_kernels.bench.report import table
from qlora_kernels.bench.worker import Worker

_RESULTS = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("qlora_kernels bench")
    group.addoption("--bench-sweep", choices=SWEEPS, default="usual", help="what to measure (default %(default)s)")
    group.addoption("--bench-out", metavar="FILE", help="write what was measured here, as JSON lines")
    group.addoption("--bench-threads", type=int, help="threads of the CPU")
    group.addoption("--bench-seconds", type=float, default=Settings().seconds, help="a case (default %(default)s)")


def _option(config: pytest.Config, name: str) -> Any:
    """Of the type that pytest_addoption() gives it; pytest declares any, or None."""
    return config.getoption(name)


def pytest_xdist_auto_num_workers() -> int:
    """One process alone on the machine, or times mean little."""
    return 0


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "point" in metafunc.fixturenames:
        points = SWEEPS[_option(metafunc.config, "--bench-sweep")]()
        metafunc.parametrize("point", points, ids=str)


@pytest.fixture(scope="session")
def settings(pytestconfig: pytest.Config) -> Settings:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Settings(
        device=device,
        threads=_option(pytestconfig, "--bench-threads") or torch.get_num_threads(),
        cache_bytes=largest_cache(device),
        seconds=_option(pytestconfig, "--bench-seconds"),
    )


@pytest.fixture(scope="session")
def cases(settings: Settings, pytestconfig: pytest.Config) -> list[dict[str, Any]]:
    """Where a test leaves what it measured."""
    measured = result_files.begin(settings, _option(pytestconfig, "--bench-sweep"))
    pytestconfig.stash[_RESULTS] = measured
    return measured["cases"]


@pytest.fixture
def worker() -> Iterator[Worker]:
    with Worker() as worker:
        yield worker


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    measured = config.stash.get(_RESULTS, None)
    if measured is None or not measured["cases"]:
        return
    measured["complete"] = exitstatus == 0
    out = _option(config, "--bench-out")
    if out:
        result_files.save(measured, out)
    terminalreporter.write_line("\n" + table.terminal(measured))
