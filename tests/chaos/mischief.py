"""What happens to a process while it writes: signals, full disks and errors, at a moment that a number decides."""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
from dataclasses import dataclass

_WATCHED = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.listdir", "os.scandir", "shutil.rmtree"}
_NEED_ROOM = {"open", "os.rename", "os.mkdir", "os.fsync"}


@dataclass(frozen=True)
class Mischief:
    """One thing that happens.

    Attributes:
        kind: "none"; "signal", from outside after a time; "signal at" a call of the system; "error at" one; "file
            size", a limit for every file; "full disk"; "two", the same command twice.
        number: the signal, or errno's number.
        at: for "signal" and "two" the moment, as a fraction of an undisturbed run; for "signal at" and "error at"
            which of its calls, likewise; for "file size" and "full disk" the room, as a fraction of what it needs.
        again: a second signal follows closely; an error comes back with each later call.
    """

    kind: str
    number: int = 0
    at: float = 0.0
    again: bool = False

    def __str__(self) -> str:
        name = ""
        if self.kind in ("signal", "signal at"):
            name = f" {signal.Signals(self.number).name}"
        elif self.kind == "error at":
            name = f" {errno.errorcode[self.number]}"
        return f"{self.kind}{name} {self.at:.3f}{' and again' if self.again else ''}"


def watch(folder: str, mischief: Mischief, calls: int) -> list[int]:
    """Lets the mischief happen in this process, at a call that concerns ``folder``.

    Args:
        folder: what the command writes in.
        mischief: what.
        calls: how many such calls an undisturbed run makes.

    Returns:
        A list whose only element counts the calls.
    """
    count, due = [0], 1 + int(mischief.at * calls)

    def seen(event: str, path: object, writes: bool) -> None:
        if not isinstance(path, (str, bytes)) or not os.fsdecode(path).startswith(folder):
            return
        count[0] += 1
        if mischief.kind == "signal at" and (count[0] == due or (mischief.again and count[0] == due + 1)):
            os.kill(os.getpid(), mischief.number)
        late = mischief.again and count[0] > due and event in _NEED_ROOM and writes
        if mischief.kind == "error at" and (count[0] == due or late) and event in _NEED_ROOM and writes:
            raise OSError(mischief.number, os.strerror(mischief.number), path)

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            written = isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            seen(event, path, written)
        elif event in _WATCHED:
            seen(event, arguments[0], True)

    fsync = os.fsync

    def synced(descriptor: int) -> None:
        seen("os.fsync", os.readlink(f"/proc/self/fd/{descriptor}"), True)
        fsync(descriptor)

    os.fsync = synced
    sys.addaudithook(hook)
    return count


def limit_file_size(nbytes: int) -> None:
    """Files can grow to so many bytes: the write that crosses the limit is short, the next one fails."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
