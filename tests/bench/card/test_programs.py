"""Programs that crash, hang, ignore signals or cannot be killed: each ends alone, and the others go on."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bench.card import facts, programs
from bench.card.programs import Ended, Program


def program(folder: Path, name: str, code: str, seconds: float = 20.0, **more) -> Program:
    return Program(name, [sys.executable, "-c", code], folder / f"{name}.log", seconds, **more)


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(programs, "GRACE", 0.3)
    monkeypatch.setattr(programs, "GONE", 0.3)


def test_a_process_stuck_in_the_driver_is_left_behind(tmp_path, monkeypatch):
    """No signal ends it; to wait for it would take as long as it takes."""
    stuck = []

    class Stuck(subprocess.Popen):
        def wait(self, timeout=None):
            if self.args[-1] != "stuck":
                return super().wait(timeout)
            assert timeout is not None, "waits for ever"
            raise subprocess.TimeoutExpired(self.args, timeout)

        def poll(self):
            return None if self.args[-1] == "stuck" else super().poll()

    monkeypatch.setattr(programs.subprocess, "Popen", Stuck)
    never = program(tmp_path, "stuck", "import time; print('at work', flush=True); time.sleep(60)", 0.5)
    never = replace(never, command=[*never.command, "stuck"])
    begin = time.monotonic()
    ended = programs.execute_all(
        [never, program(tmp_path, "next", "print('went on')")], 30.0, 1, lambda one, end: stuck.append(one.name)
    )
    assert time.monotonic() - begin < 15
    assert ended["stuck"].code is None
    assert "still there after a kill: stuck in the driver" in ended["stuck"].why
    assert ended["next"].output == "went on\n"
    assert stuck == ["stuck", "next"]


@pytest.mark.slow
def test_one_that_gets_no_further_is_ended_long_before_its_time(tmp_path):
    pulse = tmp_path / "pulse"
    code = f"import time; file = open({str(pulse)!r}, 'w')\nfor i in range(6):\n"
    code += "    print(i, file=file, flush=True); time.sleep(0.1)\ntime.sleep(60)"
    begin = time.monotonic()
    slow_start = program(
        tmp_path, "late", "import time; time.sleep(2); print('here')", pulse=tmp_path / "x", patience=0.5
    )
    ended = programs.execute_all([program(tmp_path, "hangs", code, pulse=pulse, patience=1.0), slow_start], 60.0, 2)
    assert time.monotonic() - begin < 20
    assert ended["hangs"].code is None
    assert ended["hangs"].why.startswith("got no further for 1 s")
    assert len(pulse.read_text().split()) == 6
    assert ended["late"].output == "here\n"  # what has not begun to tell is given its time


def test_after_a_fault_another_process_goes_on(tmp_path):
    """In its turn, before those that wait; and not when the time of all is up."""
    order = []

    def then(one: Program, ended: Ended) -> Program | None:
        order.append((one.name, ended.code))
        return replace(one, name="a again", command=[sys.executable, "-c", ""]) if one.name == "a" else None

    wanted = [program(tmp_path, "a", "import os; os.abort()"), program(tmp_path, "b", "")]
    ended = programs.execute_all(wanted, 30.0, 1, then)
    assert order == [("a", -6), ("a again", 0), ("b", 0)]
    assert [one.code for one in ended.values()] == [-6, 0, 0]
    assert "a again" not in programs.execute_all([program(tmp_path, "a", "import time; time.sleep(9)")], 0.3, 1, then)


def test_what_was_written_so_far_is_looked_at_meanwhile(tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "LOOK", 0.1)
    looks = []
    programs.execute_all([program(tmp_path, "a", "import time; time.sleep(0.6)")], 9.0, 1, look=lambda: looks.append(1))
    assert len(looks) > 2


def test_a_module_runs_through_the_stand_in_where_one_is(monkeypatch):
    monkeypatch.delenv(programs.THROUGH, raising=False)
    assert programs.module("a.b", "--c") == [sys.executable, "-m", "a.b", "--c"]
    monkeypatch.setenv(programs.THROUGH, "bench.card.stand_in")
    assert programs.module("a.b", "--c") == [sys.executable, "-m", "bench.card.stand_in", "a.b", "--c"]


def test_a_tool_that_does_not_answer_is_not_waited_for():
    begin = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        facts.output_of(sys.executable, "-c", "import time; time.sleep(60)", seconds=0.2)
    assert time.monotonic() - begin < 10
    assert facts.output_of(sys.executable, "-c", "print('text')") == "text\n"
    with pytest.raises(subprocess.CalledProcessError):
        facts.output_of(sys.executable, "-c", "raise SystemExit(3)")
