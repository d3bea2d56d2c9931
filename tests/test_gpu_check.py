"""bench.gpu_check without a card: its steps, parsers and files."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from bench import gpu_cases, gpu_check, gpu_facts, gpu_parsers, gpu_steps
from bench.gpu_steps import Step, StepFailed
from qlora_kernels.bench import machine

ROOT = Path(__file__).resolve().parent.parent


# ----------------------------------------------------------------------------------------------------- without a card


@pytest.mark.parametrize("module_name", ["bench.gpu_check", "bench.gpu_cases", "bench.bench_cuda"])
def test_without_a_card_one_sentence_and_nothing_done(tmp_path, module_name):
    command = [sys.executable, "-m", module_name, *([] if module_name.endswith("cases") else ["--out", "made"])]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "CUDA device" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not any(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------ parsers


CLEAN = "========= COMPUTE-SANITIZER\nhello\n========= ERROR SUMMARY: 0 errors\n"
RACE_CLEAN = "========= COMPUTE-SANITIZER\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"


def test_sanitizer_summaries():
    assert gpu_parsers.sanitizer_findings(CLEAN, "memcheck") == {"errors": 0}
    one = "========= Invalid __global__ read of size 16 bytes\n========= ERROR SUMMARY: 1 error\n"
    assert gpu_parsers.sanitizer_findings(one, "initcheck") == {"errors": 1}
    assert gpu_parsers.sanitizer_findings(CLEAN + one, "synccheck") == {"errors": 1}
    assert gpu_parsers.sanitizer_findings(RACE_CLEAN, "racecheck") == {"errors": 0, "hazards": 0, "warnings": 0}
    race = "========= RACECHECK SUMMARY: 3 hazards displayed (1 error, 2 warnings)\n"
    assert gpu_parsers.sanitizer_findings(race, "racecheck") == {"errors": 1, "hazards": 3, "warnings": 2}


@pytest.mark.parametrize(
    ("text", "tool"),
    [
        ("", "memcheck"),
        ("ERROR SUMMARY: 0 errors", "memcheck"),  # not the tool's line
        (RACE_CLEAN, "memcheck"),
        (CLEAN, "racecheck"),
        ("========= Error: Device not supported. Please refer to the list\n" + CLEAN, "memcheck"),
        ("========= Internal Sanitizer Error: out of memory\n" + CLEAN, "initcheck"),
        ("========= Target application terminated before first instrumented API call\n" + CLEAN, "synccheck"),
        ("========= ERROR SUMMARY: many errors", "memcheck"),
    ],
)
def test_no_summary_is_no_clean_result(text, tool):
    with pytest.raises(ValueError):
        gpu_parsers.sanitizer_findings(text, tool)


JUNIT = """<?xml version="1.0"?><testsuites><testsuite name="pytest">
<testcase classname="tests.test_a" name="test_one"/>
<testcase classname="tests.test_a" name="test_two[cuda]"><failure message="assert 1 == 2&#10;.">x</failure></testcase>
<testcase classname="tests.test_a" name="test_two[cuda]"><error message="teardown">x</error></testcase>
<testcase classname="tests.test_b" name="test_three"><skipped message="needs two cards">x</skipped></testcase>
<testcase classname="" name="tests.test_c"><error message="collection failure">x</error></testcase>
<testcase classname="tests.test_d" name="test_four"/>
<testcase classname="tests.test_d" name="test_four"><error>no message</error></testcase>
</testsuite></testsuites>"""


def test_junit_counts():
    assert gpu_parsers.junit_counts(JUNIT) == {
        "passed": 1,
        "failed": 3,
        "skipped": 1,
        "failures": [
            ["tests.test_a::test_two[cuda]", "assert 1 == 2"],
            ["tests.test_c", "collection failure"],
            ["tests.test_d::test_four", "no message"],
        ],
        "skips": [["tests.test_b::test_three", "needs two cards"]],
    }
    with pytest.raises(ValueError, match="junit"):
        gpu_parsers.junit_counts("<testsuites>")


def test_nvidia_smi_and_nvcc():
    rows = gpu_parsers.smi_rows("NVIDIA H200, 580.159.04\nNVIDIA H200, 580.159.04\n", ("name", "driver_version"))
    assert rows == [{"name": "NVIDIA H200", "driver_version": "580.159.04"}] * 2
    for text in ("", 'Field "nonsense" is not a valid field to query.\n'):
        with pytest.raises(ValueError, match="2 columns"):
            gpu_parsers.smi_rows(text, ("name", "driver_version"))
    text = "nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release 13.0, V13.0.48\nBuild cuda_13.0\n"
    assert gpu_parsers.nvcc_release(text) == "13.0.48"
    assert gpu_parsers.nvcc_release("no such thing") == "unknown"


def test_facts_that_cannot_be_read_are_unknown(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert gpu_facts.cards_now().startswith("unknown")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sometool").write_text("#!/bin/sh\n")
    assert gpu_facts.tool("sometool") is None  # not executable
    (tmp_path / "bin" / "sometool").chmod(0o755)
    assert gpu_facts.tool("sometool") == str(tmp_path / "bin" / "sometool")
    before = gpu_facts.sources_digest()
    monkeypatch.delenv("QLORA_KERNELS_COMMIT", raising=False)
    assert machine.describe_commit() == {"commit": None, "modified": None}  # PATH has no git
    monkeypatch.setenv("QLORA_KERNELS_COMMIT", "0123abc")
    assert machine.describe_commit() == {"commit": "0123abc", "modified": None}
    monkeypatch.setattr(gpu_facts, "ROOT", tmp_path)
    assert gpu_facts.sources_digest() != before


# -------------------------------------------------------------------------------------------------------------- steps


def sleeping(folder: Path, seconds: float) -> dict:
    """A step that outlasts any limit, with a child of its own."""
    code = (
        "import subprocess, time; child = subprocess.Popen(['sleep', '600']);"
        f"open({str(folder.parent / 'child')!r}, 'w').write(str(child.pid)); print('under way'); time.sleep(600)"
    )
    ended = gpu_steps.execute([sys.executable, "-c", code], folder / "sleeping.log", seconds)
    gpu_steps.demand(ended, "the sleeper", seconds)
    return {}


def gone(pid: int) -> bool:
    """Whether a process has ended, waited for or not."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def good(folder: Path, seconds: float) -> dict:
    return {"seen": seconds}


