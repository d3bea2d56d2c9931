"""Work beside a case: there while it is measured, and gone afterwards, whatever happened."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from bench_runs.cases import POINT, TINY

from qlora_kernels.bench.case import OURS, Case, Contender, OtherProcesses, Ready
from qlora_kernels.bench.timing import busy
from qlora_kernels.bench.timing.measure import Measurement

needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="the system has no /proc")


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until_gone(pid: int) -> bool:
    end = time.monotonic() + 10
    while exists(pid) and time.monotonic() < end:
        time.sleep(0.01)
    return not exists(pid)


@needs_proc
def test_one_process_spins_on_each_core_until_the_end():
    with busy.every_core() as pids:
        assert [os.sched_getaffinity(pid) for pid in pids] == [{core} for core in sorted(os.sched_getaffinity(0))]
        assert all(exists(pid) for pid in pids)
    assert not any(exists(pid) for pid in pids)


def test_they_end_with_an_exception():
    pids: list[int] = []
    with contextlib.suppress(KeyError), busy.every_core() as started:
        pids += started
        raise KeyError
    assert pids
    assert not any(exists(pid) for pid in pids)


@needs_proc
def test_they_end_with_a_process_that_is_killed():
    """As one that takes too long is."""
    code = (
        "import time\nfrom qlora_kernels.bench.timing.busy import every_core\n"
        "with every_core() as pids:\n    print(*pids, flush=True)\n    time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        assert pids
        assert all(exists(pid) for pid in pids)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
    assert all(wait_until_gone(pid) for pid in pids)


def test_a_round_is_beside_the_work_and_the_checks_are_not():
    running, seen = [], []

    @contextlib.contextmanager
    def beside():
        running.append(True)
        try:
            yield
        finally:
            running.pop()

    ready = Ready(lambda i: seen.append(bool(running)), lambda _: 0.0, 0.1, bytes=8)
    case = Case("", None, [Contender(OURS, lambda: ready)], beside=beside)
    measurement = Measurement(case, TINY, POINT)
    assert not seen[0]  # verified in peace
    assert all(seen[-Measurement.CALLS :])  # how long a call takes is found beside it
    seen.clear()
    measurement.round()
    assert len(seen) >= Measurement.CALLS_BESIDE
    assert all(seen)
    assert not running
    [figures] = measurement.result()["contenders"]
    assert figures["samples"] == Measurement.CALLS_BESIDE
    assert figures["q0_ms"] <= figures["mean_ms"] <= figures["q100_ms"]


@needs_proc
def test_its_time_is_not_that_of_other_processes():
    others = OtherProcesses()
    others.resume()
    with busy.every_core():
        time.sleep(0.5)
    others.pause()
    alone = OtherProcesses()
    alone.resume()
    time.sleep(0.5)
    alone.pause()
    assert (others.share or 0) < (alone.share or 0) + 0.5


def test_only_some_contenders():
    from qlora_kernels.bench.operations import begin

    measurement = begin(replace(TINY, only=(OURS, "torch dense")), POINT)
    assert [runner.name for runner in measurement.runners] == [OURS, "torch dense"]
    assert torch.get_num_threads() == TINY.threads
