"""The steps of bench.card.check without a card: programs that are told how to end."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bench_runs.cases import limits_case
from bench_runs.check import CLEAN, JUNIT, RACE_CLEAN, good

from bench.card import check, kernels, parsers, programs, steps
from bench.card.steps import StepFailed
from qlora_kernels.bench import options
from qlora_kernels.bench.case import Settings
from qlora_kernels.bench.points import SWEEPS
from qlora_kernels.bench.report import results

ROOT = Path(__file__).resolve().parent.parent.parent.parent

# ----------------------------------------------------------------------------------------------------------- programs


def program(folder: Path, name: str, code: str, seconds: float = 20.0) -> programs.Program:
    return programs.Program(name, [sys.executable, "-c", code], folder / f"{name}.log", seconds, {"HELLO": name})


UNDER_WAY = """
import os, pathlib, time
here, name = pathlib.Path({folder!r}), os.environ["HELLO"]
(here / (name + ".on")).touch()
(here / (name + ".begun")).touch()
end = time.monotonic() + 20
while not (here / "b.begun").exists() and time.monotonic() < end:
    time.sleep(0.01)
print((here / "b.begun").exists(), len(list(here.glob("*.on"))))
(here / (name + ".on")).unlink()
"""


def test_programs_run_so_many_at_a_time_in_their_order(tmp_path):
    # The first waits for the second to begin; each says how many are under way.
    code = UNDER_WAY.format(folder=str(tmp_path))
    ended = programs.execute_all([program(tmp_path, name, code) for name in "abcd"], 60.0, 2)
    assert list(ended) == list("abcd")
    assert all(one.code == 0 for one in ended.values())
    assert {one.output for one in ended.values()} <= {"True 1\n", "True 2\n"}


def test_one_that_takes_too_long_is_interrupted_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "GRACE", 1.0)
    tells = "import signal, time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('heard')"
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    wanted = [
        program(tmp_path, "tells", tells, 1.0),
        program(tmp_path, "deaf", deaf, 1.0),
        program(tmp_path, "good", "print('good')"),
        program(tmp_path, "bad", "raise SystemExit(3)"),
    ]
    begin = time.monotonic()
    ended = programs.execute_all(wanted, 30.0, 2)
    assert time.monotonic() - begin < 20
    assert [ended[one.name].code for one in wanted] == [None, None, 0, 3]
    assert ended["tells"].output == "heard\n"
    assert ended["good"].output == "good\n"


def test_one_whose_turn_does_not_come_was_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "GRACE", 0.2)
    wanted = [program(tmp_path, name, "import time; time.sleep(60)") for name in "ab"]
    ended = programs.execute_all(wanted, 0.5, 1)
    assert ended["a"].code is None
    assert ended["a"].seconds > 0.5
    assert ended["b"] == programs.Ended(None, 0.0, "not begun")
    assert not (tmp_path / "b.log").exists()


def ending(monkeypatch, outcomes, left=None):
    """Lets every program end so: by name (output, exit code), or the same for all; having left files."""

    def execute_all(wanted, seconds, at_once, then=None, look=None):
        for path, content in (left or {}).items():
            path.write_text(content)
        outcome = {}
        for one in wanted:
            output, code = outcomes.get(one.name, ("", 0)) if isinstance(outcomes, dict) else outcomes
            one.log.write_text(output)
            outcome[one.name] = programs.Ended(code, 1.0, output)
            if then is not None:
                then(one, outcome[one.name])
        return outcome

    monkeypatch.setattr(programs, "execute_all", execute_all)


# -------------------------------------------------------------------------------------------------------------- tests


PASSING = '<testsuite><testcase name="a"/><testcase name="b"><skipped message="why"/></testcase></testsuite>'


def test_every_file_with_tests_of_a_card_is_run():
    files = {*steps.TEST_FILES, steps.LAST_TEST_FILE}
    marks = re.compile(r"mark\.gpu\b|\bdevice_fixture\b|^def test_\w+\([^)]*\b(?:cuda_)?engine\b", re.MULTILINE)
    marked = {
        str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py") if marks.search(path.read_text())
    }
    assert marked - {str(Path(__file__).relative_to(ROOT))} == files


def test_the_tests_step(tmp_path, monkeypatch):
    names = [Path(file).stem for file in (*steps.TEST_FILES, steps.LAST_TEST_FILE)]
    all_pass = {tmp_path / f"{name}.xml": PASSING for name in names}
    commands = []
    ending(monkeypatch, ("", 0), all_pass)
    right = programs.execute_all
    monkeypatch.setattr(programs, "execute_all", lambda p, *rest: commands.extend(p) or right(p, *rest))
    outcome = steps.run_tests(tmp_path, 10)
    assert (outcome["passed"], outcome["failed"], outcome["skipped"]) == (len(names), 0, len(names))
    assert list(outcome["files"]) == names == [one.name for one in commands]
    assert all("faulthandler_timeout=60" in one.command for one in commands)
    first = tmp_path / f"{names[0]}.xml"
    rest = {path: text for path, text in all_pass.items() if path != first}
    others = len(names) - 1
    for code, text, words, failed, passed in (
        (1, JUNIT, "3 tests failed", 3, others + 1),
        (3, PASSING, "exit code 3", 1, others + 1),
        (None, PASSING, "took too long: ended after 1 s", 1, others + 1),
        (None, None, "took too long: ended after 1 s, without counts", 1, others),
        (0, None, "left no junit file", 1, others),
        (-11, None, "exit code -11 and left no junit file", 1, others),
        (0, PASSING[:40], "the junit file cannot be read", 1, others),
    ):
        first.unlink(missing_ok=True)
        ending(monkeypatch, {names[0]: ("the end", code)}, {**rest, **({} if text is None else {first: text})})
        with pytest.raises(StepFailed, match=f"{failed} tests failed") as failure:
            steps.run_tests(tmp_path, 10)
        assert failure.value.tail == f"{names[0]}:\nthe end"
        assert failure.value.outcome["passed"] == passed
        assert words in str(failure.value) + str(failure.value.outcome["failures"])
    whole = '<testsuite><testcase name="tests.x"><skipped message="no transformers"/></testcase></testsuite>'
    ending(monkeypatch, {names[0]: ("", 5)}, {**rest, first: whole})
    assert steps.run_tests(tmp_path, 10)["skips"][0] == ["tests.x", "no transformers"]
    ending(monkeypatch, {names[0]: ("", 5)}, {**rest, first: "<testsuite/>"})
    with pytest.raises(StepFailed, match="1 tests failed"):
        steps.run_tests(tmp_path, 10)
    skipped = PASSING.replace('<testcase name="a"/>', "")
    ending(monkeypatch, ("", 0), dict.fromkeys(all_pass, skipped))
    with pytest.raises(StepFailed, match="no test passed"):
        steps.run_tests(tmp_path, 10)


CARD_IS_GONE = """
import pytest, torch
torch.cuda.is_initialized = lambda: True
def synchronize():
    if {gone}:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\\nmore")
