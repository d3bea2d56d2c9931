"""What a paged optimizer has on the device, and when: on the emulator, which knows on which side each page lies."""

from __future__ import annotations

import contextlib
import copy
import gc
from types import SimpleNamespace

import pytest
import torch
from emulated import Emulated, counters, emulated, paging
from emulated import module as emulator
from optimizer_runs import bits, refused

from qlora_kernels import PagedAdamW, PagedLion
from qlora_kernels.ops import backends
from qlora_kernels.optim.arena import layout, schedule

#: Small ones, so that small arenas have many.
PAGE = 4096
LANDINGS = ("earliest", "latest", "random")
STRICT = {"forbid_faults": True, "page_bytes": PAGE}


def parameters(dtype=torch.float32, sizes=(70_000, 10, 300, 40_000, 9_000, 70_001)):
    generator = torch.Generator().manual_seed(2)
    return [torch.nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for n in sizes]


def steps(optimizer, params, count=3, first=0):
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def everything(optimizer, params):
    """Parameters and states, as bytes."""
    optimizer.state_dict()  # waits for what is under way
    tensors = [t for p in params for t in (p.detach(), *optimizer.state[p].values())]
    return [t.reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors]


def least(kind, params, **options):
    """The least budget that a step is possible with."""
    probe = kind(params, page_budget=1, **options)
    with pytest.raises(ValueError, match=r"page_budget should be at least (\d+) bytes") as raised:
        steps(probe, params, 1)
    return int(str(raised.value).split("at least ")[1].split()[0])


@contextlib.contextmanager
def read_nothing():
    """No tensor is read: on a card that ends the capture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "item", lambda _: pytest.fail("the device was read"))
        yield


@contextlib.contextmanager
def capture():
    """The caller's stream is being captured."""
    emulator().configure(capturing=True, **STRICT)
    backends.forced_backend().captures = True
    try:
        yield
    finally:
        backends.forced_backend().captures = False
        emulator().configure(**STRICT)


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch):
    monkeypatch.setattr(layout, "PAGE", PAGE)


@pytest.fixture(params=LANDINGS)
def landing(request):
    with emulated("forward", landing=request.param, **STRICT):
        gc.collect()
        emulator().reset_paging()
        assert paging()["resident"] == 0, "arenas are freed with their optimizers"
        yield request.param


CASES = [
    (PagedAdamW, {}, torch.float32),
    (PagedAdamW, {"state_bits": 8, "master_weights": True}, torch.bfloat16),
    (PagedLion, {"max_grad_norm": 0.5}, torch.float16),
]


@pytest.mark.share(4)
@pytest.mark.parametrize(("kind", "options", "dtype"), CASES)
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_budget_is_kept_and_every_page_comes_before_it_is_used(landing, kind, options, dtype, share):
    plain = parameters(dtype)
    reference = kind(plain, **options)
    steps(reference, plain)
    expected = everything(reference, plain)
    whole = reference.arena_bytes
    del reference
    gc.collect()

    params = parameters(dtype)
    low = least(kind, parameters(dtype), **options)
    budget = int(low + share * (whole - low))
    assert budget < whole
    emulator().reset_paging()
    ours = kind(params, page_budget=budget, **options)
    steps(ours, params)  # with faults forbidden: a page that is late ends the test
    ours.page_in()
    assert everything(ours, params) == expected
    found = paging()
    assert found["faults"] == 0
    assert found["resident_peak"] * PAGE <= budget
    assert found["to_host"] > 0, "what is beyond the budget goes back"
    assert ours.resident_bytes() <= budget


