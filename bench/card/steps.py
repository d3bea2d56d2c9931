"""The steps of a check on a card, each a program of its own with a time limit."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.card import kernels, programs
from bench.card.facts import cards_now, facts, tool
from bench.card.parsers import junit_counts, sanitizer_findings, tests_of
from bench.card.programs import Ended, Program, cores, module
from qlora_kernels.bench.report import results
from qlora_kernels.bench.timing.machine import ROOT
from qlora_kernels.native import architectures
from qlora_kernels.storage.formats import load_json

#: Seconds reserved in a measuring step for its start and for the last case's overrun.
STARTING = 35.0
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
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
    "tests/ops/test_levels.py",
    "tests/ops/test_grouped.py",
    "tests/cuda/test_cuda.py",
    "tests/cuda/test_cuda_few_rows.py",
    "tests/cuda/test_cuda_tiles.py",
    "tests/cuda/test_cuda_launches.py",
    "tests/cuda/test_cuda_adapters.py",
    "tests/cuda/test_cuda_grouped.py",
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
        tells: whether ``run`` also takes a function, which it gives what it has found so far: that is written at once.
    """

    name: str
    share: float
    run: Callable[..., dict[str, Any]]
    needs: str | None = None
    tells: bool = False


def silent(found: dict[str, Any]) -> None:
    """Ignores what was found so far."""


def demand(ended: Ended, what: str, seconds: float, outcome: dict[str, Any] | None = None) -> None:
    """Raises StepFailed unless the program ended well and in time."""
    if ended.code is None:
        raise StepFailed(f"{what} {ended.why or f'took longer than {seconds:.0f} s'}", outcome, ended.tail)
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
    wanted = [Program("build", command, folder / "build.log", limit, {"QLORA_KERNELS_CUDA_ARCHS": "native"})]
    for name in ("emulator", "conformance"):
        command = module("bench.emulator", name)
        wanted.append(Program(name, command, folder / f"build_{name}.log", limit))
    all_ended = programs.execute_all(wanted, seconds, len(wanted))
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
    ended = programs.execute([sys.executable, "-c", code], folder / "build_info.log", left)
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


