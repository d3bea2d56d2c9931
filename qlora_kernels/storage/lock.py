"""One writer at a time: a file that says who has an output, and a lock on a folder that lasts for one save."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import socket
import stat
from collections.abc import Iterator

from ..errors import InputError
from .leftovers import here, is_alive, stem


def claim_of(path: str) -> str:
    """The file beside an output that says which process has it; its name for :func:`claimed`."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{stem(name)}.running")


@contextlib.contextmanager
def claimed(path: str, what: str) -> Iterator[None]:
    """A context that claims an output for this process, by a lock on a file that says who has it.

    The lock ends with the process, however it ends, and the file goes at the end. A killed process leaves it; the next
    one takes it over. Where the file system has no locks, what the file says decides: a process that is not known to
    have ended keeps its claim.

    Args:
        path: the file, in an existing folder.
        what: the output, for the message.

    Raises:
        InputError: when another process or thread has it; the sentence says which and since when.
        OSError: when the file cannot be created.
    """
    descriptor = _open_locked(path, what)
    try:
        record = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "machine": here(),
            "since": datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
        }
        with contextlib.suppress(OSError):  # a full disk; the lock holds without it
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(record).encode(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)
        _release(descriptor)


def _open_locked(path: str, what: str) -> int:
    while True:
        # A named pipe would keep an open without O_NONBLOCK waiting.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"{path} is in the way; it should be a file that says who has {what}")
            _lock(descriptor, path, what)
            # Whoever had the lock may have removed the file since it was opened.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(status, os.lstat(path)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, path: str, what: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{what} is being written by {_holder(_read(descriptor))}") from None
    except OSError:
        record = _read(descriptor)
        if not record or (record.get("machine") == here() and not is_alive(record["process"])):
            return
        raise InputError(
            f"{what} is being written by {_holder(record)}; if that has ended, remove {path} (this file system has no "
            "locks)"
        ) from None


def _release(descriptor: int) -> None:
    # Closing is not enough where a child was forked meanwhile: it shares the lock.
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _read(descriptor: int) -> dict:
    try:
        record = json.loads(os.pread(descriptor, 4096, 0))
        process = int(record["process"])
        return {**record, "process": process} if 0 < process < 1 << 31 else {}
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):  # anyone may have written it
        return {}


def _holder(record: dict) -> str:
    if not record:
        return "another process"
    return f"process {record['process']} on {_shown(record.get('host'))} since {_shown(record.get('since'))}"


def _shown(value: object) -> str:
    """Text without control characters, which could change what a terminal shows."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in value) if isinstance(value, str) else "?"


@contextlib.contextmanager
def exclusive(folder: str) -> Iterator[None]:
    """A context in which no other thread or process is in this context for the same folder; it waits for its turn.

    Where the file system has no locks for folders, it does not wait.

    Raises:
        OSError: when the folder cannot be opened.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        _release(descriptor)


@contextlib.contextmanager
def unchanging(folder: str) -> Iterator[None]:
    """A context for readers of a folder: nothing else is in :func:`exclusive` for it, but other readers may be here.

    Where the folder cannot be opened or locked, it does not wait.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield
        return
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        _release(descriptor)
