"""Memory that is kept for the next large result on the CPU.

A large tensor is fresh memory each time: the C library gives it back to the system when the tensor dies. Filling fresh
pages with zeros takes several times as long as decoding a weight into them. So the memory of results is kept here, and
used again once no tensor uses it any more.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

#: Results below this many bytes come from the C library's own reserves.
SMALLEST = 4 << 20
#: Mebibytes kept at most; 0 keeps nothing.
VARIABLE = "QLORA_KERNELS_KEEP_MB"
DEFAULT_MB = 256

_lock = threading.Lock()


def _renew_lock() -> None:
    """In a child that was forked while another thread held the lock, nobody would ever release it."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)
_storages: list[torch.UntypedStorage] = []
# How many use a storage. Not public: a torch that lacks it keeps nothing.
_use_count = getattr(torch._C, "_storage_Use_Count", None)  # pyright: ignore[reportPrivateUsage]


def _limit() -> int:
    """Bytes kept at most."""
    try:
        return int(os.environ.get(VARIABLE, "")) << 20
    except ValueError:
        return DEFAULT_MB << 20


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """``torch.empty(shape, dtype=dtype)`` on the CPU, in memory of an earlier result if one of this size is free."""
    size = dtype.itemsize
    for length in shape:
        size *= length
    limit = _limit()
    # Without waiting: a signal handler or a finalizer may come here while its own thread holds the lock.
    if _use_count is None or size < SMALLEST or not _lock.acquire(blocking=False):
        return torch.empty(shape, dtype=dtype, device="cpu")
    try:
        _trim(limit)
        if size > limit:
            return torch.empty(shape, dtype=dtype, device="cpu")
        storage = _free(size)
        if storage is None:
            storage = torch.UntypedStorage(size, device="cpu")
            _storages.append(storage)
            _trim(limit)
        # Before the lock is released: from here on somebody uses it.
        return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, shape)  # type: ignore[call-overload]
    finally:
        _lock.release()


def _trim(limit: int) -> None:
    """Gives up the storages that were not asked for the longest, until ``limit`` bytes hold the rest."""
    while sum(kept.nbytes() for kept in _storages) > limit:
        del _storages[0]


def _references(objects: Sequence[object], i: int) -> int:
    """How many references Python has to ``objects[i]``, this function's own included."""
    one = objects[i]
    return sys.getrefcount(one)


#: What it returns for an object that only the sequence knows: that differs between versions of Python.
_UNUSED = _references([object()], 0)


def _is_free(i: int) -> bool:
    """Whether only the list uses a storage: tensors count in torch, a storage object that a caller holds in Python."""
    assert _use_count is not None
    address = _storages[i]._cdata  # pyright: ignore[reportPrivateUsage]
    return _use_count(address) == 1 and _references(_storages, i) == _UNUSED


def _free(size: int) -> torch.UntypedStorage | None:
    """A kept storage that nothing uses, now the last to be given up; or None. Forgets those that changed their size or
    went to memory shared with other processes, which may read it still."""
    _storages[:] = [kept for kept in _storages if kept.nbytes() >= SMALLEST and not kept.is_shared()]
    for i in range(len(_storages)):
        if _storages[i].nbytes() == size and _is_free(i):
            _storages.append(_storages.pop(i))
            return _storages[-1]
    return None


def release() -> None:
    """Gives everything back that nothing uses."""
    with _lock:
        _storages.clear()
