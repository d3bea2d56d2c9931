"""Programs that a check on a card runs, each with a time limit: whatever one of them does, the others go on."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qlora_kernels.bench.timing.machine import ROOT

TAIL_LINES = 40
#: Seconds between an interrupt and a kill, and those in which a killed process has to be gone: one that waits inside
#: the driver ends when the driver lets it, or never.
GRACE, GONE = 3.0, 3.0
#: Seconds between two looks at what a program has written so far.
LOOK = 1.0
#: A module here through which the others run, in a rehearsal without a card: stand_in.py.
THROUGH = "QLORA_KERNELS_CARD_THROUGH"


def module(name: str, *arguments: str) -> list[str]:
    """The command that runs a module with this Python; in a rehearsal, through the stand-in for a card."""
    through = os.environ.get(THROUGH)
    return [sys.executable, "-m", *([through] if through else []), name, *arguments]


@dataclass(frozen=True)
class Ended:
    """How a program ended: ``code`` is None where it ran out of time. ``why`` says how it was ended then."""

    code: int | None
    seconds: float
    output: str = field(repr=False)
    why: str = ""

    @property
    def tail(self) -> str:
        return "\n".join(self.output.splitlines()[-TAIL_LINES:])


@dataclass(frozen=True)
class Program:
    """A program to run in the source folder.

    Attributes:
        name: its name among those that run with it.
        command: what to run.
        log: where its output goes.
        seconds: that it may take.
        environment: beside that of this process.
        pulse: a file that it writes to as it gets on.
        patience: for how long that file, once it is there, may stay unchanged.
    """

    name: str
    command: Sequence[str]
    log: Path
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)
    pulse: Path | None = None
    patience: float = float("inf")


class _Running:
    """A program under way, in a session of its own."""

    def __init__(self, program: Program) -> None:
        self.program, self.begin = program, time.monotonic()
        self.why = ""
        self._size, self._changed = self._pulse(), self.begin
        program.log.parent.mkdir(parents=True, exist_ok=True)
        with open(program.log, "wb") as file:
            self.process = subprocess.Popen(
                program.command,
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **program.environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _pulse(self) -> int | None:
        """The size of the file that shows how far it is."""
        try:
            return self.program.pulse.stat().st_size if self.program.pulse else None
        except OSError:
            return None

    def overdue(self, now: float, deadline: float) -> bool:
        """Whether its time is up, or it has written nothing for too long; ``why`` then says which."""
        size = self._pulse()
        if size != self._size:
            self._size, self._changed = size, now
        if now - self.begin >= min(max(self.program.seconds, 0.1), max(deadline - self.begin, 0.1)):
            self.why = f"took longer than {now - self.begin:.0f} s"
        elif size and now - self._changed >= self.program.patience:
            self.why = f"got no further for {now - self._changed:.0f} s"
        return bool(self.why)

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """Kills it and everything it started. Does not wait for long: a process stuck in the driver cannot be killed,
        and must not stop the rest."""
        self.signal(signal.SIGKILL)
        try:
            self.process.wait(GONE)
        except subprocess.TimeoutExpired:
            self.why = f"{self.why or 'was ended'}, and is still there after a kill: stuck in the driver"

    def ended(self, in_time: bool) -> Ended:
        output = self.program.log.read_text(errors="replace")
        code = self.process.returncode if in_time else None
        return Ended(code, time.monotonic() - self.begin, output, "" if in_time else self.why)


def execute_all(
    programs: Sequence[Program],
    seconds: float,
    at_once: int,
    then: Callable[[Program, Ended], Program | None] | None = None,
    look: Callable[[], object] | None = None,
) -> dict[str, Ended]:
    """Runs programs in their order, so many at a time, and ends each when its time, or that of all, is up.

    It is interrupted first, and has GRACE seconds to write down what it has (pytest does). One whose turn does not come
    has ended with no code in no time.

    Args:
        programs, seconds, at_once: what, for how long together, and how many at the same time.
        then: given a program that has ended, the one to go on with, if any: after a fault, the rest in a new process.
        look: called now and then, for what programs have written so far.

    Raises:
        OSError: when one cannot be started.
    """
    deadline = time.monotonic() + seconds
    waiting, all_ended = list(programs), {one.name: Ended(None, 0.0, "not begun") for one in programs}
    running: list[_Running] = []
    overdue: dict[str, float] = {}
    looked = time.monotonic()
    try:
        while waiting or running:
            now = time.monotonic()
            if now >= deadline:
                waiting.clear()
            while waiting and len(running) < at_once:
                running.append(_Running(waiting.pop(0)))
            for one in list(running):
                if not _over(one, overdue, now, deadline):
                    continue
                name = one.program.name
                running.remove(one)
                ended = all_ended[name] = one.ended(name not in overdue)
                overdue.pop(name, None)
                if then is not None and (following := then(one.program, ended)) is not None:
                    waiting.insert(0, following)
            if look is not None and now - looked >= LOOK:
                looked = now
                look()
            time.sleep(0.02)
    finally:
        for one in running:  # an interrupt
            one.kill()
    return all_ended


def _over(one: _Running, overdue: dict[str, float], now: float, deadline: float) -> bool:
    """Whether a program has ended, or been given up; ends it when its time is up. ``overdue`` notes until when a
    program that was interrupted may take."""
    name = one.program.name
    ended = one.process.poll() is not None
    if name in overdue and (now >= overdue[name] or ended):
        one.kill()  # and what it left behind
        return True
    if name not in overdue and not ended and one.overdue(now, deadline):
        overdue[name] = now + GRACE
        one.signal(signal.SIGINT)
    return ended


def execute(command: Sequence[str], log: Path, seconds: float, environment: Mapping[str, str] | None = None) -> Ended:
    """Runs one program, as :func:`execute_all` does."""
    return execute_all([Program("", command, log, seconds, environment or {})], seconds, 1)[""]


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