def test_what_stays_does_not_move(landing):
    params = parameters()
    ours = PagedAdamW(params)
    steps(ours, params, 1)
    found = paging()
    pages = ours.arena_bytes // PAGE
    assert found["to_device"] == found["resident"] == pages
    assert ours.resident_bytes() == ours.arena_bytes
    emulator().reset_paging()
    steps(ours, params, 3, 1)
    found = paging()
    assert found["to_device"] == found["to_host"] == found["prefetches"] == 0


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
    plain = parameters()
    reference = PagedAdamW(plain)
    steps(reference, plain, 4)
    assert everything(ours, params) == everything(reference, plain)


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
    plain, params = parameters(sizes=sizes), parameters(sizes=sizes)
    reference = PagedAdamW(plain)
    steps(reference, plain)
    expected = everything(reference, plain)
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
    # The check of the check: a step whose pages nobody has asked for.
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


@pytest.mark.share(4)
@pytest.mark.parametrize(("kind", "options", "dtype"), CASES)
@pytest.mark.parametrize("tight", [True, False])
def test_without_managed_memory_copies_do_the_same(landing, kind, options, dtype, tight):
    plain = parameters(dtype)
    reference = kind(plain, **options)
    steps(reference, plain, 4)
    emulator().configure(landing=landing, managed=False, **STRICT)
    params = parameters(dtype)
    budget = least(kind, parameters(dtype), **options) if tight else None
    ours = kind(params, page_budget=budget, **options)
    steps(ours, params, 4)
    assert everything(ours, params) == everything(reference, plain)
    assert "pinned" in ours.paging
    if tight:
        assert ours._engine.arena.native.base != ours._engine.arena.native.states


def test_a_step_is_one_launch_however_many_tensors_there_are():
    with emulated():
        for options, launches in (({}, 1), ({"max_grad_norm": 1.0}, 2), ({"skip_nonfinite": True}, 2)):
            for sizes in ((100,), (100,) * 60):
                params = parameters(sizes=sizes)
                ours = PagedAdamW(params, **options)
                steps(ours, params, 1)
                emulator().reset_counters()
                steps(ours, params, 1, 1)
                assert counters()["launches"] == launches


def test_a_captured_step_needs_everything_on_the_device():
    with emulated(**STRICT):
        params, small = parameters(), parameters()
        ours = PagedAdamW(params)
        paged = PagedAdamW(small, page_budget=least(PagedAdamW, parameters()))
        saved = PagedAdamW(params).state_dict()
        with capture():
            with refused(ours, RuntimeError, "there are none yet, .* take a step before"):
                steps(ours, params, 1)
            ours.load_state_dict(saved)
        steps(ours, params, 1)
        steps(paged, small, 1)
        late = torch.nn.Parameter(torch.ones(300))
        with capture():
            with pytest.raises(RuntimeError, match="set no page_budget"):
                steps(paged, small, 1)
            for action in (
                lambda: ours.add_param_group({"params": [late]}),
                lambda: PagedAdamW(params).step(),
            ):
                with refused(ours, RuntimeError, "not for these parameters: take a step before"), read_nothing():
                    action()
            steps(ours, params, 1, 1)
        # A graph copies its settings from memory that the host can change.
        ours.param_groups[0]["lr"] = 0.5
        ours.refresh()
        source, there = ours._engine._captured["groups"][0]
        assert source[0, 0] == 0.5
        assert there[0, 0] == 1e-3


def test_the_emulator_has_no_memory_in_a_capture():
    for managed in (True, False):
        with emulated(capturing=True, managed=managed), pytest.raises(RuntimeError, match="StreamCaptureUnsupported"):
            emulator().Arena(1 << 16, 4096, 0 if managed else 4096, 0)


def test_what_is_no_lack_of_memory_is_not_called_so():
    params = parameters(sizes=(100,))
    with emulated():
        for message, error in (
            ("csrc/cuda/device/memory.cuh:30: cudaMallocManaged(&memory, bytes): cudaErrorLaunchFailure", RuntimeError),
            ("csrc/cuda/device/memory.cuh:30: cudaErrorIllegalAddress: an illegal memory access", RuntimeError),
            ("csrc/cuda/device/memory.cuh:30: cudaErrorMemoryAllocation: out of memory", MemoryError),
        ):

            def fail(*_, message=message):
                raise RuntimeError(message)

            backends.forced_backend().kernels = SimpleNamespace(**{**vars(emulator()), "Arena": fail})
            with pytest.raises(error, match=message.split()[-1]):
                steps(PagedAdamW(params), params, 1)


