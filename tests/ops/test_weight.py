"""What is cached for a weight between calls: its checks, and the struct that the kernels take."""

from __future__ import annotations

import pytest
import torch
from contract import relative_error

from qlora_kernels import NF4Weight, linear, quantize
from qlora_kernels.native import extension


def own_weight(n=8, k=128):
    quantized = quantize(torch.randn(n, k))
    return NF4Weight(*(p.clone() for p in quantized.pieces), quantized.shape)


def test_pieces_whose_data_is_exchanged_are_checked_again():
    weight, x = own_weight(), torch.randn(3, 128)
    before = linear(x, weight)
    other = own_weight()
    for name in ("packed", "absmax", "nested_absmax", "nested_offset", "nested_table"):
        getattr(weight, name).data = getattr(other, name).clone()
    assert torch.equal(linear(x, weight), linear(x, other))
    assert not torch.equal(linear(x, weight), before)
    good = weight.packed.data
    weight.packed.data = good[:-1]  # begins where the good one did
    with pytest.raises(ValueError, match=r"packed of a weight .* should have 512 elements, found 511"):
        linear(x, weight)
    weight.packed.data = good
    weight.absmax.data = weight.absmax.float()
    with pytest.raises(TypeError, match=r"absmax of a weight .* should be torch\.uint8, found torch\.float32"):
        linear(x, weight)
    weight.absmax = other.absmax
    linear(x, weight)
    weight.nested_absmax.requires_grad_()
    with pytest.raises(RuntimeError, match="nested_absmax asks for one"):
        linear(x, weight)
    weight.nested_absmax = None
    with pytest.raises(ValueError, match="come together"):
        linear(x, weight)
    single_quant = quantize(torch.randn(8, 128), double_quant=False)
    linear(x, single_quant)
    single_quant.absmax.requires_grad_()
    with pytest.raises(RuntimeError, match="absmax asks for one"):
        linear(x, single_quant)


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_piece_that_is_written_to_between_forward_and_backward_is_an_error(double_quant):
    quantized = quantize(torch.randn(8, 128), double_quant)
    for name in ("packed", "absmax"):
        weight = NF4Weight(*(p if p is None else p.clone() for p in quantized.pieces), quantized.shape)
        x = torch.randn(3, 128, requires_grad=True)
        y = linear(x, weight)
        y.sum().backward(retain_graph=True)
        getattr(weight, name).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation: a piece of the quantized weight"):
            y.sum().backward()


def test_a_weight_made_in_inference_mode_has_gradients():
    with torch.inference_mode():
        weight = own_weight()
    x = torch.randn(3, 128, requires_grad=True)
    linear(x, weight).sum().backward()
    expected = weight.dequantize().double().sum(0).expand(3, -1)
    assert relative_error(x.grad, expected) < 1e-5


@pytest.mark.parametrize("double_quant", [True, False])
def test_the_struct_for_the_kernels_is_made_once_while_the_pieces_stay(double_quant):
    quantized = quantize(torch.randn(8, 128), double_quant)
    weight = NF4Weight(*(p if p is None else p.clone() for p in quantized.pieces), quantized.shape)
    operand, kind = weight.operand(), extension.native().Weight
    operand.check()
    struct = operand.native(kind)
    operand.check()
    assert operand.native(kind) is struct
    assert operand.native(dict) == {
        "packed": weight.packed.data_ptr(),
        "absmax": 0 if double_quant else weight.absmax.data_ptr(),
        "absmax_code": weight.absmax.data_ptr() if double_quant else 0,
        "nested_absmax": weight.nested_absmax.data_ptr() if double_quant else 0,
        "nested_table": weight.nested_table.data_ptr() if double_quant else 0,
        "nested_offset": weight.nested_offset.data_ptr() if double_quant else 0,
        "n": 8,
        "k": 128,
        "levels": 0,
    }
    kept = weight.packed.data  # so that the exchanged data lies elsewhere
    weight.packed.data = kept.clone()
    operand.check()
    assert operand.native(kind) is not struct
    assert operand.native(dict)["packed"] == weight.packed.data_ptr() != kept.data_ptr()
