"""Which pages of an arena are on the device when: stretches within a budget."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from . import layout as arena_layout
from .layout import CHUNK, FIRST, FIRST_ABSMAX, MASTER, SECOND, SECOND_ABSMAX, Layout, aligned

# Bytes of states that a step works on at a time, where they do not all stay on the device: at most, and, where the
# budget has room for four, at least, so that launches and prefetches stay few.
STRETCH = 64 << 20
LEAST_STRETCH = 8 << 20


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
    return tuple((int(a) * arena_layout.PAGE, (int(b) + 1) * arena_layout.PAGE) for a, b in zip(firsts, lasts))


def least_budget(layout: Layout) -> int:
    """Bytes on the device without which no step is possible: the header, and four stretches of one chunk each."""
    widest = sum(CHUNK * (4 if plane == MASTER or layout.state_bits == 32 else 1) for plane in (FIRST, SECOND))
    if (layout.planes[:, MASTER] >= 0).any():
        widest += 4 * CHUNK
    # A chunk's planes begin and end within pages.
    return layout.header + 4 * (widest + 2 * arena_layout.PAGE * 3)


def _small_budget(layout: Layout, budget: int) -> ValueError:
    least = min(layout.nbytes, least_budget(layout))
    return ValueError(f"page_budget should be at least {least} bytes for these parameters, found {budget}")


def _chunk_bytes(layout: Layout) -> np.ndarray:
    """Bytes of each chunk's states, with what is left free behind a plane: most of it where tensors are tiny."""
    sizes = np.zeros(layout.chunk_count, dtype=np.int64)
    elements = layout.chunks.view(np.int32)[:, 1].astype(np.int64)
    for plane in (FIRST, SECOND, MASTER):
        wide = 4 if plane == MASTER or layout.state_bits == 32 else 1
        sizes += np.where(layout.chunks[:, 3 + plane] >= 0, aligned(elements * wide), 0)
    return sizes


def stretches(layout: Layout, budget: int | None) -> list[Stretch]:
    """The order of a step: first what stays on the device, in one stretch, then the rest piece by piece.

    While one piece is worked on, the next comes and the last goes; with what stays that is no more than ``budget``
    bytes. None: everything stays.

    Raises:
        ValueError: when the budget is too small for any step.
    """
    pages = layout.nbytes // arena_layout.PAGE
    rest = pages * arena_layout.PAGE if budget is None else budget
    if rest < min(layout.nbytes, least_budget(layout)):
        raise _small_budget(layout, rest)
    count = layout.chunk_count
    if rest >= layout.nbytes:
        return [Stretch(0, count, ((0, layout.nbytes),), (), True)]
    rest -= layout.header
    size = min(STRETCH, max(rest // 16, min(rest // 4, LEAST_STRETCH)))
    slack = 6 * arena_layout.PAGE  # of a piece: the ends of three intervals
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
    place = aligned(max((sum(aligned(b - a) for a, b in piece) for piece in pieces), default=1), arena_layout.PAGE)
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
            at += aligned(end - first)
        plan.append((a, b, tuple(pieces[i]), tuple(pieces[i]), tuple(where), False))
    return plan or [(0, 0, (), (), (), False)], chunks, min(max(len(plan), 1), 3) * place
