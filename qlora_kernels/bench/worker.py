"""Each case in a process of its own: what it does to malloc, to kernel caches or to the device ends with it.

And a contender that takes the process with it ends its own case only: the others are measured without it. Processes are
forked from one that has imported everything and done nothing, so a new one costs milliseconds. On a card, where the
allocator is torch's and starting the device takes seconds, a process goes on with the next case until one fails.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from types import TracebackType
from typing import Any

from .case import DeviceLost, Settings, printable, reason
from .points import Point

#: Imported before the first fork.
PRELOADED = ("qlora_kernels.bench.contenders.peers", "qlora_kernels.bench.operations")
#: A contender that has not been set up and verified by then, or not done its share of a round, is given up.
PREPARE_SECONDS = 300.0
#: With a deadline it has half of the time that is left, but this much.
LEAST_SECONDS = 10.0
#: What a process says, in its folder.
_LOG = "log"
#: Bytes of memory in which a process notes which contender is at work.
_DOING = 256


class Lost(Exception):
    """The process ended, or did not answer in time; the message says which and why.

    Attributes:
        who: the contender that was at work; empty where none was.
    """

    def __init__(self, why: str, who: str) -> None:
        super().__init__(why)
        self.who = who


class OutOfTime(Exception):
    """The worker's deadline came before the answer; the message names the contender at work, if one was."""


class Remote:
    """A measurement in another process, with the interface of :class:`qlora_kernels.bench.timing.measure.Measurement`.

    Raises:
        Lost, OutOfTime: from any method, when the process is lost.
        RuntimeError: what the measurement raised there, in words.
    """

    def __init__(self, worker: Worker, settings: Settings, point: Point, without: dict[str, str]) -> None:
        self._worker = worker
        self.rounds: int = worker.ask("begin", settings, point, without)

    def round(self) -> float:
        return self._worker.ask("round")

    def result(self) -> dict[str, Any]:
        return self._worker.ask("result")


@dataclass(frozen=True)
class _Process:
    """A process that was started.

    Attributes:
        handle, pid: multiprocessing's, and its number.
        pipe: for requests and answers.
        folder: for all that it and its children leave.
        doing: shared memory, which says what contender is at work.
    """

    handle: ForkServerProcess
    pid: int
    pipe: Connection
    folder: str
    doing: Any


