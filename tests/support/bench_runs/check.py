"""Steps of a card check that need no card, and what tools print of them."""

from __future__ import annotations

import sys
from pathlib import Path

from bench.card import programs, steps

CLEAN = "========= COMPUTE-SANITIZER\nhello\n========= ERROR SUMMARY: 0 errors\n"
RACE_CLEAN = "========= COMPUTE-SANITIZER\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"

JUNIT = """<?xml version="1.0"?><testsuites><testsuite name="pytest">
<testcase classname="tests.test_a" name="test_one"/>
<testcase classname="tests.test_a" name="test_two[cuda]"><failure message="assert 1 == 2&#10;.">x</failure></testcase>
<testcase classname="tests.test_a" name="test_two[cuda]"><error message="teardown">x</error></testcase>
<testcase classname="tests.test_b" name="test_three"><skipped message="needs two cards">x</skipped></testcase>
<testcase classname="" name="tests.test_c"><error message="collection failure">x</error></testcase>
<testcase classname="tests.test_d" name="test_four"/>
<testcase classname="tests.test_d" name="test_four"><error>no message</error></testcase>
</testsuite></testsuites>"""


def sleeping(folder: Path, seconds: float) -> dict:
    """A step that outlasts any limit, with a child of its own."""
    code = (
        "import subprocess, time; child = subprocess.Popen(['sleep', '600']);"
        f"open({str(folder.parent / 'child')!r}, 'w').write(str(child.pid)); print('under way'); time.sleep(600)"
    )
    ended = programs.execute([sys.executable, "-c", code], folder / "sleeping.log", seconds)
    steps.demand(ended, "the sleeper", seconds)
    return {}


def good(folder: Path, seconds: float) -> dict:
    return {"seen": seconds}
