"""Each case in a process of its own: what one does to malloc, to caches of kernels or to the device is over with it.

And a contender that takes the process with it ends its own case only: the others are measured without it. Processes are
forked from one that has imported everything and done nothing, so a new one costs milliseconds. On a card, where the
allocator is torch's and starting the device takes seconds, a process goes on with the next case until one fails.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from .common import OURS, Settings, reason
from .points import Point

#: Imported before the first fork.
PRELOADED = ("qlora_kernels.bench.peers", "qlora_kernels.bench.operations")
#: A contender that has not been set up and verified by then is given up.
PREPARE_SECONDS = 300.0


class Lost(Exception):
    """The process ended, or did not answer in time; the message says which and why."""


class Remote:
    """A measurement in another process, with the interface of :class:`qlora_kernels.bench.measure.Measurement`.

    Raises:
        Lost: from any method, when the process is lost.
        RuntimeError: what the measurement raised there, in words.
    """

    def __init__(self, worker: Worker, settings: Settings, point: Point, without: dict[str, str]) -> None:
        self._worker = worker
        self.rounds: int = worker.ask("begin", settings, point, without)

    def round(self) -> float:
        return self._worker.ask("round")

    def result(self) -> dict[str, Any]:
        return self._worker.ask("result")


class Worker:
    """A process that measures.

    Args:
        prepare_seconds: how long a contender may take to be set up, or a round; then the process is killed.
        begin: what makes a measurement there; for tests.
    """

    def __init__(self, prepare_seconds: float = PREPARE_SECONDS, begin: Callable[..., Any] | None = None) -> None:
        self.prepare_seconds, self._begin = prepare_seconds, begin
        self._process: Any = None
        self._pipe: Connection | None = None
        self._output: Any = None
        #: Who was being prepared when the process last answered.
        self.busy_with = ""

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the process; the next measurement begins a new one."""
        if self._process is None:
            return
        self._pipe.close()
        self._process.join(1.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process, self._pipe = None, None
        self._output.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        self._output = tempfile.NamedTemporaryFile("w+", prefix="qlora-bench-", suffix=".log", errors="replace")  # noqa: SIM115
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._output.name, self._begin), daemon=False)
        self._process.start()
        theirs.close()

    def ask(self, what: str, *arguments: Any) -> Any:
        """Sends a request and waits for its answer; see :class:`Remote` for what it raises."""
        if self._process is None:
            self._start()
        with contextlib.suppress(BrokenPipeError):
            self._pipe.send((what, arguments))
        deadline = time.monotonic() + self.prepare_seconds
        while True:
            if not self._pipe.poll(max(deadline - time.monotonic(), 0.0)):
                self.stop()
                raise Lost(f"gave no answer within {self.prepare_seconds:.0f} s")
            try:
                kind, value = self._pipe.recv()
            except (EOFError, OSError):
                raise Lost(self._ending()) from None
            if kind == "announce":
                self.busy_with = value
                deadline = time.monotonic() + self.prepare_seconds
            elif kind == "error":
                raise RuntimeError(value)
            else:
                return value

    def _ending(self) -> str:
        """How the process ended, with the last line that it wrote."""
        process, output = self._process, self._output
        process.join(5.0)
        code = process.exitcode
        how = "its process hangs" if code is None else f"ended its process with exit code {code}"
        if code is not None and code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            how = f"ended its process: {name}" + (" (perhaps out of memory)" if -code == signal.SIGKILL else "")
        output.seek(0)
        lines = [line.strip() for line in output.read().splitlines() if line.strip()]
        self.stop()
        return how + (f": {lines[-1][:200]}" if lines else "")

    def measure(
        self, point: Point, settings: Settings, progress: Callable[[str], None] = lambda what: None
    ) -> dict[str, Any]:
        """A point from beginning to end.

        Args:
            point, settings: what and how.
            progress: called with a few words on what is going on.

        Returns:
            The case; with ``failed`` and no contenders where it could not be set up at all.
        """
        without: dict[str, str] = {}
        while True:
            try:
                remote = Remote(self, settings, point, without)
                self.busy_with = ""
                for number in range(remote.rounds):
                    remote.round()
                    progress(f"{number + 1}/{remote.rounds}")
                return remote.result()
            except Lost as problem:
                if self.busy_with and self.busy_with not in without:
                    without[self.busy_with] = str(problem)
                    self.busy_with = ""
                    continue
                return failed_case(point, str(problem), without)
            except RuntimeError as problem:
                return failed_case(point, str(problem), without)
            finally:
                if not settings.device.startswith("cuda"):
                    self.stop()


def failed_case(point: Point, why: str, without: dict[str, str] | None = None) -> dict[str, Any]:
    """A case of which there is nothing but the reason."""
    return {
        **point.as_dict(),
        "title": point.operation,
        "flops": None,
        "failed": why,
        "rounds": 0,
        "other_processes": None,
        "contenders": [{"name": name, "failed": text} for name, text in {OURS: why, **(without or {})}.items()],
    }


def _serve(pipe: Connection, output: str, begin: Callable[..., Any] | None) -> None:
    """The other process: answers until the pipe is closed. Ctrl-C is the first process's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    if begin is None:
        from .operations import begin
    measurement = None
    while True:
        try:
            what, arguments = pipe.recv()
        except EOFError:
            return
        try:
            if what == "begin":
                measurement = None
                measurement = begin(*arguments, lambda name: pipe.send(("announce", name)))
                answer = measurement.rounds
            else:
                answer = getattr(measurement, what)()
            pipe.send(("answer", answer))
        except Exception as problem:
            pipe.send(("error", reason(problem)))
