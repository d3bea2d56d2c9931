"""Opening a file that someone else named: only a regular one, since a pipe or a device may block or never end."""

from __future__ import annotations

import os
import stat
from io import BufferedReader


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Opens a regular file to read bytes.

    Raises:
        FileNotFoundError: when there is no such file.
        OSError: when it cannot be opened.
        ValueError: for a pipe, a socket, a device or a folder.
    """
    path = os.fspath(path)
    if "\0" in path:
        raise ValueError(f"{path!r} is not a file's name")
    try:
        mode = os.stat(path).st_mode  # before opening, which a device could notice
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    _require_regular(path, mode)
    # Without blocking, should a pipe have taken its place.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _require_regular(path, os.fstat(descriptor).st_mode)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _require_regular(path: str, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is not a regular file")


def identity_of(path: str) -> tuple[int, ...] | None:
    """What changes when a file is replaced or written; None when it cannot be asked, as when there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
