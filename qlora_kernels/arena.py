"""Where a paged optimizer's states lie: one arena for each optimizer, and the order in which a step goes through it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import math
import mmap
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CHUNK = 8192  # elements; csrc/optimizer.h
STATE_BLOCK = 256
PAGE = 65536  # what is sent from one side to the other: at least a page of any of them
# Bytes of states that a step works on at a time, where they do not all stay on the device: at most, and, where the
# budget has room for four, at least, so that launches and prefetches stay few.
STRETCH = 64 << 20
LEAST_STRETCH = 8 << 20

#: Planes of a chunk's states, in the order of csrc/optimizer.h.
FIRST, SECOND, FIRST_ABSMAX, SECOND_ABSMAX, MASTER = range(5)
PLANES = 5
_CONTROL_BYTES = 64
_ALIGNED = 256


def _aligned(count: int, to: int = _ALIGNED) -> int:
    return -(-count // to) * to


@dataclass(frozen=True)
class Slot:
    """One tensor of an optimizer.

    Attributes:
        count: of its elements.
        group: the index of its parameter group.
        dtype: how the extension calls its dtype.
        planes: which planes its states have.
    """

    count: int
    group: int
    dtype: int
    planes: tuple[int, ...]


class Layout:
    """Where everything lies in an arena, in bytes from its begin.

    First what every step needs (control, the tensors' step counts, the sums of the norm, the constants of 8-bit
    states): ``header`` bytes that never leave the device. Then the states, tensor after tensor.
    """

    def __init__(self, slots: Sequence[Slot], state_bits: int):
        self.slots = tuple(slots)
        self.state_bits = state_bits
        chunks_of = [-(-slot.count // CHUNK) for slot in self.slots]
        self.chunk_count = sum(chunks_of)
        self.control = 0
        self.steps = _CONTROL_BYTES
        self.partial = _aligned(self.steps + 4 * len(self.slots))
        end = _aligned(self.partial + 8 * max(self.chunk_count, 1))
        self.planes = np.full((len(self.slots), PLANES), -1, dtype=np.int64)
        for pages in (False, True):
            for i, slot in enumerate(self.slots):
                for plane in slot.planes:
                    if (plane in (FIRST, SECOND, MASTER)) == pages:
                        self.planes[i, plane] = end
                        end = _aligned(end + self.plane_bytes(slot.count, plane))
            if not pages:
                self.header = end = _aligned(end, PAGE)
        self.nbytes = _aligned(end, PAGE)
        self.chunks = self._chunks(chunks_of)

    def plane_bytes(self, count: int, plane: int) -> int:
        if plane == MASTER or (plane in (FIRST, SECOND) and self.state_bits == 32):
            return 4 * count
        return count if plane in (FIRST, SECOND) else 4 * -(-count // STATE_BLOCK)

    def _chunks(self, chunks_of: list[int]) -> np.ndarray:
        """OptimizerChunk[chunks], as int64 [chunks, 8]."""
        tensor = np.repeat(np.arange(len(self.slots), dtype=np.int64), chunks_of)
        begins = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.asarray(chunks_of, dtype=np.int64))[:-1]])
        first = (np.arange(self.chunk_count, dtype=np.int64) - begins[tensor]) * CHUNK
        of_slot = np.array([(s.count, s.group, s.dtype) for s in self.slots], dtype=np.int64).reshape(-1, 3)[tensor]
        table = np.empty((self.chunk_count, 8), dtype=np.int64)
        words = table.view(np.int32)
        words[:, 0] = tensor
        words[:, 1] = np.minimum(of_slot[:, 0] - first, CHUNK)
        words[:, 2] = of_slot[:, 1]
        words[:, 3] = of_slot[:, 2]
        table[:, 2] = first
        planes = self.planes[tensor]
        wide = 4 if self.state_bits == 32 else 1
        step = np.stack([first * wide, first * wide, first // STATE_BLOCK * 4, first // STATE_BLOCK * 4, first * 4], 1)
        table[:, 3:] = np.where(planes < 0, -1, planes + step)
        return table

    def intervals(self, begin: int, end: int) -> list[tuple[int, int]]:
        """What the chunks [begin, end) have of the pages: (first byte, end), ascending, neighbours joined."""
        rows = self.chunks[begin:end]
        count = rows.view(np.int32)[:, 1].astype(np.int64)
        parts = []
        for plane in (FIRST, SECOND, MASTER):
            offset = rows[:, 3 + plane]
            have = offset >= 0
            wide = 4 if plane == MASTER or self.state_bits == 32 else 1
            parts.append(np.stack([offset[have], offset[have] + count[have] * wide], 1))
        joined: list[tuple[int, int]] = []
        for first, last in sorted(map(tuple, np.concatenate(parts).tolist())):
            if joined and first <= _aligned(joined[-1][1]):
                joined[-1] = (joined[-1][0], max(last, joined[-1][1]))
            else:
                joined.append((first, last))
        return joined


@dataclass(frozen=True)
class Stretch:
    """What a step works on at a time.

    Attributes:
        begin, end: its chunks.
        arrive: pages that have to come to the device before it, (first byte, end).
        leave: pages that may go back to the host after it.
        stays: whether none of its pages ever goes.
    """

    begin: int
    end: int
    arrive: tuple[tuple[int, int], ...]
    leave: tuple[tuple[int, int], ...]
    stays: bool


def _runs(pages: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Ascending page numbers as intervals of bytes."""
    if len(pages) == 0:
        return ()
    cuts = np.flatnonzero(np.diff(pages) > 1)
    firsts = pages[np.concatenate([[0], cuts + 1])]
    lasts = pages[np.concatenate([cuts, [len(pages) - 1]])]
    return tuple((int(a) * PAGE, (int(b) + 1) * PAGE) for a, b in zip(firsts, lasts))


