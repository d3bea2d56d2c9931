"""Merging, initialisations that change the base, and files, with PEFT on QLinear."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import nn

from qlora_kernels import QLinear
from qlora_kernels.interop.peft.layer import LoraQLinear

REQUANTIZES = pytest.mark.filterwarnings("ignore:.*requantizes")
X = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = QLinear.from_linear(nn.Linear(128, 192), rank=0)
        self.down = QLinear.from_linear(nn.Linear(192, 128, bias=False), rank=0, double_quant=False)
        self.head = nn.Linear(128, 10)

    def forward(self, x):
        return self.head(self.down(torch.relu(self.up(x))))


def adapted(seed=1, **options) -> PeftModel:
    torch.manual_seed(seed)
    model = get_peft_model(Pair(), LoraConfig(**{"r": 4, "target_modules": ["up", "down"], **options}))
    randomize(model, seed)
    return model.eval()


def randomize(model, seed):
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += torch.randn_like(parameter) * 0.1


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items() if "weight_" in name or "bias" in name}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True, "target_modules": ["up"]}])
@pytest.mark.parametrize("safe", [False, True])
def test_merging_requantizes_with_a_warning_and_unmerging_gives_the_bits_back(options, safe):
    model = adapted(**options)
    before, y = bits(model), model(X)
    with pytest.warns(UserWarning, match="requantizes"):
        model.merge_adapter(safe_merge=safe)
    merged = model(X)
    assert not same(bits(model), before)
    # The 4-bit grid's own error, about 0.1 of the weight; without the adapter it would be far more than that.
    assert error(merged, y) < 0.25
    with model.disable_adapter():
        base = model(X)
    assert error(base, y) > 2 * error(merged, y)
    if model.base_model.model.up.merged:
        model.unmerge_adapter()
    assert same(bits(model), before)
    assert torch.equal(model(X), y)


@REQUANTIZES
def test_the_merged_weight_is_the_exact_one_requantized():
    model = adapted()
    layer = model.base_model.model.up
    exact = layer.to_linear()
    assert error(exact(X), layer(X)) < 1e-5
    model.merge_adapter()
    expected = QLinear.from_linear(exact, rank=0)
    assert torch.equal(layer.base_layer.weight.packed, expected.weight.packed)
    assert error(layer.to_linear()(X), exact(X)) < 1e-6  # from the base before the merge


@REQUANTIZES
def test_merges_one_after_the_other_round_once():
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["up"], use_dora=True))
    randomize(model, 5)
    before = bits(model)
    model.merge_adapter(adapter_names=["default", "other"])
    together = bits(model)
    model.unmerge_adapter()
    model.merge_adapter(adapter_names=["default"])
    model.merge_adapter(adapter_names=["other"])
    assert same(bits(model), together)
    model.unmerge_adapter()
    assert same(bits(model), before)


@REQUANTIZES
@pytest.mark.parametrize("safe", [False, True])
def test_a_broken_adapter_is_not_merged(safe):
    model = adapted()
    layer = model.base_model.model.up
    layer.lora_A["default"].weight.data[0, 0] = float("nan")
    before = bits(model)
    with pytest.raises(ValueError, match="NaN"):
        layer.merge(safe_merge=safe)
    assert same(bits(model), before)
    assert not layer.merged


@REQUANTIZES
def test_merge_and_unload_gives_quantized_layers_and_unload_the_base():
    model = adapted()
    with torch.no_grad():
        y = model(X)
        merged = copy.deepcopy(model).merge_and_unload()
        base = copy.deepcopy(model).unload()
        assert type(merged.up) is type(base.up) is QLinear
        assert error(merged(X), y) < 0.25
        assert torch.equal(base(X), Pair()(X))
        assert type(merged.up.to_linear()) is nn.Linear


@REQUANTIZES
@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}, {"modules_to_save": ["head"]}]
)
def test_saved_and_loaded(options, tmp_path):
    model = adapted(**options)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Pair(), tmp_path).eval()
    assert isinstance(again.base_model.model.up, LoraQLinear)
    assert error(again(X), model(X)) < 1e-6
    if "init_lora_weights" not in options:  # PEFT's PiSSA fails so on dense layers too
        small = PeftModel.from_pretrained(Pair(), tmp_path, low_cpu_mem_usage=True).eval()
        assert error(small(X), model(X)) < 1e-6


def test_adapters_are_swapped_deleted_and_combined(tmp_path):
    model, other = adapted(), adapted(seed=2)
    other.save_pretrained(tmp_path)
    expected = other(X)
    model.load_adapter(str(tmp_path), "other")
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both", combination_type="svd", svd_rank=8)
    model.set_adapter("both")
    up, x = model.base_model.model.up, torch.randn(3, 128)
    model.set_adapter("default")
    one = up(x)
    model.set_adapter("other")
    two = up(x)
    model.set_adapter("both")
    assert error(up(x), (one + two) / 2) < 1e-4
    model.delete_adapter("both")
    model.set_adapter("other")
    assert torch.equal(model(X), expected)
    model.set_adapter("default")
    hotswap_adapter(model, str(tmp_path), adapter_name="default")
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4", "olora"])
def test_initialisations_that_change_the_base_requantize_it(kind):
    base = Pair()
    with pytest.warns(UserWarning, match=r"(PiSSA|OLoRA) .* requantizes"):
        model = get_peft_model(Pair(), LoraConfig(r=8, target_modules=["up"], init_lora_weights=kind))
    layer = model.base_model.model.up
    x = torch.randn(4, 128)
    assert not torch.equal(layer.base_layer.weight.packed, base.up.weight.packed)
    assert error(layer(x), base.up(x)) < 0.15  # what is left, in 4 bits, with the adapter added
    assert error(layer.base_layer(x), base.up(x)) > error(layer(x), base.up(x))


@pytest.mark.parametrize("kind", ["gaussian", "orthogonal", "eva"])
def test_initialisations_that_keep_the_base(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(Pair(), LoraConfig(r=8, target_modules=["up"], init_lora_weights=kind))
    assert error(model(X), Pair()(X)) < 1e-5


def test_initialisations_that_need_the_dense_weight_say_what_to_do():
    layer = adapted().base_model.model.up
    for start in (lambda: layer.loftq_init("default", None), lambda: layer.corda_init("default", "corda")):
        with pytest.raises(ValueError, match=r"(LoftQ|CorDA) .* quantize that base with rank=0"):
            start()
