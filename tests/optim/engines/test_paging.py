"""Which pages of a paged optimizer are on the device, and when."""

from __future__ import annotations

import functools
import gc

import pytest
import torch
from emulated import Emulated, emulated, paging
from emulated import module as emulator
from optimizers.paging import PAGE, STRICT, everything, landing_fixture, least, parameters, small_pages_fixture, steps  # noqa: F401 - fixtures

from qlora_kernels import PagedAdamW, PagedLion
from qlora_kernels.ops import backends
from qlora_kernels.optim.arena import layout, schedule

CASES = [
    (PagedAdamW, {}, torch.float32),
    (PagedAdamW, {"state_bits": 8, "master_weights": True}, torch.bfloat16),
    (PagedLion, {"max_grad_norm": 0.5}, torch.float16),
]


@functools.cache
def without_budget(case: int) -> tuple[list[bytes], int]:
    """The result of three steps with everything on the device, and the arena's bytes."""
    kind, options, dtype = CASES[case]
    params = parameters(dtype)
    optimizer = kind(params, **options)
    steps(optimizer, params)
    return everything(optimizer, params), optimizer.arena_bytes


@functools.cache
def least_of(case: int) -> int:
    kind, options, dtype = CASES[case]
    return least(kind, parameters(dtype), **options)


@pytest.mark.share(4)
@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: f"case{i}")
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_budget_is_kept_and_every_page_comes_before_it_is_used(landing, case, share):
    kind, options, dtype = CASES[case]
    expected, whole = without_budget(case)
    params = parameters(dtype)
    low = least_of(case)
    budget = int(low + share * (whole - low))
    assert budget < whole
    gc.collect()
    emulator().reset_paging()
    ours = kind(params, page_budget=budget, **options)
    steps(ours, params)  # with faults forbidden: a page that is late ends the test
    ours.page_in()
    assert everything(ours, params) == expected
    pages = paging()
    assert pages["faults"] == 0
    assert pages["resident_peak"] * PAGE <= budget
    assert pages["to_host"] > 0, "what is beyond the budget goes back"
    assert ours.resident_bytes() <= budget


@pytest.mark.share(4)
@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: f"case{i}")
@pytest.mark.parametrize("tight", [True, False])
def test_without_managed_memory_copies_do_the_same(landing, case, tight):
    kind, options, dtype = CASES[case]
    expected, _ = without_budget(case)
    gc.collect()
    emulator().configure(landing=landing, managed=False, **STRICT)
    params = parameters(dtype)
    budget = least_of(case) if tight else None
    ours = kind(params, page_budget=budget, **options)
    steps(ours, params)
    assert everything(ours, params) == expected
    assert "pinned" in ours.paging
    if tight:
        assert ours._engine.arena.native.base != ours._engine.arena.native.states


def test_what_stays_does_not_move(landing):
    params = parameters()
    ours = PagedAdamW(params)
    steps(ours, params, 1)
    moved = paging()
    pages = ours.arena_bytes // PAGE
    assert moved["to_device"] == moved["resident"] == pages
    assert ours.resident_bytes() == ours.arena_bytes
    emulator().reset_paging()
    steps(ours, params, 3, 1)
    moved = paging()
    assert moved["to_device"] == moved["to_host"] == moved["prefetches"] == 0


def test_half_a_budget_moves_only_the_other_half(landing, monkeypatch):
    monkeypatch.setattr(schedule, "LEAST_STRETCH", 1 << 18)
    params = parameters(sizes=(400_000, 400_000))
    budget = 5 << 20
    ours = PagedAdamW(params, page_budget=budget)
    steps(ours, params, 2)
    emulator().reset_paging()
    steps(ours, params, 1, 2)
    ours._engine.arena.native.wait()
    moved = paging()["to_device"] * PAGE
    stays = ours.arena_bytes - moved
    assert stays >= budget // 2 - (1 << 20)
    assert 0 < moved < ours.arena_bytes


def test_page_out_and_page_in(landing):
    params = parameters()
    ours = PagedAdamW(params)
    steps(ours, params, 1)
    for step in range(1, 3):
        ours.page_out()
        assert ours.resident_bytes() == ours._engine.layout.header
        ours.page_in()
        assert ours.resident_bytes() == ours.arena_bytes
        steps(ours, params, 1, step)
    ours.page_out()
    steps(ours, params, 1, 3)
    stayed = parameters()
    reference = PagedAdamW(stayed)
    steps(reference, stayed, 4)
    assert everything(ours, params) == everything(reference, stayed)


def test_page_out_comes_after_page_in(landing):
    params = parameters()
    ours = PagedAdamW(params)
    steps(ours, params, 1)
    ours.page_out()
    ours.page_in()
    ours.page_out()
    ours._engine.arena.native.wait()
    assert paging()["resident"] * PAGE == ours.resident_bytes() == ours._engine.layout.header


