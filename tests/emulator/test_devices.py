"""Two devices: calls concern the one that they were told, whichever is current, and leave no other trace.

Everything else on the emulator runs on device 1, too, while device 0 is current (tests/support/emulated.py).
"""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from emulated import Emulated, emulated, module
from optimizers.paging import parameters, steps

from qlora_kernels import PagedAdamW, linear, linear_grouped, quantize, quantize_stack
from qlora_kernels.ops import backends

WITHOUT_GUARD = {
    "launch": "a launch for device 1, while device 0 is current",
    "memory": "an access on device 0 to memory that belongs to device 1",
    "managed memory": "an access on device 0 to memory that belongs to device 1",
    "prefetch": "a prefetch for device 1, while device 0 is current",
    "memset": "a memset for device 1, while device 0 is current",
    "event": "an event for device 1, while device 0 is current",
    "another device's event": "an event is recorded in a stream of another device",
    "another device's stream": "waiting in a stream of device 0 for device 1",
    "default stream": "waiting for device 1, while device 0 is current",
}


def test_every_call_has_its_message():
    assert module().device_samples() == list(WITHOUT_GUARD)


@pytest.mark.parametrize("name", WITHOUT_GUARD)
def test_a_missing_guard_is_found(name):
    with emulated(landing="earliest"):
        with pytest.raises(module().EmulatorError, match=WITHOUT_GUARD[name]):
            module().run_device_sample(name, guarded=False)
        module().run_device_sample(name, guarded=True)
        assert module().current_device() == 0


# --------------------------------------------------------------------------------------------- what the kernels offer


def quantization():
    for dtype in (torch.float32, torch.bfloat16):
        quantize(torch.randn(16, 128).to(dtype))
        quantize(torch.randn(16, 128).to(dtype), double_quant=False)


def dequantization():
    weight = quantize(torch.randn(16, 128))
    weight.dequantize(torch.float32)
    weight.dequantize(torch.bfloat16)


def products():
    weight = quantize(torch.randn(16, 128))
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (1, 20, 70):
            x = torch.randn(rows, 128).to(dtype).requires_grad_()
            A, B = (torch.randn(s).to(dtype).requires_grad_() for s in ((16, 128), (16, 16)))
            linear(x, weight, lora_A=A, lora_B=B, dropout=0.25).sum().backward()


def products_of_experts():
    stack = quantize_stack(torch.randn(3, 16, 128))
    offsets = torch.tensor([0, 5, 5, 70])
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(70, 128).to(dtype).requires_grad_()
        A, B = (torch.randn(s).to(dtype).requires_grad_() for s in ((3, 16, 128), (3, 16, 16)))
        linear_grouped(x, stack, offsets, lora_A=A, lora_B=B).sum().backward()


def optimizer():
    params = parameters(sizes=(9_000, 300))
    paged = PagedAdamW(params, max_grad_norm=1.0)
    steps(paged, params, 2)
    paged.page_out()
    paged.page_in()
    steps(paged, params, 2)
    paged.load_state_dict(paged.state_dict())
    steps(paged, params, 1)


def arena_that_does_not_fit():
    params = parameters(sizes=(300,))
    with pytest.raises(MemoryError):
        steps(PagedAdamW(params), params, 1)


CALLS = {
    "quantization": (quantization, {}),
    "dequantization": (dequantization, {}),
    "products": (products, {}),
    "products of experts": (products_of_experts, {}),
    "optimizer": (optimizer, {}),
    "optimizer without managed memory": (optimizer, {"managed": False}),
    "arena that does not fit": (arena_that_does_not_fit, {"managed_limit": 1}),
}


@pytest.fixture(params=CALLS, name="call")
def call_fixture(request):
    call, options = CALLS[request.param]
    gc.collect()
    with emulated(**options):
        yield call


def test_the_current_device_is_restored(call):
    call()
    gc.collect()
    assert module().current_device() == 0
    assert module().contexts() == [0, 1]


def test_a_device_that_nothing_uses_gets_no_context(call):
    """To make device 0 current again would create one, on a card that may be somebody else's."""
    module().forget_devices()
    call()
    gc.collect()
    assert module().contexts() == [1]


@pytest.mark.parametrize("managed", [True, False])
@pytest.mark.parametrize("name", ["wait", "to_host", "page_in", "page_out", "plan", "free"])
def test_no_call_of_an_arena_creates_another_context(name, managed):
    """Each in a thread that has used no device."""
    with emulated(managed=managed):
        staging = 0 if managed else 4096
        arena = module().Arena(8192, 4096, staging, 1)
        stretches = [(0, 0, [(4096, 8192)], [], [] if managed else [0], True)]
        arena.plan(stretches)
        arguments = {"plan": (stretches,), "page_out": (1, 0), "to_host": (1, 0)}.get(name, ())
        module().forget_devices()
        if name != "free":
            getattr(arena, name)(*arguments)
            assert module().contexts() == [1]
            module().forget_devices()
        del arena
        assert module().contexts() == [1]


@pytest.mark.parametrize("used", [False, True])
def test_a_new_thread_gets_its_device_back_if_that_has_a_context(used):
    """A thread that has used no device is told that device 0 is current."""
    with emulated():
        if not used:
            module().forget_devices()

        def call():
            assert module().current_device() == 0
            module().run_device_sample("launch", guarded=True)
            return module().current_device(), module().contexts()

        with ThreadPoolExecutor(1) as threads:
            assert threads.submit(call).result() == ((0, [0, 1]) if used else (1, [1]))


def test_a_device_that_does_not_exist():
    absent = Emulated(module(), ordinal=2)
    with emulated(), backends.forced(absent), pytest.raises(RuntimeError, match="invalid device ordinal 2"):
        quantization()


@pytest.mark.parametrize(
    ("version", "found"),
    [
        (12040, "the NVIDIA driver supports CUDA 12.4"),
        (12090, "the NVIDIA driver supports CUDA 12.9"),
        (0, "there is no NVIDIA driver"),
    ],
)
def test_a_driver_that_is_too_old_is_named_with_the_one_that_is_needed(call, version, found):
    module().configure(driver_version=version)
    with pytest.raises(RuntimeError) as raised:
        call()
    assert str(raised.value) == (
        f"{found}, and these kernels, built with CUDA 13.0, need one that supports CUDA 13.0 or later; "
        "install a newer driver, or build for an older CUDA"
    )


def test_a_newer_driver_will_do():
    with emulated(driver_version=13020):
        quantization()
