"""``qlora-kernels bench`` as people type it: what it measures, writes and says, and how long it takes."""

from __future__ import annotations

import itertools
import os
import resource
import signal
import time
from dataclasses import replace

import pytest
import torch
from bench_runs.cases import POINT, TINY, limits_case, measured, parsed, small_point

from qlora_kernels.bench import command, options, worker
from qlora_kernels.bench.case import OURS
from qlora_kernels.bench.contenders.names import BNB
from qlora_kernels.bench.report import plots, results
from qlora_kernels.bench.timing.measure import failed_ours
from qlora_kernels.bench.worker import OutOfTime
from qlora_kernels.cli.main import main
from qlora_kernels.storage.lock import claim_of, claimed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--operations", "dance"], "--operations should be some of limits"),
        (["--rows", "0"], "--rows should be at least 1"),
        (["--rows", "one"], "whole numbers"),
        (["--ranks", "-1"], "--ranks should be at least 0"),
        (["--shapes", "64"], "--shapes should be weights such as 4096x4096"),
        (["--shapes", "0x64"], "--shapes"),
        (["--dtypes", "int8"], "--dtypes should be some of bfloat16"),
        (["--models", "gpt"], "--models should be some of llama-2-7b"),
        (["--operations", "quantize", "--rows", "4"], "--rows says nothing about quantize"),
        (["--operations", "decode", "--ranks", "0"], "decode needs an adapter"),
        (["--threads", "0"], "--threads should be at least 1"),
        (["--seconds", "0"], "--seconds should be positive"),
        (["--seconds", "nan"], "--seconds should be positive"),
        (["--minutes", "-1"], "--minutes should be positive"),
        (["--into", ".", "--out", "x"], "--into and --out each say where"),
        (["--device", "cpu", "--isa", "sse"], "--isa sse: this machine and build have"),
        (["--retries", "-1"], "--retries should not be negative"),
        (["--out", "/nowhere/at/all.jsonl"], "there is no folder /nowhere/at"),
        (["--out", "."], "is a folder"),
        (["--out", "/dev/null"], "is a device or the like"),
        (["--out", 300 * "x"], "cannot be written: File name too long"),
        (["--seconds", "1e308"], "at most a day"),
        (["--device", "cpu", "--operations", "adamw_paged_step"], "adamw_paged_step can only be measured on a card"),
        (["--device", "cpu", "--card"], "adamw_paged_step, adamw_budget_step can only be measured on a card"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a card")
def test_a_card_that_is_not_there(capsys):
    assert main(["bench", "--device", "cuda"]) == 2
    assert "sees no card" in capsys.readouterr().err


@pytest.mark.parametrize(("sweep", "seconds"), [("--bars", 100.0), ("--quick", worker.PREPARE_SECONDS)])
def test_patience_with_slow_rivals(monkeypatch, tmp_path, sweep, seconds):
    found = []

    def run(points, settings, minutes, retries, show, patience):
        found.append(patience)
        yield limits_case()

    monkeypatch.setattr(command, "run", run)
    assert main(["bench", sweep, "--device", "cpu", "--quiet", "--no-plots", "--out", str(tmp_path / "r.jsonl")]) == 0
    assert found == [seconds]


@pytest.fixture
def no_processes(monkeypatch):
    """Cases are measured in this process, and the limits at once."""

    class Here:
        deadline = None

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def measure(self, point, settings, progress, without):
            return limits_case() if point.operation == "limits" else measured(point, replace(TINY, seconds=0.0))

    monkeypatch.setattr(command, "Worker", Here)
    return Here


DEQUANTIZE, DEQUANTIZE_HALF = small_point("dequantize"), small_point("dequantize", dtype="float16")
TINY_ARGUMENTS = [
    "--operations",
    "dequantize,linear_step",
    "--shapes",
    "64x64",
    "--rows",
    "2",
    "--ranks",
    "2",
    "--quiet",
]


@pytest.mark.usefixtures("no_processes")
def test_command_writes_a_result(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *TINY_ARGUMENTS, "--out", "x.jsonl"]) == 0
    run = results.load("x.jsonl")
    assert run["complete"]
    assert [case["operation"] for case in run["cases"]] == ["limits", "dequantize", "linear_step"]
    shown = capsys.readouterr().out
    assert "the worst first" in shown
    assert shown.endswith("Written: x.jsonl\n")
    assert main(["bench", "--show", "x.jsonl"]) == 0
    assert capsys.readouterr().out.strip() in shown
    assert main(["bench", *TINY_ARGUMENTS]) == 0
    assert [path.name for path in tmp_path.glob("bench-cpu-*.jsonl")]


