"""The CUDA kernels on a card, where no default device is set: streams, graphs, devices, and what a card refuses."""

from __future__ import annotations

import pytest
import torch
from contract import make_weight, relative_error
from cuda_code.calls import call_kernels

from bench.emulator import conformance_module
from qlora_kernels import NF4Weight, default_nested_table, linear, ops, quantize
from qlora_kernels.native import extension
from qlora_kernels.ops import backends, dispatcher

#: Clocks for which the card is kept busy: some 50 ms.
BUSY = 100_000_000


def pieces_on_the_cpu(weight: NF4Weight) -> list:
    return [p.cpu() for p in weight.pieces]


@pytest.mark.gpu
def test_the_callers_stream_is_used_and_nothing_waits():
    weight = torch.randn(2048, 2048, dtype=torch.bfloat16, device="cuda")
    expected = quantize(weight.cpu())
    table, stream = default_nested_table("cuda"), torch.cuda.Stream()
    source = torch.zeros_like(weight)

    def there_and_back():
        packed, *rest = ops.quantize_nested(source, table)
        quantized = NF4Weight(packed, *rest, table, weight.shape)
        busy = [not stream.query()]
        dense = quantized.dequantize(torch.bfloat16)
        return quantized, dense, [*busy, not stream.query()]

    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        there_and_back()  # loads the kernels, and gets the stream its memory, in which zeros' results are left
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        # Were a launch on another stream, it would read the weight before this stream has written it.
        torch.cuda._sleep(BUSY)
        source.copy_(weight)
        quantized, dense, busy = there_and_back()
    assert busy == [True, True], "quantize or dequantize has waited for the device"
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(pieces_on_the_cpu(quantized), expected.pieces, strict=True))
    assert torch.equal(dense.cpu(), expected.dequantize(torch.bfloat16))


