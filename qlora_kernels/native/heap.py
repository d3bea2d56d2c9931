"""The C library's heap: freed memory that it keeps, although nothing fits into the holes."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

_EVERY = 32 << 20  # bytes; a look at the whole heap takes a few milliseconds
_freed = 0


def freed(size: int) -> None:
    """Says that ``size`` bytes were freed in a loop that allocates as it goes; now and then gives them back.

    glibc serves blocks of up to 32 MiB from its heap. Where a dense weight goes and small pieces of 4 bits stay, the
    next dense weight may not fit into the hole, and in the end the holes take as much memory as the dense model.
    """
    global _freed
    _freed += size
    if _freed >= _EVERY:
        _freed = 0
        _trim()()


@functools.cache
def _trim() -> Callable[[], object]:
    """glibc's malloc_trim, which returns whole free pages to the system; nothing with another C library."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return lambda: None
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    return functools.partial(trim, 0)