def test_stretches_that_share_their_last_page(landing, monkeypatch):
    # Two chunks of 32 KiB have one page of 64, so that some stretches have none of their own to send away.
    monkeypatch.setattr(layout, "PAGE", 65536)
    emulator().configure(landing=landing, forbid_faults=True)
    sizes = (16384,) * 40
    unpaged, params = parameters(sizes=sizes), parameters(sizes=sizes)
    reference = PagedAdamW(unpaged)
    steps(reference, unpaged)
    expected = everything(reference, unpaged)
    del reference
    gc.collect()
    budget = least(PagedAdamW, parameters(sizes=sizes))
    ours = PagedAdamW(params, page_budget=budget)
    emulator().reset_paging()
    for step in range(3):
        steps(ours, params, 1, step)
        assert 0 < ours.resident_bytes() <= budget
    assert any(not s.leave for s in schedule.stretches(ours._engine.layout, budget))
    assert paging()["faults"] == 0
    assert paging()["resident_peak"] * 65536 <= budget
    assert everything(ours, params) == expected


def test_an_arena_larger_than_what_the_card_has_left_has_a_budget():
    params = parameters(sizes=(200_000,) * 3)
    with emulated(**STRICT, free_bytes=4 << 20):
        ours = PagedAdamW(params)
        steps(ours, params, 2)
        ours._engine.arena.native.wait()
        assert ours.arena_bytes > 4 << 20
        assert ours.resident_bytes() <= 2 << 20
        assert paging()["resident_peak"] * PAGE <= 2 << 20


def test_pages_that_the_driver_has_taken_come_again():
    with emulated(**STRICT):
        params = parameters()
        ours = PagedAdamW(params)
        steps(ours, params, 1)
        emulator().configure(**STRICT, free_bytes=1 << 20)
        emulator().reset_paging()
        asked = []
        for step in range(1, 49):
            steps(ours, params, 1, step)
            asked.append(paging()["prefetches"])
        one = asked[-1] // 3
        assert asked == [0] * 15 + [one] * 16 + [2 * one] * 16 + [3 * one], "once in 16 steps"
        assert one > 0
        assert ours.resident_bytes() == ours.arena_bytes


def test_a_forbidden_access_is_an_error():
    # Checks the check itself: a step whose pages were never prefetched.
    with emulated(**STRICT):
        params = parameters()
        ours = PagedAdamW(params)
        steps(ours, params, 1)
        ours.page_out()
        engine = ours._engine
        plan = [(0, engine.layout.chunk_count, [], [], [], True)]
        engine.arena.native.plan(plan)
        ours.state_dict()
        engine.arena.native.wait()
        with pytest.raises(RuntimeError, match="of managed memory, which is on the host"):
            steps(ours, params, 1, 1)
    with emulated():
        emulator().reset_paging()
        params = parameters()
        ours = PagedAdamW(params)
        steps(ours, params, 1)
        ours.page_out()
        ours._engine.arena.native.plan([(0, ours._engine.layout.chunk_count, [], [], [], True)])
        steps(ours, params, 1, 1)
        assert paging()["faults"] > 0


def test_a_group_added_later_grows_the_arena():
    with emulated(**STRICT):
        params = parameters()
        ours = PagedAdamW(params[:3])
        steps(ours, params[:3], 2)
        before = everything(ours, params[:3])
        small = ours.arena_bytes
        ours.add_param_group({"params": params[3:], "lr": 0.5})
        assert ours.arena_bytes > small
        assert everything(ours, params[:3]) == before
        gc.collect()
        steps(ours, params, 1, 2)
        assert paging()["resident"] * PAGE == ours.arena_bytes, "the smaller one has gone"
        emulator().configure(managed_limit=1 << 16, **STRICT)
        now = everything(ours, params)
        extra = torch.nn.Parameter(torch.zeros(100_000))
        with pytest.raises(MemoryError):
            ours.add_param_group({"params": [extra]})
        assert len(ours.param_groups) == 2
        assert everything(ours, params) == now


def test_states_outlive_their_optimizer():
    with emulated():
        params = parameters()
        ours = PagedAdamW(params)
        steps(ours, params, 1)
        kept = ours.state[params[0]]["exp_avg"]
        value = kept.clone()
        del ours
        gc.collect()
        parameters(sizes=(1 << 20,))
        assert torch.equal(kept, value)


def test_state_dicts_go_between_devices():
    cpu_params, params = parameters(), parameters()
    on_cpu = PagedAdamW(cpu_params, lr=0.01)
    steps(on_cpu, cpu_params, 2)
    with emulated(**STRICT):
        ours = PagedAdamW(params)
        with torch.no_grad():
            for p, q in zip(params, cpu_params):
                p.copy_(q)
        ours.load_state_dict(on_cpu.state_dict())
        assert isinstance(backends.forced_backend(), Emulated)
        steps(ours, params, 1, 2)
        there = everything(ours, params)
    steps(on_cpu, cpu_params, 1, 2)
    assert there == everything(on_cpu, cpu_params)
