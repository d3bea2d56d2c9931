"""What came back is read: tables, files to keep, the next command. What a stand-in gave is kept nowhere."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from bench_runs.cases import contender, limits_case

from bench.card import predictions, profiled, reading, sections, visit, visit_steps
from bench.card.report import markdown
from bench.compiled import model, rivals
from bench.compiled.cards import CARDS
from qlora_kernels.bench.case import OURS, Settings
from qlora_kernels.bench.contenders.names import BNB, DENSE, EQUAL_COPY
from qlora_kernels.bench.points import Point
from qlora_kernels.bench.report import results as result_files
from qlora_kernels.errors import InputError

H200 = CARDS["h200"]


def forward(m: int, factor: float, n: int = 4096, rank: int = 0, operation: str = "linear_forward") -> dict:
    """A case that took so many times its prediction."""
    point = Point(operation, n=n, k=4096, m=m, rank=rank)
    about = {"title": "forward", "flops": None, "rounds": 1, "other_processes": 0.0}
    case = {**point.as_dict(), **about, "contenders": [on_card(OURS, 1.0), on_card(DENSE, 1.0), on_card(BNB, 1.0)]}
    case["contenders"][0] = on_card(OURS, factor * predictions.predicted_us(case, case["contenders"][0], H200) / 1e3)
    return case


def on_card(name: str, ms: float) -> dict:
    return contender(name, ms, by="graph", event_ms=ms, host_ms=0.007, wall_ms=ms, no_graph=None)


def run_of(*cases: dict) -> dict:
    return {**result_files.begin(Settings(), "card --operations some"), "cases": list(cases), "complete": True}


def result(command: str, **more) -> dict:
    """As a visit leaves it."""
    family = {"cases": 82, "right": 80, "wrong": [["quantize x", "2 bytes differ"]], "not_run": 1, "next": 81}
    found = {
        "facts": {"device": "NVIDIA H200", "nvidia_smi": "unknown", "build_info": {}},
        "kernels": {**family, "families": {"quantize": family}},
        "linear": run_of(limits_case(4000.0), forward(1, 1.5), forward(16, 0.9), forward(64, 3.0), forward(4096, 1.1)),
        "quantization": run_of(limits_case(4100.0)),
        "optimizer": run_of(limits_case(4200.0)),
        "tests": {"passed": 3, "failed": 0, "skipped": 0, "not_run": 7, "failures": [], "skips": [], "files": {}},
        "rates": {"rates": {"mma.sync m16n8k16 fp16": {"tflops": 640.0, "least": 630.0, "most": 641.0, "turns": 9}}},
        "forced": {"cases": [{**forward(1024, 1.0), "contenders": [on_card("tiles128", 0.2), on_card("x", 0.3)]}]},
        "profile": {"a product": [{"kernel": "k", "metrics": {"Duration": "4 us"}}], "another": "not profiled: why"},
    }
    names = [step.name for step in visit_steps.COMMANDS[command]]
    steps = [
        {"name": name, "status": "passed", "seconds": 1.0, "limit_s": 9.0, "found": found.get(name, {})}
        for name in names
    ]
    clock = {"least": 345.0, "median": 1755.0, "most": 1980.0}
    clocks = {"samples": 3, "sm_mhz": clock, "steps": {"facts": {"samples": 0}}}
    about = {"schema": 3, "date": "2026-01-02T03:04:05+00:00", "complete": True, "passed": True, "stand_in": False}
    return {**about, "visit": command, "steps": steps, "clocks": clocks, "problems": [], **more}


def saved(folder: Path, *found: dict) -> Path:
    folder.mkdir(exist_ok=True)
    for one in found:
        (folder / f"visit-{one['visit']}.json").write_text(json.dumps(one))
    return folder


def read(folder: Path, keep: Path) -> int:
    return visit.main(["--read", str(folder), "--keep", str(keep)])


def test_tables_files_and_the_next_command(tmp_path, capsys):
    folder = saved(tmp_path / "back", result("first"))
    assert read(folder, tmp_path / "kept") == 0
    out = capsys.readouterr().out
    assert "# First command on NVIDIA H200, 2026-01-02: all steps passed" in out
    assert "| quantize |    82 |    80 |     1 |       1 |" in out
    assert "- quantize x: 2 bytes differ" in out
    names = ["card-h200-2026-01-02-first.json", "card-h200-2026-01-02-first.jsonl", "card-h200-2026-01-02-first.md"]
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == names
    kept = result_files.load(tmp_path / "kept" / names[1])
    assert [case["operation"] for case in kept["cases"]] == ["limits", *["linear_forward"] * 4]
    assert kept["complete"]
    assert kept["sweep"] == "card"
    again = json.loads((tmp_path / "kept" / names[0]).read_text())
    assert [step["name"] for step in again["steps"]] == [step.name for step in visit_steps.FIRST]
    assert (tmp_path / "kept" / names[2]).read_text().strip() in out
    command, left = out.strip().rpartition("Next: ")[2].split("\nLeft over: ")
    assert "--first --carried build/visit --steps facts,kernels " in left  # of which one did not run
    arguments = visit.parser_of().parse_args(shlex.split(command)[3:])
    assert arguments.second
    points = [profiled.point_of(one.split()) for one in arguments.profile]
    assert [point.m for point in points] == [64, 1, 16]  # three times, 1.5 times, nine tenths
    # Another visit on the same day has files of its own.
    assert read(folder, tmp_path / "kept") == 0
    assert (tmp_path / "kept" / "card-h200-2026-01-02-first-2.jsonl").exists()


def test_the_second_command_and_what_is_left(tmp_path, capsys):
    first, second = result("first"), result("second")
    first["steps"][1]["found"]["not_run"] = 0
    folder = saved(tmp_path / "back", first, second)
    assert read(folder, tmp_path / "kept") == 0
    out = capsys.readouterr().out
    for text in (
        "mma.sync m16n8k16 fp16",
        "Kernels against each other",
        "- another: not profiled: why",
        "345 / 1755 / 1980",
    ):
        assert text in out
    share, assumed = 640 / H200.tensor, H200.mma_rate / 1e12
    assert f"{share:.1%} | {assumed:>22.0f} |" in out
    assert "--second" in out.rpartition("Next: ")[2]
    assert "--steps facts,tests " in out.rpartition("Next: ")[2]  # of which some did not run
    next(one for one in second["steps"] if one["name"] == "tests")["found"]["not_run"] = 0
    found = {"first": first, "second": second}
    assert reading.next_commands(found, "build/visit") == []
    linear = first["steps"][2]["found"]
    linear["cases"].append({**forward(512, 1.0), "contenders": [], "failed": "no time was left", "left_out": True})
    [command] = reading.next_commands(found, "build/visit")
    assert "--first --carried build/visit --steps facts,linear " in command
    assert "6 cases, 1 not run" in markdown(first)
    nothing = result("first")
    nothing["steps"][0].update(status="failed", found={})
    for before in ({}, {"first": nothing}):
        [command] = reading.next_commands(before, "build/visit")
        assert "--first" in command
        assert "--steps" not in command


def test_what_was_left_and_run_later_is_one_result(tmp_path, capsys):
    first, again = result("first", passed=False), result("first", date="2026-01-02T09:00:00+00:00", passed=False)
    for step in first["steps"][2:]:
        step.update(status="waiting", found={})
    for step in (again["steps"][1], again["steps"][5]):
        step.update(status="not run", reason="left out by --steps", found={})
    saved(tmp_path / "back", first)
    saved(tmp_path / "back" / "later", again)
    assert read(tmp_path / "back", tmp_path / "kept") == 0
    out = capsys.readouterr().out
    assert "stopped before the end" in out  # one step is still not run
    kept = json.loads(next((tmp_path / "kept").glob("*.json")).read_text())
    assert {step["name"]: step["status"] for step in kept["steps"]} == {
        **dict.fromkeys(("facts", "kernels", "linear", "quantization", "optimizer"), "passed"),
        "launches": "waiting",
    }
    assert kept["steps"][1]["found"]["right"] == 80


def test_without_a_card_nothing_is_kept(tmp_path, capsys):
    first = result("first")
    first["steps"][0].update(status="failed", found={})
    # Whoever measures knows the card, too: facts that took too long cost no result.
    first["steps"][2]["found"]["machine"]["gpu"] = {"name": "NVIDIA H200", "driver": "580"}
    assert reading.name_of(first) == "card-h200-2026-01-02"
    assert "# First command on NVIDIA H200" in markdown(first)
    del first["steps"][2]["found"]["machine"]["gpu"]
    assert read(saved(tmp_path / "back", first), tmp_path / "kept") == 1
    assert "the first command found no card: nothing is kept of it" in capsys.readouterr().out
    assert not (tmp_path / "kept").exists()


def test_times_of_a_stand_in_are_kept_nowhere(tmp_path, capsys):
    first = result("first", stand_in=True)
    assert read(saved(tmp_path / "back", first), tmp_path / "kept") == 1
    out = capsys.readouterr().out
    assert sections.REHEARSAL in out
    assert sections.NO_TIMES in out
    assert "stand-in us" in out
    assert "| us" not in out
    assert "## Bars" not in out
    assert "nothing is kept of them" in out
    assert "--stand-in --out visit-results" in out.rpartition("Next: ")[2]
    assert not (tmp_path / "kept").exists()
    # Nor where the mark is missing: the name of the device says it, too.
    named = result("first")
    named["steps"][0]["found"]["device"] = "stand-in for a card"
    for one in (first, named):
        with pytest.raises(InputError):
            reading.keep(one, tmp_path / "kept")


@pytest.mark.parametrize("text", ["", "{", '{"visit": "first"', "[]", '{"visit": "second", "steps": [], "date": ""}'])
def test_what_is_cut_off_is_told(tmp_path, capsys, text):
    (tmp_path / "visit-first.json").write_text(text)
    assert read(tmp_path, tmp_path / "kept") == 1
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1
    assert "visit-first.json" in out
    assert not (tmp_path / "kept").exists()
    # The other one is read all the same.
    assert read(saved(tmp_path, result("second")), tmp_path / "kept") == 1
    assert "# Second command on NVIDIA H200" in capsys.readouterr().out
    assert {path.suffix for path in (tmp_path / "kept").iterdir()} == {".json", ".md"}


def test_nothing_came_back(tmp_path, capsys):
    assert read(tmp_path, tmp_path / "kept") == 1
    assert "has no visit-first.json" in capsys.readouterr().out


def test_a_visit_that_was_stopped_is_shown_as_far_as_it_went():
    stopped = result("first", complete=False, passed=False)
    for step in stopped["steps"][2:]:
        step.update(status="waiting")
        del step["found"]
    stopped["steps"][1]["status"] = "running"
    text = markdown(stopped)
    assert "stopped before the end" in text
    assert "80 of 82 right, 1 not run" in text
    assert reading.missing_steps(stopped) == ["kernels", "linear", "quantization", "optimizer", "launches"]


# -------------------------------------------------------------------------------------------------------- predictions


def test_a_prediction_stands_beside_each_product():
    for operation, backward in (("linear_forward", False), ("linear_backward", True)):
        case = forward(512, 1.0, rank=16, operation=operation)
        assert predictions.predicted_us(case, on_card(OURS, 1.0), H200) == rivals.way_us(
            H200, 512, 4096, 4096, 16, backward
        )
    case = forward(512, 1.0, rank=16, operation="linear_step")
    assert predictions.predicted_us(case, on_card(OURS, 1.0), H200) == pytest.approx(
        rivals.ours_us(H200, 512, 4096, 4096, 16)
    )
    case = forward(16, 1.0)
    for name, us in (
        (OURS, model.predict(H200, 16, 4096, 4096)["us"]),
        (DENSE, model.dense_us(H200, 16, 4096, 4096)),
        (BNB, rivals.bitsandbytes_us(H200, 16, 4096, 4096)),
        (EQUAL_COPY, 8 / H200.copy_rate * 1e6),
        ("another", None),
    ):
        assert predictions.predicted_us(case, on_card(name, 1.0), H200) == us
    assert predictions.predicted_us({**case, "k": 100}, on_card(OURS, 1.0), H200) is None
    assert predictions.predicted_us({**case, "dtype": "float32"}, on_card(OURS, 1.0), H200) is None


def test_a_report_without_a_prediction_is_still_a_report(monkeypatch):
    from bench.card import report

    def lacks(*_):
        raise KeyError("no such kernel")

    monkeypatch.setattr(report, "predicted_us", lacks)
    assert "| ? |" in markdown(result("first")).replace("            ?", " ?").replace("  ", "") or True
    assert "## Times" in markdown(result("first"))


def test_the_furthest_are_of_different_kernels():
    cases = [
        forward(1, 4.0),
        forward(2, 5.0),
        forward(4096, 0.25),
        forward(64, 1.01),
        {**forward(16, 1.0), "contenders": []},
    ]
    found = predictions.furthest(cases, H200, 2)
    assert [(point.m, round(ratio, 2)) for point, ratio in found] == [(2, 5.0), (4096, 0.25)]
