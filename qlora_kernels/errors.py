"""Checks at the Python boundary: clear sentences."""

from __future__ import annotations


def require(condition: bool, error: type[Exception], message: str) -> None:
    """Raises ``error(message)`` unless the condition holds."""
    if not condition:
        raise error(message)


def missing_extra(package: str, extra: str) -> ImportError:
    """The error for an optional package that is not installed."""
    return ImportError(f"this needs the package '{package}': pip install 'qlora_kernels[{extra}]'")
