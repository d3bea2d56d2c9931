"""What can end a run early, and what the command line makes of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class InputError(Exception):
    """Something the user gave cannot be used. The message is one sentence; the command line exits with code 2."""


class Interrupted(BaseException):
    """A signal asked the run to stop. Not an Exception, so that no handler of errors swallows it.

    Attributes:
        signum: the signal.
        note: what was saved, for the message to the user.
    """

    def __init__(self, signum: int, note: str = "") -> None:
        super().__init__(note)
        self.signum = signum
        self.note = note


def sentence(error: BaseException) -> str:
    """The first line of an exception's message, or its type when it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def readable(what: str) -> Iterator[None]:
    """Turns whatever a library raises while reading the user's files into one sentence."""
    try:
        yield
    except InputError:
        raise
    except ImportError:
        raise
    except Exception as error:
        raise InputError(f"{what}: {sentence(error)}") from error