@pytest.mark.gpu
def test_quantization_and_dequantization_in_a_graph():
    weight = torch.randn(512, 1024, dtype=torch.bfloat16, device="cuda")
    quantize(weight).dequantize(torch.bfloat16)  # loads the modules, makes the table
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        quantized = quantize(weight)
        dense = quantized.dequantize(torch.bfloat16)
    for seed in range(3):
        weight.copy_(torch.randn(512, 1024, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        torch.cuda.synchronize()
        expected = quantize(weight.cpu())
        assert all(torch.equal(a, b) for a, b in zip(pieces_on_the_cpu(quantized), expected.pieces, strict=True))
        assert torch.equal(dense.cpu(), expected.dequantize(torch.bfloat16))


@pytest.mark.gpu
def test_a_layer_with_dropout_in_a_graph():
    weight = make_weight(64, 128).to("cuda")
    x, A, B = (torch.randn(*s, device="cuda").bfloat16() for s in ((20, 128), (4, 128), (64, 4)))
    with torch.no_grad():
        linear(x, weight, None, A, B, dropout=0.5)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = linear(x, weight, None, A, B, dropout=0.5)
        graph.replay()
        first = y.clone()
        graph.replay()
    # Each replay draws a seed of its own.
    assert torch.isfinite(first).all()
    assert not torch.equal(first, y)


@pytest.mark.gpu
def test_the_tensors_device_is_used():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two cards")
    weight = torch.randn(64, 256)
    with torch.cuda.device(0):
        quantized = quantize(weight.to("cuda:1"))
        dense = quantized.dequantize()
        assert torch.cuda.current_device() == 0
    assert dense.device == torch.device("cuda:1")
    assert torch.equal(dense.cpu(), quantize(weight).dequantize())


@pytest.mark.gpu
def test_a_device_that_is_not_there_is_an_exception_and_the_next_call_works():
    weight = torch.randn(8, 64, device="cuda")
    kernels = extension.native().cuda
    with pytest.raises(RuntimeError, match=r"device\.cuh:\d+: cudaErrorInvalidDevice.*failed: cudaSetDevice"):
        address = weight.data_ptr()
        call_kernels(kernels, "quantize", weight=address, packed=address, absmax=address, count=512, device=999)
    assert torch.equal(quantize(weight).dequantize().cpu(), quantize(weight.cpu()).dequantize())


@pytest.mark.gpu
def test_a_bad_weight_is_refused_outside_of_a_graph_and_is_nan_within():
    weight = torch.randn(8, 64, device="cuda")
    quantize(weight).dequantize()
    weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"\(3, 5\)"):
        quantize(weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dense = quantize(weight).dequantize()
    graph.replay()
    assert dense.isnan().any()


# ---------------------------------------------------------------------------------------------------------- the layer


def operands(m, n, k, r, dtype=torch.bfloat16, device="cuda"):
    """x, bias, lora_A and lora_B that ask for gradients, and dy."""
    generator = torch.Generator().manual_seed(m)
    shapes = ((m, k), (n,), (r, k), (n, r), (m, n))
    *leaves, dy = (torch.randn(*shape, generator=generator).to(device, dtype) for shape in shapes)
    return [leaf.requires_grad_() for leaf in leaves], dy


def step(weight, leaves, dy):
    """y and all gradients."""
    y = linear(leaves[0], weight, *leaves[1:], scaling=0.5)
    return (y.detach(), *torch.autograd.grad(y, leaves, dy))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_layer_past_the_dispatcher(monkeypatch, dtype):
    weight, seen, right = make_weight(72, 128), [], dispatcher.is_idle

    def watched(*arguments):
        seen.append(right(*arguments))
        return seen[-1]

    monkeypatch.setattr(dispatcher, "is_idle", watched)
    for m in (3, 20, 70):
        actual = step(weight.to("cuda"), *operands(m, 72, 128, 8, dtype))
        expected = step(weight, *operands(m, 72, 128, 8, dtype, "cpu"))
        for name, one, other in zip(("y", "dx", "dbias", "dA", "dB"), actual, expected, strict=True):
            assert one.is_cuda
            error = relative_error(one.cpu(), other.double())
            assert error < (2e-2 if dtype == torch.bfloat16 else 1e-5), f"{name} M={m} {dtype}: {error:.2e}"
    # Forward and backward of both devices, each by the short way.
    assert seen == [True] * 12


@pytest.mark.gpu
@pytest.mark.parametrize("m", [20, 70])
def test_a_step_of_the_layer_in_a_graph(m):
    n = k = 1088
    card = torch.cuda.get_device_properties(torch.cuda.current_device())
    architecture, room = card.major * 10 + card.minor, card.shared_memory_per_block_optin
    for backward in (False, True):
        plan = extension.native().dispatch(m, n, k, 1, backward, architecture, card.multi_processor_count, room)
        assert plan["splits"] > 1, "of a tile that blocks share, tickets have to be right again at each replay"
    weight = make_weight(n, k).to("cuda")
    leaves, dy = operands(m, n, k, 16)
    eager = [t.clone() for t in step(weight, leaves, dy)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(weight, leaves, dy)  # autograd's first time on another stream
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(weight, leaves, dy)
    for _ in range(3):
        for tensor in captured:
            tensor.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.gpu
@pytest.mark.parametrize(("here", "there"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_operands_on_two_devices_are_refused_and_the_next_call_works(here, there):
    host = make_weight(16, 64)
    weight, n = host.to(here), 16
    (x, bias, A, B), dy = operands(3, n, 64, 4, torch.float32, here)
    expected = [t.cpu() for t in step(weight, [x, bias, A, B], dy)]
    dense = host.dequantize()
    moved = NF4Weight(*(p.to(there) if i == 1 else p for i, p in enumerate(weight.pieces)), weight.shape)
    table, zeros = default_nested_table(there), torch.zeros(n, 64, device=there)
    refused = {
        "x": lambda: linear(x.to(there), weight, bias, A, B),
        "bias": lambda: linear(x, weight, bias.to(there), A, B),
        "lora_A": lambda: linear(x, weight, bias, A.to(there), B),
        "lora_B": lambda: linear(x, weight, bias, A, B.to(there)),
        "the weight": lambda: linear(x, host.to(there), bias, A, B),
        "a piece of the weight": lambda: linear(x, moved, bias, A, B),
        "a piece to dequantize": lambda: moved.dequantize(),
        "out": lambda: weight.dequantize(out=zeros),
        "nested_table": lambda: quantize(dense.to(here), nested_table=table),
        "dy": lambda: ops.linear_backward(
            dy.to(there), *weight.pieces, 64, None, None, None, None, 1.0, 0.0, None, True, False, False
        ),
    }
    for name, call in refused.items():
        with pytest.raises(ValueError, match=r"is on (cpu|cuda:\d+), but .* on (cpu|cuda:\d+)"):
            call()
        assert not zeros.any(), name
        again = step(weight, [x, bias, A, B], dy)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(again, expected, strict=True)), name


@pytest.mark.gpu
def test_a_build_without_kernels_for_the_card_says_so_and_the_next_call_works(monkeypatch):
    weight, native = torch.randn(8, 64, device="cuda"), extension.native()
    built = native.build_info()
    other = "80" if torch.cuda.get_device_capability()[0] >= 9 else "90a"
    try:
        for archs, words in (("", "has no CUDA kernels"), (other, f"has kernels for sm_{other} alone")):
            with monkeypatch.context() as patch:
                patch.setattr(native, "build_info", lambda archs=archs: {**built, "cuda_archs": archs})
                backends.cuda.cache_clear()
                with pytest.raises(RuntimeError, match=f"is of architecture sm_.*{words}; build it for this card"):
                    quantize(weight)
    finally:
        backends.cuda.cache_clear()
    assert torch.equal(quantize(weight).dequantize().cpu(), quantize(weight.cpu()).dequantize())


#: Threads of a block, and bytes of shared memory.
BAD_LAUNCHES = {"threads": (2048, 0), "shared memory": (32, 1 << 20)}


@pytest.mark.gpu
@pytest.mark.parametrize("case", BAD_LAUNCHES)
def test_a_launch_that_fails_is_an_exception_and_the_next_call_works(case):
    threads, shared_bytes = BAD_LAUNCHES[case]
    weight, queue = torch.randn(8, 64, device="cuda"), (0, torch.cuda.current_stream().cuda_stream)
    with pytest.raises(RuntimeError, match=r"device\.cuh:\d+: cudaErrorInvalid\w+: .*failed: cudaLaunchKernelEx"):
        conformance_module().launch_idle(threads, shared_bytes, *queue)
    conformance_module().launch_idle(64, 64 * 1024, *queue)
    torch.cuda.synchronize()
    assert torch.equal(quantize(weight).dequantize().cpu(), quantize(weight.cpu()).dequantize())