torch.cuda.synchronize = synchronize
pytestmark = pytest.mark.gpu
def test_one():
    assert False, "the first to see it"
def test_two():
    pass
"""


@pytest.mark.parametrize("gone", [True, False])
def test_a_card_that_answers_no_more_ends_the_run(tmp_path, gone):
    (tmp_path / "test_it.py").write_text(CARD_IS_GONE.format(gone=gone))
    command = [
        *(sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-c", str(ROOT / "pyproject.toml"), "-p", "conftest"),
        *(f"--junitxml={tmp_path / 'it.xml'}", str(tmp_path / "test_it.py")),
    ]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    counts = parsers.junit_counts((tmp_path / "it.xml").read_bytes())
    assert (counts["passed"], counts["failed"]) == (0 if gone else 1, 1), done.stdout
    assert "the first to see it" in counts["failures"][0][1]
    sentence = "the card answers no more after "
    assert (sentence in done.stdout) == gone
    assert done.returncode == (2 if gone else 1)
    if gone:
        assert "::test_one: CUDA error: an illegal memory access was encountered" in done.stdout


#: Instead of pytest: a file of four tests, the second of which takes the card with it.
LOSES = """
import pathlib, sys
given = sys.argv[1:]
left = [i for i in range(4) if not any(one == f"--deselect=tests/t/test_x.py::test_{{i}}" for one in given)]
junit = next(one for one in given if one.startswith("--junitxml=")).partition("=")[2]
print(f"collected 9 items / 5 deselected / {{len(left)}} selected")
cases = []
for i in left:
    bad = i in {faults}
    print(f"tests/t/test_x.py::test_{{i}} {{'FAILED' if bad else 'PASSED'}}  [ 9%]")
    cases.append(f'<testcase name="t{{i}}">' + '<failure message="gone"/>' * bad + "</testcase>")
    if bad:
        print("!!! _pytest.outcomes.Exit: the card answers no more after tests/t/test_x.py::test_1: gone !!!")
        break
