"""Files that are written whole or not at all: written under another name, synced, renamed."""

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


def make_beside(path: str, make: Callable[[str], None], owner: str = "") -> str:
    """Calls ``make``, which creates a file or folder and fails if it exists, with a hidden name beside ``path``.

    tempfile would do the same, but gives only the user access; here the process's umask decides, as for any new file.
    Reading the umask means setting it, which other threads would notice.

    Returns:
        ``.NAME.OWNERxxxxxxxx.part`` beside ``path``.
    """
    folder, name = os.path.split(path)
    while True:
        temporary = os.path.join(folder, f".{name}.{owner}{secrets.token_hex(4)}.part")
        with contextlib.suppress(FileExistsError):
            make(temporary)
            return temporary


def _here() -> str:
    """Six letters for this machine since it booted, or rather for those of its processes that can see each other.

    Machines made from one image have one host name and may share a folder, so the kernel's boot id goes in as well.
    """
    facts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # not Linux
        facts += [os.readlink("/proc/self/ns/pid"), Path("/proc/sys/kernel/random/boot_id").read_text()]
    return hashlib.sha256(" ".join(facts).encode()).hexdigest()[:6]


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # alive, and another user's
        pass
    return True


def _sweep_files(path: str) -> None:
    """Removes what killed writers of ``path`` left beside it, except from other machines or before the last boot."""
    folder, name = os.path.split(path)
    pattern = re.compile(rf"\.{re.escape(name)}\.{_here()}-(\d+)-[0-9a-f]{{8}}\.part")
    with contextlib.suppress(OSError):
        for match in filter(None, map(pattern.fullmatch, os.listdir(folder))):
            if not _is_alive(int(match[1])):
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(folder, match[0]))


def write_atomically(path: str | os.PathLike, write: Callable[[str], object]) -> None:
    """Calls ``write(temporary_path)`` beside ``path``, syncs the file, and renames it into place.

    A kill at any moment leaves the old file or the new one; an exception leaves the old one and no litter. Leftovers
    of killed writers of the same ``path`` are removed.

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
        os.chmod(temporary, stat.S_IMODE(mode))  # safetensors replaces the file by one that only its owner may read
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_folder(folder)
