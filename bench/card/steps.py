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

from bench.card import kernels
from bench.card.facts import cards_now, facts, tool
from bench.card.parsers import junit_counts, sanitizer_findings
from qlora_kernels.bench.report import results
from qlora_kernels.bench.timing.machine import ROOT
from qlora_kernels.native import architectures
from qlora_kernels.storage.formats import load_json

#: Seconds reserved in a measuring step for its start and for the last case's overrun.
STARTING = 35.0
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
TAIL_LINES = 40
#: Seconds between an interrupt and a kill.
GRACE = 3.0
#: pytest's exit code when a file has no tests.
NONE_COLLECTED = 5
#: With at least this many cores, several programs run at once.
MANY_CORES = 8
#: Test files that need a card, the foundations first.
TEST_FILES = (
    "tests/emulator/test_conformance.py",
    "tests/emulator/test_conformance_sm90.py",
    "tests/ops/test_quantize.py",
    "tests/ops/test_dequantize.py",
    "tests/cuda/test_cuda.py",
    "tests/cuda/test_cuda_few_rows.py",
    "tests/cuda/test_cuda_tiles.py",
    "tests/cuda/test_cuda_launches.py",
    "tests/cuda/test_cuda_adapters.py",
    "tests/ops/test_ops.py",
    "tests/cuda/test_cuda_large.py",
    "tests/optim/test_algorithms.py",
    "tests/optim/test_state_dict.py",
    "tests/optim/test_state_files.py",
    "tests/optim/test_convert.py",
    "tests/optim/test_binding.py",
    "tests/optim/test_changes.py",
    "tests/optim/test_frameworks.py",
    "tests/finetune/test_run_gpu.py",
)
#: Runs alone, after all others: it measures how much of the card is free.
LAST_TEST_FILE = "tests/optim/engines/test_paging_gpu.py"


class StepFailed(Exception):
    """A step did not do what it should; the sentence says what.

    Attributes:
        outcome: what it measured all the same.
        tail: the end of its output.
    """

    def __init__(self, sentence: str, outcome: dict[str, Any] | None = None, tail: str = "") -> None:
        super().__init__(sentence)
        self.outcome, self.tail = outcome or {}, tail


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


@dataclass(frozen=True)
class Program:
    """A program to run in the source folder.

    Attributes:
        name: its name among those that run with it.
        command: what to run.
        log: where its output goes.
        seconds: that it may take.
        environment: beside that of this process.
    """

    name: str
    command: Sequence[str]
    log: Path
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)