pathlib.Path(junit).write_text("<testsuite>" + "".join(cases) + "</testsuite>")
sys.exit(2 if len(cases) < len(left) or cases[-1].count("failure") else 0)
"""


@pytest.mark.parametrize(("faults", "passed", "failed", "not_run"), [((1,), 3, 1, 0), ((0, 2), 1, 2, 1)])
def test_after_a_fault_the_rest_of_a_file_goes_on_in_a_new_process(
    tmp_path, monkeypatch, faults, passed, failed, not_run
):
    """Once; what did not run then is counted."""
    (tmp_path / "pytest.py").write_text(LOSES.format(faults=faults))
    monkeypatch.setattr(steps, "module", lambda name, *words: [sys.executable, str(tmp_path / "pytest.py"), *words])
    told = []
    with pytest.raises(StepFailed, match=f"{failed} tests failed") as failure:
        steps.run_tests(tmp_path, 30.0, told.append, ["tests/t/test_x.py"])
    outcome = failure.value.outcome
    assert (outcome["passed"], outcome["failed"], outcome["not_run"]) == (passed, failed, not_run)
    assert list(outcome["files"]) == ["test_x", "test_x, again"]
    assert [one["passed"] for one in told] == [faults[0], passed]


def test_tests_that_did_not_run_are_no_success(tmp_path, monkeypatch):
    junit = {tmp_path / "test_x.xml": PASSING}
    ending(monkeypatch, {"test_x": ("collected 5 items\n", 0)}, junit)
    with pytest.raises(StepFailed, match="3 tests did not run") as failure:
        steps.run_tests(tmp_path, 9.0, files=["tests/test_x.py"])
    assert failure.value.outcome["not_run"] == 3
    ending(monkeypatch, {"test_x": ("collected 2 items\n", 0)}, junit)
    assert steps.run_tests(tmp_path, 9.0, files=["tests/test_x.py"])["not_run"] == 0


# --------------------------------------------------------------------------------------------------------- sanitizers


def test_the_sanitizers_options():
    """Slow kernels are no hangs; a fault ends a kernel, not the process; two tools look at this package's kernels."""
    for name in steps.SANITIZERS:
        words = " ".join(steps.sanitizer_command("compute-sanitizer", name))
        assert f"--tool {name} --launch-timeout 0 --destroy-on-device-error kernel " in words
        assert ("--kernel-name kns=qlk " in words) == (name in ("racecheck", "synccheck"))


def test_the_sanitizer_step(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "tool", lambda name: "/somewhere/" + name)
    total = sum(1 for _ in kernels.cases())
    went_through = kernels.verdict(total, total) + "\n"
    clean = {name: (went_through + CLEAN, 0) for name in steps.SANITIZERS}
    clean["racecheck"] = (went_through + RACE_CLEAN, 0)
    ending(monkeypatch, clean)
    outcome = steps.run_sanitizers(tmp_path, 10)
    assert list(outcome) == list(steps.SANITIZERS)
    assert outcome["memcheck"] == {"seconds": 1.0, "errors": 0, "cases": total}
    errors = "========= ERROR SUMMARY: 2 errors"
    race = RACE_CLEAN.replace("0 hazards displayed (0 errors, 0", "1 hazard displayed (0 errors, 1")
    for name, output, code, words in (
        ("memcheck", went_through + errors, 9, "memcheck found 2 errors"),
        ("memcheck", went_through + errors, 0, "memcheck found 2 errors"),
        ("racecheck", went_through + race, 0, "1 hazards, 1 warnings"),
        ("memcheck", went_through, 0, "no ERROR SUMMARY"),
        ("memcheck", kernels.verdict(total - 1, total) + "\n" + CLEAN, 1, "exit code 1"),
        ("memcheck", CLEAN, 0, "not gone through"),
        ("initcheck", "", None, "initcheck took longer than"),
    ):
        ending(monkeypatch, {**clean, name: (output, code)})
        with pytest.raises(StepFailed, match=words) as failure:
            steps.run_sanitizers(tmp_path, 10)
        # What the others found is kept.
        assert failure.value.outcome["synccheck"]["cases"] == total
        assert "cases" not in failure.value.outcome[name]
    monkeypatch.setattr(steps, "tool", lambda name: None)
    with pytest.raises(StepFailed, match="not found"):
        steps.run_sanitizers(tmp_path, 10)


@pytest.mark.parametrize(("cores", "at_once", "limit"), [(16, 4, 100.0), (2, 1, 25.0)])
def test_the_sanitizers_run_beside_each_other_on_many_cores(tmp_path, monkeypatch, cores, at_once, limit):
    seen = []

    def execute_all(wanted, seconds, count, then):
        seen.append((wanted, seconds, count))
        return {one.name: programs.Ended(None, 1.0, "") for one in wanted}

    monkeypatch.setattr(programs, "execute_all", execute_all)
    monkeypatch.setattr(steps, "tool", lambda name: name)
    monkeypatch.setattr(steps, "cores", lambda: cores)
    with pytest.raises(StepFailed):
        steps.run_sanitizers(tmp_path, 100.0)
    [(wanted, seconds, count)] = seen
    assert (seconds, count) == (100.0, at_once)
    for one in wanted:
        assert one.seconds == limit
        # What no kernel uses may be read unwritten, in scratch and in managed memory: of no concern to the others.
        assert ("--poison-scratch" in one.command) == (one.name == "initcheck")
        assert ("QLORA_KERNELS_MANAGED" in one.environment) == (one.name == "initcheck")


