"""The steps of a check on a card, each a program of its own with a time limit."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_kernels import architectures
from qlora_kernels.bench.machine import ROOT
from qlora_kernels.files import load_json

from . import gpu_cases
from .gpu_facts import cards_now, facts, tool
from .gpu_parsers import junit_counts, sanitizer_findings

SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
TAIL_LINES = 40


class StepFailed(Exception):
    """A step did not do what it should; the sentence says what.

    Attributes:
        found: what it gave all the same.
        tail: the end of its output.
    """

    def __init__(self, sentence: str, found: dict[str, Any] | None = None, tail: str = "") -> None:
        super().__init__(sentence)
        self.found, self.tail = found or {}, tail


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: its name in the results.
        share: of the budget, in seconds of the default one; what earlier steps leave comes on top.
        run: given the folder for files and the seconds there are, does it and returns what it found.
        needs: a step without whose success this one would say something about another build.
    """

    name: str
    share: float
    run: Callable[[Path, float], dict[str, Any]]
    needs: str | None = None


@dataclass(frozen=True)
class Ended:
    """How a program ended: ``code`` is None where it ran out of time."""

    code: int | None
    seconds: float
    output: str = field(repr=False)

    @property
    def tail(self) -> str:
        return "\n".join(self.output.splitlines()[-TAIL_LINES:])


def execute(command: Sequence[str], log: Path, seconds: float, environment: Mapping[str, str] | None = None) -> Ended:
    """Runs a program in the source folder, its output in a file, and ends it with all that it started when time is up.

    Raises:
        OSError: when it cannot be started.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:  # out of time, or an interrupt
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return Ended(code, time.monotonic() - begin, log.read_text(errors="replace"))


def demand(ended: Ended, what: str, seconds: float, found: dict[str, Any] | None = None) -> None:
    """Raises StepFailed unless the program ended well and in time."""
    if ended.code is None:
        raise StepFailed(f"{what} took longer than {seconds:.0f} s", found, ended.tail)
    if ended.code != 0:
        raise StepFailed(f"{what} ended with exit code {ended.code}", found, ended.tail)


# -------------------------------------------------------------------------------------------------------- the steps


def run_facts(folder: Path, seconds: float) -> dict[str, Any]:
    return facts()


def run_build(folder: Path, seconds: float) -> dict[str, Any]:
    """Builds the extension for the card that is there, beside the package, and asks it what it has."""
    begin = time.monotonic()
    found: dict[str, Any] = {"from_scratch": not any((ROOT / "build").glob("temp.*"))}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    ended = execute(command, folder / "build.log", seconds, {"QLORA_KERNELS_CUDA_ARCHS": "native"})
    found["build_seconds"] = round(ended.seconds, 1)
    demand(ended, "the build", seconds, found)
    code = (
        "import json, torch, qlora_kernels; print(json.dumps({**qlora_kernels.build_info(), "
        "'card': [*torch.cuda.get_device_capability(), torch.cuda.get_device_name()]}))"
    )
    left = seconds - (time.monotonic() - begin)
    ended = execute([sys.executable, "-c", code], folder / "build_info.log", left)
    demand(ended, "loading what was built", left, found)
    lines = [line for line in ended.output.splitlines() if line.startswith("{")]
    if not lines:
        raise StepFailed("what was built says nothing of itself", found, ended.tail)
    info = json.loads(lines[-1])
    card = info.pop("card")
    found["build_info"] = info
    if not info["native"]:
        raise StepFailed(f"what was built does not load: {info['problem']}", found)
    archs = info.get("cuda_archs", "")
    problem = architectures.unserved(archs if isinstance(archs, str) else ";".join(archs), *card)
    if problem:
        raise StepFailed(problem, found, (folder / "build.log").read_text(errors="replace")[-4000:])
    return found


def run_tests(folder: Path, seconds: float) -> dict[str, Any]:
    """The tests that need a card. One file that cannot be imported does not keep the others from running."""
    junit = folder / "tests.xml"
    junit.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--continue-on-collection-errors"]
    ended = execute([*command, f"--junitxml={junit}"], folder / "tests.log", seconds)
    if not junit.exists():
        demand(ended, "pytest", seconds)
        raise StepFailed("pytest left no junit file", None, ended.tail)
    try:
        found = junit_counts(junit.read_bytes())
    except ValueError as problem:
        raise StepFailed(str(problem), None, ended.tail) from None
    if found["failed"]:
        raise StepFailed(f"{found['failed']} tests failed", found, ended.tail)
    demand(ended, "pytest", seconds, found)
    if not found["passed"]:
        raise StepFailed("no test passed", found, ended.tail)
    return found


def sanitizer_command(program: str, name: str) -> list[str]:
    """compute-sanitizer's command line over the small cases."""
    # torch asks the driver for what older ones do not have; this package checks its own calls.
    options = ["--report-api-errors", "no"] if name == "memcheck" else []
    return [
        *(program, "--tool", name, *options, "--target-processes", "all", "--error-exitcode", "9"),
        *(sys.executable, "-m", "bench.gpu_cases"),
    ]


def run_sanitizer(name: str, folder: Path, seconds: float) -> dict[str, Any]:
    """One of compute-sanitizer's tools over the small cases."""
    program = tool("compute-sanitizer")
    if program is None:
        raise StepFailed("compute-sanitizer was not found below CUDA_HOME, in PATH or in /usr/local/cuda")
    # Each tensor an allocation of its own: in torch's pool, no access beyond its end would be noticed.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    ended = execute(sanitizer_command(program, name), folder / f"{name}.log", seconds, environment)
    if ended.code is None:
        demand(ended, name, seconds)
    try:
        found: dict[str, Any] = sanitizer_findings(ended.output, name)
    except ValueError as problem:
        raise StepFailed(str(problem), None, ended.tail) from None
    if any(found.values()):
        counts = ", ".join(f"{count} {what}" for what, count in found.items())
        raise StepFailed(f"{name} found {counts}", found, ended.tail)
    demand(ended, name, seconds, found)
    total = sum(1 for _ in gpu_cases.cases())
    if gpu_cases.verdict(total, total) not in ended.output:
        raise StepFailed("the cases were not gone through to the end", found, ended.tail)
    return {**found, "cases": total}


def run_bench(folder: Path, seconds: float) -> dict[str, Any]:
    """The benchmarks. What was measured before a failure or the limit is kept."""
    out = folder / "bench.json"
    out.unlink(missing_ok=True)
    # Starting and the last case's overrun need the rest.
    budget = min(max(seconds - 35.0, seconds / 2), 90.0)
    command = [sys.executable, "-m", "bench.bench_cuda", "--out", str(out), "--seconds", f"{budget:.0f}"]
    ended = execute(command, folder / "bench.log", seconds)
    found: dict[str, Any] = load_json(out) if out.exists() else {}
    found["nvidia_smi_after"] = cards_now()
    demand(ended, "the benchmark", seconds, found)
    if not found.get("complete"):
        raise StepFailed("the benchmark left no complete result", found, ended.tail)
    return found


def _sanitizer(name: str) -> Step:
    return Step(name, 40.0, lambda folder, seconds: run_sanitizer(name, folder, seconds), needs="build")


STEPS = (
    Step("facts", 15.0, run_facts),
    Step("build", 120.0, run_build),
    Step("tests", 130.0, run_tests, needs="build"),
    *map(_sanitizer, SANITIZERS),
    Step("bench", 105.0, run_bench, needs="build"),
)
#: Seconds for all of it: under nine minutes, with some for what lies between.
BUDGET = sum(step.share for step in STEPS)
