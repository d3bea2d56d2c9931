"""Files that are written whole or not at all: written in a folder beside, synced, renamed."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator

from .leftovers import sweep_of, working_folder


def sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def reported_as(path: str, temporary: str) -> Iterator[None]:
    """A context in which failed writes are OSErrors that name ``path``, whatever library wrote.

    safetensors and tokenizers raise exceptions of their own, with the system's reason in their text.

    Args:
        path: what is being written.
        temporary: where it is until then; its path would mean nothing to a user.
    """
    try:
        yield
    except OSError as error:
        named = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else None
        if error.errno is not None and (named is None or named.startswith(temporary)):
            raise OSError(error.errno, error.strerror, path) from error
        raise
    except Exception as error:
        reason = re.search(r"\(os error (\d+)\)", str(error))
        if reason is None:
            raise
        raise OSError(int(reason[1]), os.strerror(int(reason[1])), path) from error


def write_atomically(path: str | os.PathLike, write: Callable[[str], object]) -> None:
    """Calls ``write(temporary_path)``, syncs the file that it writes there, and renames it to ``path``.

    A kill at any moment leaves the old file or the new one; an exception leaves the old one and no litter. Leftovers
    of killed writers of the same ``path`` are removed. Libraries may put files of their own beside the temporary one:
    it lies in a folder that goes with all that is in it.

    Raises:
        OSError: when the folder does not exist or cannot be written, the disk is full, or ``path`` is a folder.
    """
    path = os.path.abspath(os.fspath(path))
    parent, name = os.path.split(path)
    sweep_of(path)
    with contextlib.ExitStack() as stack:
        with reported_as(path, os.path.join(parent, ".")):
            folder, mode = stack.enter_context(working_folder(path))
        with reported_as(path, folder):
            temporary = os.path.join(folder, name)
            write(temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, mode & 0o666)  # safetensors lets only the owner read its files
            os.replace(temporary, path)
            sync_folder(parent)