def bad(folder: Path, seconds: float) -> dict:
    ended = gpu_steps.execute([sys.executable, "-c", "print('a clue'); raise SystemExit(7)"], folder / "b.log", seconds)
    gpu_steps.demand(ended, "the program", seconds, {"half": 1})
    raise AssertionError("not reached")


def packed(folder: Path) -> dict[str, bytes]:
    with tarfile.open(folder / "logs.tar.gz") as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


def test_failures_and_timeouts_are_recorded_and_the_rest_goes_on(tmp_path):
    def broken(folder, seconds):
        raise KeyError("no such thing")

    steps = [
        Step("bad", 0.2, bad),
        Step("slow", 1.6, sleeping),
        Step("broken", 0.1, broken),
        Step("dependent", 0.1, good, needs="bad"),
        Step("good", 0.1, good, needs="good-before"),
    ]
    steps.insert(0, Step("good-before", 0.1, good))
    results = gpu_check.check(tmp_path, steps, 6.0)
    assert results == json.loads((tmp_path / "gpu_check.json").read_text())
    entries = {entry["name"]: entry for entry in results["steps"]}
    assert {name: entry["status"] for name, entry in entries.items()} == {
        "good-before": "passed",
        "bad": "failed",
        "slow": "failed",
        "broken": "failed",
        "dependent": "not run",
        "good": "passed",
    }
    assert entries["bad"]["reason"] == "the program ended with exit code 7"
    assert entries["bad"]["tail"] == "a clue"
    assert entries["bad"]["found"] == {"half": 1}
    assert entries["slow"]["reason"].startswith("the sleeper took longer than")
    assert entries["slow"]["tail"].startswith("under way")
    assert gone(int((tmp_path / "child").read_text()))
    assert entries["broken"]["reason"].startswith("KeyError")
    assert entries["dependent"]["reason"] == "bad failed"
    assert results["complete"] is True
    assert results["passed"] is False
    text = (tmp_path / "gpu_check.md").read_text()
    assert "not all steps passed" in text
    assert "    a clue" in text
    # What the steps have printed, in one file.
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "child",
        "gpu_check.json",
        "gpu_check.md",
        "logs.tar.gz",
    ]
    logs = packed(tmp_path)
    assert sorted(logs) == ["b.log", "sleeping.log"]
    assert logs["b.log"] == b"a clue\n"
    assert logs["sleeping.log"].startswith(b"under way\n")


def test_what_a_step_leaves_the_next_ones_may_use(tmp_path):
    limits = []

    def note(folder, seconds):
        limits.append(seconds)
        return {}

    gpu_check.check(tmp_path, [Step(name, 10.0, note) for name in "abc"], 300.0)
    assert limits == pytest.approx([100, 200, 300], abs=5)


