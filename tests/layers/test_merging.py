"""Folding an adapter into the 4-bit base, out again, and into a dense layer."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from contract import relative_error
from safetensors.torch import load, save
from torch import nn

import qlora_kernels
from qlora_kernels import QLinear
from qlora_kernels.layers import merging


def layer(k=100, n=72, rank=4, dtype=None, double_quant=True, bias=True):
    made = QLinear.from_linear(nn.Linear(k, n, bias, dtype=dtype), rank, double_quant=double_quant)
    nn.init.normal_(made.lora_B["default"], std=0.1)
    return made


def exact(made, dtype=torch.float32):
    A, B = made.lora_A["default"].to(dtype), made.lora_B["default"].to(dtype)
    return made.weight.dequantize(dtype) + made.scaling * B @ A


@pytest.mark.parametrize(
    # 64: rows are whole blocks. 100: panels start at multiples of 16 rows. 63, 1: blocks straddle rows, 65 has a tail.
    ("k", "n"),
    [(64, 70), (100, 72), (63, 65), (1, 130), (128, 1)],
)
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_merge_is_the_quantized_sum_and_can_be_undone(k, n, double_quant, monkeypatch):
    monkeypatch.setattr(merging, "_PANEL", 1024)  # several panels
    made = layer(k, n, rank=1, double_quant=double_quant)
    before = {key: value.clone() for key, value in made.state_dict().items()}
    wanted = qlora_kernels.quantize(exact(made).detach(), double_quant)
    probe = torch.randn(9, k)
    with torch.no_grad():
        moved = (probe @ wanted.dequantize().T - probe @ exact(made).T).norm() / (probe @ exact(made).T).norm()
        lost = (wanted.dequantize() - exact(made)).norm() / exact(made).norm()
    report = made.merge(probe)
    # Products of a panel and of the whole may round differently, and so may a code: compare values, not bits.
    assert relative_error(made.weight.dequantize(), wanted.dequantize().double()) < 1e-3
    assert report.weight_error == pytest.approx(lost.item(), rel=1e-2)
    assert report.output_error == pytest.approx(moved.item(), rel=1e-2, abs=1e-6)
    assert made.merged_adapter_name == "default"
    assert torch.allclose(made(probe), probe @ made.weight.dequantize().T + made.bias, rtol=1e-4, atol=1e-5)
    assert made.weight.bits_per_weight < 13  # still 4-bit, also where a constant serves one weight

    made.unmerge()
    after = made.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert made.merged_adapter_name is None


def test_merging_an_adapter_of_a_large_rank_costs_little_next_to_quantization():
    made = layer(256, 256, rank=32)
    report = made.merge()
    assert 0 < report.weight_error < 0.12  # NF4 loses about 9% on a normal weight
    assert report.output_error is None


def test_a_weight_of_zeros_merges_without_error():
    linear = nn.Linear(64, 32)
    nn.init.zeros_(linear.weight)
    made = QLinear.from_linear(linear, rank=2)
    assert made.merge(torch.zeros(3, 64)) == merging.MergeReport(0.0, 0.0)
    assert not made.weight.dequantize().any()


def test_the_probe_may_have_any_shape_and_dtype_and_autocast_does_not_matter():
    made = layer()
    probe = torch.randn(2, 3, 100)
    first = made.merge(probe)
    made.unmerge()
    with torch.autocast("cpu", torch.bfloat16):
        assert made.merge(probe) == first
    made.unmerge()
    assert made.merge(probe.bfloat16()).output_error == pytest.approx(first.output_error, rel=0.1)


def test_the_state_while_merged_travels_whole():
    made = layer()
    x = torch.randn(3, 100)
    y = made(x)
    made.merge()
    merged_y = made(x)
    state = load(save({key: value.contiguous() for key, value in made.state_dict().items()}))
    others = [copy.deepcopy(made), pickle.loads(pickle.dumps(made))]
    for other, assign in ((layer(), False), (QLinear(100, 72, rank=4, device="meta"), True)):
        other.load_state_dict(state, assign=assign)
        others.append(other)
    again = copy.deepcopy(made)
    again.load_state_dict(state)  # merged into merged
    for other in (*others, again):
        assert other.merged_adapter_name == "default"
        assert torch.equal(other(x), merged_y)
        other.unmerge()
        assert torch.equal(other(x), y)


def test_loading_an_unmerged_state_ends_the_merge():
    made = layer()
    state = {key: value.clone() for key, value in made.state_dict().items()}
    x = torch.randn(3, 100)
    y = made(x)
    made.merge()
    made.load_state_dict(state)
    assert made.merged_adapter_name is None
    assert torch.equal(made(x), y)
    made.merge()
    made.load_state_dict({key: value for key, value in state.items() if key.startswith("lora")}, strict=False)
    assert made.merged_adapter_name == "default"  # adapters alone say nothing about the base


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_merge_of_a_base_with_other_levels_travels_whole(double_quant):
    """The merged weight has NF4's levels, so there are fewer entries in its table."""
    made = other_levels(double_quant)
    x = torch.randn(3, 100)
    y = made(x)
    state = {key: value.clone() for key, value in made.state_dict().items()}
    made.merge()
    merged_y, merged_state = made(x), {key: value.clone() for key, value in made.state_dict().items()}
    for assign in (False, True):
        other = other_levels(double_quant)
        other.load_state_dict(merged_state, assign=assign)
        assert torch.equal(other(x), merged_y)
        other.load_state_dict(merged_state, assign=assign)  # merged into merged
        assert torch.equal(other(x), merged_y)
        other.unmerge()
        assert torch.equal(other(x), y)
        other.merge()
        other.load_state_dict(state, assign=assign)
        assert other.merged_adapter_name is None
        assert torch.equal(other(x), y)
    with pytest.raises(RuntimeError, match="unmerged_nested_table"):
        layer(double_quant=double_quant).load_state_dict(merged_state)


