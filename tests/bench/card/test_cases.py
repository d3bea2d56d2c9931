"""The small cases by families, and what is left when the process that runs them ends, hangs or is cut off."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from emulated import emulated

from bench.card import cases, kernels, programs, visit_steps
from bench.card.steps import StepFailed

NAMES = ["a", "b", "c", "d"]


def lines(*entries: tuple, **more) -> str:
    return "".join(json.dumps({"case": number, "state": state, **more}) + "\n" for number, state in entries)


def test_every_case_is_of_one_family():
    families = [cases.family_of(case) for case in kernels.cases()]
    assert set(families) == set(cases.FAMILIES)
    assert len(families) == sum(len(cases.chosen(family)) for family in cases.FAMILIES)


def test_what_did_not_run_is_not_right():
    assert cases.outcome("", NAMES) == {
        **{"cases": 4, "right": 0, "wrong": [], "not_run": 4, "next": 0, "at_work": None}
    }
    text = lines((0, "begun"), (0, "right"), (1, "begun"))
    found = cases.outcome(text, NAMES)
    assert (found["right"], found["not_run"], found["next"], found["at_work"]) == (1, 3, 2, 1)
    found = cases.outcome(text + lines((1, "ended"), problem="crashed"), NAMES)
    assert (found["right"], found["not_run"], found["wrong"], found["at_work"]) == (1, 2, [["b", "crashed"]], None)
    # A line that is cut off says nothing, and neither does one of another file.
    cut = text + '{"case": 1, "state": "ri'
    assert cases.outcome(cut, NAMES)["right"] == 1
    assert (
        cases.outcome(text + '7\n{"case": 9, "state": "right"}\n[]\n{"case": null, "state": "right"}\n', NAMES)["right"]
        == 1
    )
    # The card was lost by a case that was right by its numbers.
    found = cases.outcome(lines((0, "begun"), (0, "right"), (0, "lost"), problem="gone"), NAMES)
    assert (found["right"], found["wrong"], found["not_run"]) == (0, [["a", "gone"]], 3)


def test_a_family_on_the_emulator(tmp_path):
    report = tmp_path / "report"
    with emulated():
        assert cases.main(["--report", str(report), "--only", "quantize_absmax", "--begin", "4"], device="cpu") == 0
    chosen = cases.chosen("quantize_absmax")
    found = cases.outcome(report.read_text(), [cases.title(case) for case in chosen])
    assert (found["cases"], found["right"], found["not_run"]) == (10, 6, 4)


def test_a_case_that_loses_the_card_is_the_last_of_its_process(monkeypatch):
    noted = []
    of = cases.chosen("quantize_absmax")[:3]
    monkeypatch.setattr(kernels, "check", lambda case, device: "wrong" if case is of[1] else None)
    assert not cases.run(of, 0, lambda **line: noted.append(line), "cuda", lambda device: "an illegal access")
    assert [(line["case"], line["state"]) for line in noted] == [
        *((0, "begun"), (0, "right"), (1, "begun"), (1, "wrong"), (1, "lost"))
    ]
    noted.clear()
    assert cases.run(of, 1, lambda **line: noted.append(line), "cuda", lambda device: None)
    assert [line["case"] for line in noted] == [1, 1, 2, 2]


#: Instead of bench.card.cases: ten cases, of which some do what is said.
CHILD = """
import json, os, signal, sys, time
sys.argv = sys.argv[1:]
report, only, begin = sys.argv[2], sys.argv[4], int(sys.argv[6])
faults = {faults!r}.get(only, {{}})
file = open(report, "a")
def note(**line):
    file.write(json.dumps(line) + "\\n"); file.flush()
for number in range(begin, {count}[only]):
    note(case=number, state="begun")
    fault = faults.get(number)
    if fault == "crash":
        os.abort()
    if fault == "hang":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
    if fault == "truncated":
        file.write('{{"case": ' + str(number) + ', "sta'); file.flush()
        os._exit(1)
    if fault == "lost":
        note(case=number, state="lost", problem="an illegal access")
        os._exit(3)
    note(case=number, state="wrong", problem="bytes differ") if fault == "wrong" else note(case=number, state="right")
"""


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    """Runs the step with children that have faults, by family and case."""

    def run(faults: dict, seconds: float = 60.0, patience: float = 1.5) -> tuple[dict, str, list]:
        count = {family: len(cases.chosen(family)) for family in cases.FAMILIES}
        child = tmp_path / "child.py"
        child.write_text(CHILD.format(faults=faults, count=count))
        monkeypatch.setattr(visit_steps, "module", lambda name, *words: [sys.executable, str(child), name, *words])
        monkeypatch.setattr(visit_steps, "PATIENCE", patience)
        monkeypatch.setattr(programs, "GRACE", 0.2)
        told = []
        try:
            return visit_steps.run_kernels(tmp_path / "logs", seconds, told.append), "", told
        except StepFailed as problem:
            return problem.outcome, str(problem), told

    (tmp_path / "logs").mkdir()
    return run


def test_all_are_right(faulty):
    found, problem, told = faulty({})
    assert problem == ""
    assert found["right"] == found["cases"] == sum(1 for _ in kernels.cases())
    assert found["again"] == 0
    assert told[-1]["right"] == found["right"]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("crash", "its process ended with exit code -6"),
        pytest.param("hang", "got no further for", marks=pytest.mark.slow),
        ("truncated", "its process ended with exit code 1"),
        ("lost", "an illegal access"),
        ("wrong", "bytes differ"),
    ],
)
def test_a_fault_is_that_cases_alone(faulty, fault, words):
    found, problem, _ = faulty({"linear bfloat16": {2: fault, 5: fault}})
    assert [name for name, _ in found["wrong"]] == [cases.title(cases.chosen("linear bfloat16")[i]) for i in (2, 5)]
    assert all(why.startswith(words) for _, why in found["wrong"]), found["wrong"]
    assert found["not_run"] == 0
    assert found["right"] == found["cases"] - 2
    assert found["again"] == (0 if fault == "wrong" else 2)
    assert problem.startswith(f"2 of {found['cases']} cases are wrong, 0 did not run")


def test_a_family_that_always_crashes_does_not_go_on_for_ever(faulty):
    found, problem, _ = faulty({"dequantize": dict.fromkeys(range(72), "crash")})
    family = found["families"]["dequantize"]
    assert len(family["wrong"]) == visit_steps.MOST_AGAIN + 1
    assert family["not_run"] == 72 - len(family["wrong"])
    assert found["right"] == found["cases"] - 72
    assert f"{family['not_run']} did not run" in problem


@pytest.mark.slow
def test_what_has_no_time_is_not_run(faulty):
    found, problem, told = faulty({"optimizer": {3: "hang"}}, seconds=3.0, patience=60.0)
    family = found["families"]["optimizer"]
    assert (family["right"], len(family["wrong"]), family["not_run"]) == (3, 1, 31)
    assert "31 did not run" in problem
    assert told


@pytest.mark.slow
def test_a_card_that_is_not_there_leaves_all_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    )
    monkeypatch.setattr(cases, "FAMILIES", ("quantize_absmax",))
    with pytest.raises(StepFailed, match="0 of 10 cases are wrong, 10 did not run") as failure:
        visit_steps.run_kernels(tmp_path, 60.0, lambda found: None)
    assert "no CUDA device" in failure.value.tail