def test_each_step_is_on_disk_before_the_next_begins(tmp_path):
    def look(folder, seconds):
        return {"statuses": [s["status"] for s in json.loads((folder.parent / "gpu_check.json").read_text())["steps"]]}

    results = gpu_check.check(tmp_path, [Step(name, 1.0, look) for name in "abc"], 30.0)
    assert [s["found"]["statuses"] for s in results["steps"]] == [
        ["running", "waiting", "waiting"],
        ["passed", "running", "waiting"],
        ["passed", "passed", "running"],
    ]
    assert results["passed"] is True


def test_results_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    results = gpu_check.check(tmp_path, [Step("a", 1.0, good)], 30.0)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def crash(*_):
        raise OSError("the power is gone")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError):
        gpu_check.write({**results, "date": "another"}, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


DRIVER = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
import torch
torch.cuda.is_available = lambda: True
from bench import gpu_check, gpu_steps
from test_gpu_check import good, sleeping
gpu_steps.STEPS = (gpu_steps.Step("first", 100.0, good), gpu_steps.Step("second", 100.0, sleeping))
sys.exit(gpu_check.main(["--out", {out!r}]))
"""


def test_a_stop_in_the_middle_leaves_what_was_done(tmp_path):
    code = DRIVER.format(tests=str(ROOT / "tests"), root=str(ROOT), out=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) != 0
    finally:
        process.kill()
        process.wait()
    results = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [s["status"] for s in results["steps"]] == ["passed", "running"]
    assert results["complete"] is False
    assert gone(int((tmp_path / "child").read_text()))
    assert "stopped before the end" in (tmp_path / "gpu_check.md").read_text()
    assert packed(tmp_path) == {"sleeping.log": b"under way\n"}
    assert not (tmp_path / gpu_check.LOGS).exists()


@pytest.mark.parametrize(
    ("functions", "arguments", "code"),
    [((good, good), [], 0), ((good, bad), [], 1), ((good, good), ["--steps", "one"], 1)],
)
def test_exit_codes(tmp_path, monkeypatch, capsys, functions, arguments, code):
    steps = tuple(Step(name, 10.0, function) for name, function in zip(("one", "two"), functions))
    monkeypatch.setattr(gpu_steps, "STEPS", steps)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert gpu_check.main(["--out", str(tmp_path / "new"), *arguments]) == code
    out, err = capsys.readouterr()
    assert out.strip() == (tmp_path / "new" / "gpu_check.md").read_text().strip()
    assert "two " + ("passed" if code == 0 else "not run" if arguments else "failed") in err
    with pytest.raises(SystemExit):
        gpu_check.main(["--out", str(tmp_path), "--steps", "three"])


def test_the_budget_is_under_nine_minutes():
    assert gpu_steps.BUDGET == sum(step.share for step in gpu_steps.STEPS) == 530
    assert [step.name for step in gpu_steps.STEPS] == [
        *("facts", "build", "tests", "sanitizers", "bench", "bench_linear", "bench_optimizer")
    ]
    assert all(step.needs == "build" for step in gpu_steps.STEPS[2:])
    for step in gpu_steps.STEPS:  # what the module's text says
        assert re.search(rf"\b{step.share:.0f}\b", gpu_check.__doc__), step.name


# ----------------------------------------------------------------------------------------------------------- programs


def program(folder: Path, name: str, code: str, seconds: float = 20.0) -> gpu_steps.Program:
    return gpu_steps.Program(name, [sys.executable, "-c", code], folder / f"{name}.log", seconds, {"HELLO": name})


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
    ended = gpu_steps.execute_all([program(tmp_path, name, code) for name in "abcd"], 60.0, 2)
    assert list(ended) == list("abcd")
    assert all(one.code == 0 for one in ended.values())
    assert {one.output for one in ended.values()} <= {"True 1\n", "True 2\n"}


def test_one_that_takes_too_long_is_interrupted_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_steps, "GRACE", 1.0)
    tells = "import signal, time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('heard')"
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    programs = [
        program(tmp_path, "tells", tells, 1.0),
        program(tmp_path, "deaf", deaf, 1.0),
        program(tmp_path, "good", "print('good')"),
        program(tmp_path, "bad", "raise SystemExit(3)"),
    ]
    begin = time.monotonic()
    ended = gpu_steps.execute_all(programs, 30.0, 2)
    assert time.monotonic() - begin < 20
    assert [ended[one.name].code for one in programs] == [None, None, 0, 3]
    assert ended["tells"].output == "heard\n"
    assert ended["good"].output == "good\n"


def test_one_whose_turn_does_not_come_was_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_steps, "GRACE", 0.2)
    programs = [program(tmp_path, name, "import time; time.sleep(60)") for name in "ab"]
    ended = gpu_steps.execute_all(programs, 0.5, 1)
    assert ended["a"].code is None
    assert ended["a"].seconds > 0.5
    assert ended["b"] == gpu_steps.Ended(None, 0.0, "not begun")
    assert not (tmp_path / "b.log").exists()


def ending(monkeypatch, outcomes, left=None):
    """Lets every program end so: by name (output, exit code), or the same for all; having left files."""

    def execute_all(programs, seconds, at_once):
        for path, content in (left or {}).items():
            path.write_text(content)
        found = {}
        for one in programs:
            output, code = outcomes.get(one.name, ("", 0)) if isinstance(outcomes, dict) else outcomes
            one.log.write_text(output)
            found[one.name] = gpu_steps.Ended(code, 1.0, output)
        return found

    monkeypatch.setattr(gpu_steps, "execute_all", execute_all)


# -------------------------------------------------------------------------------------------------------------- tests


PASSING = '<testsuite><testcase name="a"/><testcase name="b"><skipped message="why"/></testcase></testsuite>'


def test_every_file_with_tests_of_a_card_is_run():
    files = {*gpu_steps.TEST_FILES, gpu_steps.LAST_TEST_FILE}
    marks = re.compile(r"mark\.gpu\b|^def test_\w+\([^)]*\bengine\b", re.MULTILINE)
    marked = {path.name for path in (ROOT / "tests").glob("test_*.py") if marks.search(path.read_text())}
    assert marked - {Path(__file__).name} == files


def test_the_tests_step(tmp_path, monkeypatch):
    names = [file.removesuffix(".py") for file in (*gpu_steps.TEST_FILES, gpu_steps.LAST_TEST_FILE)]
    all_pass = {tmp_path / f"{name}.xml": PASSING for name in names}
    commands = []
    ending(monkeypatch, ("", 0), all_pass)
    right = gpu_steps.execute_all
    monkeypatch.setattr(gpu_steps, "execute_all", lambda p, *rest: commands.extend(p) or right(p, *rest))
    found = gpu_steps.run_tests(tmp_path, 10)
    assert (found["passed"], found["failed"], found["skipped"]) == (len(names), 0, len(names))
    assert list(found["files"]) == names == [one.name for one in commands]
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
            gpu_steps.run_tests(tmp_path, 10)
        assert failure.value.tail == f"{names[0]}:\nthe end"
        assert failure.value.found["passed"] == passed
        assert words in str(failure.value) + str(failure.value.found["failures"])
    whole = '<testsuite><testcase name="tests.x"><skipped message="no transformers"/></testcase></testsuite>'
    ending(monkeypatch, {names[0]: ("", 5)}, {**rest, first: whole})
    assert gpu_steps.run_tests(tmp_path, 10)["skips"][0] == ["tests.x", "no transformers"]
    ending(monkeypatch, {names[0]: ("", 5)}, {**rest, first: "<testsuite/>"})
    with pytest.raises(StepFailed, match="1 tests failed"):
        gpu_steps.run_tests(tmp_path, 10)
    skipped = PASSING.replace('<testcase name="a"/>', "")
    ending(monkeypatch, ("", 0), dict.fromkeys(all_pass, skipped))
    with pytest.raises(StepFailed, match="no test passed"):
        gpu_steps.run_tests(tmp_path, 10)


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
    counts = gpu_parsers.junit_counts((tmp_path / "it.xml").read_bytes())
    assert (counts["passed"], counts["failed"]) == (0 if gone else 1, 1), done.stdout
    assert "the first to see it" in counts["failures"][0][1]
    sentence = "the card answers no more after "
    assert (sentence in done.stdout) == gone
    assert done.returncode == (2 if gone else 1)
    if gone:
        assert "::test_one: CUDA error: an illegal memory access was encountered" in done.stdout


# --------------------------------------------------------------------------------------------------------- sanitizers


def test_the_sanitizer_step(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_steps, "tool", lambda name: "/somewhere/" + name)
    total = sum(1 for _ in gpu_cases.cases())
    went_through = gpu_cases.verdict(total, total) + "\n"
    clean = {name: (went_through + CLEAN, 0) for name in gpu_steps.SANITIZERS}
    clean["racecheck"] = (went_through + RACE_CLEAN, 0)
    ending(monkeypatch, clean)
    found = gpu_steps.run_sanitizers(tmp_path, 10)
    assert list(found) == list(gpu_steps.SANITIZERS)
    assert found["memcheck"] == {"seconds": 1.0, "errors": 0, "cases": total}
    errors = "========= ERROR SUMMARY: 2 errors"
    race = RACE_CLEAN.replace("0 hazards displayed (0 errors, 0", "1 hazard displayed (0 errors, 1")
    for name, output, code, words in (
        ("memcheck", went_through + errors, 9, "memcheck found 2 errors"),
        ("memcheck", went_through + errors, 0, "memcheck found 2 errors"),
        ("racecheck", went_through + race, 0, "1 hazards, 1 warnings"),
        ("memcheck", went_through, 0, "no ERROR SUMMARY"),
        ("memcheck", gpu_cases.verdict(total - 1, total) + "\n" + CLEAN, 1, "exit code 1"),
        ("memcheck", CLEAN, 0, "not gone through"),
        ("initcheck", "", None, "initcheck took longer than"),
    ):
        ending(monkeypatch, {**clean, name: (output, code)})
        with pytest.raises(StepFailed, match=words) as failure:
            gpu_steps.run_sanitizers(tmp_path, 10)
        # What the others found is kept.
        assert failure.value.found["synccheck"]["cases"] == total
        assert "cases" not in failure.value.found[name]
    monkeypatch.setattr(gpu_steps, "tool", lambda name: None)
    with pytest.raises(StepFailed, match="not found"):
        gpu_steps.run_sanitizers(tmp_path, 10)


@pytest.mark.parametrize(("cores", "at_once", "limit"), [(16, 4, 100.0), (2, 1, 25.0)])
def test_the_sanitizers_run_beside_each_other_on_many_cores(tmp_path, monkeypatch, cores, at_once, limit):
    seen = []

    def execute_all(programs, seconds, count):
        seen.append((programs, seconds, count))
        return {one.name: gpu_steps.Ended(None, 1.0, "") for one in programs}

    monkeypatch.setattr(gpu_steps, "execute_all", execute_all)
    monkeypatch.setattr(gpu_steps, "tool", lambda name: name)
    monkeypatch.setattr(gpu_steps, "cores", lambda: cores)
    with pytest.raises(StepFailed):
        gpu_steps.run_sanitizers(tmp_path, 100.0)
    [(programs, seconds, count)] = seen
    assert (seconds, count) == (100.0, at_once)
    for one in programs:
        assert one.seconds == limit
        # What no kernel uses may be read unwritten, in scratch and in managed memory: of no concern to the others.
        assert ("--poison-scratch" in one.command) == (one.name == "initcheck")
        assert ("QLORA_KERNELS_MANAGED" in one.environment) == (one.name == "initcheck")


def test_the_build_step(tmp_path, monkeypatch):
    def info(**more):
        return json.dumps({"native": True, "cuda_archs": "90a", "card": [9, 0, "NVIDIA H200"], **more})

    ending(monkeypatch, {"": ("a warning\n" + info() + "\nanother one", 0), "conformance": ("", 1)})
    found = gpu_steps.run_build(tmp_path, 10)
    assert found["build_info"] == {"native": True, "cuda_archs": "90a"}
    # What the tests need beside it is theirs to miss.
    assert (found["emulator_built"], found["conformance_built"]) == (True, False)
    for output, code, words in (
        (info(cuda_archs=""), 0, "no CUDA kernels"),
        (info(cuda_archs="80;120"), 0, "NVIDIA H200 is of architecture sm_90"),
        (info(native=False, problem="undefined symbol"), 0, "undefined symbol"),
        ("nothing", 0, "says nothing"),
        (info(), 1, "exit code 1"),
        (info(), None, "longer than"),
    ):
        ending(monkeypatch, (output, code))
        with pytest.raises(StepFailed, match=words):
            gpu_steps.run_build(tmp_path, 10)


@pytest.mark.parametrize("module", ["bench_cuda", "bench_cuda_linear", "bench_cuda_optimizer"])
def test_a_bench_step_keeps_what_was_measured(tmp_path, monkeypatch, module):
    assert importlib.util.find_spec(f"bench.{module}")
    out = tmp_path / f"{module}.json"
    part = {"complete": False, "roof": None, "cases": [], "l2_bytes": 1}
    for code, words in ((None, "longer than"), (1, "exit code 1"), (0, "no complete result")):
        ending(monkeypatch, ("", code), {out: json.dumps(part)})
        with pytest.raises(StepFailed, match=words) as failure:
            gpu_steps.run_bench(module, tmp_path, 10)
        assert failure.value.found["l2_bytes"] == 1
    ending(monkeypatch, ("", 0), {out: json.dumps({**part, "complete": True})})
    assert gpu_steps.run_bench(module, tmp_path, 10)["complete"]
