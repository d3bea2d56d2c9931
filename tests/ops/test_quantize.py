"""NF4 quantization and dequantization: the nearest level always, the same bits everywhere."""

from __future__ import annotations

import contextlib

import pytest
import torch
from contract import make_weight
from engines import forced, on_the_cpu

from qlora_kernels import NF4Weight, default_nested_table, ops, quantize
from qlora_kernels.formats import nf4
from qlora_kernels.ops import backends
from qlora_kernels.ops.backends import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One element, one short block, a block less one, a block, one more, rows that begin inside a block or a byte, one
# whole group of 256 blocks and one more block.
SHAPES = ((1, 1), (3, 7), (1, 63), (2, 64), (1, 65), (5, 100), (7, 129), (64, 256), (257, 64), (9, 1000))


def codes_of(weight: NF4Weight) -> torch.Tensor:
    packed = weight.packed
    return torch.stack((packed >> 4, packed & 15), -1).flatten()[: weight.numel()].long()


def blocks_of(weight: torch.Tensor) -> torch.Tensor:
    """float64 [blocks, 64], zeros after the end."""
    flat = weight.double().flatten()
    return torch.nn.functional.pad(flat, (0, -len(flat) % 64)).view(-1, 64)


def test_the_levels_are_the_published_ones():
    levels = reference.levels()
    assert len(levels) == 16
    assert levels[0] == -1
    assert levels[7] == 0
    assert levels[15] == 1
    assert (levels.diff() > 0).all()
    # Written out, not read from nf4.h: a wrong digit there must fail. Appendix E of arXiv 2305.14314 prints them so.
    assert levels[1].item() == pytest.approx(-0.6961928009986877, abs=1e-9)
    assert levels[8].item() == pytest.approx(0.07958029955625534, abs=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_are_the_nearest_levels(engine, shape, dtype):
    weight = (torch.randn(shape) * 3).to(dtype)
    quantized = quantize(weight, double_quant=False)
    blocks = blocks_of(weight)
    absmax = blocks.abs().amax(1, keepdim=True)
    assert torch.equal(quantized.absmax.double(), absmax.flatten())
    distance = (blocks.unsqueeze(-1) - reference.levels().double() * absmax.unsqueeze(-1)).abs()
    # argmin takes the first of equals: the lower code at a tie. Products of two float32 are exact in float64.
    expected = distance.argmin(-1).flatten()[: weight.numel()]
    assert torch.equal(codes_of(quantized), expected)


def test_ties_go_to_the_lower_code_and_their_neighbours_do_not(engine):
    # absmax 2^20 makes midpoint * absmax representable for many midpoints; nextafter looks at both sides of each.
    levels = reference.levels().double()
    middle = ((levels[1:] + levels[:-1]) / 2 * 2**20).float()
    weight = torch.zeros(1, 64)
    weight[0, 0] = 2.0**20
    weight[0, 1:16] = middle
    weight[0, 16:31] = torch.nextafter(middle, torch.tensor(torch.inf))
    weight[0, 31:46] = torch.nextafter(middle, torch.tensor(-torch.inf))
    code = codes_of(quantize(weight, double_quant=False))
    distance = (weight.double().unsqueeze(-1) - levels * 2**20).abs()
    assert torch.equal(code, distance.argmin(-1).flatten())


@pytest.mark.parametrize("scale", [1e-45, 1e-40, 1e-38, 1.0, 1e30, 3e38])
def test_extreme_scales(engine, scale):
    weight = (torch.rand(4, 128) * 2 - 1).double().mul(scale).float()
    weight[0, 0] = torch.tensor(scale).float()
    quantized = quantize(weight, double_quant=False)
    blocks = blocks_of(weight)
    distance = blocks.unsqueeze(-1) - reference.levels().double() * blocks.abs().amax(1)[:, None, None]
    code = codes_of(quantized)
    zero = blocks.abs().amax(1, keepdim=True).expand_as(blocks).flatten() == 0
    assert torch.equal(code[~zero], distance.abs().argmin(-1).flatten()[~zero])
    assert (code[zero] == 7).all()
    for dtype in DTYPES:
        assert torch.equal(quantized.dequantize(dtype), reference.decode(quantized.pieces, 4, 128, dtype)), dtype


@pytest.mark.parametrize("double_quant", [True, False])
def test_blocks_of_zeros_are_exact(engine, double_quant):
    weight = torch.randn(4, 256)
    weight[1] = 0
    weight[2, 64:128] = 0
    quantized = quantize(weight, double_quant)
    code = codes_of(quantized).view(4, 256)
    assert (code[1] == 7).all()
    assert (code[2, 64:128] == 7).all()
    for dtype in DTYPES:
        dense = quantized.dequantize(dtype)
        assert (dense[1] == 0).all()
        assert (dense[2, 64:128] == 0).all()
        assert (dense[0] != 0).any()
    assert (quantize(torch.zeros(2, 64)).dequantize() == 0).all()


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_has_the_bits_of_the_reference(engine, shape, dtype, double_quant):
    quantized = make_weight(*shape, double_quant)
    dense = quantized.dequantize(dtype)
    expected = reference.decode(quantized.pieces, *shape, dtype)
    assert dense.dtype == dtype
    assert torch.equal(dense, expected)
    # Any range of rows, down to none, is that part of the whole.
    n = shape[0]
    for begin, end in {(0, 0), (n // 2, n), (n - 1, n), (n // 3, n // 2)}:
        assert torch.equal(quantized.dequantize(dtype, row_begin=begin, row_end=end), expected[begin:end])


# Rows that are no multiple of a block, of a warp's 2048 weights, of a group of 16384, of 256 groups.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(37, 192), (31, 1001), (70, 640), (3, 16384)])
def test_every_engine_gives_the_same_bits(engine, shape, dtype):
    weight = (torch.randn(shape) * torch.logspace(-2, 2, shape[0]).unsqueeze(1)).to(dtype)
    weight[0, 5:] = 0
    for double_quant in (True, False):
        quantized = quantize(weight, double_quant)
        actual = [*quantized.pieces, *(quantized.dequantize(d) for d in DTYPES)]
        with forced("portable"), on_the_cpu():
            portable = quantize(weight.cpu(), double_quant)
            expected = [*portable.pieces, *(portable.dequantize(d) for d in DTYPES)]
        for a, b in zip(actual, expected, strict=True):
            assert (a is None and b is None) or torch.equal(a.cpu(), b)


def test_threads_do_not_change_the_bits(isa):
    weight = torch.randn(300, 1024)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            quantized = quantize(weight)
            results.append([*quantized.pieces, quantized.dequantize(torch.bfloat16)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 1000, 70000])
def test_double_quantization_is_the_nearest_entry(isa, count):
    absmax = torch.rand(count) * 5
    table = default_nested_table()
    code, nested_absmax, offset = ops.quantize_absmax(absmax, table)
    assert offset.item() == pytest.approx(absmax.double().mean().item(), rel=1e-7)
    difference = torch.nn.functional.pad(absmax - offset, (0, -count % 256)).view(-1, 256)
    assert torch.equal(nested_absmax, difference.abs().amax(1))
    exact = table.double()[code.long()] * nested_absmax.double().repeat_interleave(256)[:count]
    error = (exact - (absmax - offset).double()).abs()
    scaled = table.double() * nested_absmax.double().unsqueeze(1)  # [groups, 256]
    rows = scaled.repeat_interleave(256, 0)[:count]
    best = torch.cat(
        [
            (r - d.double().unsqueeze(1)).abs().amin(1)
            for r, d in zip(rows.split(4096), (absmax - offset).split(4096), strict=True)
        ]
    )
    assert torch.equal(error, best)


def test_double_quantization_of_equal_constants_and_of_another_table(engine):
    default = default_nested_table(torch.get_default_device())
    code, nested_absmax, offset = ops.quantize_absmax(torch.full((300,), 0.7), default)
    assert (nested_absmax == 0).all()
    assert (default[code.long()] == 0).all()
    assert offset.item() == pytest.approx(0.7)
    table = torch.linspace(-1, 1, 256)[torch.randperm(256)]  # a table need not be sorted
    absmax = torch.rand(500)
    code, nested_absmax, offset = ops.quantize_absmax(absmax, table)
    decoded = table[code.long()] * nested_absmax.repeat_interleave(256)[:500] + offset
    assert (decoded - absmax).abs().max() <= nested_absmax.max() / 255 * 1.01


def test_a_table_of_the_caller_that_is_not_finite_is_refused(engine):
    table = default_nested_table().clone()
    table[7] = torch.inf
    with pytest.raises(ValueError, match="nested_table holds a value that is not finite"):
        quantize(torch.randn(4, 64), nested_table=table.to(torch.empty(0).device))


def test_the_table_is_kept_out_of_modes_and_default_devices():
    from torch._subclasses.fake_tensor import FakeTensorMode

    weight = torch.randn(4, 64)
    with FakeTensorMode():
        assert quantize(torch.randn(4, 64)).packed.shape == (128,)
    with torch.device("meta"):
        inner = quantize(weight)
    assert torch.equal(quantize(weight).dequantize(), inner.dequantize())
    assert type(default_nested_table()) is torch.Tensor


def test_the_table_of_cuda_is_that_of_the_current_card(monkeypatch):
    here, there = torch.zeros(256), torch.ones(256)
    monkeypatch.setattr(nf4, "_tables", {torch.device("cuda", 0): here, torch.device("cuda", 1): there})
    for index, table in ((0, here), (1, there)):
        monkeypatch.setattr(torch.cuda, "current_device", lambda index=index: index)
        assert default_nested_table("cuda") is table
    assert default_nested_table("cuda:0") is here


def test_capture_is_checked_on_the_tensors_card(monkeypatch):
    current = [torch.device("cuda", 0)]

    @contextlib.contextmanager
    def device(one):
        current.append(one)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[-1].index == 1)
    for backend in (backends.CUDA(None), reference):
        assert backend.capturing(torch.device("cuda", 1))
        assert not backend.capturing(torch.device("cuda", 0))
        assert len(current) == 1
    assert not any(backend.capturing(torch.device("cpu")) for backend in (backends.CPU(), reference))


def test_a_table_that_is_not_finite_is_refused():
    with pytest.raises(RuntimeError, match="not finite"):
        ops.quantize_absmax(torch.rand(500), torch.full((256,), torch.nan))


def test_the_default_table_is_e4m3_over_448():
    table = default_nested_table()
    expected = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float() / 448
    finite = ~expected.isnan()
    assert finite.sum() == 254
    assert torch.equal(table[finite], expected[finite])
    assert table[0x7F] == 1
    assert table[0xFF] == -1


BAD_WEIGHTS = {
    "a list": ([[1.0]], TypeError, "tensor"),
    "integers": (torch.ones(2, 64, dtype=torch.int32), TypeError, "int32"),
    "float64": (torch.ones(2, 64, dtype=torch.float64), TypeError, "float64"),
    "complex": (torch.ones(2, 64, dtype=torch.complex64), TypeError, "complex64"),
    "one dimension": (torch.ones(64), ValueError, r"\[64\]"),
    "three dimensions": (torch.ones(2, 2, 64), ValueError, r"\[2, 2, 64\]"),
    "no rows": (torch.ones(0, 64), ValueError, "empty"),
    "no columns": (torch.ones(64, 0), ValueError, "empty"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights_are_refused(case):
    weight, error, words = BAD_WEIGHTS[case]
    with pytest.raises(error, match=words):
        quantize(weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_weights_are_refused_with_their_first_index(engine, dtype, value):
    weight = torch.randn(40, 130).to(dtype)
    weight[31, 7] = value
    weight[3, 129] = value
    weight[39, 129] = value
    with pytest.raises(ValueError, match=r"layers\.3\.weight.*\(3, 129\)"):
        quantize(weight, name="layers.3.weight")


def test_bad_requests():
    weight = quantize(torch.randn(4, 64))
    with pytest.raises(TypeError, match="int8"):
        weight.dequantize(torch.int8)
    for begin, end in ((-1, 2), (3, 2), (0, 5)):
        with pytest.raises(ValueError, match="rows"):
            weight.dequantize(row_begin=begin, row_end=end)
    with pytest.raises(ValueError, match="no use"):
        quantize(torch.randn(4, 64), double_quant=False, nested_table=default_nested_table())
    with pytest.raises(ValueError, match="256"):
        quantize(torch.randn(4, 64), nested_table=torch.zeros(16))
    with pytest.raises(RuntimeError, match="frozen"):
        weight.requires_grad_()
    for text in ("isa", "portable,amx"):
        with forced(text), pytest.raises(RuntimeError, match="available on this machine"):
            weight.dequantize()


def test_a_non_contiguous_weight_is_quantized_as_it_reads():
    weight = torch.randn(64, 128)
    assert torch.equal(quantize(weight.T).dequantize(), quantize(weight.T.contiguous()).dequantize())
