"""The two commands of a visit: what they run, in which order, how they are written, and what a stop leaves."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import torch
from bench_runs.check import good
from torch.utils._python_dispatch import TorchDispatchMode

from bench.card import cases, check, clocks, parsers, prepare, profiled, steps, variants, visit, visit_steps
from bench.card.steps import Step
from qlora_kernels.bench.case import Settings
from qlora_kernels.bench.contenders.names import EQUAL_COPY
from qlora_kernels.bench.contenders.weights import Lab
from qlora_kernels.bench.operations import CASES
from qlora_kernels.bench.points import SWEEPS, Point
from qlora_kernels.native import dispatch

ROOT = Path(__file__).resolve().parents[3]
SOABI = sysconfig.get_config_var("SOABI")


def names_of(command: str) -> list[str]:
    return [step.name for step in visit_steps.steps_of(command)]


def test_the_commands_do_what_is_worth_most_first():
    assert names_of("first") == ["facts", "kernels", "linear", "quantization", "optimizer", "launches"]
    assert names_of("second") == ["facts", "tests", "sanitizers", "rates", "forced", "early", "profile"]
    for command, most in visit.SECONDS.items():
        assert sum(step.share for step in visit_steps.COMMANDS[command]) == most
    assert visit.SECONDS == {"first": 295.0, "second": 345.0}
    # Whatever is stopped early has the first facts: they come within the time that a short loan leaves.
    assert sum(step.share for step in visit_steps.FIRST[:3]) < 240 - 60


def test_the_first_command_times_all_that_the_check_does():
    operations = {point.operation for point in SWEEPS["card"]()}
    chosen = {name for step in visit_steps.FIRST for name in getattr(step.run, "keywords", {}).get("chosen", ())}
    assert chosen == operations - {"limits"}
    assert set(visit_steps.LAUNCHES) <= set(steps.TEST_FILES)


def test_a_command_is_one_line_that_can_be_sent(capsys, monkeypatch, tmp_path):
    manifest = {"files": {"a": {"bytes": 5 << 20}}, "python": "cpython-312-x86_64-linux-gnu", "left_out": ["no peer"]}
    monkeypatch.setattr(prepare, "prepare", lambda *_: manifest)
    monkeypatch.setattr(prepare, "python_of", lambda version: version)
    assert visit.main(["--prepare", "--results", '"${OUT:-results}"']) == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if "bench.card.visit" in line]
    assert [re.search(r"--(first|second)", line)[1] for line in lines] == ["first", "second"]
    assert all(len(line) < prepare.MOST_CHARACTERS == 2000 for line in lines)
    assert all(line.endswith(' --out "${OUT:-results}"') for line in lines)
    assert "5.0 MiB in 1 files" in out
    assert "- no peer" in out
    # With everything that can be asked for.
    words = [" ".join(profiled.words_of(point)) for point in visit_steps.PROFILED]
    line = visit.command_line("second", "build/visit", "DIR", names_of("second"), words, True)
    assert len(line) < 2000
    arguments = visit.parser_of().parse_args(shlex.split(line)[3:])
    assert [profiled.point_of(one.split()) for one in arguments.profile] == list(visit_steps.PROFILED)
    assert arguments.steps.split(",") == names_of("second")
    monkeypatch.setattr(prepare, "MOST_CHARACTERS", 40)
    assert visit.main(["--prepare"]) == 2


def test_arguments_that_make_no_sense(tmp_path, capsys, monkeypatch):
    for arguments in ([], ["--first"], ["--first", "--second", "--out", "x"], ["--read"]):
        with pytest.raises(SystemExit):
            visit.main(arguments)
    monkeypatch.setattr(visit, "carried_by", lambda folder: ({"stand_in": False, "python": SOABI}, []))
    assert visit.main(["--first", "--out", str(tmp_path / "out"), "--steps", "facts,nonsense"]) == 2
    assert "no step nonsense in --first" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is no product"):
        profiled.point_of(["linear_forward", "1"])
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- what is on the disk


def test_what_a_step_tells_is_on_the_disk_while_it_runs(tmp_path):
    seen = []

    def tells(folder, seconds, tell):
        tell({"half": 1})
        seen.append(json.loads((tmp_path / "visit-first.json").read_text())["steps"][0])
        raise KeyError("in the middle")

    files = check.Files(tmp_path, "visit-first", "visit-first-logs.tar.gz", tmp_path / "elsewhere")
    results = check.check(files, [Step("a", 1.0, tells, tells=True)], 9.0, more=lambda: {"visit": "first"})
    assert seen[0]["found"] == {"half": 1}
    assert seen[0]["status"] == "running"
    assert results["steps"][0]["found"] == {"half": 1}
    assert results["steps"][0]["status"] == "failed"
    assert json.loads((tmp_path / "visit-first.json").read_text())["visit"] == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["visit-first.json", "visit-first.md"]


def test_a_full_disk_leaves_what_was_there_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    from qlora_kernels.storage import atomic_file

    files, ran = check.Files(tmp_path), []
    full = {"now": False}
    real = os.fsync

    def fsync(descriptor):
        if full["now"]:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(atomic_file.os, "fsync", fsync)

    def fills(folder, seconds):
        ran.append("fills")
        full["now"] = True
        return {}

    def frees(folder, seconds):
        ran.append("frees")
        on_disk = json.loads((tmp_path / "gpu_check.json").read_text())
        assert [step["status"] for step in on_disk["steps"]] == ["passed", "running", "waiting", "waiting"]
        full["now"] = False
        return {}

    stages = [Step("good", 1.0, good), Step("fills", 1.0, fills), Step("frees", 1.0, frees), Step("last", 1.0, good)]
    results = check.check(files, stages, 40.0)
    assert ran == ["fills", "frees"]
    assert results == json.loads((tmp_path / "gpu_check.json").read_text())
    assert [step["status"] for step in results["steps"]] == ["passed"] * 4
    assert "could not be written" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*"))


KILLED = """
import os, signal, sys
sys.path[:0] = [{root!r}]
from pathlib import Path
from bench.card import check
from bench.card.steps import Step
from qlora_kernels.storage import atomic_file
def dies(folder, seconds):
    def fsync(descriptor):
        os.kill(os.getpid(), signal.SIGKILL)
    atomic_file.os.fsync = fsync
    return {{"never": "written"}}
