"""Runs cases in a child process that may crash, hang, or run out of memory, and says how each ended.

In the child an audit hook sees what Python code opens, starts and connects to, so code from a file that runs is noticed
whatever it does.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .files import Files, write
from .targets import Target, Wrong

#: Seconds for one case. A machine may be busy; what should end takes milliseconds.
SECONDS = 10
#: Memory that a case may take beyond what the process has.
MEMORY = 1 << 30

_EVENTS = re.compile(
    r"os\.(system|exec|fork|forkpty|posix_spawn|spawn|startfile|remove|rename|mkdir|rmdir|link|symlink|chmod|chown|truncate"
    r"|kill|putenv)|subprocess\.Popen|pty\.spawn|socket\.(connect|getaddrinfo|bind|sendto)|builtins\.input|shutil\..*"
    r"|urllib\.Request|webbrowser\.open|tempfile\..*"
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_FRAME = re.compile(r'File "[^"]*/(qlora_kernels/[^"]+)", line \d+,? in (\S+)')


@dataclass(frozen=True)
class Outcome:
    """How a case ended.

    Attributes:
        kind: "accepted" and "refused" are good; all others are findings.
        message: the exception's, or what happened.
        where: the innermost function of the package, "storage/formats.py:load_json".
        trace: the traceback of a finding.
    """

    kind: str
    message: str = ""
    where: str = ""
    trace: str = ""

    @property
    def good(self) -> bool:
        return self.kind in ("accepted", "refused")

    @property
    def signature(self) -> str:
        """The same for findings with the same cause, as far as one can tell."""
        return f"{self.kind} {self.where}"


class Forbidden(RuntimeError):
    """Raised in place of what a parser must not do, so that fuzzing harms nothing."""


class _Watch:
    """What the audit hook has seen, and prevented, while it was on."""

    def __init__(self) -> None:
        self.case: Path | None = None
        self.output = ""
        self.seen: list[tuple[str, str]] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple) -> None:
        case = self.case
        if case is None:
            return
        if event == "open":
            path, _, flags = args
            if not isinstance(path, (str, bytes, os.PathLike)) or not isinstance(flags, int):
                return
            if flags & _WRITING and os.fsdecode(path) != os.devnull:
                self._note(f"writes {os.fsdecode(path)!r}", path)
            elif _inside(path, case.parent) and not _inside(path, case):
                self._note(f"reads {os.fsdecode(path)!r}, outside the folder")
        elif event == "os.mkdir" and os.path.isdir(args[0]):  # makedirs tries
            return
        elif event.startswith("shutil."):
            self._note(f"{event} {args!r:.300}", args[1] if "copy" in event else args[0])
        elif _EVENTS.fullmatch(event):
            self._note(f"{event} {args!r:.300}", *_paths(args))

    def _note(self, what: str, *paths: object) -> None:
        case = self.case
        assert case is not None
        if self.output and paths and all(_inside(path, case / self.output) for path in paths):
            return
        self.case = None  # what follows is this program's
        self.seen.append((what, _place("".join(traceback.format_stack(sys._getframe(1))))))
        self.case = case
        raise Forbidden(what)


def _paths(args: tuple) -> list[object]:
    """The paths in an audit event's arguments; a descriptor comes first, and that of a folder last."""
    if args and isinstance(args[0], int):
        return [os.readlink(f"/proc/self/fd/{args[0]}")]
    paths = [os.fsdecode(a) for a in args if isinstance(a, (str, bytes, os.PathLike))]
    folder = os.readlink(f"/proc/self/fd/{args[-1]}") if args and isinstance(args[-1], int) and args[-1] >= 0 else ""
    return [os.path.join(folder, path) for path in paths]


def _inside(path: object, folder: Path) -> bool:
    try:
        full = os.path.abspath(os.fsdecode(path))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return full == str(folder) or full.startswith(f"{folder}{os.sep}")


def _place(text: str) -> str:
    """The innermost function of the package in a traceback that has it last."""
    frames = _FRAME.findall(text)
    return f"{frames[-1][0].removeprefix('qlora_kernels/')}:{frames[-1][1]}" if frames else ""


