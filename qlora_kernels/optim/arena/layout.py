"""Where a paged optimizer's states lie: one arena for each optimizer, and the order in which a step goes through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CHUNK = 8192  # elements; csrc/optimizer.h
STATE_BLOCK = 256
PAGE = 65536  # what is sent from one side to the other: at least a page of any of them

#: Planes of a chunk's states, in the order of csrc/optimizer.h.
FIRST, SECOND, FIRST_ABSMAX, SECOND_ABSMAX, MASTER = range(5)
PLANES = 5
_CONTROL_BYTES = 64
_ALIGNED = 256


def aligned(count: int, to: int = _ALIGNED) -> int:
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
        self.partial = aligned(self.steps + 4 * len(self.slots))
        end = aligned(self.partial + 8 * max(self.chunk_count, 1))
        self.planes = np.full((len(self.slots), PLANES), -1, dtype=np.int64)
        for pages in (False, True):
            for i, slot in enumerate(self.slots):
                for plane in slot.planes:
                    if (plane in (FIRST, SECOND, MASTER)) == pages:
                        self.planes[i, plane] = end
                        end = aligned(end + self.plane_bytes(slot.count, plane))
            if not pages:
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
            if joined and first <= aligned(joined[-1][1]):
                joined[-1] = (joined[-1][0], max(last, joined[-1][1]))
            else:
                joined.append((first, last))
        return joined
