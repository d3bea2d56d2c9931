"""--passed=FOLDER: leaves out what earlier runs have noted there as passed, and notes what passes in this one.

So .ci/run runs each test once, and at its end finds any that no step has collected, or that all have skipped.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest


def add_option(parser) -> None:
    # With "=": before pytest knows the option, it would take a folder that stands alone for the one with the tests.
    parser.addoption(
        "--passed", metavar="FOLDER", type=Path, help="leave out the tests noted in FOLDER, and note those that pass"
    )


def register(config) -> None:
    if config.option.passed is not None:
        config.pluginmanager.register(Passed(config.option.passed, notes=not hasattr(config, "workerinput")))


class Passed:
    def __init__(self, folder: Path, notes: bool) -> None:
        self.folder = folder
        #: Whether this process writes them down: a worker's are seen by the process that started it.
        self.notes = notes
        # Read once, at the start: all workers have to collect the same tests.
        self.before = {line for file in folder.glob("*.txt") for line in file.read_text().splitlines()}
        self.outcomes: dict[str, set[tuple[str, str]]] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items) -> None:
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in self.before])
        items[:] = [item for item in items if item.nodeid not in self.before]

    def pytest_runtest_logreport(self, report) -> None:
        # pytest reports an expected failure as skipped.
        outcome = "passed" if hasattr(report, "wasxfail") and report.skipped else report.outcome
        self.outcomes.setdefault(report.nodeid, set()).add((report.when, outcome))

    def pytest_sessionfinish(self) -> None:
        whole = {(when, "passed") for when in ("setup", "call", "teardown")}
        passed = sorted(name for name, outcomes in self.outcomes.items() if outcomes == whole)
        if self.notes and passed:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = self.folder / f"{time.time_ns()}-{os.getpid()}.txt"
            file.write_text("".join(f"{name}\n" for name in passed))
