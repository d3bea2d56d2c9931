"""While tests are collected nothing is built: an emulator or a wheel is made when a test first asks for it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

_BUILDERS = {"cmake", "ninja", "nvcc", "c++", "g++", "gcc", "cc", "clang++", "pip"}
_guarded = False


def _refuse(event: str, arguments: tuple) -> None:
    if not _guarded or event != "subprocess.Popen":
        return
    command = arguments[1].split() if isinstance(arguments[1], str) else [os.fspath(word) for word in arguments[1]]
    # A module by its name, too: python -m pip.
    if _BUILDERS & {os.path.basename(word) for word in command[:3]}:
        raise RuntimeError(f"collecting tests runs {' '.join(command[:3])}; building belongs into a fixture")


sys.addaudithook(_refuse)


@contextlib.contextmanager
def builds_nothing() -> Iterator[None]:
    """A context in which starting a compiler or a build is an error."""
    global _guarded
    _guarded = True
    try:
        yield
    finally:
        _guarded = False
