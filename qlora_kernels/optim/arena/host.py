"""The arena in the host's memory, or in a file."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import os
import tempfile

import numpy as np
import torch
from torch import Tensor


def no_memory(nbytes: int, where: str, why: str, state_bits: int, page_file: str | None = None) -> MemoryError:
    """The error for an arena that cannot be had; with advice that its settings do not already follow."""
    advice = ["state_bits=8 takes a quarter of it"] if state_bits == 32 else []
    advice += [
        "page_file=FOLDER (on the CPU) keeps them in a file there"
        if page_file is None
        else "page_file can be a folder on another disk"
    ]
    return MemoryError(
        f"the optimizer's states need {nbytes} bytes ({nbytes / 2**30:.2f} GiB) {where}, which cannot be had ({why}); "
        + ", and ".join(advice)
    )


def memory_left() -> int | None:
    """Bytes that can still be had here: what the system and its swap space have left, at most what cgroups allow.

    None where nobody says. A cgroup's limit counts as a whole: what it holds of files can be given up.
    """
    found = []
    with contextlib.suppress(OSError, ValueError, KeyError), open("/proc/meminfo") as file:
        fields = dict(line.split(":", 1) for line in file)
        found.append(sum(int(fields[name].split()[0]) << 10 for name in ("MemAvailable", "SwapFree")))
    with contextlib.suppress(OSError), open("/proc/self/cgroup") as file:
        for line in file:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            if controllers in ("", "memory"):
                at = ("memory", "memory.limit_in_bytes") if controllers else ("", "memory.max")  # version 1, and 2
                found += cgroup_limits(os.path.join("/sys/fs/cgroup", at[0]), path, at[1])
    return min(found, default=None)


def cgroup_limits(root: str, path: str, name: str) -> list[int]:
    """What a cgroup and those around it allow; within a container, its own is at the root."""
    parts = path.strip("/").split("/")
    limits = []
    for depth in range(len(parts) + 1):
        with contextlib.suppress(OSError, ValueError), open(os.path.join(root, *parts[:depth], name)) as file:
            limits.append(int(file.read()))  # "max" is no number
    return limits


class HostArena:
    """States in the host's memory, or, with ``page_file``, in a file that the system pages.

    The file has no name: it goes when the optimizer does, however the process ends.

    Raises:
        MemoryError: when there is no memory, or no room in the file's folder.
        OSError: when the folder cannot be written to.
    """

    def __init__(self, nbytes: int, page_file: str | os.PathLike | None = None, state_bits: int = 32):
        self.nbytes = nbytes
        self.kind = "host memory" if page_file is None else "a memory-mapped file"
        self._file = None
        try:
            if page_file is None:
                # The system would promise more than it has, and kill the process that asks for it.
                left = memory_left()
                if left is not None and nbytes > left:
                    raise MemoryError(f"{left} bytes are left")
                self._memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            else:
                self._file = tempfile.TemporaryFile(dir=os.fspath(page_file))  # noqa: SIM115
                # Reserved now: a disk that is full later would end the process.
                os.posix_fallocate(self._file.fileno(), 0, nbytes)
                self._memory = mmap.mmap(self._file.fileno(), nbytes)
        except (OSError, MemoryError, OverflowError) as error:
            if self._file is not None:
                self._file.close()  # what was reserved of a full disk is free again
            if isinstance(error, FileNotFoundError | NotADirectoryError | PermissionError):
                raise
            where = "of memory" if page_file is None else f"in a file in {os.fspath(page_file)}"
            folder = None if page_file is None else os.fspath(page_file)
            raise no_memory(nbytes, where, str(error), state_bits, folder) from None
        if page_file is None and hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without large pages
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        self.address = self._bytes.data_ptr()

    def view(self, offset: int, count: int, dtype: torch.dtype) -> Tensor:
        """A flat tensor of ``count`` elements at ``offset`` bytes."""
        if count == 0:
            return torch.empty(0, dtype=dtype, device="cpu")
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=offset)

    #: Where a step's states are filled from.
    host_view = view

    def synchronize(self) -> None:
        """Nothing is ever under way."""

    to_host = synchronize

    def page_out(self) -> None:
        """Writes the file and gives its memory back; without one there is nowhere to go."""
        if self._file is None:
            return
        self._memory.flush()
        self._memory.madvise(mmap.MADV_DONTNEED)
        os.posix_fadvise(self._file.fileno(), 0, self.nbytes, os.POSIX_FADV_DONTNEED)

    def page_in(self) -> None:
        """Asks for the whole file to be read."""
        if self._file is not None:
            self._memory.madvise(mmap.MADV_WILLNEED)

    def resident_bytes(self) -> int:
        """Bytes in memory now, as the system says (mincore)."""
        pages = math.ceil(self.nbytes / mmap.PAGESIZE)
        seen = (ctypes.c_ubyte * pages)()
        if _libc().mincore(ctypes.c_void_p(self.address), ctypes.c_size_t(self.nbytes), seen) != 0:
            return self.nbytes
        here = int((np.frombuffer(seen, dtype=np.uint8) & 1).sum())
        return min(here * mmap.PAGESIZE, self.nbytes)


@functools.cache
def _libc():
    return ctypes.CDLL(None, use_errno=True)
