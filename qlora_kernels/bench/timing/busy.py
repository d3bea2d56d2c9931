"""Work that keeps every core busy, for a case that is measured beside it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

# It dies with the thread that began it (prctl's PR_SET_PDEATHSIG, where there is one), however that ends.
_SPIN = """
import ctypes, os, signal, sys
try:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
except (OSError, AttributeError):
    pass
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
if len(sys.argv) > 2:
    os.sched_setaffinity(0, {int(sys.argv[2])})
os.write(1, b"x")
while True:
    pass
"""


@contextlib.contextmanager
def every_core() -> Iterator[list[int]]:
    """One spinning process on each core that this process may use, from before the block to its end.

    Yields:
        Their process ids.

    Raises:
        RuntimeError: where one did not start.
    """
    pinned = hasattr(os, "sched_getaffinity")
    cores = sorted(os.sched_getaffinity(0)) if pinned else list(range(os.cpu_count() or 1))
    command = [sys.executable, "-I", "-S", "-c", _SPIN, str(os.getpid())]
    with contextlib.ExitStack() as ends:
        spinning = []
        for core in cores:
            process = subprocess.Popen([*command, *([str(core)] if pinned else [])], stdout=subprocess.PIPE)
            ends.callback(_end, process)
            spinning.append(process)
        for process in spinning:
            assert process.stdout is not None
            if process.stdout.read(1) != b"x":
                raise RuntimeError("a process that should keep a core busy did not start")
        yield [process.pid for process in spinning]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
