"""Errors as sentences that a user can act on."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from numbers import Real
from typing import Any, ParamSpec, TypeGuard, TypeVar


class InputError(Exception):
    """Something the user gave cannot be used. The message is one sentence; the command line exits with code 2."""


def require(condition: bool, error: type[Exception], message: str) -> None:
    """Raises ``error(message)`` unless the condition holds."""
    if not condition:
        raise error(message)


def require_number(name: str, value: Any, in_range: Callable[[float], bool], expected: str) -> None:
    """Raises a ValueError unless ``value`` is a finite number, or a tensor with one element, in the range."""
    from torch import Tensor

    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    usable = _finite(value) and in_range(value)
    require(usable, ValueError, f"{name} should be a finite number {expected}, found {value!r}")


def _finite(value: Any) -> TypeGuard[float]:
    # NumPy's scalars and fractions pass too; they compare as floats do.
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond any float
        return False


def missing_extra(package: str, extra: str) -> ImportError:
    """The error for an optional package that is not installed."""
    return ImportError(f"this needs the package '{package}': pip install 'qlora_kernels[{extra}]'")


def sentence(error: BaseException) -> str:
    """The first line of an exception's message, or its type when it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def sentence_of(error: OSError) -> str:
    """What the system refused, with the file's name."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or sentence(error)}"


def listed(items: Iterable[str], limit: int = 10, separator: str = ", ") -> str:
    """Items for a sentence, the first of them by name: "a, b and 5 more"."""
    items = list(items)
    more = len(items) - limit
    return separator.join(items[:limit]) + (f" and {more} more" if more > 0 else "")


@contextlib.contextmanager
def readable(what: str) -> Iterator[None]:
    """Turns whatever a library raises while reading the user's files into one sentence."""
    try:
        yield
    except (InputError, ImportError):
        raise
    except Exception as error:
        raise InputError(f"{what}: {sentence(error)}") from error


#: What PEFT calls an adapter's settings, and what they are called here.
_PEFT_NAMES = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "use_rslora": "rslora"}

# Settings of PEFT that have no counterpart, and what to do instead.
_PEFT_ONLY = {
    "modules_to_save": "to train other modules too, call requires_grad_(True) on them afterwards",
    "exclude_modules": "target_modules names the layers that get adapters",
    "lora_bias": "adapters have no bias here",
    "use_dora": "DoRA is not supported",
}

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def peft_names(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorates a function that takes ``rank``, ``alpha``, ``dropout`` or ``rslora``, for callers who know PEFT.

    ``r=8`` or ``lora_alpha=16`` raise a TypeError that says what the argument is called here, instead of Python's
    "unexpected keyword argument". The signature that users see stays the function's own.
    """
    callee = function.__qualname__.removesuffix(".__init__").rpartition(".")[2]

    @functools.wraps(function)
    def checked(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        foreign = [name for name in kwargs if name in _PEFT_NAMES]
        if foreign:
            renamed = ", ".join(f"'{name}' is called '{_PEFT_NAMES[name]}'" for name in foreign)
            raise TypeError(f"{callee} does not take PEFT's names: {renamed} here")
        for name in kwargs:
            if name in _PEFT_ONLY:
                raise TypeError(f"{callee} does not take PEFT's '{name}': {_PEFT_ONLY[name]}")
        return function(*args, **kwargs)

    return checked
