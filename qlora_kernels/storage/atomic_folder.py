"""Folders that appear whole or not at all: written under another name, synced, renamed."""

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
    """Calls ``write(temporary_folder)`` beside ``path``, syncs its files, and renames it into place.

    A kill leaves no ``path``; an exception leaves neither that nor the temporary folder. Leftovers of killed writers of
    the same ``path`` are removed.

    Raises:
        FileExistsError: when ``path`` exists and is not an empty folder, at the start or at the end.
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
            fcntl.flock(lock, fcntl.LOCK_EX)  # a sweeper that looks at the new folder holds it for a moment
        write(temporary)
        for folder, _, names in os.walk(temporary):
            for name in names:
                with open(os.path.join(folder, name), "rb") as file:
                    os.fchmod(file.fileno(), mode & 0o666)  # safetensors lets only the owner read its files
                    os.fsync(file.fileno())
            sync_folder(folder)
        try:
            os.rename(temporary, path)  # replaces an empty folder; fails on any other
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            raise FileExistsError(error.errno, f"another program has created {path}") from None
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(lock)
    sync_folder(parent)


def sweep_folders(parent: str, name: str) -> None:
    """Removes the temporary folders that killed writers left in ``parent``.

    A writer holds a lock on its folder, which ends with the process, however it ends. A folder stays where the file
    system has no locks, or while it is so new that its writer may not have locked it yet.

    Args:
        parent: the folder to look in; need not exist.
        name: regular expression for their final names.
    """
    pattern = re.compile(rf"\.{name}\.[a-z0-9_]{{8}}\.part")
    with contextlib.suppress(OSError):
        for entry in filter(pattern.fullmatch, os.listdir(parent)):
            folder = os.path.join(parent, entry)
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
    """A context that creates a folder, with its parents, and checks that files can be written in it.

    If the body raises, the folders it created are removed again, as far as they are empty.

    Raises:
        OSError: when it cannot be created or written.
    """
    path = os.path.abspath(os.fspath(path))
    created, folder = [], path
    while not os.path.lexists(folder):
        created.append(folder)
        folder = os.path.dirname(folder)
    try:
        os.makedirs(path, exist_ok=True)
        handle, probe = tempfile.mkstemp(prefix=".probe", dir=path)
        os.close(handle)
        os.unlink(probe)
        yield path
    except BaseException:
        for folder in created:
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        raise
