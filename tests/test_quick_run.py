"""What `pytest` leaves to `pytest -m ""` (tests/support/quick_run/choice.py), and that collecting builds nothing."""

from __future__ import annotations

import collections
import os
import subprocess
import sys
from pathlib import Path

import pytest
from engines import ORDERS
from quick_run.choice import DIVISOR, Case, case_of, left_out
from quick_run.collecting import builds_nothing

HERE = Path(__file__).resolve().parent
ISAS = ("best", "better", "portable")
ENGINES = [*(dict(isa=isa) for isa in ISAS), *(dict(order=order) for order in ORDERS)]


def cases(count: int, share: int = 1, function: str = "tests/a.py::test_a") -> list[Case]:
    return [Case(function, str(i), **engine, share=share) for engine in ENGINES for i in range(count)]


def run(listed: list[Case], day: int) -> list[Case]:
    return [case for case, out in zip(listed, left_out(listed, day, ISAS)) if not out]


def test_each_case_runs_in_one_order_on_the_best_and_the_portable_set():
    for day in range(5):
        counts = collections.Counter((case.values, case.isa) for case in run(cases(7), day))
        assert counts == {(str(i), isa): 1 for i in range(7) for isa in ("best", "portable", None)}


@pytest.mark.parametrize("share", range(1, 11))
@pytest.mark.parametrize("count", [1, 2, 9, 40])
def test_a_month_sees_every_order_of_every_case(count, share):
    listed = cases(count, share)
    month = collections.Counter(case for day in range(739_000, 739_030) for case in run(listed, day))
    assert set(month) == {case for case in listed if case.isa != "better"}


@pytest.mark.parametrize("share", [2, 3, 7])
def test_a_share_takes_its_part_and_one_at_least(share):
    for day in range(share):
        for count in (1, 2, 21):
            chosen = {case.values for case in run(cases(count, share), day)}
            assert max(1, count // share) <= len(chosen) <= -(-count // min(share, count))


def test_orders_differ_from_case_to_case():
    orders = [{case.values: case.order for case in run(cases(9), day) if case.order} for day in (0, 1)]
    assert set(orders[0].values()) == set(ORDERS)
    assert all(orders[0][values] != orders[1][values] for values in orders[0])


def test_an_order_without_its_sisters_stays():
    listed = [Case("f", "x", order="random"), Case("f", "y", order="forward"), Case("f", "y", order="reverse")]
    for day in range(6):
        assert len(run(listed, day)) == 2
        assert listed[0] in run(listed, day)


def test_another_test_file_does_not_change_the_choice():
    alone = run(cases(6, 3), 4)
    assert alone == run(cases(6, 3, "tests/b.py::test_b") + cases(6, 3), 4)[-len(alone) :]


@pytest.mark.share(5)
@pytest.mark.parametrize("order", ["forward"])
@pytest.mark.parametrize("landing", ["random"])
@pytest.mark.parametrize("size", [3])
def test_a_case_is_read_from_its_item(request, isa, size, landing, order):
    read = case_of(request.node)
    assert read.function.endswith("test_quick_run.py::test_a_case_is_read_from_its_item")
    assert (read.order, read.isa, read.share) == ("forward", isa, 5)
    assert read.values.replace("-", "") == "3random"


@pytest.mark.share(3)
def test_a_run_may_take_a_part_of_each_test(request, monkeypatch):
    assert case_of(request.node).share == 3
    monkeypatch.setenv(DIVISOR, "2")
    assert case_of(request.node).share == 6


@pytest.mark.parametrize("kernels", [*(f"emulated-{order}" for order in ORDERS), "cuda"])
def test_an_engine_of_the_emulator_is_an_order(kernels, request):
    read = case_of(request.node)
    assert read.order == (None if kernels == "cuda" else kernels.removeprefix("emulated-"))
    assert read.values == ("cuda" if kernels == "cuda" else "")


@pytest.mark.parametrize("command", [["cmake", "--version"], [sys.executable, "-m", "pip", "--version"]])
def test_a_build_while_collecting_is_an_error(command):
    with builds_nothing(), pytest.raises(RuntimeError, match="collecting tests runs"):
        subprocess.run(command)
    with builds_nothing():
        subprocess.run([sys.executable, "-c", ""], check=True)


def test_a_module_that_builds_while_it_is_imported_is_not_collected(tmp_path):
    (tmp_path / "conftest.py").write_text((HERE / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text("import emulated\nemulated.module()\n\ndef test_a():\n    pass\n")
    command = [sys.executable, "-m", "pytest", "-n0", "--collect-only", "-c", HERE.parent / "pyproject.toml", tmp_path]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "QLORA_KERNELS_EMU"))
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "collecting tests runs cmake" in done.stdout, done.stdout + done.stderr
    assert done.returncode != 0


@pytest.mark.slow
def test_no_test_file_is_left_out():
    """pytest leaves out folders by name, "build" among them, unless it is told otherwise."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n", "0", "-m", ""]
    printed = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True).stdout
    collected = {line.partition("::")[0] for line in printed.splitlines() if "::" in line}
    files = {path.relative_to(HERE.parent).as_posix() for path in HERE.rglob("test_*.py")}
    assert len(files) > 100
    only_on_a_card = {
        "tests/cuda/test_cuda_large.py",
        "tests/cuda/test_cuda_launches.py",
        "tests/finetune/test_run_gpu.py",
    }
    assert files - collected <= only_on_a_card


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_what_has_passed_is_left_out_the_next_time(tmp_path, workers):
    """And what failed, or was skipped, is not."""
    (tmp_path / "conftest.py").write_text(
        "from quick_run import passed\n"
        "def pytest_addoption(parser): passed.add_option(parser)\n"
        "def pytest_configure(config): passed.register(config)\n"
    )
    (tmp_path / "test_it.py").write_text(
        "import os, pytest\n"
        "ready = 'READY' in os.environ\n"
        "@pytest.mark.parametrize('case', ['plain', 'a b\\n'])\n"
        "def test_passes(case): pass\n"
        "def test_fails(): assert ready\n"
        "@pytest.fixture\n"
        "def broken():\n    yield\n    assert ready\n"
        "def test_ends_badly(broken): pass\n"
        "@pytest.mark.skipif(not ready, reason='not ready')\n"
        "def test_skipped(): pass\n"
        "def test_skips(): ready or pytest.skip('not ready')\n"
        "@pytest.mark.xfail\n"
        "def test_fails_as_expected(): assert False\n"
        "@pytest.mark.skip\n"
        "def test_never_runs(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-c", str(HERE.parent / "pyproject.toml"), f"--rootdir={tmp_path}"]
    command += [f"--passed={tmp_path / 'passed'}", "-p", "no:cacheprovider", str(tmp_path)]

    def outcome(*options: str, **environment: str) -> tuple[int, str]:
        done = subprocess.run([*command, *options], env=os.environ | environment, capture_output=True, text=True)
        return done.returncode, done.stdout

    def listed() -> list[str]:
        return [line for line in outcome("-n0", "--collect-only")[1].splitlines() if "::" in line]

    assert len(listed()) == 8
    assert outcome(f"-n{workers}")[0] == 1
    left = ["test_fails", "test_ends_badly", "test_skipped", "test_skips", "test_never_runs"]
    assert [name.partition("::")[2] for name in listed()] == left
    code, said = outcome(f"-n{workers}", READY="1")
    assert code == 0, said
    assert "4 passed" in said
    assert [name.partition("::")[2] for name in listed()] == ["test_never_runs"]
