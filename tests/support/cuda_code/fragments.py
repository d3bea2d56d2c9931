"""Fragments of matrices as PTX lays them out over a warp."""

from __future__ import annotations

import numpy as np

U32 = np.uint32


def fragment(columns: int):
    """Row and column of the element in each of a thread's registers: [128, N / 2]."""
    thread, v = np.arange(128)[:, None], np.arange(columns // 2)[None]
    row = thread // 32 * 16 + thread % 32 // 4 + v // 2 % 2 * 8
    return row, v // 4 * 8 + thread % 4 * 2 + v % 2
