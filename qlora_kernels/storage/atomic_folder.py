"""Folders that appear whole or not at all: written aside, synced, renamed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator

from .atomic_file import make_beside, sync_folder


def write_folder_atomically(path: str | os.PathLike, write: Callable[[str], None]) -> None:
    """Calls ``write(temporary_folder)`` beside ``path``, syncs what it wrote, and renames it into place.

    A kill leaves no ``path``; an exception leaves neither that nor the temporary folder. What a killed writer of the
    same ``path`` left is removed.

    Raises:
        FileExistsError: when ``path`` exists and is not an empty folder, now or when all is written.
        OSError: when the folder that holds ``path`` does not exist or cannot be written.
    """
    path = os.path.abspath(os.fspath(path))
    parent = os.path.dirname(path)
    if os.path.lexists(path) and not (os.path.isdir(path) and not os.listdir(path)):
        raise FileExistsError(f"{path} exists already")
    sweep_folders(parent, re.escape(os.path.basename(path)))
    temporary = make_beside(path, os.mkdir)
    mode = os.stat(temporary).st_mode
    lock = os.open(temporary, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)  # a sweeper that looks at the new folder has it for a moment
        write(temporary)
        for folder, _, names in os.walk(temporary):
            for name in names:
                with open(os.path.join(folder, name), "rb") as file:
                    os.fchmod(file.fileno(), mode & 0o666)  # safetensors' are such that only their owner may read them
                    os.fsync(file.fileno())
            sync_folder(folder)
        try:
            os.rename(temporary, path)  # replaces an empty folder; fails on any other
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            raise FileExistsError(error.errno, f"another program made {path} meanwhile") from None
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(lock)
    sync_folder(parent)


def sweep_folders(parent: str, name: str) -> None:
    """Removes the temporary folders that killed writers left in ``parent``.

    A writer holds a lock on its folder, and its death, however sudden, gives it up. Where the file system has no
    locks, or the folder is too new for its writer to have locked it, nothing is removed.

    Args:
        parent: the folder to look in; need not exist.
        name: regular expression of the names that they were to have.
    """
    pattern = re.compile(rf"\.{name}\.[a-z0-9_]{{8}}\.part")
    with contextlib.suppress(OSError):
        for found in filter(pattern.fullmatch, os.listdir(parent)):
            folder = os.path.join(parent, found)
            if os.path.islink(folder) or not os.path.isdir(folder):
                continue
            with contextlib.suppress(OSError):
                lock = os.open(folder, os.O_RDONLY)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if os.listdir(folder) or time.time() - os.fstat(lock).st_mtime > 60:
                        shutil.rmtree(folder, ignore_errors=True)
                finally:
                    os.close(lock)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[str]:
    """Makes a folder, with those above it, and checks that files can be written in it.

    When what it encloses raises, the folders it made are removed again as far as they are empty.

    Raises:
        OSError: when it cannot be made or written.
    """
    path = os.path.abspath(os.fspath(path))
    made, folder = [], path
    while not os.path.lexists(folder):
        made.append(folder)
        folder = os.path.dirname(folder)
    try:
        os.makedirs(path, exist_ok=True)
        handle, probe = tempfile.mkstemp(prefix=".probe", dir=path)
        os.close(handle)
        os.unlink(probe)
        yield path
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        raise
