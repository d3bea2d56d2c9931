"""bench.card.check without a card: its steps, parsers and files."""

from __future__ import annotations

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
from bench_runs.check import CLEAN, JUNIT, RACE_CLEAN, good, sleeping

from bench.card import check, facts, parsers, programs, steps
from bench.card.steps import Step
from qlora_kernels.bench.timing import machine

ROOT = Path(__file__).resolve().parent.parent.parent.parent


# ----------------------------------------------------------------------------------------------------- without a card


@pytest.mark.share(4)
@pytest.mark.parametrize(
    "words",
    [
        *("check --out made", "kernels", "tensor_rate --out made", "facts", "cases --report made"),
        *("variants early --out made", "profiled linear_forward 4096 4096 1 0"),
    ],
    ids=lambda words: words.split()[0],
)
def test_without_a_card_one_sentence_and_nothing_done(tmp_path, words):
    command = [sys.executable, "-m", *f"bench.card.{words}".split()]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "CUDA device" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not any(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------ parsers


def test_sanitizer_summaries():
    assert parsers.sanitizer_findings(CLEAN, "memcheck") == {"errors": 0}
    one = "========= Invalid __global__ read of size 16 bytes\n========= ERROR SUMMARY: 1 error\n"
    assert parsers.sanitizer_findings(one, "initcheck") == {"errors": 1}
    assert parsers.sanitizer_findings(CLEAN + one, "synccheck") == {"errors": 1}
    assert parsers.sanitizer_findings(RACE_CLEAN, "racecheck") == {"errors": 0, "hazards": 0, "warnings": 0}
    race = "========= RACECHECK SUMMARY: 3 hazards displayed (1 error, 2 warnings)\n"
    assert parsers.sanitizer_findings(race, "racecheck") == {"errors": 1, "hazards": 3, "warnings": 2}


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
        parsers.sanitizer_findings(text, tool)


def test_junit_counts():
    assert parsers.junit_counts(JUNIT) == {
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
        parsers.junit_counts("<testsuites>")


def test_nvidia_smi_and_nvcc():
    rows = parsers.smi_rows("NVIDIA H200, 580.159.04\nNVIDIA H200, 580.159.04\n", ("name", "driver_version"))
    assert rows == [{"name": "NVIDIA H200", "driver_version": "580.159.04"}] * 2
    for text in ("", 'Field "nonsense" is not a valid field to query.\n'):
        with pytest.raises(ValueError, match="2 columns"):
            parsers.smi_rows(text, ("name", "driver_version"))
    text = "nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release 13.0, V13.0.48\nBuild cuda_13.0\n"
    assert parsers.nvcc_release(text) == "13.0.48"
    assert parsers.nvcc_release("no such thing") == "unknown"


def test_facts_that_cannot_be_read_are_unknown(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert facts.cards_now().startswith("unknown")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sometool").write_text("#!/bin/sh\n")
    assert facts.tool("sometool") is None  # not executable
    (tmp_path / "bin" / "sometool").chmod(0o755)
    assert facts.tool("sometool") == str(tmp_path / "bin" / "sometool")
    before = facts.sources_digest()
    monkeypatch.delenv("QLORA_KERNELS_COMMIT", raising=False)
    assert machine.describe_commit() == {"commit": None, "modified": None}  # PATH has no git
    monkeypatch.setenv("QLORA_KERNELS_COMMIT", "0123abc")
    assert machine.describe_commit() == {"commit": "0123abc", "modified": None}
    monkeypatch.setattr(facts, "ROOT", tmp_path)
    assert facts.sources_digest() != before


# -------------------------------------------------------------------------------------------------------------- steps


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


def bad(folder: Path, seconds: float) -> dict:
    ended = programs.execute([sys.executable, "-c", "print('a clue'); raise SystemExit(7)"], folder / "b.log", seconds)
    steps.demand(ended, "the program", seconds, {"half": 1})
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
    results = check.check(check.Files(tmp_path), steps, 6.0)
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

    check.check(check.Files(tmp_path), [Step(name, 10.0, note) for name in "abc"], 300.0)
    assert limits == pytest.approx([100, 200, 300], abs=5)


def test_each_step_is_on_disk_before_the_next_begins(tmp_path):
    def look(folder, seconds):
        return {"statuses": [s["status"] for s in json.loads((folder.parent / "gpu_check.json").read_text())["steps"]]}

    results = check.check(check.Files(tmp_path), [Step(name, 1.0, look) for name in "abc"], 30.0)
    assert [s["found"]["statuses"] for s in results["steps"]] == [
        ["running", "waiting", "waiting"],
        ["passed", "running", "waiting"],
        ["passed", "passed", "running"],
    ]
    assert results["passed"] is True


def test_results_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    results = check.check(check.Files(tmp_path), [Step("a", 1.0, good)], 30.0)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def crash(*_):
        raise OSError("the power is gone")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError):
        check.write({**results, "date": "another"}, check.Files(tmp_path))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


DRIVER = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
import torch
torch.cuda.is_available = lambda: True
from bench.card import check, steps
from bench_runs.check import good, sleeping
steps.STEPS = (steps.Step("first", 100.0, good), steps.Step("second", 100.0, sleeping))
sys.exit(check.main(["--out", {out!r}]))
"""


def test_a_stop_in_the_middle_leaves_what_was_done(tmp_path):
    code = DRIVER.format(tests=str(ROOT / "tests" / "support"), root=str(ROOT), out=str(tmp_path))
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
    assert not (tmp_path / check.LOGS).exists()


@pytest.mark.parametrize(
    ("functions", "arguments", "code"),
    [((good, good), [], 0), ((good, bad), [], 1), ((good, good), ["--steps", "one"], 1)],
)
def test_exit_codes(tmp_path, monkeypatch, capsys, functions, arguments, code):
    two = tuple(Step(name, 10.0, function) for name, function in zip(("one", "two"), functions))
    monkeypatch.setattr(steps, "STEPS", two)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert check.main(["--out", str(tmp_path / "new"), *arguments]) == code
    out, err = capsys.readouterr()
    assert out.strip() == (tmp_path / "new" / "gpu_check.md").read_text().strip()
    assert "two " + ("passed" if code == 0 else "not run" if arguments else "failed") in err
    with pytest.raises(SystemExit):
        check.main(["--out", str(tmp_path), "--steps", "three"])


def test_the_budget_is_under_nine_minutes():
    assert steps.BUDGET == sum(step.share for step in steps.STEPS) == 530
    assert [step.name for step in steps.STEPS] == [*("facts", "build", "tests", "sanitizers", "rates", "bench")]
    assert all(step.needs == "build" for step in steps.STEPS[2:])
    for step in steps.STEPS:  # what the module's text says
        assert re.search(rf"\b{step.share:.0f}\b", check.__doc__), step.name
