"""Where states lie in the arena of a paged optimizer, and the order in which a step goes through them."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

from qlora_kernels.optim.arena import layout as arena_layout
from qlora_kernels.optim.arena import schedule
from qlora_kernels.optim.arena.layout import (
    CHUNK,
    FIRST,
    FIRST_ABSMAX,
    MASTER,
    PLANES,
    SECOND,
    SECOND_ABSMAX,
    Layout,
    Slot,
)

#: Sizes around a block of 256 and a chunk of 16384, none, and one of many chunks.
COUNTS = (0, 1, 7, 255, 256, 257, 4096, 16383, 16384, 16385, 70_000, 300_001)


def planes_of(state_bits: int, lion: bool, master: bool) -> tuple[int, ...]:
    moments = [(FIRST, FIRST_ABSMAX)] if lion else [(FIRST, FIRST_ABSMAX), (SECOND, SECOND_ABSMAX)]
    wanted = [plane for plane, _ in moments] + [absmax for _, absmax in moments if state_bits == 8]
    return tuple(wanted + [MASTER] * master)


def random_layout(seed: int) -> Layout:
    """A few tensors of any size, or many tiny ones; some with 16 bits and a master, some without."""
    rng = random.Random(seed)
    bits, lion = rng.choice((32, 8)), rng.random() < 0.3
    tiny = rng.random() < 0.4
    counts = [rng.choice((0, 1, 3, 60)) for _ in range(rng.randint(300, 2000))] if tiny else []
    counts += rng.choices(COUNTS, k=rng.randint(1, 12))
    rng.shuffle(counts)
    slots = []
    for count in counts:
        dtype = rng.choice((0, 1, 2))
        slots.append(Slot(count, rng.randrange(3), dtype, planes_of(bits, lion, dtype > 0 and rng.random() < 0.7)))
    return Layout(slots, bits)


def bytes_of(layout: Layout, plane: int, count: int) -> int:
    if plane in (FIRST_ABSMAX, SECOND_ABSMAX):
        return 4 * -(-count // 256)
    return count * (4 if plane == MASTER or layout.state_bits == 32 else 1)


@pytest.mark.parametrize("seed", range(20))
def test_every_element_is_in_one_chunk(seed):
    layout = random_layout(seed)
    words = layout.chunks.view(np.int32)
    at = 0
    for i, slot in enumerate(layout.slots):
        first = 0
        while first < slot.count:
            count = min(CHUNK, slot.count - first)
            assert words[at, :4].tolist() == [i, count, slot.group, slot.dtype]
            assert layout.chunks[at, 2] == first
            first, at = first + count, at + 1
    assert at == layout.chunk_count == len(layout.chunks)


@pytest.mark.parametrize("seed", range(20))
def test_nothing_overlaps_and_everything_is_aligned(seed):
    layout = random_layout(seed)
    parts = [
        (layout.control, 64, "control"),
        (layout.steps, 4 * len(layout.slots), "steps"),
        (layout.partial, 8 * layout.chunk_count, "partial"),
    ]
    for row in range(layout.chunk_count):
        tensor, count = layout.chunks.view(np.int32)[row, :2].tolist()
        for plane in range(PLANES):
            offset = int(layout.chunks[row, 3 + plane])
            assert (offset >= 0) == (plane in layout.slots[tensor].planes)
            if offset >= 0:
                parts.append((offset, bytes_of(layout, plane, count), f"plane {plane} of chunk {row}"))
                in_header = plane in (FIRST_ABSMAX, SECOND_ABSMAX)
                assert (offset < layout.header) == in_header, "constants stay on the device, the rest is paged"
    parts.sort()
    for (a, size, name), (b, _, other) in zip(parts, [*parts[1:], (layout.nbytes, 0, "the end")]):
        assert a % 16 == 0, name
        assert a + size <= b, f"{name} reaches into {other}"
    assert layout.nbytes % arena_layout.PAGE == layout.header % arena_layout.PAGE == 0


def test_planes_of_a_tensor_go_on_from_chunk_to_chunk():
    # A parameter's state is one view, whatever its chunks.
    for bits in (32, 8):
        layout = Layout([Slot(5, 0, 1, planes_of(bits, False, True)), Slot(50_000, 0, 1, (*range(PLANES),))], bits)
        rows = layout.chunks[layout.chunks.view(np.int32)[:, 0] == 1]
        for plane in planes_of(bits, False, True):
            assert rows[0, 3 + plane] == layout.planes[1, plane]
            assert np.diff(rows[:, 3 + plane]).tolist() == [bytes_of(layout, plane, CHUNK)] * (50_000 // CHUNK)


def touched(layout: Layout, begin: int, end: int) -> set[int]:
    """Pages that the states of some chunks lie in, from the chunks' own table."""
    pages, page = set(), arena_layout.PAGE
    for row in range(begin, end):
        count = int(layout.chunks.view(np.int32)[row, 1])
        for plane in (FIRST, SECOND, MASTER):
            offset = int(layout.chunks[row, 3 + plane])
            if offset >= 0:
                last = offset + bytes_of(layout, plane, count) - 1
                pages.update(range(offset // page, last // page + 1))
    return pages


def pages_of(intervals) -> set[int]:
    pages = [page for a, b in intervals for page in range(a // arena_layout.PAGE, b // arena_layout.PAGE)]
    assert len(set(pages)) == len(pages)
    assert all(a % arena_layout.PAGE == b % arena_layout.PAGE == 0 and a < b for a, b in intervals)
    return set(pages)


def follow(layout: Layout, plan, budget: int) -> int:
    """Goes through a step as an engine does and checks that every page it touches is resident; returns the peak."""
    assert [s.begin for s in plan] + [layout.chunk_count] == [0] + [s.end for s in plan]
    header = set(range(layout.header // arena_layout.PAGE))
    here, arrived, most = set(), set(), 0
    going: set[int] = set()  # of the last stretch; its pages are free when the next has been worked on
    coming = [pages_of(s.arrive) for s in plan]
    for i, stretch in enumerate(plan):
        for pages in coming[i : i + 2] if i == 0 else coming[i + 1 : i + 2]:
            assert not pages & arrived, "a page comes once"
            arrived |= pages
            here |= pages
        most = max(most, len(here))
        assert header | touched(layout, stretch.begin, stretch.end) <= here - going
        here -= going
        going = pages_of(stretch.leave)
        assert going <= here
        assert not going & header
        assert not any(going & touched(layout, s.begin, s.end) for s in plan[i + 1 : i + 3]), "it is needed again"
    assert most * arena_layout.PAGE <= budget
    return most


@pytest.mark.parametrize("page", [4096, 65536])
@pytest.mark.parametrize("seed", range(40))
def test_a_step_stays_within_its_budget(monkeypatch, seed, page):
    monkeypatch.setattr(arena_layout, "PAGE", page)
    layout = random_layout(seed)
    rng = random.Random(seed)
    # Small stretches, of at least one chunk, leave most of a budget to what stays resident.
    monkeypatch.setattr(schedule, "STRETCH", rng.choice(((192 << 10) + 6 * page, 1 << 20, 64 << 20)))
    least = min(schedule.least_budget(layout), layout.nbytes)
    for budget in (least, least + 1, rng.randint(least, layout.nbytes), rng.randint(least, layout.nbytes)):
        follow(layout, schedule.stretches(layout, budget), budget)


@pytest.mark.parametrize("bits", [32, 8])
def test_tiny_tensors_stay_within_their_budget(monkeypatch, bits):
    # Nearly all of this arena's bytes are padding.
    monkeypatch.setattr(schedule, "STRETCH", 1 << 20)
    layout = Layout([Slot(1, 0, 0, planes_of(bits, False, False)) for _ in range(20_000)], bits)
    budget = layout.nbytes * 3 // 4
    plan = schedule.stretches(layout, budget)
    assert follow(layout, plan, budget) * arena_layout.PAGE > budget // 2, "and make use of it"


def test_a_large_budget_is_used():
    layout = Layout([Slot(CHUNK * 40, 0, 0, (FIRST, SECOND))] * 100, 32)
    for share in (0.7, 0.9, 0.99):
        budget = int(layout.nbytes * share)
        plan = schedule.stretches(layout, budget)
        most = follow(layout, plan, budget)
        assert most * arena_layout.PAGE > 0.7 * budget
    moved = sum(len(pages_of(s.leave)) for s in plan)
    stays = layout.nbytes // arena_layout.PAGE - moved
    # Besides what stays there is room for four stretches.
    assert (stays + 4) * arena_layout.PAGE > budget - 4 * schedule.STRETCH - 64 * arena_layout.PAGE


@pytest.mark.parametrize("seed", range(10))
def test_without_a_budget_everything_comes_and_stays(seed):
    layout = random_layout(seed)
    for budget in (None, layout.nbytes, layout.nbytes + 12345):
        [stretch] = schedule.stretches(layout, budget)
        assert (stretch.begin, stretch.end) == (0, layout.chunk_count)
        assert stretch.arrive == ((0, layout.nbytes),)
        assert stretch.leave == ()


@pytest.mark.parametrize("seed", range(10))
def test_a_budget_that_is_too_small_is_told_the_least(seed):
    layout = random_layout(seed)
    with pytest.raises(ValueError, match=r"at least \d+ bytes .* found 1$") as caught:
        schedule.stretches(layout, 1)
    least = int(re.search(r"at least (\d+)", str(caught.value))[1])
    follow(layout, schedule.stretches(layout, least), least)
    with pytest.raises(ValueError, match=f"at least {least} bytes"):
        schedule.stretches(layout, least - 1)


def test_an_arena_of_nothing():
    for slots in ([], [Slot(0, 0, 0, (FIRST, SECOND))] * 3):
        layout = Layout(slots, 32)
        assert layout.chunk_count == 0
        assert layout.header == layout.nbytes > 0
        assert [(s.begin, s.end) for s in schedule.stretches(layout, layout.nbytes)] == [(0, 0)]
