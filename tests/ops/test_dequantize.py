"""Dequantization into a tensor of the caller's."""

from __future__ import annotations

import pytest
import torch
from contract import make_weight

from qlora_kernels import NF4Weight, dequantize, ops, quantize

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# As in test_quantize.py: rows that begin inside a block or a byte, a block, one more, a group of 256 blocks and more.
SHAPES = ((1, 1), (3, 7), (1, 63), (2, 64), (1, 65), (5, 100), (7, 129), (64, 256), (257, 64), (9, 1000))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_into_a_given_tensor(engine, shape, dtype):
    weight = make_weight(*shape)
    expected = weight.dequantize(dtype)
    # A slice of a larger tensor: its surroundings stay unchanged.
    around = torch.full((shape[0] + 2, shape[1]), torch.nan, dtype=dtype)
    out = around[1:-1]
    assert weight.dequantize(dtype, out=out) is out
    assert torch.equal(out, expected)
    assert around[0].isnan().all()
    assert around[-1].isnan().all()
    begin = shape[0] // 2
    rows = torch.full((shape[0] - begin, shape[1]), torch.nan, dtype=dtype)
    assert dequantize(weight.to(dtype), out=around[1:-1]).data_ptr() == out.data_ptr()
    assert torch.equal(weight.dequantize(dtype, row_begin=begin, out=rows), expected[begin:])
    assert weight.dequantize(dtype, row_begin=begin, row_end=begin, out=rows[:0]).shape == (0, shape[1])


def test_a_given_tensor_counts_as_changed():
    weight = quantize(torch.randn(4, 64))
    out, x = torch.zeros(4, 64), torch.ones(4, 64, requires_grad=True)
    y = (x * out).sum()
    weight.dequantize(out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    with torch.inference_mode():
        inside = torch.empty(4, 64)
        weight.dequantize(out=inside)
        weight.dequantize(out=out)
        assert torch.equal(inside, out)


def test_a_given_tensor_through_torch_compile():
    weight = quantize(torch.randn(4, 64))

    @torch.compile(backend="aot_eager", fullgraph=True)
    def twice(packed, absmax, nested_absmax, nested_offset, nested_table, out):
        ops.dequantize_out(packed, absmax, nested_absmax, nested_offset, nested_table, 4, 64, 0, 4, out)
        return 2 * out

    out = torch.zeros(4, 64)
    assert torch.equal(twice(*weight.pieces, out), 2 * weight.dequantize())
    assert torch.equal(out, weight.dequantize())


def _bad_out():
    weight = quantize(torch.randn(4, 64), double_quant=False)
    # The 128 bytes of packed codes overlap 1024 that could hold a result; the 4 constants lie in front of another.
    memory = torch.zeros(256)
    bytes_ = memory.view(torch.uint8)
    bytes_[896:].copy_(weight.packed)
    inside = NF4Weight(bytes_[896:], weight.absmax, None, None, None, weight.shape)
    more = torch.zeros(259)
    more[:4].copy_(weight.absmax)
    before = NF4Weight(weight.packed, more[:4], None, None, None, weight.shape)
    yield "list", weight, [0.0], TypeError, "tensor, found list"
    yield "dtype", weight, torch.zeros(4, 64, dtype=torch.float16), TypeError, "float32.*float16"
    yield "no such dtype", weight.to(torch.int8), torch.zeros(4, 64, dtype=torch.int8), TypeError, "int8"
    yield "rows", weight, torch.zeros(5, 64), ValueError, r"\[4, 64\], found \[5, 64\]"
    yield "flat", weight, torch.zeros(256), ValueError, r"\[4, 64\], found \[256\]"
    yield "device", weight, torch.zeros(4, 64, device="meta"), ValueError, "meta"
    yield "columns", weight, torch.zeros(64, 4).T, ValueError, "contiguous"
    yield "expanded", weight, torch.zeros(1, 64).expand(4, 64), ValueError, "contiguous"
    yield "gradient", weight, torch.zeros(4, 64, requires_grad=True), RuntimeError, "gradient.*detach"
    yield "packed codes", inside, memory.view(4, 64), ValueError, "shares memory"
    yield "constants", before, more[3:].view(4, 64), ValueError, "shares memory"


@pytest.mark.parametrize("case", list(_bad_out()), ids=lambda case: case[0])
def test_a_bad_tensor_to_dequantize_into_is_refused_and_stays_as_it_is(case):
    _, weight, out, error, words = case
    tensors = [t for t in (out, *weight.pieces) if isinstance(t, torch.Tensor) and not t.is_meta]
    # As bytes: the packed codes read as float32 may be NaN, which is not equal to itself.
    before = [(bytes(t.detach().contiguous().view(torch.uint8).numpy()), t._version) for t in tensors]
    with pytest.raises(error, match=words):
        weight.dequantize(out=out)
    for tensor, (content, version) in zip(tensors, before, strict=True):
        assert bytes(tensor.detach().contiguous().view(torch.uint8).numpy()) == content
        assert tensor._version == version


def test_memory_right_beside_the_weight_will_do():
    weight = quantize(torch.randn(4, 64), double_quant=False)
    memory = torch.zeros(4 + 256 + 32)
    memory[:4].copy_(weight.absmax)
    memory[260:].view(torch.uint8).copy_(weight.packed)
    beside = NF4Weight(memory[260:].view(torch.uint8), memory[:4], None, None, None, weight.shape)
    beside.dequantize(out=memory[4:260].view(4, 64))
    assert torch.equal(memory[4:260].view(4, 64), weight.dequantize())
    assert torch.equal(beside.dequantize(), weight.dequantize())