check.check(check.Files(Path({out!r})), [Step("a", 1.0, lambda *_: {{"first": 1}}), Step("b", 1.0, dies)], 9.0)
"""


@pytest.mark.slow
def test_a_kill_in_the_middle_of_a_write_leaves_the_file_before(tmp_path):
    code = KILLED.format(root=str(ROOT), out=str(tmp_path))
    assert subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode == -signal.SIGKILL
    results = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [step["status"] for step in results["steps"]] == ["passed", "running"]
    assert results["steps"][0]["found"] == {"first": 1}
    assert "stopped before the end" in (tmp_path / "gpu_check.md").read_text()


# ------------------------------------------------------------------------------------------------------------- clocks

DMON = """#Time        gpu    pwr  gtemp  mtemp     sm    mem   pclk   mclk
#HH:MM:SS    Idx      W      C      C      %      %    MHz    MHz
 10:00:01      0     70     33      -      0      0    345   3201
 10:00:02      0    650     60      -     99     50   1980   3201
#Time        gpu    pwr  gtemp  mtemp     sm    mem   pclk   mclk
 10:00:03      0    690     61      -    100     50   1755   3201
 10:00:04      0    6"""


def test_clocks_by_step():
    rows = clocks.rows_of(DMON)
    assert [row["sm_mhz"] for row in rows] == [345, 1980, 1755]
    assert clocks.summary(rows)["watts"] == {"least": 70, "median": 650, "most": 690}
    stages = [
        {"name": "a", "began": "10:00:00", "ended": "10:00:01"},
        {"name": "b", "began": "10:00:02", "ended": "10:00:09"},
        {"name": "over midnight", "began": "23:59:59", "ended": "00:00:03"},
        {"name": "waiting"},
    ]
    found = clocks.by_step(rows, stages)
    assert {name: one["samples"] for name, one in found.items()} == {"a": 1, "b": 2}
    assert found["b"]["sm_mhz"]["least"] == 1755
    assert clocks.rows_of("# gpu   pclk\n# Idx   MHz\n    0   900\n") == [{"time": "", "sm_mhz": 900.0}]
    assert clocks.rows_of("Unable to determine the device handle\n#\n") == []


@pytest.mark.parametrize("deaf", [False, True])
def test_what_logs_the_clocks_is_ended(tmp_path, monkeypatch, deaf):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{'trap : TERM' * deaf}\nprintf '%s\\n' '{DMON}'\nwhile :; do sleep 0.1; done\n")
    program.chmod(0o755)
    monkeypatch.setattr(clocks, "tool", lambda name: str(program))
    monkeypatch.setattr(clocks, "LEAVE", 0.5)
    with clocks.Watch(tmp_path / "log") as watch:
        process = watch._process
        end = time.monotonic() + 20
        while "problem" in watch.found([]) and time.monotonic() < end:
            time.sleep(0.02)
        assert watch.found([])["samples"] == 3
    assert process.returncode == (-signal.SIGKILL if deaf else -signal.SIGTERM)
    assert watch.problem == ""
    monkeypatch.setattr(clocks, "tool", lambda name: None)
    with clocks.Watch(tmp_path / "other") as watch:
        assert watch.found([]) == {"problem": "nvidia-smi was not found"}


# ------------------------------------------------------------------------------------------------- variants, profiles


def test_every_kernel_that_is_compared_exists_and_takes_its_point(monkeypatch):
    variable, points = variants.SETS["kernels"]
    card = dispatch.CARDS[90]
    seen = set()
    for point, names in points.items():
        for name in names:
            monkeypatch.setenv(variable, name)
            backward = point.operation == "linear_dx"
            chosen = dispatch.choose(card, point.m, point.n, point.k, torch.bfloat16, backward)["kernel"]
            assert chosen == name, point
            seen.add(name)
        monkeypatch.delenv(variable)
        backward = point.operation == "linear_dx"
        chosen = dispatch.choose(card, point.m, point.n, point.k, torch.bfloat16, backward)["kernel"]
        assert chosen in names, f"{point}: the kernel that is chosen is not compared"
    assert {"few", "warpgroup64", "middle16", "middle32", "tiles128", "tiles128wide"} <= seen


def test_a_variant_is_called_with_its_value(monkeypatch):
    monkeypatch.setenv("QLORA_KERNELS_CUDA_EARLY", "before")
    seen = []
    point = Point("linear_forward", n=24, k=64, m=3, rank=2)
    monkeypatch.setitem(variants.SETS, "early", ("QLORA_KERNELS_CUDA_EARLY", {point: ("1", "0")}))
    case = variants.case_of("early", Lab(Settings("cpu", 1, cache_bytes=1), point))
    for contender in case.contenders:
        ready = contender.prepare()
        right = ready.run(0)
        assert ready.error(right) < ready.limit
        hook = variants._with(lambda: seen.append(os.environ["QLORA_KERNELS_CUDA_EARLY"]), "QLORA_KERNELS_CUDA_EARLY",
                              contender.name)  # fmt: skip
        hook()
        assert os.environ["QLORA_KERNELS_CUDA_EARLY"] == "before"
    assert seen == ["1", "0"]
    assert case.title == "forward with an adapter, QLORA_KERNELS_CUDA_EARLY"


def test_a_profile_is_read():
    text = (
        '==PROF== Connected\n"ID","Kernel Name","Block Size","Grid Size","Metric Name","Metric Unit","Metric Value"\n'
        '"0","_ZN3qlk4cudaE","(256, 1, 1)","(132, 1, 1)","Duration","us","4.1"\n'
        '"0","_ZN3qlk4cudaE","(256, 1, 1)","(132, 1, 1)","DRAM Throughput","%","61,2"\n'
        '"1","_ZN3qlk5otherE","(32, 1, 1)","(1, 1, 1)","Duration","us","2"\n"1","cut'
    )
    first, second = parsers.profile_of(text)
    assert first["metrics"] == {"Duration": "4.1 us", "DRAM Throughput": "61,2 %"}
    assert (first["grid"], second["kernel"]) == ("(132, 1, 1)", "_ZN3qlk5otherE")
    assert parsers.profile_of("==ERROR== no permission") == []


def test_tests_that_have_ended_are_counted():
    output = (
        "collected 12 items / 3 deselected / 9 selected\n\ntests/a/test_b.py::test_c[x y-1] PASSED     [ 11%]\n"
        "tests/a/test_b.py::test_d FAILED [ 22%]\ntests/a/test_b.py::test_e SKIPPED (why)\ntests/a/test_b.py::test_f "
    )
    assert parsers.tests_of(output) == (
        ["tests/a/test_b.py::test_c[x y-1]", "tests/a/test_b.py::test_d", "tests/a/test_b.py::test_e"],
        9,
    )
    assert parsers.tests_of("collected 4 items\n") == ([], 4)
    assert parsers.tests_of("") == ([], 0)


# ------------------------------------------------------------------------------------------------------ a copy's work


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "point", [Point("dequantize", n=24, k=64), Point("adamw_step", "float32", rank=1, model="tiny")], ids=str
)
def test_a_copy_of_as_many_bytes_is_a_kernel(point, monkeypatch):
    """What torch hands to the driver as a copy is, in a graph, no kernel."""
    monkeypatch.setattr(Lab, "cuda", True)
    case = CASES[point.operation](Lab(Settings("cpu", 1, cache_bytes=1), point))
    ready = next(one for one in case.contenders if one.name == EQUAL_COPY).prepare()
    with Seen() as seen:
        seen.names = []
        result = ready.run(0)
    assert seen.names
    assert set(seen.names) <= {"bitwise_not", "neg"}
    assert ready.error(result) <= ready.limit
    assert not ready.error(result + 1) <= ready.limit


def test_the_families_are_side_by_side(tmp_path, monkeypatch):
    seen = []

    def execute_all(wanted, seconds, at_once, then, look):
        seen.append((wanted, at_once))
        return {}

    monkeypatch.setattr(visit_steps.programs, "execute_all", execute_all)
    with pytest.raises(steps.StepFailed):
        visit_steps.run_kernels(tmp_path, 9.0, lambda found: None)
    [(wanted, at_once)] = seen
    assert [one.name for one in wanted] == list(cases.FAMILIES)
    assert at_once == len(wanted) == 6
