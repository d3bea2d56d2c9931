"""PEFT's LoRA layer on QLinear: what it computes, against a dense reference in float64."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from small.blocks import IDS, LINEARS, Model, quantize
from torch import nn

from qlora_kernels import QLinear
from qlora_kernels.interop.peft import layer as peft_layer
from qlora_kernels.interop.peft.layer import LoraQLinear


class One(nn.Module):
    """A single linear layer [n, k] with a bias."""

    def __init__(self, n=48, k=96, bias=True, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.proj = QLinear.from_linear(nn.Linear(k, n, bias=bias, dtype=dtype), rank=0)

    def forward(self, x):
        return self.proj(x)


def adapted(model, *names, seed=1, **options):
    """A PEFT model with adapters of these names, none of them zero."""
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["proj"], **options})
    peft_model = get_peft_model(model, config, adapter_name=(names or ("default",))[0])
    for name in names[1:]:
        peft_model.add_adapter(name, copy.deepcopy(config))
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            parameter.data += torch.randn_like(parameter) * 0.1
    return peft_model


def proj(peft_model) -> LoraQLinear:
    return peft_model.base_model.model.proj


@pytest.fixture
def fused(monkeypatch):
    """The number of products with an adapter inside."""
    calls = []
    real = peft_layer.linear_on
    monkeypatch.setattr(peft_layer, "linear_on", lambda *args: calls.append(1) or real(*args))
    return calls


def reference(layer, x, *names):
    """The layer's output in float64, each adapter added by itself."""
    base = layer.get_base_layer()
    y = x.double() @ base.weight.dequantize(torch.float64).T
    y = y if base.bias is None else y + base.bias.double()
    for name in names:
        A, B = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
        y = y + layer.scaling[name] * (x.double() @ A.T) @ B.T
    return y


def error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_adapter_is_one_product_with_the_right_gradients(dtype, fused):
    layer = proj(adapted(One(dtype=dtype)))
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert A.dtype == torch.float32  # PEFT's autocast_adapter_dtype
    x = torch.randn(7, 96, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert len(fused) == 1
    assert y.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    expected = reference(layer, x, "default")
    assert error(y, expected) < tolerance
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, A, B), dy)
    for one, right in zip(found, torch.autograd.grad(expected, (x, A, B), dy.double()), strict=True):
        assert error(one, right.double()) < tolerance


def test_a_layer_of_its_own_for_every_base_and_no_other():
    model = Model()
    quantize(model, rank=0, skip=("down", "lm_head"))
    config = LoraConfig(target_modules="all-linear", rank_pattern={"up": 2}, alpha_pattern={"up": 3}, use_rslora=True)
    peft_model = get_peft_model(model, config)
    modules = peft_model.base_model.model.named_modules()
    kinds = {name: type(module) for name, module in modules if isinstance(module, LoraLayer)}
    assert set(LINEARS) <= set(kinds)
    for name, kind in kinds.items():
        assert kind is (peft.tuners.lora.Linear if name.endswith(("down", "lm_head")) else LoraQLinear)
    up = peft_model.base_model.model.layers[0].up
    assert up.lora_A["default"].weight.shape == (2, 64)
    assert up.scaling["default"] == pytest.approx(3 / 2**0.5)
    assert torch.isfinite(peft_model(IDS)).all()


@pytest.mark.parametrize("targets", [["q_proj", "up"], r"layers\.\d\.(q_proj|up)", r".*(q_proj|up).*"])
def test_targets_by_name_and_by_expression(targets):
    model = Model()
    quantize(model, rank=0)
    peft_model = get_peft_model(model, LoraConfig(target_modules=targets))
    found = {name for name, m in peft_model.base_model.model.named_modules() if isinstance(m, LoraQLinear)}
    assert found == {f"layers.{i}.{name}" for i in range(2) for name in ("q_proj", "up")}


def test_several_adapters_add_up(fused):
    peft_model = adapted(One(), "first", "second")
    layer, x = proj(peft_model), torch.randn(5, 96)
    assert error(layer(x), reference(layer, x, "first")) < 1e-5
    peft_model.base_model.set_adapter(["first", "second"])
    assert error(layer(x), reference(layer, x, "first", "second")) < 1e-5
    assert len(fused) == 2
    peft_model.set_adapter("second")
    assert error(layer(x), reference(layer, x, "second")) < 1e-5
    with peft_model.disable_adapter():
        assert error(layer(x), reference(layer, x)) < 1e-5


