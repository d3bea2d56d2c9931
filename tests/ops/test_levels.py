"""Weights whose codes stand for other levels than NF4's: bitsandbytes' FP4, and any 16 numbers from -1 to 1."""

from __future__ import annotations

import copy

import pytest
import torch
from contract import assert_within_contract, make_weight, relative_error, with_levels
from emulated import emulated
from torch.nn import functional as F

from qlora_kernels import NF4Weight, QLinear, linear, ops
from qlora_kernels.formats.nf4 import meta_weight
from qlora_kernels.ops.backends import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Multiples of 1/192 (bitsandbytes' order: the sign in the highest bit), and levels that share no pattern.
FP4 = torch.tensor([0, 1 / 16, 8, 12, 4, 6, 2, 3, -0.0, -1 / 16, -8, -12, -4, -6, -2, -3]) / 12
UNEVEN = torch.linspace(-1, 0.9, 16).sin()


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(3, 7), (33, 192), (7, 100), (64, 1024)])
def test_decoding_and_products(engine, shape, double_quant):
    n, k = shape
    weight = with_levels(make_weight(n, k, double_quant), FP4)
    assert not weight.has_nf4_levels
    assert torch.equal(weight.levels.cpu(), FP4)
    for dtype in DTYPES:
        dense = weight.dequantize(dtype)
        assert torch.equal(dense, reference.decode(weight.pieces, n, k, dtype)), dtype
        for m in (1, 2, 5, 13, 33):
            x, dy = torch.randn(m, k).to(dtype).requires_grad_(), torch.randn(m, n).to(dtype)
            y = linear(x, weight)
            y.backward(dy)
            unrounded = weight.dequantize(torch.float64)
            case = f"{dtype}, M = {m}"
            assert_within_contract(y.detach(), F.linear(x, dense).detach(), x.detach().double() @ unrounded.T, case)
            assert_within_contract(x.grad, dy @ dense, dy.double() @ unrounded, case + ": dx")


@pytest.mark.parametrize("double_quant", [True, False])
def test_any_levels(engine, double_quant):
    """They may lie badly for a 16-bit type: some kernels round each once, for all weights that have it."""
    weight = with_levels(make_weight(33, 192, double_quant), UNEVEN)
    for dtype in DTYPES:
        assert torch.equal(weight.dequantize(dtype), reference.decode(weight.pieces, 33, 192, dtype)), dtype
        for m in (1, 5, 33):
            x = torch.randn(m, 192).to(dtype)
            exact = x.double() @ weight.dequantize(torch.float64).T
            assert relative_error(linear(x, weight), exact) < max(torch.finfo(dtype).eps, 1e-6), (dtype, m)


def test_levels_of_fp4_are_exact_in_every_product_of_few_rows(isa):
    """Multiples of 1/192 lose nothing in the 13 and the 8 bits that some kernels look levels up in."""
    weight = with_levels(make_weight(32, 512), FP4)
    x = torch.zeros(1, 512, dtype=torch.bfloat16)
    x[0, 5] = 1
    column = weight.dequantize(torch.float32)[:, 5].to(torch.bfloat16)
    # A sum of one product is that product, and y rounds it once.
    assert (linear(x, weight)[0].double() - column.double()).abs().max() <= column.abs().max() * 2**-15


@pytest.mark.parametrize("m", [1, 20, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_kernels(m, dtype):
    n, k = 40, 192
    weight = with_levels(make_weight(n, k), FP4)
    x, dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
    dense, unrounded = weight.dequantize(dtype), weight.dequantize(torch.float64)
    with emulated():
        decoded = ops.dequantize(*weight.pieces, n, k, dtype, 0, n)
        y, _ = ops.linear_forward(x, *weight.pieces, n, None, None, None, 1.0, 0.0, None)
        dx, _, _ = ops.linear_backward(dy, *weight.pieces, k, *(None,) * 4, 1.0, 0.0, None, True, False, False)
    assert torch.equal(decoded, dense)
    assert_within_contract(y, F.linear(x, dense), x.double() @ unrounded.T, "y")
    assert_within_contract(dx, dy @ dense, dy.double() @ unrounded, "dx")


@pytest.mark.parametrize("double_quant", [True, False])
def test_levels_that_change_in_place_are_noticed(double_quant):
    weight = with_levels(make_weight(8, 128, double_quant), FP4)
    x = torch.randn(2, 128)
    before = linear(x, weight)
    weight.nested_table[-16:] = UNEVEN
    expected = reference.decode(weight.pieces, 8, 128, torch.float32)
    assert torch.equal(weight.dequantize(), expected)
    torch.testing.assert_close(linear(x, weight), x @ expected.T)
    assert not torch.equal(linear(x, weight), before)


def test_levels_outside_the_range_are_refused():
    for bad in (1.5, float("nan")):
        levels = FP4.clone()
        levels[3] = bad
        weight = with_levels(make_weight(8, 128), levels)
        with pytest.raises(ValueError, match=r"levels of a weight.*from -1 to 1"):
            weight.dequantize()


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_table_of_another_size_is_refused(double_quant):
    weight = make_weight(8, 128, double_quant)
    pieces = [*weight.pieces[:4], torch.zeros(17 if double_quant else 256)]
    with pytest.raises(ValueError, match=r"nested_table of a weight .* should have (256|16) elements"):
        NF4Weight(*pieces, weight.shape).dequantize()


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_file_and_a_state_dict_keep_the_levels(tmp_path, double_quant):
    weight = with_levels(make_weight(16, 64, double_quant), FP4)
    weight.save(tmp_path / "weight.safetensors")
    loaded = NF4Weight.load(tmp_path / "weight.safetensors")
    assert torch.equal(loaded.dequantize(), weight.dequantize())
    assert torch.equal(loaded.levels, FP4)
    layer = QLinear.from_nf4(weight, rank=4)
    for other in (copy.deepcopy(layer), layer.to("cpu")):
        assert torch.equal(other.weight.dequantize(), weight.dequantize())
    room = QLinear.from_nf4(meta_weight(16, 64, double_quant, nf4_levels=False), rank=4)
    room.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(3, 64)
    assert torch.equal(room(x), layer(x))
    with pytest.raises(RuntimeError, match="nested_table"):
        QLinear(64, 16, rank=4, double_quant=double_quant, bias=False).load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError, match="nested_table"):
        layer.load_state_dict(QLinear(64, 16, rank=4, double_quant=double_quant, bias=False).state_dict())


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_merge_requantizes_to_nf4_and_can_be_undone(double_quant):
    weight = with_levels(make_weight(16, 64, double_quant), FP4)
    layer = QLinear.from_nf4(weight, rank=4)
    torch.nn.init.normal_(layer.lora_B["default"])
    exact = weight.dequantize() + layer.scaling * layer.lora_B["default"] @ layer.lora_A["default"]
    layer.merge()
    assert layer.weight.has_nf4_levels
    assert (layer.weight.dequantize() - exact).norm() / exact.norm() < 0.12
    layer.unmerge()
    assert not layer.weight.has_nf4_levels
    assert torch.equal(layer.weight.dequantize(), weight.dequantize())


def test_compiled(engine):
    weight = with_levels(make_weight(16, 64), FP4)
    x = torch.randn(3, 64)
    compiled = torch.compile(lambda x: linear(x, weight), backend="aot_eager")
    assert torch.equal(compiled(x), linear(x, weight))
