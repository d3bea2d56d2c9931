"""A paged optimizer's memory, streams and graphs on a card, with a few MiB of managed memory at a time.

Tests that the emulator can run as well run on both.
"""

from __future__ import annotations

import ctypes
import gc
import operator

import pytest
import torch
from emulated import emulated

from qlora_kernels import PagedAdamW, PagedLion
from qlora_kernels.ops import backends
from qlora_kernels.optim.arena import layout, schedule

#: On a card, 3.5 to 7 MiB of states; with the emulator's smaller pages, fewer are as many.
SIZES = {"cuda": (600_000, 10, 300_001), "cpu": (120_000, 10, 40_001)}
PAGE = 4096
#: Clocks for which the card is kept busy: some 50 ms, in which the host can send a dozen steps.
BUSY = 100_000_000

CASES = [
    (PagedAdamW, {}, torch.float32),
    (PagedAdamW, {"state_bits": 8, "master_weights": True, "skip_nonfinite": True}, torch.bfloat16),
    (PagedLion, {"max_grad_norm": 0.5}, torch.float16),
]


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Where the parameters are: on the CPU, for the emulator, or on a card."""
    monkeypatch.delenv("QLORA_KERNELS_MANAGED", raising=False)
    if request.param == "cuda":
        yield "cuda"
        return
    monkeypatch.setattr(layout, "PAGE", PAGE)
    with emulated(forbid_faults=True, page_bytes=PAGE):
        yield "cpu"


def parameters(device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    return [torch.nn.Parameter(torch.randn(n, generator=generator).to(device, dtype)) for n in SIZES[device]]


def gradients(params, step):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator).to(p.device, p.dtype) for p in params]


def steps(optimizer, params, count=3, first=0):
    for step in range(first, first + count):
        for p, grad in zip(params, gradients(params, step)):
            p.grad = grad
        optimizer.step()


def everything(optimizer, params):
    """Parameters and states, as bytes."""
    optimizer.state_dict()  # waits for copies in flight
    tensors = [t for p in params for t in (p.detach(), *optimizer.state[p].values())]
    return [t.cpu().reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors]


def expected(kind, device, dtype, count=3, **options):
    """The result of steps without a budget, and the arena's bytes."""
    params = parameters(device, dtype)
    unbudgeted = kind(params, **options)
    steps(unbudgeted, params, count)
    assert unbudgeted.paging == "managed memory"
    return everything(unbudgeted, params), unbudgeted.arena_bytes


# ------------------------------------------------------------------------------------------------------------- pages


