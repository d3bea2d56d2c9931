"""Restarts the process with threads that sleep while they wait, when other programs keep the cores busy."""

from __future__ import annotations

import math
import os
import sys
import time


def restart_if_cores_are_busy() -> None:
    """Restarts the process, under the same id, with threads that sleep, when other programs are using the cores.

    OpenMP's threads spin while they wait for each other. That is best on free cores and ruinous on busy ones: each of
    a small model's many short products then waits for a thread that is not running. Measured on two cores, a training
    step of the tiny model takes 94 ms spinning and 150 ms sleeping; with one other busy process, 1366 ms and 166 ms.
    The runtime reads the setting when it is loaded, which importing torch has already done. Results do not change.
    """
    settings = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    if not sys.platform.startswith("linux") or any(name in os.environ for name in settings):
        return
    import torch

    if free_cores() < torch.get_num_threads() - 0.5:
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "OMP_WAIT_POLICY": "passive"})


def free_cores() -> float:
    """How many cores were idle over the last 0.3 s; infinity where the system does not say."""
    samples = []
    for pause in (0.3, 0.0):
        try:
            with open("/proc/stat") as file:
                times = [int(word) for word in file.readline().split()[1:9]]
        except (OSError, ValueError):
            return math.inf
        samples.append((times[3] + times[4], sum(times)))  # idle or waiting for a disk; all
        time.sleep(pause)
    (idle, total), (idle_after, total_after) = samples
    return (os.cpu_count() or 1) * (idle_after - idle) / max(total_after - total, 1)
