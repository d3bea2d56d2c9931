"""Peak memory of a phase: resident memory of the process on a CPU, allocated memory on a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import threading
import time
from types import TracebackType

import torch

_STATUS = "/proc/self/status"


def _status(key: str) -> int | None:
    """A size in /proc/self/status, in bytes; None off Linux."""
    with contextlib.suppress(OSError), open(_STATUS) as file:
        for line in file:
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    return None


def _trim() -> None:
    """Returns unused memory that malloc holds to the system, so that it does not count for the next phase."""
    gc.collect()
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


class PeakMemory:
    """A context that measures the peak memory between its ends.

    On Linux it resets the kernel's own high-water mark (``/proc/self/clear_refs``) and reads VmHWM at the end; where
    that is not allowed, a thread samples VmRSS. The figure covers the whole process: interpreter, torch and the other
    libraries (``start``, before the phase) as well as model and activations. On CUDA it is what torch's allocator has
    handed out on the device.

    Attributes:
        start: bytes at the beginning, or None where unknown.
        peak: most bytes in between, or None.
        method: how it was measured.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._cuda = device.startswith("cuda")
        self.start: int | None = None
        self.peak: int | None = None
        self.method = "unknown"
        self._sampler: threading.Thread | None = None
        self._done = threading.Event()

    def __enter__(self) -> PeakMemory:
        _trim()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self.start, self.method = torch.cuda.memory_allocated(), "allocated on the GPU"
            return self
        self.start = _status("VmRSS")
        if self.start is None:
            return self
        self.method = "resident memory of the process (VmHWM)"
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        except OSError:
            self.method = "resident memory of the process (VmRSS, sampled every 20 ms)"
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        return self

    def _sample(self) -> None:
        while not self._done.is_set():
            self.peak = max(self.peak or 0, _status("VmRSS") or 0)
            time.sleep(0.02)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._cuda:
            self.peak = torch.cuda.max_memory_allocated()
        elif self._sampler is not None:
            self._done.set()
            self._sampler.join()
        else:
            self.peak = _status("VmHWM")
