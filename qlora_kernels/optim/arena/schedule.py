"""Which pages of an arena are on the device at what time: a step goes through stretches that fit into a budget."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from . import layout as arena_layout
from .layout import CHUNK, FIRST, FIRST_ABSMAX, MASTER, SECOND, SECOND_ABSMAX, Layout, aligned

# The most bytes of states in one stretch; and the least, if the budget has room for four, to keep launches and
# prefetches few.
STRETCH = 64 << 20
LEAST_STRETCH = 8 << 20


@dataclass(frozen=True)
class Stretch:
    """Chunks that a step updates in one launch, and the pages that move around it.

    Attributes:
        begin, end: its chunks.
        arrive: pages that must be on the device before it, (first byte, end).
        leave: pages that may go back to the host after it.
        stays: whether all its pages stay on the device for good.
    """

    begin: int
    end: int
    arrive: tuple[tuple[int, int], ...]
    leave: tuple[tuple[int, int], ...]
    stays: bool


def _intervals_of(selected: np.ndarray) -> tuple[tuple[int, int], ...]:
    """The bytes of the pages that a mask selects, as (first byte, end) pairs."""
    pages = np.flatnonzero(selected)
    if len(pages) == 0:
        return ()
    cuts = np.flatnonzero(np.diff(pages) > 1)
    firsts = pages[np.concatenate([[0], cuts + 1])]
    lasts = pages[np.concatenate([cuts, [len(pages) - 1]])]
    return tuple((int(a) * arena_layout.PAGE, (int(b) + 1) * arena_layout.PAGE) for a, b in zip(firsts, lasts))


def least_budget(layout: Layout) -> int:
    """The smallest budget that a step can run with: the header, and four stretches of one chunk each."""
    widest = sum(CHUNK * (4 if plane == MASTER or layout.state_bits == 32 else 1) for plane in (FIRST, SECOND))
    if (layout.planes[:, MASTER] >= 0).any():
        widest += 4 * CHUNK
    # A chunk's planes start and end in the middle of pages.
    return layout.header + 4 * (widest + 2 * arena_layout.PAGE * 3)


def _budget_too_small(layout: Layout, budget: int) -> ValueError:
    least = min(layout.nbytes, least_budget(layout))
    return ValueError(f"page_budget should be at least {least} bytes for these parameters, found {budget}")


def _chunk_bytes(layout: Layout) -> np.ndarray:
    """Bytes of each chunk's states, padding included: for tiny tensors the padding is most of it."""
    sizes = np.zeros(layout.chunk_count, dtype=np.int64)
    elements = layout.chunks.view(np.int32)[:, 1].astype(np.int64)
    for plane in (FIRST, SECOND, MASTER):
        width = 4 if plane == MASTER or layout.state_bits == 32 else 1
        sizes += np.where(layout.chunks[:, 3 + plane] >= 0, aligned(elements * width), 0)
    return sizes


def stretches(layout: Layout, budget: int | None) -> list[Stretch]:
    """The stretches of a step: first one with everything that stays on the device, then the rest piece by piece.

    While one piece is updated, the next arrives and the last leaves. Together with what stays, they take at most
    ``budget`` bytes. With None everything stays.

    Raises:
        ValueError: if the budget is too small for any step.
    """
    count = layout.chunk_count
    if budget is None or budget >= layout.nbytes:
        return [Stretch(0, count, ((0, layout.nbytes),), (), True)]
    if budget < least_budget(layout):
        raise _budget_too_small(layout, budget)
    pages, rest = layout.nbytes // arena_layout.PAGE, budget - layout.header
    size = min(STRETCH, max(rest // 16, min(rest // 4, LEAST_STRETCH)))
    slack = 6 * arena_layout.PAGE  # a piece has three intervals, whose ends lie in the middle of pages
    stay = rest - 4 * size
    total = np.concatenate([[0], np.cumsum(_chunk_bytes(layout))])
    cuts = [int(np.searchsorted(total, max(stay - slack, 0), side="right")) - 1]
    while cuts[-1] < count:
        at = int(np.searchsorted(total, total[cuts[-1]] + max(size - slack, 1), side="right")) - 1
        cuts.append(max(at, cuts[-1] + 1))
    if cuts[0] > 0:
        cuts.insert(0, 0)
    # Several stretches may touch a page: it arrives before the first of them and leaves after the last.
    ranges = [(a, b) for a, b in itertools.pairwise(cuts) if b > a]
    first, last = np.full(pages, len(ranges)), np.full(pages, -1)
    for i, (a, b) in enumerate(ranges):
        for begin, end in layout.intervals(a, b):
            touched = slice(begin // arena_layout.PAGE, -(-end // arena_layout.PAGE))
            first[touched] = np.minimum(first[touched], i)
            last[touched] = i
    header = layout.header // arena_layout.PAGE
    first[:header] = 0
    last[:header] = len(ranges)
    stays = stay > slack
    if stays:
        last[first == 0] = len(ranges)
    return [
        Stretch(a, b, _intervals_of(first == i), _intervals_of(last == i), stays and i == 0)
        for i, (a, b) in enumerate(ranges)
    ]


def staged_stretches(
    layout: Layout, budget: int | None
) -> tuple[list[tuple[int, int, tuple, tuple, tuple[int, ...], bool]], np.ndarray, int]:
    """The stretches of a step that copies all states to the device and back, through three buffers in turn.

    Returns:
        Stretches for the extension: (begin, end, intervals of the arena that arrive, those that leave, their offsets
        in the staging memory, False); the table of chunks with offsets in the staging memory; that memory's bytes.

    Raises:
        ValueError: if the budget is too small for any step.
    """
    if budget is not None and budget < min(layout.nbytes, least_budget(layout)):
        raise _budget_too_small(layout, budget)
    size = STRETCH if budget is None else min(STRETCH, max(budget - layout.header, 0) // 4)
    total = np.concatenate([[0], np.cumsum(_chunk_bytes(layout))])
    cuts = [0]
    while cuts[-1] < layout.chunk_count:
        at = int(np.searchsorted(total, total[cuts[-1]] + size, side="right")) - 1
        cuts.append(max(at, cuts[-1] + 1))
    pieces = [layout.intervals(a, b) for a, b in itertools.pairwise(cuts)]
    largest = max((sum(aligned(b - a) for a, b in piece) for piece in pieces), default=1)
    buffer_bytes = aligned(largest, arena_layout.PAGE)
    chunks, plan = layout.chunks.copy(), []
    for i, (a, b) in enumerate(itertools.pairwise(cuts)):
        offset, offsets = i % 3 * buffer_bytes, []
        planes = chunks[a:b, 3:]
        original = layout.chunks[a:b, 3:]
        for first, end in pieces[i]:
            inside = (original >= first) & (original < end)
            inside[:, [FIRST_ABSMAX, SECOND_ABSMAX]] = False
            planes[inside] = original[inside] - first + offset
            offsets.append(offset)
            offset += aligned(end - first)
        plan.append((a, b, tuple(pieces[i]), tuple(pieces[i]), tuple(offsets), False))
    return plan or [(0, 0, (), (), (), False)], chunks, min(max(len(plan), 1), 3) * buffer_bytes