def test_the_build_step(tmp_path, monkeypatch):
    def info(**more):
        return json.dumps({"native": True, "cuda_archs": "90a", "card": [9, 0, "NVIDIA H200"], **more})

    ending(monkeypatch, {"": ("a warning\n" + info() + "\nanother one", 0), "conformance": ("", 1)})
    outcome = steps.run_build(tmp_path, 10)
    assert outcome["build_info"] == {"native": True, "cuda_archs": "90a"}
    # What the tests need beside it is theirs to miss.
    assert (outcome["emulator_built"], outcome["conformance_built"]) == (True, False)
    for output, code, words in (
        (info(cuda_archs=""), 0, "no CUDA kernels"),
        (info(cuda_archs="80;120"), 0, "NVIDIA H200 is of architecture sm_90"),
        (info(native=False, problem="undefined symbol"), 0, "undefined symbol"),
        ("nothing", 0, "prints no build information"),
        (info(), 1, "exit code 1"),
        (info(), None, "longer than"),
    ):
        ending(monkeypatch, (output, code))
        with pytest.raises(StepFailed, match=words):
            steps.run_build(tmp_path, 10)


def test_a_bench_step_keeps_what_was_measured(tmp_path, monkeypatch):
    out = tmp_path / "bench.jsonl"
    run = results.begin(Settings(), "card")

    def left(complete: bool) -> dict[Path, str]:
        results.save({**run, "complete": complete, "cases": [limits_case()]}, tmp_path / "made.jsonl")
        return {out: (tmp_path / "made.jsonl").read_text()}

    for code, words in ((None, "longer than"), (1, "exit code 1"), (0, "no complete result")):
        ending(monkeypatch, ("", code), left(False))
        with pytest.raises(StepFailed, match=words) as failure:
            steps.run_bench(tmp_path, 10)
        assert [case["operation"] for case in failure.value.outcome["cases"]] == ["limits"]
    ending(monkeypatch, ("", 0), left(True))
    assert steps.run_bench(tmp_path, 10)["complete"]


def test_a_result_that_is_cut_off_fails_its_step_alone(tmp_path, monkeypatch):
    out = tmp_path / "logs" / "bench.jsonl"
    results.save({**results.begin(Settings(), "card"), "cases": [limits_case()], "complete": True}, tmp_path / "whole")
    text = (tmp_path / "whole").read_text()
    stages = [
        steps.Step("bench", 9.0, steps.run_bench, tells=True),
        steps.Step("rates", 9.0, steps.run_rates),
        steps.Step("good", 9.0, good),
    ]
    left = {out: text[: len(text) // 2], out.with_name("tensor_rate.json"): '{"rates": {'}
    ending(monkeypatch, ("", 0), left)
    found = check.check(check.Files(tmp_path, loose=out.parent), stages, 60.0)
    assert [step["status"] for step in found["steps"]] == ["failed", "failed", "passed"]
    assert "bench.jsonl is" in found["steps"][0]["reason"]
    assert "tensor_rate.json should hold a JSON object" in found["steps"][1]["reason"]


def test_the_bench_step_gives_the_one_bench_its_time(tmp_path, monkeypatch):
    commands = []

    def execute_all(wanted, *arguments, **more):
        commands.extend(one.command for one in wanted)
        return {one.name: programs.Ended(1, 1.0, "") for one in wanted}

    monkeypatch.setattr(programs, "execute_all", execute_all)
    with pytest.raises(StepFailed):
        steps.run_bench(tmp_path, 135.0)
    [command] = commands
    assert command[1:4] == ["-m", "qlora_kernels", "bench"]
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    arguments = parser.parse_args(command[4:])
    assert (arguments.card, arguments.device, arguments.out) == (True, "cuda", str(tmp_path / "bench.jsonl"))
    assert arguments.minutes == pytest.approx((135 - steps.STARTING) / 60, abs=0.01)
    assert options.points_of(arguments) == SWEEPS["card"]()


def test_the_rates_step_keeps_what_was_measured(tmp_path, monkeypatch):
    out = tmp_path / "tensor_rate.json"
    for code, words in ((None, "longer than"), (1, "exit code 1"), (0, "no complete result")):
        ending(monkeypatch, ("", code), {out: json.dumps({"rates": {}})})
        with pytest.raises(StepFailed, match=words) as failure:
            steps.run_rates(tmp_path, 8)
        assert failure.value.outcome["rates"] == {}
    ending(monkeypatch, ("", 0), {out: json.dumps({"complete": True})})
    assert steps.run_rates(tmp_path, 8)["complete"]
