"""A stand-in for a card, to rehearse a visit without one: python -m bench.card.stand_in MODULE [ARGUMENT]…

It takes the place of a card's parts, so that all else is what a visit runs: the commands, processes, files, limits. The
emulator executes the small cases, some tests and small products. nvidia-smi, compute-sanitizer and ncu are scripts that
check how they are called. A clock that ticks once a question gives the times: they are made up, and whatever holds them
says so.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
SUPPORT = ROOT / "tests" / "support"
DEVICE = "stand-in for a card"
#: Of the small cases, those that the stand-in for compute-sanitizer goes through; of a test file, those that run.
EVERY, MOST_TESTS = 15, 4
TEST_FILES = ("tests/emulator/test_conformance.py", "tests/ops/test_quantize.py")
LAUNCHES = ("tests/cuda/test_cuda_launches.py", "tests/ops/test_dequantize.py")
#: Sizes that the emulator gets through.
SIZES = {"n": 24, "k": 64, "m": 9, "rank": 2}
#: Operations that a rehearsal measures; the others take the same ways.
OPERATIONS = ("linear_forward", "linear_backward", "dequantize", "quantize", "adamw_step")


# ------------------------------------------------------------------------------------------------------- what is there


def enter() -> None:
    """Puts the tools into PATH and CUDA_HOME, and shortens the steps of this process."""
    from bench.card import cases, kernels, steps, visit_steps

    folder = Path(tempfile.mkdtemp(prefix="stand-in-"))
    atexit.register(shutil.rmtree, folder, True)
    (folder / "bin").mkdir()
    for name in TOOLS:
        script = folder / "bin" / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m bench.card.stand_in {name} "$@"\n')
        script.chmod(0o755)
    os.environ["CUDA_HOME"] = str(folder)
    os.environ["PATH"] = f"{folder / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
    path = (str(ROOT), str(SUPPORT), os.environ.get("PYTHONPATH", ""))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    os.environ["OMP_NUM_THREADS"] = "1"
    steps.TEST_FILES, steps.LAST_TEST_FILE = TEST_FILES, ""
    visit_steps.LAUNCHES = LAUNCHES
    # The cases themselves are all run; compute-sanitizer's stand-in runs some of them.
    every, some = kernels.cases, _some(kernels.cases)
    cases.kernels = SimpleNamespace(**{**vars(kernels), "cases": every})  # pyright: ignore[reportAttributeAccessIssue]
    kernels.cases = some


def _some(cases: Callable[[], Iterator[Any]]) -> Callable[[], Iterator[Any]]:
    return lambda: (case for number, case in enumerate(cases()) if number % EVERY == 0)


@contextlib.contextmanager
def card() -> Iterator[None]:
    """A context in which torch sees a card, of which only facts can be asked."""
    from unittest.mock import patch

    import torch

    properties = SimpleNamespace(
        name=DEVICE, major=9, minor=0, multi_processor_count=2, total_memory=1 << 30, L2_cache_size=1 << 20
    )
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": properties,
        "get_device_name": DEVICE,
        "get_device_capability": (9, 0),
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, lambda *_, answer=answer: answer))
        yield


@contextlib.contextmanager
def emulator() -> Iterator[Any]:
    """A context in which the operations run on the emulator."""
    sys.path[:0] = [str(SUPPORT)]
    from emulated import emulated, module  # pyright: ignore[reportMissingImports]

    with emulated():
        yield module()


# --------------------------------------------------------------------------------------------------------- programs


def facts(arguments: list[str]) -> int:
    from bench.card import facts as real

    with card():
        found = {**real.facts(), "build_info": real.qlora_kernels.build_info()}
    # A build without CUDA kernels is as good here: none of them runs.
    found["build_info"]["cuda_archs"] = found["build_info"].get("cuda_archs") or ["90a"]
    print(json.dumps(found))
    return 0


def cases(arguments: list[str]) -> int:
    from bench.card import cases as real

    with emulator():
        return real.main(arguments, device="cpu")


def kernels(arguments: list[str]) -> int:
    from bench.card import kernels as real

    real.cases = _some(real.cases)
    with emulator():
        return real.main(arguments, device="cpu")


def small(point: Any) -> Any:
    """A point that is as large as the emulator likes."""
    sizes = {name: min(value, SIZES[name]) for name in SIZES if (value := getattr(point, name)) is not None}
    return replace(point, **sizes, model=point.model and "tiny")


@contextlib.contextmanager
def measuring() -> Iterator[Any]:
    """A context for measurements on the emulator by a made-up clock; gives the settings and what measures a case."""
    from unittest.mock import patch

    from qlora_kernels.bench.case import Settings
    from qlora_kernels.bench.contenders.weights import Lab
    from qlora_kernels.bench.timing import cuda_timing
    from qlora_kernels.bench.timing.measure import CudaMeasurement

    settings = Settings("cpu", 1, cache_bytes=1, seconds=0.0, min_rounds=1, max_rounds=1)

    def measured(point: Any, case_of: Callable[[Any], Any]) -> dict[str, Any]:
        from bench_runs.steady_card import SteadyCard  # pyright: ignore[reportMissingImports]

        case = case_of(Lab(settings, point))
        measurement = CudaMeasurement(case, settings, point, card=SteadyCard(l2_bytes=0))
        if measurement.rounds:
            measurement.round()
        return measurement.result()

    with contextlib.ExitStack() as stack:
        stack.enter_context(emulator())
        stack.enter_context(patch.object(Lab, "cuda", True))
        for name in ("MIN_ROUNDS", "MOST_CALLS", "HOST_CALLS"):
            stack.enter_context(patch.object(cuda_timing, name, 1))
        yield settings, measured


def bench(arguments: list[str]) -> int:
    """``qlora-kernels bench`` at small sizes, one point of an operation."""
    from qlora_kernels.bench import options
    from qlora_kernels.bench.operations import CASES
    from qlora_kernels.bench.report import results

    if arguments[:1] != ["bench"]:
        raise SystemExit(f"the stand-in runs no 'qlora-kernels {' '.join(arguments[:1])}'")
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    namespace = parser.parse_args(arguments[1:])
    by_operation = {point.operation: small(point) for point in options.points_of(namespace)}
    with measuring() as (settings, measured):
        found = {**results.begin(settings, "stand-in"), "stand_in": True}
        for name in (name for name in by_operation if name in OPERATIONS):
            found["cases"].append(measured(by_operation[name], CASES[name]))
            results.save(found, namespace.out)
        found["complete"] = True
        results.save(found, namespace.out)
    return 0


def variants(arguments: list[str]) -> int:
    """Of each set, its first points at small sizes."""
    from functools import partial

    from bench.card import variants as real
    from qlora_kernels.bench.case import Settings

    with measuring() as (settings, measured), card():
        for chosen, (variable, points) in real.SETS.items():
            real.SETS[chosen] = variable, {small(point): values for point, values in points.items()}

        def run(points: Sequence[Any], settings: Settings, minutes: float, begin: Any) -> Iterator[dict[str, Any]]:
            chosen = begin.args[0]
            return (measured(point, partial(real.case_of, chosen)) for point in points)

        real.run, real.Settings = run, lambda *_, **more: settings  # pyright: ignore[reportAttributeAccessIssue]
        return real.main(arguments)


def rates(arguments: list[str]) -> int:
    from bench.card import tensor_rate as real

    def once(launch: Callable[[int], None], flop: float, repetitions: int) -> dict[str, Any]:
        launch(1)
        return {"tflops": 1.0, "least": 1.0, "most": 1.0, "turns": 1}

    with emulator() as module, card():
        real.time_one, real.conformance_module = once, lambda: module
        measure = real.measure
        real.measure = lambda module, repetitions: {**measure(module, repetitions, "cpu"), "stand_in": True}
        return real.main(arguments)


def profiled(arguments: list[str]) -> int:
    from bench.card import profiled as real
    from qlora_kernels.bench.operations import CASES

    point = small(real.point_of(arguments))
    with measuring() as (settings, _):
        CASES[point.operation](real.Lab(settings, point)).contenders[0].prepare().run(0)
    return 0


def tests(arguments: list[str]) -> int:
    """pytest, whose tests of a card are skipped; of those that take any engine, some run on the emulator."""
    sys.path[:0] = [str(SUPPORT)]
    import engines  # pyright: ignore[reportMissingImports]
    import pytest

    named = engines.engine_named
    engines.engine_named = lambda name: named("emulated-forward" if name == "cuda" else name)

    class Plugin:
        @pytest.hookimpl(trylast=True)
        def pytest_collection_modifyitems(self, items: list[Any]) -> None:
            any_engine = [item for item in items if "engine" in getattr(item, "fixturenames", ())]
            for item in items:
                if item not in any_engine[:MOST_TESTS]:
                    item.add_marker(pytest.mark.skip(reason="the stand-in for a card does not run it"))

    return int(pytest.main(arguments, plugins=[Plugin()]))


# -------------------------------------------------------------------------------------------------------------- tools


def nvidia_smi(arguments: list[str]) -> int:
    """A query, or samples until it, or who asked for them, is ended."""
    parent = os.getppid()
    if arguments[:1] == ["dmon"]:
        print("#Time        gpu    pwr  gtemp  mtemp     sm    mem   pclk   mclk")
        print("#HH:MM:SS    Idx      W      C      C      %      %    MHz    MHz", flush=True)
        while os.getppid() == parent:
            print(f" {time.strftime('%H:%M:%S')}      0    100     40      -     50     10   1000   2000", flush=True)
            time.sleep(1.0)
        return 0
    (query,) = (one.partition("=")[2] for one in arguments if one.startswith("--query-gpu="))
    print(", ".join("stand-in" for _ in query.split(",")))
    return 0


def compute_sanitizer(arguments: list[str]) -> int:
    """Runs the program, and has found nothing; refuses options that it does not know."""
    takes = argparse.ArgumentParser(prog="compute-sanitizer", allow_abbrev=False)
    takes.add_argument("--tool", choices=("memcheck", "racecheck", "synccheck", "initcheck"), required=True)
    takes.add_argument("--report-api-errors", choices=("no",))
    takes.add_argument("--target-processes", choices=("application-only",), required=True)
    takes.add_argument("--error-exitcode", type=int, required=True)
    takes.add_argument("--launch-timeout", type=int, choices=(0,), required=True)
    takes.add_argument("--destroy-on-device-error", choices=("kernel",), required=True)
    takes.add_argument("--kernel-name")
    takes.add_argument("program", nargs=argparse.REMAINDER)
    given = takes.parse_args(arguments)
    code = subprocess.run(given.program).returncode
    summary = "ERROR SUMMARY: 0 errors"
    if given.tool == "racecheck":
        summary = "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
    print(f"========= COMPUTE-SANITIZER, a stand-in\n========= {summary}")
    return code


def ncu(arguments: list[str]) -> int:
    """Runs the program, and writes a table with one kernel."""
    begin = arguments.index(sys.executable)
    options = dict(zip(arguments[:begin:2], arguments[1:begin:2]))
    table = Path(arguments[arguments.index("--log-file") + 1])
    if options.get("--clock-control") != "none" or "--csv" not in arguments:
        raise SystemExit("ncu, a stand-in: clocks have to stay as they are, and the table has to be CSV")
    code = subprocess.run(arguments[begin:]).returncode
    head = '"ID","Kernel Name","Block Size","Grid Size","Section Name","Metric Name","Metric Unit","Metric Value"'
    rows = ['"0","stand-in","(1, 1, 1)","(1, 1, 1)","none","Duration","us","1.0"'] if code == 0 else []
    table.write_text("\n".join(["==PROF== a stand-in", head, *rows]) + "\n")
    return code


PROGRAMS = {
    "bench.card.facts": facts,
    "bench.card.cases": cases,
    "bench.card.kernels": kernels,
    "bench.card.variants": variants,
    "bench.card.tensor_rate": rates,
    "bench.card.profiled": profiled,
    "qlora_kernels": bench,
    "pytest": tests,
}
TOOLS = {"nvidia-smi": nvidia_smi, "compute-sanitizer": compute_sanitizer, "ncu": ncu}


def main(arguments: list[str]) -> int:
    name, *rest = arguments
    program = {**PROGRAMS, **TOOLS}.get(name)
    if program is not None:
        return program(rest)
    sys.argv = [name, *rest]
    runpy.run_module(name, run_name="__main__")  # what asks no card
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