class Worker:
    """A process that measures, with a folder for all that it and its children leave.

    Args:
        prepare_seconds: how long a contender may take to be set up, or in a round; then the process is killed.
        begin: what makes a measurement there; for tests.

    Attributes:
        deadline: when everything has to be over, by time.monotonic(); None for never.
    """

    def __init__(self, prepare_seconds: float = PREPARE_SECONDS, begin: Callable[..., Any] | None = None) -> None:
        self.prepare_seconds, self._begin = prepare_seconds, begin
        self.deadline: float | None = None
        self._process: _Process | None = None
        #: Imported before the fork. Where that ends the server, nothing: each process then imports for itself.
        self._preloaded: list[str] = list(PRELOADED)

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the process and what it has begun; the next measurement begins a new one."""
        running, self._process = self._process, None
        if running is None:
            return
        process = running.handle
        try:
            running.pipe.close()
            process.join(1.0)
        finally:
            # Its group has the number of the process, which nothing else is given while any of the group is alive.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(running.pid, signal.SIGKILL)
            process.kill()
            process.join()
            shutil.rmtree(running.folder, ignore_errors=True)

    def _start(self) -> _Process:
        """Begins a process.

        Raises:
            Lost, OutOfTime: where that cannot be done, or not in time.
        """
        context = multiprocessing.get_context("forkserver")
        try:
            folder = tempfile.mkdtemp(prefix="qlora-bench-")
        except OSError as problem:
            raise Lost(f"no folder for temporary files ({reason(problem)})", "") from None
        pipe, theirs = context.Pipe()
        doing = context.RawArray("c", _DOING)
        process = context.Process(target=_serve, args=(theirs, folder, doing, self._begin), daemon=True)
        try:
            try:
                self._launch(context, process)
            except (EOFError, ConnectionError):
                # The server died, perhaps of an import. The contender that needs it will fail by name.
                end_server()
                self._preloaded = []
                self._launch(context, process)
        except BaseException as problem:
            pipe.close()
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(problem, (EOFError, OSError)):
                raise Lost(f"no process could be started ({reason(problem)})", "") from None
            raise
        finally:
            theirs.close()
        assert process.pid is not None  # it has been started
        self._process = _Process(process, process.pid, pipe, folder, doing)
        return self._process

    def _launch(self, context: ForkServerContext, process: ForkServerProcess) -> None:
        """Starts a process, which waits for the server to have imported everything; an end of that ends the server."""
        context.set_forkserver_preload(self._preloaded)
        # Ctrl-C is sent to the server, too. It inherits what is blocked here; the tracker is there before, because to
        # start it unblocks.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        problems: list[BaseException] = []

        def start() -> None:
            try:
                process.start()
            except BaseException as problem:
                problems.append(problem)

        starter = threading.Thread(target=start, daemon=True)
        starter.start()
        try:
            end = self._end_of(time.monotonic())
            starter.join(max(end - time.monotonic(), 0.0))
            in_time = not starter.is_alive()
        except BaseException:
            end_server()
            raise
        if not in_time:
            end_server()
            starter.join()
            if end == self.deadline:
                raise OutOfTime
            raise Lost(f"what is compared was not imported within {self.prepare_seconds:.0f} s", "")
        if problems:
            raise problems[0]

    def _end_of(self, since: float) -> float:
        """Until when a contender at work since then may take."""
        if self.deadline is None:
            return since + self.prepare_seconds
        share = max((self.deadline - since) / 2, LEAST_SECONDS)
        return min(since + min(self.prepare_seconds, share), self.deadline)

    def ask(self, what: str, *arguments: Any) -> Any:
        """Sends a request and waits for its answer; see :class:`Remote` for what it raises."""
        process = self._process or self._start()
        asked = time.monotonic()
        with contextlib.suppress(BrokenPipeError):
            process.pipe.send((what, arguments))
        # A child of the process may hold the pipe open beyond its end, and the server that tells of that may die.
        watched: list[Connection | int] = [process.pipe, process.handle.sentinel]
        while True:
            who, since, _ = self._at_work(process, asked)
            end = self._end_of(since)
            left = end - time.monotonic()
            ready = wait(watched, max(left, 0.0))
            if process.pipe in ready or (ready and not _is_alive(process.pid)):
                break
            if ready:
                watched.pop()
                continue
            if left <= 0:
                self.stop()
                if end == self.deadline:
                    raise OutOfTime(who)
                raise Lost(f"gave no answer within {end - since:.0f} s", who)
        try:
            if not process.pipe.poll():
                raise EOFError
            kind, value = process.pipe.recv()
        except (EOFError, OSError):
            who, _, said = self._at_work(process, asked)
            raise Lost(self._ending(process, said), who) from None
        except Exception as problem:
            raise RuntimeError(f"its answer cannot be read: {reason(problem)}") from None
        if kind == "error":
            raise RuntimeError(value)
        return value

    def _at_work(self, process: _Process, asked: float) -> tuple[str, float, int]:
        """The contender at work on the request of that time, since when, and where in the log it began."""
        try:
            since, said, who = process.doing.value.decode().split(" ", 2)
            return (who, float(since), int(said)) if float(since) >= asked else ("", asked, 0)
        except ValueError:
            return "", asked, 0

    def _ending(self, process: _Process, said: int) -> str:
        """How the process ended, with the last line that it wrote from there on."""
        process.handle.join(5.0)
        code = process.handle.exitcode
        how = "its process hangs" if code is None else f"ended its process with exit code {code}"
        if code is not None and code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            how = f"ended its process: {name}" + (" (perhaps out of memory)" if -code == signal.SIGKILL else "")
        last = b""
        with contextlib.suppress(OSError), open(os.path.join(process.folder, _LOG), "rb") as log:
            log.seek(max(os.fstat(log.fileno()).st_size - 4096, said))
            last = log.read()
        lines = [printable(line) for line in last.decode(errors="replace").splitlines()]
        lines = [line for line in lines if line and not line.startswith("USDT:")]  # torch's profiler says that
        self.stop()
        return how + (f": {lines[-1][:200]}" if lines else "")

    def measure(
        self,
        point: Point,
        settings: Settings,
        progress: Callable[[str], None] = lambda what: None,
        without: dict[str, str] | None = None,
    ) -> dict[str, Any]:
        """A point from beginning to end.

        Args:
            point, settings: what and how.
            progress: called with a few words on what is going on.
            without: contenders to leave out, with the reasons; those with whom a process is lost are added.

        Returns:
            The case; with ``failed`` where it could not be measured at all.

        Raises:
            OutOfTime: at the deadline; contenders lost before then are in ``without``.
        """
        without = {} if without is None else without
        while True:
            try:
                remote = Remote(self, settings, point, without)
                for number in range(remote.rounds):
                    remote.round()
                    progress(f"{number + 1}/{remote.rounds}")
                return remote.result()
            except Lost as problem:
                if not problem.who:
                    return failed_case(point, str(problem), without)
                without[problem.who] = str(problem)
            except RuntimeError as problem:
                self.stop()  # its state is unknown now
                return failed_case(point, str(problem), without)
            finally:
                if not settings.device.startswith("cuda"):
                    self.stop()


def failed_case(point: Point, why: str, without: dict[str, str] | None = None) -> dict[str, Any]:
    """A case of which there is nothing but the reason, and those of contenders that were left out before."""
    return {
        **point.as_dict(),
        "title": point.operation,
        "flops": None,
        "failed": why,
        "rounds": 0,
        "other_processes": None,
        "contenders": [{"name": name, "failed": text} for name, text in (without or {}).items()],
    }


def _is_alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


def end_server() -> None:
    """Ends the process that others are forked from, wherever it is; the next one that is needed begins another.

    multiprocessing starts another only once this one is a zombie. A process closes its files some time before that, and
    clients then see that it is gone, so this waits for the zombie, and leaves it for multiprocessing to reap.
    """
    number = getattr(getattr(forkserver, "_forkserver", None), "_forkserver_pid", None)
    if number is not None:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(number, signal.SIGKILL)
            os.waitid(os.P_PID, number, os.WEXITED | os.WNOWAIT)


def _serve(pipe: Connection, folder: str, doing: Any, begin: Callable[..., Any] | None) -> None:
    """The other process: answers until the pipe is closed."""
    if not os.path.isdir(folder):  # the first process has given up meanwhile
        return
    os.setsid()  # what it begins can be ended with it, and Ctrl-C is the first process's business
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tempfile.tempdir = os.environ["TMPDIR"] = folder
    log = os.open(os.path.join(folder, _LOG), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)

    def announce(name: str) -> None:
        # In shared memory, which outlives this process and wakes no other one.
        doing.value = f"{time.monotonic()!r} {os.fstat(log).st_size} {name}".encode()[: _DOING - 1]

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
                measurement = begin(*arguments, announce)
                answer = measurement.rounds
            else:
                answer = getattr(measurement, what)()
            pipe.send(("answer", answer))
        except DeviceLost as problem:
            print(problem, file=sys.stderr, flush=True)
            os._exit(1)  # an orderly end would wait for the device
        except Exception as problem:
            pipe.send(("error", reason(problem)))
