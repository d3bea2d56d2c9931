"""Files that are written whole or not at all: write aside, fsync, rename."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import socket
import stat
from collections.abc import Callable
from pathlib import Path


def sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_beside(path: str, make: Callable[[str], None], whose: str = "") -> str:
    """Calls ``make``, which creates a file or folder and fails if there is one, with a hidden name beside ``path``.

    tempfile would do the same, but keeps what it makes from everybody else; here the process's umask decides, as it
    does for any new file. To ask for the umask one has to set it, which other threads would notice.

    Returns:
        ``.NAME.WHOSExxxxxxxx.part`` beside ``path``.
    """
    folder, name = os.path.split(path)
    while True:
        temporary = os.path.join(folder, f".{name}.{whose}{secrets.token_hex(4)}.part")
        with contextlib.suppress(FileExistsError):
            make(temporary)
            return temporary


def _here() -> str:
    """Six letters for this machine since it was started, or rather for those of its processes that can see each other.

    Machines made from one image have one name, and a folder may be shared by them: the kernel draws a number as it
    starts.
    """
    known = [socket.gethostname()]
    with contextlib.suppress(OSError):  # no Linux
        known += [os.readlink("/proc/self/ns/pid"), Path("/proc/sys/kernel/random/boot_id").read_text()]
    return hashlib.sha256(" ".join(known).encode()).hexdigest()[:6]


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # somebody else's
        pass
    return True


def _sweep_files(path: str) -> None:
    """Removes what killed writers of ``path`` left beside it; what one left on another machine stays, or before this
    one was last started."""
    folder, name = os.path.split(path)
    pattern = re.compile(rf"\.{re.escape(name)}\.{_here()}-(\d+)-[0-9a-f]{{8}}\.part")
    with contextlib.suppress(OSError):
        for found in filter(None, map(pattern.fullmatch, os.listdir(folder))):
            if not _lives(int(found[1])):
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(folder, found[0]))


def write_atomically(path: str | os.PathLike, write: Callable[[str], None]) -> None:
    """Calls ``write(temporary_path)`` beside ``path``, syncs what it wrote, and renames it into place.

    A kill at any moment leaves the old file or the new one; an exception leaves the old one and no litter. What a
    killed writer of the same ``path`` left is removed.

    Raises:
        OSError: when the folder does not exist or cannot be written.
    """
    path = os.path.abspath(os.fspath(path))
    folder = os.path.dirname(path)
    _sweep_files(path)
    temporary = make_beside(path, lambda name: open(name, "x").close(), f"{_here()}-{os.getpid()}-")
    mode = os.stat(temporary).st_mode
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, stat.S_IMODE(mode))  # safetensors puts another file there, that only its owner may read
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_folder(folder)
