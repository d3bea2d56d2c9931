"""Errors as sentences that a user can act on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class InputError(Exception):
    """Something the user gave cannot be used. The message is one sentence; the command line exits with code 2."""


def require(condition: bool, error: type[Exception], message: str) -> None:
    """Raises ``error(message)`` unless the condition holds."""
    if not condition:
        raise error(message)


def missing_extra(package: str, extra: str) -> ImportError:
    """The error for an optional package that is not installed."""
    return ImportError(f"this needs the package '{package}': pip install 'qlora_kernels[{extra}]'")


def sentence(error: BaseException) -> str:
    """The first line of an exception's message, or its type when it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def readable(what: str) -> Iterator[None]:
    """Turns whatever a library raises while reading the user's files into one sentence."""
    try:
        yield
    except (InputError, ImportError):
        raise
    except Exception as error:
        raise InputError(f"{what}: {sentence(error)}") from error
