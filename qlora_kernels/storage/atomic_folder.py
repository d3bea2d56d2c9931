"""Folders that appear whole or not at all: written under another name, synced, renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Callable, Iterator

from .atomic_file import reported_as, sync_folder
from .leftovers import sweep, sweep_of, working_folder


def write_folder_atomically(path: str | os.PathLike, write: Callable[[str], None]) -> None:
    """Calls ``write(temporary_folder)`` beside ``path``, syncs its files, and renames it into place.

    A kill leaves no ``path``; an exception leaves neither that nor the temporary folder. Leftovers of killed writers of
    the same ``path`` are removed.

    Raises:
        FileExistsError: when ``path`` exists and is not an empty folder, at the start or at the end.
        OSError: when the folder that holds ``path`` does not exist or cannot be written, or the disk is full.
    """
    path = os.path.abspath(os.fspath(path))
    parent = os.path.dirname(path)
    if os.path.lexists(path) and not (os.path.isdir(path) and not os.listdir(path)):
        raise FileExistsError(f"{path} exists already")
    sweep_of(path)
    with contextlib.ExitStack() as stack:
        with reported_as(path, os.path.join(parent, ".")):
            temporary, mode = stack.enter_context(working_folder(path))
        with reported_as(path, temporary):
            write(temporary)
            for folder, _, names in os.walk(temporary):
                for name in names:
                    with open(os.path.join(folder, name), "rb") as file:
                        os.fchmod(file.fileno(), mode & 0o666)  # safetensors lets only the owner read its files
                        os.fsync(file.fileno())
                sync_folder(folder)
            os.chmod(temporary, mode)
            _rename(temporary, path)
            sync_folder(parent)


def _rename(temporary: str, path: str) -> None:
    try:
        os.rename(temporary, path)  # replaces an empty folder; fails on any other
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise FileExistsError(f"another program has created {path}") from None


def sweep_folders(parent: str, name: str) -> None:
    """Removes the temporary folders that killed writers left in ``parent``; see :func:`.leftovers.sweep`.

    Args:
        parent: the folder to look in; need not exist.
        name: regular expression for their final names.
    """
    sweep(parent, name)


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
        tempfile.TemporaryFile(dir=path).close()  # has no name where the system can do so: a kill leaves nothing
        yield path
    except BaseException:
        for folder in created:
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        raise