@pytest.mark.parametrize(("kind", "options", "dtype"), CASES)
def test_a_budget_gives_the_same_bits(device, kind, options, dtype):
    wanted, whole = expected(kind, device, dtype, **options)
    params = parameters(device, dtype)
    ours = kind(params, page_budget=whole * 2 // 3, **options)
    steps(ours, params)
    assert ours.resident_bytes() <= whole * 2 // 3
    assert len(schedule.stretches(ours._engine.layout, whole * 2 // 3)) > 3
    assert everything(ours, params) == wanted


@pytest.mark.parametrize(("kind", "options", "dtype"), CASES)
@pytest.mark.parametrize("share", [None, 2 / 3])
def test_pinned_memory_gives_the_same_bits(device, monkeypatch, kind, options, dtype, share):
    wanted, whole = expected(kind, device, dtype, **options)
    monkeypatch.setenv("QLORA_KERNELS_MANAGED", "0")
    params = parameters(device, dtype)
    ours = kind(params, page_budget=None if share is None else int(whole * share), **options)
    steps(ours, params)
    assert "pinned" in ours.paging
    assert "QLORA_KERNELS_MANAGED=0" in ours.paging
    assert everything(ours, params) == wanted
    state = next(iter(ours.state.values()))
    assert not state["exp_avg_code" if "state_bits" in options else "exp_avg"].is_cuda
    if device == "cuda":
        assert state["exp_avg_code" if "state_bits" in options else "exp_avg"].is_pinned()
    ours.page_out()
    ours.page_in()
    assert ours.resident_bytes() == ours._engine.layout.header


def test_pages_go_and_come(device):
    wanted, whole = expected(PagedAdamW, device, torch.float32)
    params = parameters(device)
    ours = PagedAdamW(params)
    for step in range(3):
        steps(ours, params, 1, step)
        assert ours.resident_bytes() == ours.arena_bytes == whole
        ours.page_out()
        assert ours.resident_bytes() == ours._engine.layout.header
        if step == 1:
            ours._engine.arena.native.wait()
            ours.page_in()
            assert ours.resident_bytes() == whole  # and the next step waits until it is true
    assert everything(ours, params) == wanted


def asked_for(address: int, count: int) -> int:
    """Where the driver was last asked to move these bytes: the card's number, or -1 for the host."""
    where = ctypes.c_int(-3)
    last_prefetch_location = 4  # CU_MEM_RANGE_ATTRIBUTE_LAST_PREFETCH_LOCATION, cuda.h
    status = ctypes.CDLL("libcuda.so.1").cuMemRangeGetAttribute(
        ctypes.byref(where),
        ctypes.c_size_t(4),
        ctypes.c_int(last_prefetch_location),
        ctypes.c_uint64(address),
        ctypes.c_size_t(count),
    )
    assert status == 0
    return where.value


@pytest.mark.gpu
def test_the_driver_is_asked_to_move_pages():
    params = parameters("cuda")
    ours = PagedAdamW(params)
    steps(ours, params, 1)
    layout, native = ours._engine.layout, ours._engine.arena.native
    states = (native.states + layout.header, layout.nbytes - layout.header)
    here = torch.cuda.current_device()
    torch.cuda.synchronize()
    assert asked_for(*states) == here
    ours.page_out()
    native.wait()
    assert asked_for(*states) == -1
    assert asked_for(native.header, layout.header) == here, "the header stays"
    ours.page_in()
    native.wait()
    assert asked_for(*states) == here


# ----------------------------------------------------------------------------------------------- states as tensors


@pytest.mark.parametrize("paged_out", [False, True])
def test_torch_reads_and_writes_states(device, paged_out):
    params, twins = parameters(device), parameters(device)
    ours, reference = PagedAdamW(params), torch.optim.AdamW(twins)
    for optimizer, group in ((ours, params), (reference, twins)):
        steps(optimizer, group, 2)
        if paged_out and optimizer is ours:
            ours.page_out()
        for p in group:
            state = optimizer.state[p]
            assert state["exp_avg"].device == p.device
            state["exp_avg"].mul_(-0.5)
            state["exp_avg_sq"].add_(0.25)
        steps(optimizer, group, 1, 2)
    for p, q in zip(params, twins):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(ours.state[p][name], reference.state[q][name], rtol=1e-5, atol=1e-6)
        assert ours.state[p]["step"].item() == 3


@pytest.mark.parametrize("managed", ["1", "0"])
def test_states_outlive_their_optimizer(device, monkeypatch, managed):
    monkeypatch.setenv("QLORA_KERNELS_MANAGED", managed)
    params = parameters(device)
    ours = PagedAdamW(params)
    steps(ours, params, 2)
    ours.state_dict()
    kept, count = ours.state[params[2]]["exp_avg"], ours.state[params[2]]["step"]
    value = kept.clone()
    del ours
    gc.collect()
    others = parameters(device)
    steps(PagedAdamW(others), others, 1)  # whose memory would be the same, had it been given back
    assert torch.equal(kept, value)
    assert count.item() == 2
    assert value.any()


@pytest.mark.gpu
@pytest.mark.parametrize("managed", ["1", "0"])
def test_memory_is_given_back(monkeypatch, managed):
    monkeypatch.setenv("QLORA_KERNELS_MANAGED", managed)

    def live_and_go() -> int:
        params = parameters("cuda")
        ours = PagedAdamW(params)
        steps(ours, params, 1)
        return ours.arena_bytes

    def free() -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    size = live_and_go()
    before = free()
    for _ in range(20):
        live_and_go()
        free()
    assert before - free() < 4 * size, "20 arenas have come and gone"


# ------------------------------------------------------------------------------------------------------------ streams


def ready(count, **options):
    """Parameters with gradients of zeros on the card, their optimizer, and the gradients of some steps."""
    params = parameters("cuda")
    for p in params:
        p.grad = torch.zeros_like(p)
    coming = [gradients(params, step) for step in range(count)]
    return params, PagedAdamW(params, **options), coming


@pytest.mark.gpu
@pytest.mark.parametrize("managed", ["1", "0"])
@pytest.mark.parametrize("share", [None, 2 / 3])
def test_the_callers_stream_is_used(monkeypatch, managed, share):
    wanted, whole = expected(PagedAdamW, "cuda", torch.float32, max_grad_norm=1.0)
    monkeypatch.setenv("QLORA_KERNELS_MANAGED", managed)
    budget = None if share is None else int(whole * share)
    params, ours, coming = ready(3, max_grad_norm=1.0, page_budget=budget)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        for grads in coming:
            # On another stream, a step would go by the gradients before these.
            torch.cuda._sleep(BUSY)
            for p, grad in zip(params, grads):
                p.grad.copy_(grad)
            ours.step()
            for p in params:
                p.grad.zero_()  # nor may it read them later
    side.synchronize()
    assert everything(ours, params) == wanted


@pytest.mark.gpu
def test_two_optimizers_on_two_streams():
    wanted, _ = expected(PagedAdamW, "cuda", torch.float32, max_grad_norm=1.0)
    both = [ready(3, max_grad_norm=1.0) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in both]
    torch.cuda.synchronize()
    for step in range(3):
        for (params, ours, coming), stream in zip(both, streams):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(BUSY // 4)
                for p, grad in zip(params, coming[step]):
                    p.grad.copy_(grad)
                ours.step()
    torch.cuda.synchronize()
    for params, ours, _ in both:
        assert everything(ours, params) == wanted


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"state_bits": 8, "max_grad_norm": 0.5, "skip_nonfinite": True}])
def test_a_step_does_not_wait_for_the_device(options):
    params, ours, coming = ready(4, **options)
    if options:  # what torch.amp.GradScaler says
        ours.grad_scale, ours.found_inf = torch.full((1,), 1024.0).cuda(), torch.zeros(1).cuda()

    def step(i):
        # New gradients and another rate: both tables are sent again.
        for p, grad in zip(params, coming[i]):
            p.grad = grad
        ours.param_groups[0]["lr"] = 0.1**i
        ours.step()

    for i in range(3):
        step(i)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(10 * BUSY)
        step(3)
        done = torch.cuda.current_stream().query()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert not done
    assert ours.state[params[0]]["step"].item() == 4


# ------------------------------------------------------------------------------------------------------------- graphs


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"state_bits": 8, "max_grad_norm": 0.5, "skip_nonfinite": True}])
def test_a_graph_of_a_step_is_a_step(options):
    params, ours, coming = ready(5, **options)
    ungraphed, eager, same = ready(5, **options)

    def set_gradients(group, grads):
        for p, grad in zip(group, grads):
            p.grad.copy_(grad)

    for optimizer, group, grads in ((ours, params, coming[0]), (eager, ungraphed, same[0])):
        set_gradients(group, grads)
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step()
    assert ours.state[params[0]]["step"].item() == 1, "nothing runs while it is captured"
    for step in range(1, 5):
        for optimizer in (ours, eager):
            optimizer.param_groups[0]["lr"] = 0.1**step
        ours.refresh()
        torch.cuda._sleep(BUSY // 4)  # the next refresh comes while this replay waits
        set_gradients(params, coming[step])
        graph.replay()
    for step in range(1, 5):
        eager.param_groups[0]["lr"] = 0.1**step
        set_gradients(ungraphed, same[step])
        eager.step()
    assert everything(ours, params) == everything(eager, ungraphed)
    assert ours.state[params[0]]["step"].item() == 5
    # An eager step goes on where the graph's have ended.
    set_gradients(params, coming[0])
    set_gradients(ungraphed, same[0])
    ours.step()
    eager.step()
    assert everything(ours, params) == everything(eager, ungraphed)


@pytest.mark.gpu
def test_a_first_step_in_a_capture_is_refused():
    params, ours, coming = ready(1)
    with pytest.raises(RuntimeError, match="take a step before"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        ours.step()
    for p, grad in zip(params, coming[0]):
        p.grad.copy_(grad)
    ours.step()
    wanted, _ = expected(PagedAdamW, "cuda", torch.float32, 1)
    assert everything(ours, params) == wanted


@pytest.mark.gpu
def test_two_graphs_captured_in_a_row():
    params, ours, coming = ready(3)
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    for p, grad in zip(params, coming[0]):
        p.grad.copy_(grad)
    ours.step()
    for graph in graphs:
        with torch.cuda.graph(graph):
            ours.step()
    for graph, grads in zip(graphs, coming[1:]):
        for p, grad in zip(params, grads):
            p.grad.copy_(grad)
        graph.replay()
    wanted, _ = expected(PagedAdamW, "cuda", torch.float32)
    assert everything(ours, params) == wanted


def test_new_settings_wait_for_replays():
    with emulated():
        params = parameters("cpu")
        ours = PagedAdamW(params)
        steps(ours, params, 1)
        backends.forced_backend().captures = True
        steps(ours, params, 1, 1)
        source = ours._engine._captured["groups"][0][0]
        ours.refresh()
        assert backends.forced_backend().waits == 0, "nothing has changed"
        ours.param_groups[0]["lr"] = 0.25
        ours.refresh()
        assert backends.forced_backend().waits == 1
        assert source[0, 0] == 0.25


def test_captures_have_tables_of_their_own():
    with emulated():
        params = parameters("cpu")
        ours = PagedAdamW(params)
        steps(ours, params, 1)
        spare = list(ours._engine._spare["tensors"])
        backends.forced_backend().captures = True
        kept = []
        for step in range(1, 4):
            steps(ours, params, 1, step)
            kept.append([p.grad for p in params])
        tables = [table for table, _ in ours._engine._captured["tensors"]]
        assert all(map(operator.is_, tables, spare)), "pinned before the captures"
        for table, grads in zip(tables, kept):
            assert table.reshape(-1, 2)[:, 1].tolist() == [grad.data_ptr() for grad in grads]