def run_tests(
    folder: Path,
    seconds: float,
    tell: Callable[[dict[str, Any]], None] = silent,
    files: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The tests that need a card, a process for each file: one that hangs, or leaves the card unusable, ends alone.

    After a fault that a card does not recover from, the rest of its file goes on in a new process. On many cores three
    files run at a time. A file has at most half of the time; the last quarter is the last one's. What did not run is
    counted as that.
    """
    begin, at_once = time.monotonic(), 3 if cores() >= MANY_CORES else 1
    environment = {"OMP_NUM_THREADS": str(max(cores() // at_once, 1))}
    names = list(TEST_FILES if files is None else files)
    last = [LAST_TEST_FILE] if files is None and LAST_TEST_FILE else []
    most = (0.75 if last else 1.0) * seconds
    wanted = [_test_program(file, folder, min(0.5 * seconds, most), environment) for file in names]
    all_ended: dict[str, Ended] = {}
    begun: list[Program] = []

    def then(program: Program, ended: Ended) -> Program | None:
        begun.append(program)
        all_ended[program.name] = ended
        tell(_tests_outcome(begun, all_ended)[0])
        return _rest_of(program, ended, folder)

    programs.execute_all(wanted, most, at_once, then)
    if last:
        left = seconds - (time.monotonic() - begin)
        wanted.append(_test_program(LAST_TEST_FILE, folder, left, environment))
        programs.execute_all(wanted[-1:], left, 1, then)
    begun += [one for one in wanted if one.name not in all_ended]
    begun.sort(key=lambda one: [each.name for each in wanted].index(one.name.partition(_AGAIN)[0]))
    outcome, tails = _tests_outcome(begun, all_ended)
    if outcome["failed"]:
        raise StepFailed(f"{outcome['failed']} tests failed", outcome, "\n".join(tails))
    if not outcome["passed"]:
        raise StepFailed("no test passed", outcome, "\n".join(one.tail for one in all_ended.values()))
    if outcome["not_run"]:
        raise StepFailed(f"{outcome['not_run']} tests did not run", outcome)
    return outcome


#: In the name of a program that goes on with a file.
_AGAIN = ", again"
#: What conftest.py says when it ends the run.
GONE = "the card answers no more after "


def _test_program(file: str, folder: Path, limit: float, environment: dict[str, str]) -> Program:
    name = Path(file).stem
    junit = folder / f"{name}.xml"
    junit.unlink(missing_ok=True)
    options = ["-m", "gpu", "-v", "-n", "0", "-o", "faulthandler_timeout=60", f"--junitxml={junit}", file]
    return Program(name, module("pytest", *options), folder / f"{name}.log", limit, environment)


def _rest_of(program: Program, ended: Ended, folder: Path) -> Program | None:
    """What goes on with a file whose tests ended because the card answered no more; None where that is no help."""
    done, count = tests_of(ended.output)
    if GONE not in ended.output or not done or len(done) >= count or program.name.endswith(_AGAIN):
        return None
    name = program.name + _AGAIN
    log = folder / f"{program.name}-again.log"
    log.with_suffix(".xml").unlink(missing_ok=True)
    options = [word for word in program.command if not word.startswith("--junitxml=")]
    options[-1:-1] = [f"--junitxml={log.with_suffix('.xml')}", *(f"--deselect={one}" for one in done)]
    return replace(program, name=name, command=options, log=log, seconds=program.seconds - ended.seconds)


def _tests_outcome(begun: Sequence[Program], all_ended: dict[str, Ended]) -> tuple[dict[str, Any], list[str]]:
    """Counts over files, and the ends of what those that failed have printed."""
    outcome: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "not_run": 0}
    outcome.update(failures=[], skips=[], files={}, files_not_run=[])
    tails = []
    by_name = {one.name for one in begun}
    for one in begun:
        ended = all_ended.get(one.name, Ended(None, 0.0, "not begun"))
        counts, problem = _file_result(one, ended)
        if one.name + _AGAIN in by_name:
            counts["not_run"] = 0  # the other process counts them
        if problem:
            counts["failures"].append([f"tests.{one.name}", problem])
            counts["failed"] += 1
        if counts["failed"]:
            tails.append(f"{one.name}:\n{ended.tail}")
        if not ended.seconds:
            outcome["files_not_run"].append(one.name)
        for key, value in counts.items():
            outcome[key] += value
        outcome["files"][one.name] = round(ended.seconds, 1)
    return outcome, tails


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
    done = counts["passed"] + counts["failed"] + counts["skipped"]
    counts["not_run"] = max(tests_of(ended.output)[1] - done, 0)
    if ended.code is None:
        if not ended.seconds:
            return counts, "was not begun: no time was left"
        without = "" if junit.exists() else ", without counts"
        stuck = f"; {ended.why}" if "stuck" in ended.why else ""
        return counts, f"took too long: ended after {ended.seconds:.0f} s{without}{stuck}"
    if not junit.exists():
        problem = f"pytest ended with exit code {ended.code} and left no junit file"
    elif ended.code == NONE_COLLECTED and counts["skipped"]:
        pass  # as a whole, and says why
    elif ended.code != 0 and not counts["failed"]:
        problem = problem or f"pytest ended with exit code {ended.code}"
    return counts, problem


def sanitizer_command(program: str, name: str) -> list[str]:
    """compute-sanitizer's command line over the small cases."""
    # A kernel is slow under the tool, and many run at once: no launch is too long. After a fault the kernel ends, and
    # the next case has its turn.
    options = ["--launch-timeout", "0", "--destroy-on-device-error", "kernel"]
    # torch probes the driver for functions that older ones lack; this package checks its own calls.
    options += ["--report-api-errors", "no"] if name == "memcheck" else []
    # These two look at one kernel at a time, so only at this package's. initcheck has to see who wrote what it reads.
    options += ["--kernel-name", "kns=qlk"] if name in ("racecheck", "synccheck") else []
    poison = ["--poison-scratch"] if name == "initcheck" else []
    return [
        *(program, "--tool", name, *options, "--target-processes", "application-only", "--error-exitcode", "9"),
        *module("bench.card.kernels", *poison),
    ]


def sanitizer_environment(name: str, at_once: int) -> dict[str, str]:
    # One allocation for each tensor: in torch's pool, an access beyond its end would go unnoticed.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": str(max(cores() // at_once, 1))}
    if name == "initcheck":
        # initcheck does not see what the host writes to managed memory, so the states are pinned.
        environment["QLORA_KERNELS_MANAGED"] = "0"
    return environment


def run_sanitizers(folder: Path, seconds: float, tell: Callable[[dict[str, Any]], None] = silent) -> dict[str, Any]:
    """Runs compute-sanitizer's tools over the small cases, all at once where there are enough cores."""
    program = tool("compute-sanitizer")
    if program is None:
        raise StepFailed("compute-sanitizer was not found below CUDA_HOME, in PATH or in /usr/local/cuda")
    at_once = len(SANITIZERS) if cores() >= MANY_CORES else 1
    limit = seconds * at_once / len(SANITIZERS)
    wanted = [
        Program(
            name, sanitizer_command(program, name), folder / f"{name}.log", limit, sanitizer_environment(name, at_once)
        )
        for name in SANITIZERS
    ]
    so_far: dict[str, Any] = {}

    def then(one: Program, ended: Ended) -> None:
        so_far[one.name] = sanitizer_result(one.name, ended, limit)[0]
        tell(so_far)

    all_ended = programs.execute_all(wanted, seconds, at_once, then)
    outcome: dict[str, Any] = {}
    problems, tails = [], []
    for name in SANITIZERS:
        outcome[name], problem = sanitizer_result(name, all_ended[name], limit)
        if problem:
            problems.append(problem)
            tails.append(f"{name}:\n{all_ended[name].tail}")
    if problems:
        raise StepFailed("; ".join(problems), outcome, "\n".join(tails))
    return outcome


def sanitizer_result(name: str, ended: Ended, limit: float) -> tuple[dict[str, Any], str]:
    """A tool's counts with ``seconds``, and ``cases`` if it finished them; and what is wrong, or an empty string."""
    outcome: dict[str, Any] = {"seconds": round(ended.seconds, 1)}
    if ended.code is None:
        if not ended.seconds:
            return {**outcome, "not_run": True}, f"{name} was not begun: no time was left"
        return outcome, f"{name} {ended.why or f'took longer than {limit:.0f} s'}"
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
    command = module("bench.card.tensor_rate", "--out", str(out), "--seconds", f"{budget:.0f}")
    ended = programs.execute(command, folder / "tensor_rate.log", seconds)
    outcome: dict[str, Any] = load_json(out) if out.exists() else {}
    outcome["nvidia_smi_after"] = cards_now()
    return whole(outcome, ended, "the measurement", seconds)


def run_bench(
    folder: Path,
    seconds: float,
    tell: Callable[[dict[str, Any]], None] = silent,
    name: str = "bench",
    chosen: Sequence[str] = (),
) -> dict[str, Any]:
    """``qlora-kernels bench --card``, or some of its operations. What was measured before a failure or the limit is
    kept."""
    command = module(
        *("qlora_kernels", "bench", "--card", "--device", "cuda", "--quiet", "--no-plots"),
        *(("--operations", ",".join(chosen)) if chosen else ()),
    )
    return measured(command, name, folder, seconds, tell)


def measured(
    command: Sequence[str], name: str, folder: Path, seconds: float, tell: Callable[[dict[str, Any]], None] = silent
) -> dict[str, Any]:
    """What a program measures that takes ``--minutes`` and ``--out``, and writes a result file after each case."""
    out = folder / f"{name}.jsonl"
    out.unlink(missing_ok=True)
    budget = max(seconds - STARTING, seconds / 2)
    command = [*command, "--minutes", f"{budget / 60:.2f}", "--out", str(out)]
    seen = 0

    def look() -> None:
        nonlocal seen
        size = out.stat().st_size if out.exists() else 0
        if size != seen:
            seen = size
            tell(results.load(out))  # it is renamed to its place, so always whole

    program = Program(name, command, folder / f"{name}.log", seconds)
    ended = programs.execute_all([program], seconds, 1, look=look)[name]
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