def judge(target: Target, folder: Path, watch: _Watch | None = None) -> Outcome:
    """Runs the target on a folder, in this process."""
    problem: BaseException | None = None
    try:
        if watch is not None:
            watch.seen.clear()
            watch.output, watch.case = target.output, folder
        target.call(folder)
    except BaseException as error:
        problem = error
    finally:
        if watch is not None:
            watch.case = None
    trace = "" if problem is None else "".join(traceback.format_exception(problem))[-6000:]
    place = "" if problem is None else _place("".join(traceback.format_tb(problem.__traceback__)))
    message = "" if problem is None else f"{problem}"
    if watch is not None and watch.seen:
        what, where = watch.seen[0]
        return Outcome(f"forbidden: {what.split()[0]}", "; ".join(w for w, _ in watch.seen[:5]), where, trace)
    if problem is None:
        return Outcome("accepted")
    if isinstance(problem, Wrong):
        return Outcome(f"wrong: {problem.what}", message, place, trace)
    if not isinstance(problem, target.refusals):
        return Outcome(f"undocumented {type(problem).__name__}", message, place, trace)
    names = (str(folder), *(name for name in os.listdir(folder)))
    if not message.strip():
        return Outcome(f"silent {type(problem).__name__}", message, place, trace)
    if not any(name in message for name in names) and not re.search(target.names, message):
        return Outcome(f"nameless {type(problem).__name__}", message, place, trace)
    return Outcome("refused", message, place)


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _child(
    target: Target, make: Callable[[int], Files], first: int, last: int | None, root: Path, seconds: float, pipe: int
) -> None:
    stacks = open(root / "stacks", "w")  # noqa: SIM115 - open until the process ends
    faulthandler.enable(stacks)
    faulthandler.dump_traceback_later(3 * seconds + 10, exit=True, file=stacks)
    torch.set_num_threads(1)
    sys.dont_write_bytecode = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, and kills
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nowhere, descriptor)
    os.chdir(root / "cwd")
    soft = _address_space() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (soft, soft))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    watch = _Watch()

    def say(value: dict) -> None:
        os.write(pipe, json.dumps(value).encode() + b"\n")

    number = first
    while last is None or number < last:
        files = make(number)
        shutil.rmtree(root / "box", ignore_errors=True)
        case = root / "box" / "case"
        write(files, case)
        (root / "box" / "outside.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
        before = sorted(os.listdir(case))
        say({"begins": number})
        faulthandler.dump_traceback_later(seconds, exit=True, file=stacks)
        outcome = judge(target, case, watch)
        faulthandler.dump_traceback_later(3 * seconds + 10, exit=True, file=stacks)
        after = sorted(name for name in os.listdir(case) if name != target.output)
        if outcome.good and (after != before or os.listdir(root / "cwd")):
            new = set(after) ^ set(before) | set(os.listdir(root / "cwd"))
            outcome = Outcome("forbidden: litter", f"files appeared or went: {sorted(new)}", outcome.where)
        say({"ends": number, **asdict(outcome)})
        number += 1


def run(
    target: Target,
    make: Callable[[int], Files],
    *,
    count: int | None = None,
    until: float | None = None,
    seconds: float = SECONDS,
) -> Iterator[tuple[int, Outcome]]:
    """Runs cases 0, 1, … in children, one after another, and yields how each ended.

    Args:
        target: the parser.
        make: the files of a case. Runs in the child, so it must depend on nothing but the number.
        count: how many cases; without end by default.
        until: ``time.monotonic()`` at which to stop.
        seconds: for one case.
    """
    target.seeds()  # made once, here, for all children
    number = 0
    while (count is None or number < count) and (until is None or time.monotonic() < until):
        root = Path(tempfile.mkdtemp(prefix="fuzzing-"))
        (root / "cwd").mkdir()
        receiver, sender = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        process = os.fork()
        if not process:
            code = 3
            try:
                os.close(receiver)
                _child(target, make, number, count, root, seconds, sender)
                code = 0
            except BaseException:
                (root / "harness").write_text(traceback.format_exc())
            finally:
                os._exit(code)
        os.close(sender)
        try:
            begun: int | None = None
            for line in _lines(receiver, until, seconds):
                if "begins" in line:
                    begun = line["begins"]
                    continue
                begun, ended = None, line.pop("ends")
                number = ended + 1
                yield ended, Outcome(**line)
            _kill_if_late(process, begun is None and until is not None and time.monotonic() >= until)
            status = os.waitpid(process, 0)[1]
            process = 0
            if begun is not None and not (until is not None and time.monotonic() >= until and status == signal.SIGKILL):
                number = begun + 1
                yield begun, _died(status, root, seconds)
            elif status and not (until is not None and time.monotonic() >= until):
                notes = [root / name for name in ("harness", "stacks") if (root / name).exists()]
                text = "".join(path.read_text(errors="replace")[-6000:] for path in notes)
                raise RuntimeError(f"the harness failed before case {number} (status {status}): {text}")
        finally:
            os.close(receiver)
            if process:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
            shutil.rmtree(root, ignore_errors=True)


def _lines(pipe: int, until: float | None, seconds: float) -> Iterator[dict]:
    """What the child says, until it ends, is silent for too long, or the time is over."""
    buffer, heard = b"", time.monotonic()
    while until is None or time.monotonic() < until:
        if not select.select([pipe], [], [], 0.2)[0]:
            if time.monotonic() - heard > 4 * seconds + 20:  # its own alarm failed
                return
            continue
        piece = os.read(pipe, 1 << 16)
        if not piece:
            return
        heard = time.monotonic()
        *lines, buffer = (buffer + piece).split(b"\n")
        yield from map(json.loads, lines)


def _kill_if_late(process: int, late: bool) -> None:
    """Kills a child that goes on; one that has closed its pipe gets a moment to end by itself."""
    for _ in range(0 if late else 100):
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.02)
    os.kill(process, signal.SIGKILL)


def _died(status: int, root: Path, seconds: float) -> Outcome:
    """A finding for the case in which the child ended."""
    stacks = (root / "stacks").read_text(errors="replace") if (root / "stacks").exists() else ""
    frames = _FRAME.findall(stacks)
    where = f"{frames[0][0].removeprefix('qlora_kernels/')}:{frames[0][1]}" if frames else ""
    if "Timeout (" in stacks:
        return Outcome("timeout", f"took longer than {seconds:g} seconds", where, stacks[-6000:])
    code = os.waitstatus_to_exitcode(status)
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return Outcome(f"crash {how}", f"the process ended: {how}", where, stacks[-6000:])