def test_a_mixed_batch_takes_each_rows_adapter():
    peft_model = adapted(One(), "first", "second").eval()
    layer, x = proj(peft_model), torch.randn(3, 96)
    y = peft_model(x, adapter_names=["second", "__base__", "first"])
    for row, names in enumerate((["second"], [], ["first"])):
        assert error(y[row : row + 1], reference(layer, x[row : row + 1], *names)) < 1e-5


def test_dora_is_what_it_is_on_the_dense_layer():
    model = One()
    dense = copy.deepcopy(model)
    dense.proj = model.proj.to_linear()
    x = torch.randn(6, 96)
    ours, theirs = adapted(model, use_dora=True), adapted(dense, use_dora=True)
    assert type(proj(ours)).__name__ != type(proj(theirs)).__name__
    assert error(ours(x), theirs(x).double()) < 1e-5
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    expected = dict(proj(theirs).named_parameters())
    names = [name for name in expected if "lora_" in name]
    assert len(names) == 3
    for name in names:
        assert error(proj(ours).get_parameter(name).grad, expected[name].grad.double()) < 1e-4


def test_an_adapters_bias_counts(fused):
    peft_model = adapted(One(), lora_bias=True)
    layer, x = proj(peft_model), torch.randn(6, 96)
    expected = reference(layer, x, "default") + layer.scaling["default"] * layer.lora_B["default"].bias.double()
    assert error(layer(x), expected) < 1e-5
    assert not fused


def test_dropout_acts_in_training_alone_and_keeps_the_mean():
    peft_model = adapted(One(), lora_dropout=0.5)
    layer, x = proj(peft_model), torch.randn(1, 96)
    expected = reference(layer, x, "default")
    assert error(layer.eval()(x), expected) < 1e-5
    layer.train()
    torch.manual_seed(0)
    samples = torch.stack([layer(x) for _ in range(2000)]).detach()
    assert (samples[0] != samples[1]).any()
    assert error(samples.mean(0), expected) < 0.1
    torch.manual_seed(0)
    assert torch.equal(layer(x), samples[0])


def test_dropping_everything_leaves_the_base():
    layer, x = proj(adapted(One(), lora_dropout=1.0)).train(), torch.randn(3, 96)
    assert error(layer(x), reference(layer, x)) < 1e-5


@pytest.mark.parametrize("place", ["base_layer", "lora_A", "lora_dropout"])
def test_hooks_are_called(place, fused):
    layer = proj(adapted(One()))
    module = getattr(layer, place)
    calls = []
    (module if place == "base_layer" else module["default"]).register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 96)
    assert error(layer(x), reference(layer, x, "default")) < 1e-5
    assert calls == [1]
    assert not fused


def test_autocast_and_checkpointing():
    layer = proj(adapted(One(), lora_dropout=0.3))
    x = torch.randn(4, 96, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    weights = (x, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    torch.manual_seed(3)
    plain = torch.autograd.grad(layer(x).square().sum(), weights)
    torch.manual_seed(3)
    again = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    for one, other in zip(torch.autograd.grad(again.square().sum(), weights), plain, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_compiles_without_a_break():
    layer = proj(adapted(One()))
    x = torch.randn(4, 96, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y, expected = compiled(x), layer(x)
    assert error(y, expected.double()) < 1e-6
    weights = (x, layer.lora_A["default"].weight)
    found, right = (torch.autograd.grad(z.square().sum(), weights) for z in (y, expected))
    for one, other in zip(found, right, strict=True):
        assert error(one, other.double()) < 1e-5


def test_a_rank_larger_than_the_layer_and_scales():
    peft_model = adapted(One(16, 24), r=32)
    layer, x = proj(peft_model), torch.randn(3, 24)
    assert error(layer(x), reference(layer, x, "default")) < 1e-5
    layer.scale_layer(-2.0)
    assert layer.scaling["default"] == pytest.approx(-2 * 6 / 32)
    assert error(layer(x), reference(layer, x, "default")) < 1e-5
    layer.scaling["default"] = torch.tensor(0.75)  # as prepare_model_for_compiled_hotswap leaves it
    assert error(layer(x), reference(layer, x, "default")) < 1e-5