@pytest.mark.parametrize(
    ("end", "code"),
    [(None, 130), (signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
)
def test_who_ends_it_leaves_what_was_measured(end, code, tmp_path, capsys, monkeypatch, no_processes):
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]

    def interrupted(self, point, settings, progress, without):
        if point.operation == "linear_step":
            if end is None:
                raise KeyboardInterrupt
            try:
                os.kill(os.getpid(), end)
                time.sleep(5.0)
            finally:
                os.kill(os.getpid(), end)  # who asks again does not interrupt what the first one has begun
                time.sleep(0.01)
        return measured(point)

    monkeypatch.setattr(no_processes, "measure", interrupted)
    arguments = [*TINY_ARGUMENTS, "--out", str(tmp_path / "x.jsonl")]
    monkeypatch.setattr(
        options,
        "points_of",
        lambda namespace, dtype=None: [DEQUANTIZE, small_point("linear_step", rank=4), DEQUANTIZE_HALF],
    )
    assert main(["bench", *arguments]) == code
    run = results.load(tmp_path / "x.jsonl")
    assert not run["complete"]
    assert [case["operation"] for case in run["cases"]] == ["dequantize"]
    assert "interrupted" in capsys.readouterr().err
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == handlers


def test_ctrl_c_before_the_first_case_leaves_an_old_result(tmp_path, capsys, monkeypatch, no_processes):
    def interrupted(self, *arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(no_processes, "measure", interrupted)
    out = tmp_path / "x.jsonl"
    out.write_text("old")
    assert main(["bench", *TINY_ARGUMENTS, "--out", str(out)]) == 130
    assert capsys.readouterr().err == "qlora-kernels bench: interrupted before the first case; nothing is written\n"
    assert out.read_text() == "old"


def test_failure_of_this_package_is_the_commands(tmp_path, capsys, monkeypatch, no_processes):
    def failing(self, point, *more):
        case = {**measured(DEQUANTIZE), **point.as_dict()}
        return {**case, "contenders": [{"name": OURS, "failed": "out of luck"}, *case["contenders"][1:]]}

    monkeypatch.setattr(no_processes, "measure", failing)
    assert main(["bench", *TINY_ARGUMENTS, "--out", str(tmp_path / "x.jsonl")]) == 1
    assert "this package failed in dequantize to bfloat16: out of luck" in capsys.readouterr().err


def test_a_case_that_nobody_could_measure_is_not_this_packages_failure(tmp_path, capsys, monkeypatch, no_processes):
    """But one of the command."""
    monkeypatch.setattr(no_processes, "measure", lambda self, point, *more: worker.failed_case(point, "out of luck"))
    assert main(["bench", *TINY_ARGUMENTS, "--out", str(tmp_path / "x.jsonl")]) == 1
    errors = capsys.readouterr().err
    assert "no measurement of dequantize: out of luck" in errors
    assert "this package failed" not in errors


def test_what_does_not_fit_the_time_is_left_out_and_no_failure(tmp_path, capsys, monkeypatch, no_processes):
    def slow(self, point, settings, progress, without):
        assert self.deadline is not None
        if point.operation == "limits":
            return limits_case()
        raise OutOfTime(BNB)

    monkeypatch.setattr(no_processes, "measure", slow)
    assert main(["bench", *TINY_ARGUMENTS, "--minutes", "1", "--out", str(tmp_path / "x.jsonl")]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("left out: the 1 minutes were over while bitsandbytes was at work") == 2
    assert not shown.err
    assert results.load(tmp_path / "x.jsonl")["complete"]


def test_out_of_time_does_not_hide_a_failure_of_this_package(tmp_path, capsys, monkeypatch, no_processes):
    def slow(self, point, settings, progress, without):
        if point.operation == "limits":
            return limits_case()
        without[OURS] = "ended its process: SIGABRT"
        raise OutOfTime

    monkeypatch.setattr(no_processes, "measure", slow)
    assert main(["bench", *TINY_ARGUMENTS, "--minutes", "1", "--out", str(tmp_path / "x.jsonl")]) == 1
    assert "this package failed in dequantize: ended its process: SIGABRT" in capsys.readouterr().err


@pytest.mark.usefixtures("no_processes")
def test_a_run_without_time_leaves_an_old_result(tmp_path, capsys):
    out = tmp_path / "x.jsonl"
    out.write_text("old")
    assert main(["bench", *TINY_ARGUMENTS, "--minutes", "0.01", "--out", str(out)]) == 1
    assert capsys.readouterr().err == "qlora-kernels bench: no case fits that time; nothing is written\n"
    assert out.read_text() == "old"


def test_what_is_ignored_stays_ignored(tmp_path, monkeypatch, no_processes):
    """As under nohup."""

    def measure(self, point, *more):
        os.kill(os.getpid(), signal.SIGHUP)
        return limits_case()

    monkeypatch.setattr(no_processes, "measure", measure)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert main(["bench", *TINY_ARGUMENTS, "--out", str(tmp_path / "x.jsonl")]) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.usefixtures("no_processes")
def test_an_end_while_plots_are_drawn(end, tmp_path, capsys, monkeypatch):
    """The result is written, and no part of a plot."""

    def draw(results, name, path, title):
        os.kill(os.getpid(), end)
        time.sleep(5.0)

    monkeypatch.setattr(plots, "draw", draw)
    assert main(["bench", *TINY_ARGUMENTS, "--out", str(tmp_path / "x.jsonl")]) == 128 + end
    assert results.load(tmp_path / "x.jsonl")["complete"]
    assert capsys.readouterr().err == "qlora-kernels bench: interrupted\n"
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


@pytest.mark.usefixtures("no_processes")
def test_a_link_stays_one(tmp_path):
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "there.jsonl")
    assert main(["bench", *TINY_ARGUMENTS, "--no-plots", "--out", str(tmp_path / "link.jsonl")]) == 0
    assert (tmp_path / "link.jsonl").is_symlink()
    assert results.load(tmp_path / "there.jsonl")["complete"]


@pytest.mark.usefixtures("no_processes")
def test_time_is_kept(monkeypatch):
    """What no longer fits is named, not forgotten."""
    clock = itertools.chain([0.0], itertools.repeat(59.0))
    monkeypatch.setattr(command.time, "monotonic", lambda: next(clock))
    cases = list(command.run([DEQUANTIZE, DEQUANTIZE_HALF], TINY, minutes=1.0))
    assert all(case["left_out"] for case in cases)
    assert cases[0]["failed"] == "left out: the 1 minutes were over"


def test_shares_of_the_time(monkeypatch, no_processes):
    """Shares become shorter, and the end stays where it is."""
    given, now = [], [0.0]

    def measure(self, point, settings, progress, without):
        given.append((settings.seconds, self.deadline))
        now[0] += 30.0
        return {**measured(DEQUANTIZE), "other_processes": 0.9}

    monkeypatch.setattr(no_processes, "measure", measure)
    monkeypatch.setattr(command.time, "monotonic", lambda: now[0])
    cases = list(
        command.run(
            [DEQUANTIZE, DEQUANTIZE_HALF, small_point("dequantize_out")],
            replace(TINY, seconds=100.0),
            minutes=1.2,
            retries=9,
        )
    )
    # 72 seconds for three cases, half of a share for its preparation. The first is measured three times, and no more.
    assert given == [(12.0, 72.0)] * 3
    assert ["left_out" in case for case in cases] == [False, True, True]


def test_quietest_attempt_counts_whatever_it_says(monkeypatch, no_processes):
    shares = iter([0.4, 0.2, 0.3, 0.0])
    monkeypatch.setattr(
        no_processes, "measure", lambda self, point, *more: {**limits_case(), "other_processes": next(shares)}
    )
    assert next(command.run([POINT], TINY, retries=2))["other_processes"] == 0.2


def test_an_attempt_that_fails_is_not_the_quietest(monkeypatch, no_processes):
    """And who ended a process in one attempt is left out of the next."""
    left_out = []

    def measure(self, point, settings, progress, without):
        left_out.append(dict(without))
        without[BNB] = "ended its process"
        return worker.failed_case(point, "why") if len(left_out) == 2 else {**limits_case(), "other_processes": 0.4}

    monkeypatch.setattr(no_processes, "measure", measure)
    assert next(command.run([POINT], TINY, retries=9))["other_processes"] == 0.4
    assert left_out == [{}, {BNB: "ended its process"}]


def test_an_attempt_in_which_this_package_fails_is_not_the_quietest(monkeypatch, no_processes):
    cases = iter(
        [
            {**measured(DEQUANTIZE), "other_processes": 0.4},
            {**measured(DEQUANTIZE), "other_processes": 0.1, "contenders": [{"name": OURS, "failed": "why"}]},
            {**measured(DEQUANTIZE), "other_processes": None},
        ]
    )
    monkeypatch.setattr(no_processes, "measure", lambda self, *more: next(cases))
    assert next(command.run([POINT], TINY, retries=9))["other_processes"] == 0.4


def test_a_case_in_which_everybody_fails_is_a_failure(tmp_path, capsys, monkeypatch, no_processes):
    case = {**limits_case(), "contenders": [{"name": "plain copy", "failed": "out of memory"}]}
    monkeypatch.setattr(no_processes, "measure", lambda self, *more: case)
    assert main(["bench", *TINY_ARGUMENTS, "--out", str(tmp_path / "x.jsonl")]) == 1
    assert "no measurement of limits: out of memory" in capsys.readouterr().err


@pytest.mark.slow
def test_a_whole_run_by_processes(tmp_path, capsys):
    """The command as it is: a process for each case, forked from one that knows the peers."""
    arguments = ["--operations", "dequantize,linear_forward", "--shapes", "64x128", "--rows", "2", "--ranks", "0"]
    points = options.points_of(parsed(*arguments))[1:]  # the limits take seconds
    run = results.begin(TINY, "usual")
    run["cases"] = list(command.run(points, TINY))
    assert [case["operation"] for case in run["cases"]] == ["dequantize", "linear_forward"]
    for case in run["cases"]:
        assert failed_ours(case) is None
        assert case["rounds"] >= TINY.min_rounds


def test_a_second_run_is_told_who_writes_the_file(tmp_path, monkeypatch, capsys):
    out = tmp_path / "result.jsonl"
    monkeypatch.setattr(command, "run", lambda *_: pytest.fail("it measures"))
    with claimed(claim_of(str(out)), str(out)):
        assert main(["bench", "--quick", "--quiet", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert f"{out} is being written by process {os.getpid()} on " in error
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_a_full_disk_keeps_the_last_whole_result(tmp_path, monkeypatch, capsys):
    out, limits = tmp_path / "result.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)

    def run(*_):
        yield limits_case()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        yield limits_case()

    monkeypatch.setattr(command, "run", run)
    try:
        assert main(["bench", "--quick", "--quiet", "--out", str(out)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capsys.readouterr().err == f"qlora-kernels bench: {out}: File too large\n"
    assert len(results.load(out)["cases"]) == 1
    assert os.listdir(tmp_path) == ["result.jsonl"]
