"""The arena in the host's memory or in a file."""

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

from . import memory


class HostArena:
    """States in the host's memory or, with ``page_file``, in a file that the system pages.

    The file has no name, so it disappears with the optimizer, however the process ends.

    Raises:
        MemoryError: if there is not enough memory, or not enough room in the file's folder.
        OSError: if the folder cannot be written to.
    """

    def __init__(self, nbytes: int, page_file: str | os.PathLike | None = None, state_bits: int = 32):
        self.nbytes = nbytes
        self.kind = "host memory" if page_file is None else "a memory-mapped file"
        self._file = None
        try:
            if page_file is None:
                # Linux overcommits: it would grant the mapping, and kill the process once the pages are touched.
                left = memory.memory_left()
                if left is not None and nbytes > left:
                    raise MemoryError(f"{left} bytes are left")
                self._memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            else:
                self._file = tempfile.TemporaryFile(dir=os.fspath(page_file))  # noqa: SIM115
                # Reserve the blocks now: if the disk filled up later, a write to the mapping would kill the process.
                os.posix_fallocate(self._file.fileno(), 0, nbytes)
                self._memory = mmap.mmap(self._file.fileno(), nbytes)
        except (OSError, MemoryError, OverflowError) as error:
            if self._file is not None:
                self._file.close()  # gives back the blocks reserved so far
            if isinstance(error, FileNotFoundError | NotADirectoryError | PermissionError):
                raise
            where = "of memory" if page_file is None else f"in a file in {os.fspath(page_file)}"
            folder = None if page_file is None else os.fspath(page_file)
            raise memory.out_of_memory(nbytes, where, str(error), state_bits, folder) from None
        if page_file is None and hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # the kernel may lack transparent huge pages
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        self.address = self._bytes.data_ptr()

    def view(self, offset: int, count: int, dtype: torch.dtype) -> Tensor:
        """A flat tensor of ``count`` elements at ``offset`` bytes."""
        if count == 0:
            return torch.empty(0, dtype=dtype, device="cpu")
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=offset)

    #: The CUDA arena has a second view, through the host; here both are the same.
    host_view = view

    def synchronize(self) -> None:
        """Does nothing: no copies are ever in flight."""

    to_host = synchronize

    def page_out(self) -> None:
        """Writes the file's pages and drops them from memory. Without a file it does nothing."""
        if self._file is None:
            return
        self._memory.flush()
        self._memory.madvise(mmap.MADV_DONTNEED)
        os.posix_fadvise(self._file.fileno(), 0, self.nbytes, os.POSIX_FADV_DONTNEED)

    def page_in(self) -> None:
        """Asks the system to read the whole file ahead."""
        if self._file is not None:
            self._memory.madvise(mmap.MADV_WILLNEED)

    def resident_bytes(self) -> int:
        """Bytes in memory now, by mincore(2)."""
        pages = math.ceil(self.nbytes / mmap.PAGESIZE)
        seen = (ctypes.c_ubyte * pages)()
        if _libc().mincore(ctypes.c_void_p(self.address), ctypes.c_size_t(self.nbytes), seen) != 0:
            return self.nbytes
        resident = int((np.frombuffer(memoryview(seen), dtype=np.uint8) & 1).sum())
        return min(resident * mmap.PAGESIZE, self.nbytes)


@functools.cache
def _libc():
    return ctypes.CDLL(None, use_errno=True)
