"""The CUDA engine on the emulator: launches, captures, and steps and allocations that fail."""

from __future__ import annotations

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from emulated import counters, emulated
from emulated import module as emulator
from optimizers.paging import STRICT, everything, landing_fixture, least, parameters, small_pages_fixture, steps  # noqa: F401 - fixtures
from optimizers.runs import bits, refused

from qlora_kernels import PagedAdamW
from qlora_kernels.ops import backends
from qlora_kernels.optim.arena import schedule

# ------------------------------------------------------------------------------------------------ launches and captures


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


def test_a_captured_step_needs_everything_on_the_device():
    with emulated(**STRICT):
        params, small = parameters(), parameters()
        ours = PagedAdamW(params)
        paged = PagedAdamW(small, page_budget=least(PagedAdamW, parameters()))
        saved = PagedAdamW(params).state_dict()
        with capture():
            with refused(ours, RuntimeError, "have yet to be allocated: take a step before"):
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
                with refused(ours, RuntimeError, "have yet to be allocated: take a step before"), read_nothing():
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


# ------------------------------------------------------------------------------------------------------------- failures


def broken(**options):
    """An optimizer whose step failed before the last stretch, and the states from before it."""
    params = parameters()
    ours = PagedAdamW(params, page_budget=least(PagedAdamW, parameters()), **options)
    steps(ours, params, 2)
    saved, values = copy.deepcopy(ours.state_dict()), [p.detach().clone() for p in params]
    native, plan = ours._engine.arena.native, schedule.stretches(ours._engine.layout, ours._options.page_budget)
    native.wait()
    native.plan([(s.begin, s.end, s.arrive if s is not plan[-1] else (), (), (), s.stays) for s in plan])
    with pytest.raises(RuntimeError, match="of managed memory, which is on the host"):
        steps(ours, params, 1, 2)
    assert not torch.equal(params[0], values[0])
    assert torch.equal(params[-1][-5:], values[-1][-5:])
    return params, ours, saved, values


def test_nothing_continues_from_a_step_that_failed_midway(landing, tmp_path):
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
    # A load makes a new arena.
    ours.load_state_dict(saved)
    with torch.no_grad():
        for p, value in zip(params, values):
            p.copy_(value)
    steps(ours, params, 1, 2)
    untouched = parameters()
    reference = PagedAdamW(untouched)
    steps(reference, untouched)
    assert everything(ours, params) == everything(reference, untouched)


def test_after_a_step_that_failed_midway_states_can_start_from_zero(landing):
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
    plan = schedule.stretches(ours._engine.layout, ours._options.page_budget)
    native.wait()
    native.plan([(s.begin, s.end, s.arrive if s is not plan[0] else (), (), (), s.stays) for s in plan])
    with pytest.raises(RuntimeError, match="of managed memory, which is on the host"):
        steps(ours, params, 1, 2)
    assert everything(ours, params) == before


def test_no_memory_for_the_arena():
    with emulated(managed_limit=1 << 19):
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


def test_other_errors_are_not_reported_as_a_lack_of_memory():
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