def broken(**options):
    """An optimizer of which a step has gone through all stretches but the last, with the states from before it."""
    params = parameters()
    ours = PagedAdamW(params, page_budget=least(PagedAdamW, parameters()), **options)
    steps(ours, params, 2)
    saved, values = copy.deepcopy(ours.state_dict()), [p.detach().clone() for p in params]
    native, plan = ours._engine.arena.native, schedule.stretches(ours._engine.layout, ours._settings["page_budget"])
    native.wait()
    native.plan([(s.begin, s.end, s.arrive if s is not plan[-1] else (), (), (), s.stays) for s in plan])
    with pytest.raises(RuntimeError, match="of managed memory, which is on the host"):
        steps(ours, params, 1, 2)
    assert not torch.equal(params[0], values[0])
    assert torch.equal(params[-1][-5:], values[-1][-5:])
    return params, ours, saved, values


def test_a_step_that_fails_midway_is_not_gone_on_from(landing, tmp_path):
    params, ours, saved, values = broken(master_weights=True)
    before = [bits(p) for p in params]
    for action in (
        ours.step,
        ours.page_in,
        ours.page_out,
        ours.state_dict,
        ours.torch_state_dict,
        lambda: ours.save(tmp_path / "file"),
        lambda: copy.deepcopy(ours),
        lambda: ours.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]}),
    ):
        with pytest.raises(RuntimeError, match=r"a step failed midway, .* load a saved state dict, or make a new"):
            action()
    assert [bits(p) for p in params] == before
    assert len(ours.param_groups) == 1
    assert not any(tmp_path.iterdir())
    with pytest.raises(ValueError, match="another model"):
        ours.load_state_dict({"state": {}, "param_groups": []})
    with pytest.raises(RuntimeError, match="a step failed midway"):
        ours.step()
    # A load makes the arena anew.
    ours.load_state_dict(saved)
    with torch.no_grad():
        for p, value in zip(params, values):
            p.copy_(value)
    steps(ours, params, 1, 2)
    plain = parameters()
    reference = PagedAdamW(plain)
    steps(reference, plain)
    assert everything(ours, params) == everything(reference, plain)


def test_a_step_that_has_failed_midway_can_begin_anew(landing):
    params, ours, saved, _ = broken()
    ours.load_state_dict({"state": {}, "param_groups": saved["param_groups"]})
    steps(ours, params, 1)
    assert all(ours.state[p]["step"] == 1 for p in params)


def test_a_step_that_fails_before_anything_is_launched_breaks_nothing(landing):
    params = parameters()
    ours = PagedAdamW(params, page_budget=least(PagedAdamW, parameters()))
    steps(ours, params, 2)
    before = everything(ours, params)
    native = ours._engine.arena.native
    plan = schedule.stretches(ours._engine.layout, ours._settings["page_budget"])
    native.wait()
    native.plan([(s.begin, s.end, s.arrive if s is not plan[0] else (), (), (), s.stays) for s in plan])
    with pytest.raises(RuntimeError, match="of managed memory, which is on the host"):
        steps(ours, params, 1, 2)
    assert everything(ours, params) == before


def test_no_memory_for_the_arena():
    with emulated(managed_limit=1 << 20):
        params = parameters()
        before = [p.detach().clone() for p in params]
        ours = PagedAdamW(params)
        with pytest.raises(MemoryError, match=r"need \d+ bytes .* of managed memory.* state_bits=8 .* page_file"):
            steps(ours, params, 1)
        assert all(torch.equal(p, b) for p, b in zip(params, before))
        assert not ours.state
        emulator().configure()
        steps(ours, params, 1)
        assert ours.state[params[0]]["step"] == 1


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