def least_budget(layout: Layout) -> int:
    """Bytes on the device without which no step is possible: the header, and four stretches of one chunk each."""
    widest = sum(CHUNK * (4 if plane == MASTER or layout.state_bits == 32 else 1) for plane in (FIRST, SECOND))
    if (layout.planes[:, MASTER] >= 0).any():
        widest += 4 * CHUNK
    # A chunk's planes begin and end within pages.
    return layout.header + 4 * (widest + 2 * PAGE * 3)


def _small_budget(layout: Layout, budget: int) -> ValueError:
    least = min(layout.nbytes, least_budget(layout))
    return ValueError(f"page_budget should be at least {least} bytes for these parameters, found {budget}")


def _chunk_bytes(layout: Layout) -> np.ndarray:
    """Bytes of each chunk's states, with what is left free behind a plane: most of it where tensors are tiny."""
    sizes = np.zeros(layout.chunk_count, dtype=np.int64)
    elements = layout.chunks.view(np.int32)[:, 1].astype(np.int64)
    for plane in (FIRST, SECOND, MASTER):
        wide = 4 if plane == MASTER or layout.state_bits == 32 else 1
        sizes += np.where(layout.chunks[:, 3 + plane] >= 0, _aligned(elements * wide), 0)
    return sizes


def stretches(layout: Layout, budget: int | None) -> list[Stretch]:
    """The order of a step: first what stays on the device, in one stretch, then the rest piece by piece.

    While one piece is worked on, the next comes and the last goes; with what stays that is no more than ``budget``
    bytes. None: everything stays.

    Raises:
        ValueError: when the budget is too small for any step.
    """
    pages = layout.nbytes // PAGE
    rest = pages * PAGE if budget is None else budget
    if rest < min(layout.nbytes, least_budget(layout)):
        raise _small_budget(layout, rest)
    count = layout.chunk_count
    if rest >= layout.nbytes:
        return [Stretch(0, count, ((0, layout.nbytes),), (), True)]
    rest -= layout.header
    size = min(STRETCH, max(rest // 16, min(rest // 4, LEAST_STRETCH)))
    slack = 6 * PAGE  # of a piece: the ends of three intervals
    stay = rest - 4 * size
    total = np.concatenate([[0], np.cumsum(_chunk_bytes(layout))])
    cuts = [int(np.searchsorted(total, max(stay - slack, 0), side="right")) - 1]
    while cuts[-1] < count:
        at = int(np.searchsorted(total, total[cuts[-1]] + max(size - slack, 1), side="right")) - 1
        cuts.append(max(at, cuts[-1] + 1))
    if cuts[0] > 0:
        cuts.insert(0, 0)
    # A page belongs to every stretch that touches it: it comes before the first, and goes after the last.
    ranges = [(a, b) for a, b in itertools.pairwise(cuts) if b > a]
    first, last = np.full(pages, len(ranges)), np.full(pages, -1)
    for i, (a, b) in enumerate(ranges):
        for begin, end in layout.intervals(a, b):
            touched = slice(begin // PAGE, -(-end // PAGE))
            first[touched] = np.minimum(first[touched], i)
            last[touched] = i
    header = layout.header // PAGE
    first[:header] = 0
    last[:header] = len(ranges)
    stays = stay > slack
    if stays:
        last[first == 0] = len(ranges)
    return [
        Stretch(a, b, _runs(np.flatnonzero(first == i)), _runs(np.flatnonzero(last == i)), stays and i == 0)
        for i, (a, b) in enumerate(ranges)
    ]


def staged(
    layout: Layout, budget: int | None
) -> tuple[list[tuple[int, int, tuple, tuple, tuple[int, ...], bool]], np.ndarray, int]:
    """The order of a step where all states are copied to the device and back, through three places in turn.

    Returns:
        Stretches as (begin, end, intervals of the arena, the same, where each goes in the staging memory); the chunks
        as they lie there; the staging memory's bytes.

    Raises:
        ValueError: when the budget is too small for any step.
    """
    if budget is not None and budget < min(layout.nbytes, least_budget(layout)):
        raise _small_budget(layout, budget)
    size = STRETCH if budget is None else min(STRETCH, max(budget - layout.header, 0) // 4)
    sizes = _chunk_bytes(layout)
    total = np.concatenate([[0], np.cumsum(sizes)])
    cuts = [0]
    while cuts[-1] < layout.chunk_count:
        at = int(np.searchsorted(total, total[cuts[-1]] + size, side="right")) - 1
        cuts.append(max(at, cuts[-1] + 1))
    pieces = [layout.intervals(a, b) for a, b in itertools.pairwise(cuts)]
    place = _aligned(max((sum(_aligned(b - a) for a, b in piece) for piece in pieces), default=1), PAGE)
    chunks, plan = layout.chunks.copy(), []
    for i, (a, b) in enumerate(itertools.pairwise(cuts)):
        at, where = i % 3 * place, []
        planes = chunks[a:b, 3:]
        original = layout.chunks[a:b, 3:]
        for first, end in pieces[i]:
            inside = (original >= first) & (original < end)
            inside[:, [FIRST_ABSMAX, SECOND_ABSMAX]] = False
            planes[inside] = original[inside] - first + at
            where.append(at)
            at += _aligned(end - first)
        plan.append((a, b, tuple(pieces[i]), tuple(pieces[i]), tuple(where), False))
    return plan or [(0, 0, (), (), (), False)], chunks, min(max(len(plan), 1), 3) * place


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
