"""Where a paged optimizer's states lie: byte offsets in its arena, and the table of chunks that the kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

# Constants of csrc/optimizer.h: elements of a chunk, elements that share a constant of 8-bit states, and a chunk's
# planes in their order there.
CHUNK = 8192
STATE_BLOCK = 256
FIRST, SECOND, FIRST_ABSMAX, SECOND_ABSMAX, MASTER = range(5)
PLANES = 5

#: Bytes that move between host and device as a unit: a multiple of every page size in use.
PAGE = 65536
_CONTROL_BYTES = 64
_NORM, _SKIPPED = 8, 24  # offsets in OptimizerControl
_ALIGNMENT = 256

_Count = TypeVar("_Count", int, np.ndarray)


def aligned(count: _Count, to: int = _ALIGNMENT) -> _Count:
    """``count`` rounded up to a multiple of ``to``."""
    return -(-count // to) * to


@dataclass(frozen=True)
class Slot:
    """One parameter of an optimizer.

    Attributes:
        count: elements.
        group: index of its parameter group.
        dtype: the extension's code for its dtype.
        planes: the planes that its states need.
    """

    count: int
    group: int
    dtype: int
    planes: tuple[int, ...]


class Layout:
    """Byte offsets of everything in an arena.

    First comes what every step needs: control, step counts, partial sums of the norm, and the constants of 8-bit
    states. These ``header`` bytes never leave the device. The states follow, tensor after tensor.
    """

    def __init__(self, slots: Sequence[Slot], state_bits: int):
        self.slots = tuple(slots)
        self.state_bits = state_bits
        chunks_of = [-(-slot.count // CHUNK) for slot in self.slots]
        self.chunk_count = sum(chunks_of)
        self.control = 0
        self.norm, self.skipped = self.control + _NORM, self.control + _SKIPPED
        self.steps = _CONTROL_BYTES
        self.partial = aligned(self.steps + 4 * len(self.slots))
        end = aligned(self.partial + 8 * max(self.chunk_count, 1))
        self.planes = np.full((len(self.slots), PLANES), -1, dtype=np.int64)
        for paged in (False, True):
            for i, slot in enumerate(self.slots):
                for plane in slot.planes:
                    if (plane in (FIRST, SECOND, MASTER)) == paged:
                        self.planes[i, plane] = end
                        end = aligned(end + self.plane_bytes(slot.count, plane))
            if not paged:
                self.header = end = aligned(end, PAGE)
        self.nbytes = aligned(end, PAGE)
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
        slot_fields = np.array([(s.count, s.group, s.dtype) for s in self.slots], dtype=np.int64).reshape(-1, 3)[tensor]
        table = np.empty((self.chunk_count, 8), dtype=np.int64)
        words = table.view(np.int32)
        words[:, 0] = tensor
        words[:, 1] = np.minimum(slot_fields[:, 0] - first, CHUNK)
        words[:, 2] = slot_fields[:, 1]
        words[:, 3] = slot_fields[:, 2]
        table[:, 2] = first
        planes = self.planes[tensor]
        width = 4 if self.state_bits == 32 else 1
        values, absmax = first * width, first // STATE_BLOCK * 4
        within = np.stack([values, values, absmax, absmax, first * 4], 1)
        table[:, 3:] = np.where(planes < 0, -1, planes + within)
        return table

    def intervals(self, begin: int, end: int) -> list[tuple[int, int]]:
        """The paged bytes of chunks [begin, end): (first byte, end) pairs, ascending, adjacent ones joined."""
        rows = self.chunks[begin:end]
        count = rows.view(np.int32)[:, 1].astype(np.int64)
        ranges = []
        for plane in (FIRST, SECOND, MASTER):
            offset = rows[:, 3 + plane]
            present = offset >= 0
            width = 4 if plane == MASTER or self.state_bits == 32 else 1
            ranges.append(np.stack([offset[present], offset[present] + count[present] * width], 1))
        joined: list[tuple[int, int]] = []
        for first, last in sorted(map(tuple, np.concatenate(ranges).tolist())):
            if joined and first <= aligned(joined[-1][1]):
                joined[-1] = (joined[-1][0], max(last, joined[-1][1]))
            else:
                joined.append((first, last))
        return joined