@pytest.mark.parametrize("double_quant", [True, False])
def test_levels_out_of_range_are_not_loaded(double_quant):
    made = other_levels(double_quant)
    state = {key: value.clone() for key, value in made.state_dict().items()}
    for value in (1.5, torch.nan):
        state["weight_nested_table"][-1] = value
        y = made(torch.ones(1, 100))
        with pytest.raises(RuntimeError, match=r"weight_nested_table'(, should be from -1 to 1| holds NaN)"):
            made.load_state_dict(state)
        assert torch.equal(made(torch.ones(1, 100)), y)


def other_levels(double_quant):
    """A layer whose weight has levels of its own."""
    weight = layer(double_quant=double_quant).weight
    levels = torch.linspace(-1, 1, 16)
    table = levels if weight.nested_table is None else torch.cat([weight.nested_table, levels])
    made = QLinear.from_nf4(replace(weight, nested_table=table), rank=4)
    nn.init.normal_(made.lora_B["default"])
    return made


def test_loading_a_merge_of_an_adapter_that_is_not_there_is_refused():
    made = layer()
    made.add_adapter("style", rank=2)
    made.set_adapter("style")
    made.merge()
    other = layer()
    weight = other.weight.dequantize()
    with pytest.raises(RuntimeError, match=r"'style' is merged in the checkpoint, but this layer has: 'default'"):
        other.load_state_dict(made.state_dict(), strict=False)
    assert torch.equal(other.weight.dequantize(), weight)
    assert other.merged_adapter_name is None
    incomplete = {key: value for key, value in made.state_dict().items() if key != "unmerged_packed"}
    with pytest.raises(RuntimeError, match='no "unmerged_packed"'):
        layer().load_state_dict(incomplete, strict=False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.merge(), "adapter 'default' is merged already"),
        (lambda m: m.set_adapter("other"), "adapter 'default' is merged into the base; call unmerge"),
        (lambda m: m.set_adapter(None), "is merged"),
        (lambda m: m.delete_adapter("default"), "adapter 'default' is merged"),
        (lambda m: m.disable_adapters().__enter__(), "adapter 'default' is merged"),
        (lambda m: m.reset_parameters(), "adapter 'default' is merged"),
    ],
)
def test_calls_that_a_merge_forbids(call, message):
    made = layer()
    made.add_adapter("other", rank=2)
    made.merge()
    x = torch.randn(2, 100)
    y = made(x)
    with pytest.raises(RuntimeError, match=message):
        call(made)
    assert torch.equal(made(x), y)
    assert made.active_adapter == made.merged_adapter_name == "default"


def test_a_merge_that_cannot_be_changes_nothing():
    with pytest.raises(RuntimeError, match="no adapter is merged"):
        layer().unmerge()
    with pytest.raises(RuntimeError, match="no active adapter"):
        QLinear(64, 64, rank=0).merge()
    made = layer()
    with made.disable_adapters(), pytest.raises(RuntimeError, match="disabled"):
        made.merge()
    with torch.no_grad():
        made.lora_B["default"][3, 1] = torch.inf
    keys = set(made.state_dict())
    with pytest.raises(ValueError, match="lora_B of adapter 'default' holds NaN or infinity"):
        made.merge()
    assert set(made.state_dict()) == keys
    assert made.merged_adapter_name is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_to_linear_is_the_dense_layer_with_one_rounding(dtype, bias):
    made = layer(bias=bias).to(dtype).eval()
    linear = made.to_linear()
    assert type(linear) is nn.Linear
    assert not linear.training
    assert linear.weight.dtype == dtype
    assert linear.weight.requires_grad
    # One rounding to dtype of the sum in float32 (of float64 in float64); torch may order its float32 sum otherwise.
    wanted = exact(made, torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.allclose(linear.weight.double(), wanted.to(dtype).double(), rtol=torch.finfo(dtype).eps, atol=1e-7)
    if bias:
        assert torch.equal(linear.bias, made.bias)
    x = torch.randn(5, 100, dtype=dtype)
    assert relative_error(made(x), linear(x).double()) < 2 * torch.finfo(dtype).eps + 1e-6


def test_to_linear_gives_what_the_layer_computes_now():
    made = layer()
    with made.disable_adapters():
        assert torch.equal(made.to_linear().weight, made.weight.dequantize())
    made.merge()
    assert torch.equal(made.to_linear().weight, made.weight.dequantize())


def test_a_merge_holds_a_panel_of_dense_weight_at_most(monkeypatch):
    made = layer(256, 512)
    panel = 1 << 12
    monkeypatch.setattr(merging, "_PANEL", panel)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    sizes.append(tensor.numel())
            return out

    with Watch():
        made.merge()
    assert 8 * max(sizes) < 256 * 512
