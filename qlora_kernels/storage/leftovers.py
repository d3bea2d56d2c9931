"""Hidden folders that writers work in, and what killed writers leave: found and removed, never a living one's."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_LONGEST_NAME = 200  # bytes; a file system takes 255, and a temporary name adds 40
_QUIET_SECONDS = 3600  # a folder of an unknown process that nobody has touched for this long is abandoned


def make_beside(path: str, make: Callable[[str], None]) -> str:
    """Calls ``make``, which creates a file or folder and fails if it exists, with a hidden name beside ``path``.

    tempfile would do the same, but gives only the user access; here the process's umask decides, as for any new file.
    Reading the umask means setting it, which other threads would notice.

    Returns:
        ``.NAME.MACHINE-PROCESS-xxxxxxxx.part`` beside ``path``.
    """
    folder, name = os.path.split(path)
    while True:
        temporary = os.path.join(folder, f".{stem(name)}.{here()}-{os.getpid()}-{secrets.token_hex(4)}.part")
        with contextlib.suppress(FileExistsError):
            make(temporary)
            return temporary


@contextlib.contextmanager
def working_folder(path: str) -> Iterator[tuple[str, int]]:
    """A context with a hidden folder beside ``path``, which goes with whatever is in it.

    It is locked until then. The lock ends with the process, however it ends, so :func:`sweep` can tell a living
    writer's folder from an abandoned one. Only the user may look into it.

    Yields:
        The folder, and the permissions of a new folder under the process's umask.
    """
    folder = make_beside(path, os.mkdir)
    lock = None
    try:
        mode = stat.S_IMODE(os.stat(folder).st_mode)
        os.chmod(folder, 0o700)
        lock = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError):  # the file system may have no locks
            fcntl.flock(lock, fcntl.LOCK_EX)  # a sweeper that looks at the new folder holds it for a moment
        yield folder, mode
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def sweep(parent: str, name: str) -> None:
    """Removes what killed writers left in ``parent``.

    A folder goes at once when its name holds a process of this machine that has ended. A folder of any other process
    goes when it is not locked and nobody has touched it for an hour: it may be from before the last boot, or from
    another machine.

    Args:
        parent: the folder to look in; need not exist.
        name: regular expression for the final names.
    """
    pattern = re.compile(rf"\.{name}\.(?:([0-9a-f]{{6}})-(\d+)-)?[a-z0-9_]{{8}}\.part")
    with contextlib.suppress(OSError):
        for match in filter(None, map(pattern.fullmatch, os.listdir(parent))):
            ended = match[1] == here() and not is_alive(int(match[2]))
            with contextlib.suppress(OSError):
                _remove_if_abandoned(os.path.join(parent, match[0]), ended)


def sweep_of(path: str) -> None:
    """Removes what killed writers of ``path`` left beside it."""
    folder, name = os.path.split(path)
    sweep(folder, re.escape(stem(name)))


def _remove_if_abandoned(path: str, ended: bool) -> None:
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        if ended:
            os.unlink(path)
        return
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if not ended:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            touched = [os.fstat(lock).st_mtime, *(entry.stat().st_mtime for entry in os.scandir(path))]
            if time.time() - max(touched) < _QUIET_SECONDS:
                return
        shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(lock)


def stem(name: str) -> str:
    """What a hidden name beside a file starts with: its name, or a digest of one too long for an addition."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= _LONGEST_NAME else hashlib.sha256(encoded).hexdigest()[:32]


@functools.cache
def here() -> str:
    """Six letters for this machine since it booted, or rather for those of its processes that can see each other.

    Machines made from one image have one host name and may share a folder, so the kernel's boot id goes in as well.
    """
    facts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # not Linux
        facts += [os.readlink("/proc/self/ns/pid"), Path("/proc/sys/kernel/random/boot_id").read_text()]
    return hashlib.sha256(" ".join(facts).encode()).hexdigest()[:6]


def is_alive(process: int) -> bool:
    """Whether a process of this machine runs, or has ended and is not yet reaped."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # alive, and another user's
        pass
    return True
