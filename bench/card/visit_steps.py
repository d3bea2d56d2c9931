"""The steps of the two commands of a visit to a card. What they share with a check on a card is in steps.py."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bench.card import cases, profiled, programs, steps
from bench.card.parsers import profile_of
from bench.card.programs import Ended, Program, module
from bench.card.steps import Step, StepFailed
from qlora_kernels.bench.points import Point
from qlora_kernels.native import architectures

Tell = Callable[[dict[str, Any]], None]
#: Seconds that a small case may take: most take a few milliseconds, the first one loads its kernels.
PATIENCE = 12.0
#: New processes for a family after faults.
MOST_AGAIN = 8
#: Of the first command's last step: calls without the host's help, and sizes beyond 2^31.
LAUNCHES = ("tests/cuda/test_cuda_launches.py", "tests/cuda/test_cuda_large.py")
#: Profiled where no result says which products are furthest from their prediction: decoding, few rows, training.
PROFILED = (
    Point("linear_forward", n=4096, k=4096, m=1, rank=0),
    Point("linear_forward", n=4096, k=4096, m=64, rank=0),
    Point("linear_forward", n=4096, k=4096, m=4096, rank=0),
)


def run_facts(folder: Path, seconds: float) -> dict[str, Any]:
    """What is there, asked by a process of its own: a driver that hangs would otherwise stop everything."""
    ended = programs.execute(module("bench.card.facts"), folder / "facts.log", seconds)
    if ended.code != 0 and (said := ended.output.strip()):
        raise StepFailed(f"{ended.why or 'no facts'}: {said.splitlines()[-1]}", {}, ended.tail)
    steps.demand(ended, "asking for the facts", seconds)
    lines = [line for line in ended.output.splitlines() if line.startswith("{")]
    if not lines:
        raise StepFailed("the facts were not printed", {}, ended.tail)
    found = json.loads(lines[-1])
    info = found["build_info"]
    if not info["native"]:
        raise StepFailed(info["problem"], found)
    major, minor = map(int, found["capability"].split("."))
    problem = architectures.unserved(";".join(info.get("cuda_archs", [])), major, minor, found["device"])
    if problem:
        raise StepFailed(problem, found)
    return found


def run_launches(folder: Path, seconds: float, tell: Tell) -> dict[str, Any]:
    """The tests of launches and of large sizes."""
    return steps.run_tests(folder, seconds, tell, LAUNCHES)


# ---------------------------------------------------------------------------------------------------- kernel cases


class _Family:
    """The cases of a family, and what processes have said about them."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.again = name, 0
        self.names = [cases.title(case) for case in cases.chosen(name)]
        self.report = folder / f"cases-{name.replace(' ', '-')}.jsonl"
        self.report.unlink(missing_ok=True)

    def program(self, begin: int, seconds: float) -> Program:
        command = module("bench.card.cases", "--report", str(self.report), "--only", self.name, "--begin", str(begin))
        log = self.report.with_name(f"{self.report.stem}-{self.again}.log")
        threads = {"OMP_NUM_THREADS": str(max(programs.cores() // len(cases.FAMILIES), 1))}  # for the CPU's results
        return Program(self.name, command, log, seconds, threads, pulse=self.report, patience=PATIENCE)

    def outcome(self) -> dict[str, Any]:
        text = self.report.read_text(errors="replace") if self.report.exists() else ""
        return cases.outcome(text, self.names)

    def following(self, program: Program, ended: Ended) -> Program | None:
        """After a fault: the rest, in a new process."""
        found = self.outcome()
        if found["at_work"] is not None:
            how = ended.why or f"its process ended with exit code {ended.code}"
            with open(self.report, "a", encoding="utf-8") as file:  # the last line may be cut off
                file.write("\n" + json.dumps({"case": found["at_work"], "state": "ended", "problem": how}) + "\n")
        begin, before = found["next"], int(program.command[-1])
        if ended.code == 0 or begin >= len(self.names) or begin == before or self.again >= MOST_AGAIN:
            return None
        self.again += 1
        return self.program(begin, program.seconds - ended.seconds)


def run_kernels(folder: Path, seconds: float, tell: Tell) -> dict[str, Any]:
    """All small cases, the families side by side, each right or wrong. After a fault a new process goes on with the
    next case; what no process has begun was not run."""
    families = {name: _Family(name, folder) for name in cases.FAMILIES}

    def found() -> dict[str, Any]:
        by_family = {name: family.outcome() for name, family in families.items()}
        total: dict[str, Any] = {
            key: sum(one[key] for one in by_family.values()) for key in ("cases", "right", "not_run")
        }
        total["wrong"] = [line for one in by_family.values() for line in one["wrong"]]
        return {**total, "families": by_family, "again": sum(family.again for family in families.values())}

    def then(program: Program, ended: Ended) -> Program | None:
        following = families[program.name].following(program, ended)
        tell(found())
        return following

    wanted = [family.program(0, seconds) for family in families.values()]
    all_ended = programs.execute_all(wanted, seconds, len(wanted), then, lambda: tell(found()))
    outcome = found()
    if outcome["right"] != outcome["cases"]:
        sentence = f"{len(outcome['wrong'])} of {outcome['cases']} cases are wrong, {outcome['not_run']} did not run"
        tails = [f"{name}:\n{one.tail}" for name, one in all_ended.items() if one.code != 0]
        raise StepFailed(sentence, outcome, "\n".join(tails))
    return outcome


# ------------------------------------------------------------------------------------------------ speeds, profiles


def bench_of(name: str, *operations: str) -> Callable[[Path, float, Tell], dict[str, Any]]:
    """The speed of some operations against others'."""
    return partial(steps.run_bench, name=name, chosen=operations)


def run_variants(folder: Path, seconds: float, tell: Tell, chosen: str) -> dict[str, Any]:
    """A product with one value of a variable against another."""
    return steps.measured(module("bench.card.variants", chosen), chosen, folder, seconds, tell)


def run_profile(folder: Path, seconds: float, tell: Tell, points: Sequence[Point] = PROFILED) -> dict[str, Any]:
    """Counters of the kernels of some products, one after the other."""
    program = profiled.ncu()
    if program is None:
        raise StepFailed("ncu was not found below CUDA_HOME, in PATH or in /usr/local/cuda")
    begin, found, problems = time.monotonic(), {}, []
    for number, point in enumerate(points):
        left = seconds - (time.monotonic() - begin)
        table = folder / f"ncu-{number}.csv"
        command = profiled.command(program, point, str(table), module("bench.card.profiled"))
        ended = programs.execute(command, folder / f"ncu-{number}.log", left / (len(points) - number))
        text = table.read_text(errors="replace") if table.exists() else ""
        kernels = profile_of(text)
        found[str(point)] = kernels or f"not profiled: {ended.why or ' '.join((text or ended.tail).split())[-300:]}"
        if ended.code != 0 or not kernels:
            problems.append(f"{point}: {ended.why or f'ncu ended with exit code {ended.code}'}")
        tell(found)
    if problems:
        raise StepFailed("; ".join(problems), found)
    return found


#: In the order of their worth. Seconds left by one, the next ones may use.
FIRST = (
    Step("facts", 25.0, run_facts),
    Step("kernels", 40.0, run_kernels, tells=True),
    Step("linear", 100.0, bench_of("linear", "linear_forward", "linear_backward", "linear_step"), tells=True),
    Step("quantization", 45.0, bench_of("quantization", "dequantize", "quantize"), tells=True),
    Step(
        "optimizer",
        45.0,
        bench_of(*("optimizer", "adamw_step", "adamw_8bit_step", "lion_step", "adamw_paged_step", "adamw_budget_step")),
        tells=True,
    ),
    Step("launches", 40.0, run_launches, tells=True),
)
SECOND = (
    Step("facts", 15.0, run_facts),
    Step("tests", 105.0, steps.run_tests, tells=True),
    Step("sanitizers", 92.0, steps.run_sanitizers, tells=True),
    Step("rates", 12.0, steps.run_rates),
    Step("forced", 60.0, partial(run_variants, chosen="kernels"), tells=True),
    Step("early", 20.0, partial(run_variants, chosen="early"), tells=True),
    Step("profile", 41.0, run_profile, tells=True),
)
COMMANDS = {"first": FIRST, "second": SECOND}


def steps_of(command: str, points: Sequence[Point] = ()) -> tuple[Step, ...]:
    """A command's steps; with points, those that are profiled."""
    if not points:
        return COMMANDS[command]
    profile = partial(run_profile, points=tuple(points))
    return tuple(replace(one, run=profile) if one.name == "profile" else one for one in COMMANDS[command])