class _Running:
    """A program under way, in a session of its own."""

    def __init__(self, program: Program) -> None:
        self.program, self.begin = program, time.monotonic()
        program.log.parent.mkdir(parents=True, exist_ok=True)
        with open(program.log, "wb") as file:
            self.process = subprocess.Popen(
                program.command,
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **program.environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """Kills it and everything it started."""
        self.signal(signal.SIGKILL)
        self.process.wait()

    def ended(self, in_time: bool) -> Ended:
        output = self.program.log.read_text(errors="replace")
        return Ended(self.process.returncode if in_time else None, time.monotonic() - self.begin, output)


def execute_all(programs: Sequence[Program], seconds: float, at_once: int) -> dict[str, Ended]:
    """Runs programs in their order, so many at a time, and ends each when its time, or that of all, is up.

    It is interrupted first, and has GRACE seconds to write down what it has (pytest does). One whose turn does not come
    has ended with no code in no time.

    Raises:
        OSError: when one cannot be started.
    """
    deadline = time.monotonic() + seconds
    waiting, all_ended = list(programs), {one.name: Ended(None, 0.0, "not begun") for one in programs}
    running: list[_Running] = []
    overdue: dict[str, float] = {}
    try:
        while waiting or running:
            now = time.monotonic()
            if now >= deadline:
                waiting.clear()
            while waiting and len(running) < at_once:
                running.append(_Running(waiting.pop(0)))
            for one in list(running):
                name = one.program.name
                limit = min(max(one.program.seconds, 0.1), max(deadline - one.begin, 0.1))
                if name in overdue and (now >= overdue[name] or one.process.poll() is not None):
                    one.kill()  # and what it left behind
                elif name not in overdue and now - one.begin >= limit and one.process.poll() is None:
                    overdue[name] = now + GRACE
                    one.signal(signal.SIGINT)
                if one.process.poll() is not None:
                    running.remove(one)
                    all_ended[name] = one.ended(name not in overdue)
            time.sleep(0.02)
    finally:
        for one in running:  # an interrupt
            one.kill()
    return all_ended


def execute(command: Sequence[str], log: Path, seconds: float, environment: Mapping[str, str] | None = None) -> Ended:
    """Runs one program, as :func:`execute_all` does."""
    return execute_all([Program("", command, log, seconds, environment or {})], seconds, 1)[""]


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def demand(ended: Ended, what: str, seconds: float, outcome: dict[str, Any] | None = None) -> None:
    """Raises StepFailed unless the program ended well and in time."""
    if ended.code is None:
        raise StepFailed(f"{what} took longer than {seconds:.0f} s", outcome, ended.tail)
    if ended.code != 0:
        raise StepFailed(f"{what} ended with exit code {ended.code}", outcome, ended.tail)


# -------------------------------------------------------------------------------------------------------- the steps


def run_facts(folder: Path, seconds: float) -> dict[str, Any]:
    return facts()


def run_build(folder: Path, seconds: float) -> dict[str, Any]:
    """Builds the extension for the card that is there, beside the package, and asks it what it has.

    At the same time, the emulator and the conformance kernels, that their time is not the tests'.
    """
    begin = time.monotonic()
    outcome: dict[str, Any] = {"from_scratch": not any((ROOT / "build").glob("temp.*"))}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    limit = 0.9 * seconds  # the rest is to look at it
    programs = [Program("build", command, folder / "build.log", limit, {"QLORA_KERNELS_CUDA_ARCHS": "native"})]
    for name in ("emulator", "conformance"):
        command = [sys.executable, "-m", "bench.emulator", name]
        programs.append(Program(name, command, folder / f"build_{name}.log", limit))
    all_ended = execute_all(programs, seconds, len(programs))
    for name in ("emulator", "conformance"):
        # Tests that need it fail and say so; go on.
        outcome[f"{name}_built"] = all_ended[name].code == 0
        outcome[f"{name}_seconds"] = round(all_ended[name].seconds, 1)
    ended = all_ended["build"]
    outcome["build_seconds"] = round(ended.seconds, 1)
    demand(ended, "the build", limit, outcome)
    code = (
        "import json, torch, qlora_kernels; print(json.dumps({**qlora_kernels.build_info(), "
        "'card': [*torch.cuda.get_device_capability(), torch.cuda.get_device_name()]}))"
    )
    left = seconds - (time.monotonic() - begin)
    ended = execute([sys.executable, "-c", code], folder / "build_info.log", left)
    demand(ended, "loading what was built", left, outcome)
    lines = [line for line in ended.output.splitlines() if line.startswith("{")]
    if not lines:
        raise StepFailed("the build prints no build information", outcome, ended.tail)
    info = json.loads(lines[-1])
    card = info.pop("card")
    outcome["build_info"] = info
    if not info["native"]:
        raise StepFailed(f"what was built does not load: {info['problem']}", outcome)
    archs = info.get("cuda_archs", "")
    problem = architectures.unserved(archs if isinstance(archs, str) else ";".join(archs), *card)
    if problem:
        raise StepFailed(problem, outcome, (folder / "build.log").read_text(errors="replace")[-4000:])
    return outcome


def run_tests(folder: Path, seconds: float) -> dict[str, Any]:
    """The tests that need a card, a process for each file: one that hangs, or leaves the card unusable, ends alone.

    On many cores three files run at a time. A file has at most half of the time; the last quarter is the last one's.
    """
    begin, at_once = time.monotonic(), 3 if cores() >= MANY_CORES else 1
    environment = {"OMP_NUM_THREADS": str(max(cores() // at_once, 1))}

    def program(file: str, limit: float) -> Program:
        name = Path(file).stem
        junit = folder / f"{name}.xml"
        junit.unlink(missing_ok=True)
        command = [
            *(sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-o", "faulthandler_timeout=60"),
            *(f"--junitxml={junit}", file),
        ]
        return Program(name, command, folder / f"{name}.log", limit, environment)

    most = 0.75 * seconds
    programs = [program(file, min(0.5 * seconds, most)) for file in TEST_FILES]
    ended = execute_all(programs, most, at_once)
    left = seconds - (time.monotonic() - begin)
    programs.append(program(LAST_TEST_FILE, left))
    ended.update(execute_all(programs[-1:], left, 1))
    outcome: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": [], "skips": [], "files": {}}
    tails = []
    for one in programs:
        counts, problem = _file_result(one, ended[one.name])
        if problem:
            counts["failures"].append([f"tests.{one.name}", problem])
            counts["failed"] += 1
        if counts["failed"]:
            tails.append(f"{one.name}:\n{ended[one.name].tail}")
        for key, value in counts.items():
            outcome[key] += value
        outcome["files"][one.name] = round(ended[one.name].seconds, 1)
    if outcome["failed"]:
        raise StepFailed(f"{outcome['failed']} tests failed", outcome, "\n".join(tails))
    if not outcome["passed"]:
        raise StepFailed("no test passed", outcome, "\n".join(ended[one.name].tail for one in programs))
    return outcome


def _file_result(program: Program, ended: Ended) -> tuple[dict[str, Any], str]:
    """Counts of a file's tests as far as they went, and what is wrong with the file as a whole."""
    counts: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": [], "skips": []}
    problem = ""
    junit = program.log.with_suffix(".xml")
    if junit.exists():
        try:
            counts = junit_counts(junit.read_bytes())
        except ValueError as why:
            problem = str(why)
    if ended.code is None:
        if not ended.seconds:
            return counts, "was not begun: no time was left"
        return counts, f"took too long: ended after {ended.seconds:.0f} s{'' if junit.exists() else ', without counts'}"
    if not junit.exists():
        problem = f"pytest ended with exit code {ended.code} and left no junit file"
    elif ended.code == NONE_COLLECTED and counts["skipped"]:
        pass  # as a whole, and says why
    elif ended.code != 0 and not counts["failed"]:
        problem = problem or f"pytest ended with exit code {ended.code}"
    return counts, problem


def sanitizer_command(program: str, name: str) -> list[str]:
    """compute-sanitizer's command line over the small cases."""
    # torch probes the driver for functions that older ones lack; this package checks its own calls.
    options = ["--report-api-errors", "no"] if name == "memcheck" else []
    poison = ["--poison-scratch"] if name == "initcheck" else []
    return [
        *(program, "--tool", name, *options, "--target-processes", "application-only", "--error-exitcode", "9"),
        *(sys.executable, "-m", "bench.card.kernels", *poison),
    ]


def sanitizer_environment(name: str, at_once: int) -> dict[str, str]:
    # One allocation for each tensor: in torch's pool, an access beyond its end would go unnoticed.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": str(max(cores() // at_once, 1))}
    if name == "initcheck":
        # initcheck does not see what the host writes to managed memory, so the states are pinned.
        environment["QLORA_KERNELS_MANAGED"] = "0"
    return environment


def run_sanitizers(folder: Path, seconds: float) -> dict[str, Any]:
    """Runs compute-sanitizer's tools over the small cases, all at once where there are enough cores."""
    program = tool("compute-sanitizer")
    if program is None:
        raise StepFailed("compute-sanitizer was not found below CUDA_HOME, in PATH or in /usr/local/cuda")
    at_once = len(SANITIZERS) if cores() >= MANY_CORES else 1
    limit = seconds * at_once / len(SANITIZERS)
    programs = [
        Program(
            name, sanitizer_command(program, name), folder / f"{name}.log", limit, sanitizer_environment(name, at_once)
        )
        for name in SANITIZERS
    ]
    ended = execute_all(programs, seconds, at_once)
    outcome: dict[str, Any] = {}
    problems, tails = [], []
    for name in SANITIZERS:
        outcome[name], problem = sanitizer_result(name, ended[name], limit)
        if problem:
            problems.append(problem)
            tails.append(f"{name}:\n{ended[name].tail}")
    if problems:
        raise StepFailed("; ".join(problems), outcome, "\n".join(tails))
    return outcome


def sanitizer_result(name: str, ended: Ended, limit: float) -> tuple[dict[str, Any], str]:
    """A tool's counts with ``seconds``, and ``cases`` if it finished them; and what is wrong, or an empty string."""
    outcome: dict[str, Any] = {"seconds": round(ended.seconds, 1)}
    if ended.code is None:
        return outcome, f"{name} took longer than {limit:.0f} s"
    try:
        counts = sanitizer_findings(ended.output, name)
    except ValueError as problem:
        return outcome, f"{name}: {problem}"
    outcome.update(counts)
    if any(counts.values()):
        return outcome, f"{name} found {', '.join(f'{count} {what}' for what, count in counts.items())}"
    if ended.code != 0:
        return outcome, f"{name} ended with exit code {ended.code}"
    total = sum(1 for _ in kernels.cases())
    if kernels.verdict(total, total) not in ended.output:
        return outcome, f"{name}: the cases were not gone through to the end"
    return {**outcome, "cases": total}, ""


def run_rates(folder: Path, seconds: float) -> dict[str, Any]:
    """Measures what the tensor cores reach."""
    out = folder / "tensor_rate.json"
    out.unlink(missing_ok=True)
    budget = min(max(seconds - STARTING, seconds / 2), 4.0)
    command = [sys.executable, "-m", "bench.card.tensor_rate", "--out", str(out), "--seconds", f"{budget:.0f}"]
    ended = execute(command, folder / "tensor_rate.log", seconds)
    outcome: dict[str, Any] = load_json(out) if out.exists() else {}
    outcome["nvidia_smi_after"] = cards_now()
    return whole(outcome, ended, "the measurement", seconds)


def run_bench(folder: Path, seconds: float) -> dict[str, Any]:
    """``qlora-kernels bench --card``. What was measured before a failure or the limit is kept."""
    out = folder / "bench.jsonl"
    out.unlink(missing_ok=True)
    budget = max(seconds - STARTING, seconds / 2)
    command = [
        *(sys.executable, "-m", "qlora_kernels", "bench", "--card", "--device", "cuda", "--quiet", "--no-plots"),
        *("--minutes", f"{budget / 60:.2f}", "--out", str(out)),
    ]
    ended = execute(command, folder / "bench.log", seconds)
    outcome: dict[str, Any] = results.load(out) if out.exists() else {}
    outcome["nvidia_smi_after"] = cards_now()
    return whole(outcome, ended, "the benchmark", seconds)


def whole(outcome: dict[str, Any], ended: Ended, what: str, seconds: float) -> dict[str, Any]:
    """What a program left, where it succeeded and says that it is complete.

    Raises:
        StepFailed: otherwise, with what it left.
    """
    demand(ended, what, seconds, outcome)
    if not outcome.get("complete"):
        raise StepFailed(f"{what} left no complete result", outcome, ended.tail)
    return outcome


STEPS = (
    Step("facts", 10.0, run_facts),
    Step("build", 165.0, run_build),
    Step("tests", 120.0, run_tests, needs="build"),
    Step("sanitizers", 92.0, run_sanitizers, needs="build"),
    Step("rates", 8.0, run_rates, needs="build"),
    Step("bench", 135.0, run_bench, needs="build"),
)
#: Seconds for all steps: under nine minutes with the time between them.
BUDGET = sum(step.share for step in STEPS)
