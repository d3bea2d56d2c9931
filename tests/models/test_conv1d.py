"""GPT-2, whose linear layers are transformers' Conv1D: their weights are [in, out]."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qlora_kernels import QLinear, load_adapter, qlora_layers, quantize_model, save_adapter

transformers = pytest.importorskip("transformers")
CONFIG = transformers.GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=32)
IDS = torch.arange(16).view(2, 8)


def gpt2():
    torch.manual_seed(2)
    model = transformers.GPT2LMHeadModel(CONFIG).eval()
    for parameter in model.parameters():  # biases start at zero, and would hide what is wrong with them
        nn.init.normal_(parameter, std=0.1)
    return model


def decoded(model, quantized):
    """The dense model with the weights that the quantized one decodes to."""
    model = copy.deepcopy(model)
    for name, layer in qlora_layers(quantized):
        model.get_submodule(name).weight.data = layer.weight.dequantize().t()
    return model


def randomize(model):
    for _, layer in qlora_layers(model):
        nn.init.normal_(layer.lora_B["default"], std=0.1)


@pytest.fixture
def dense():
    return gpt2()


@pytest.fixture
def quantized(dense):
    model = copy.deepcopy(dense)
    report = quantize_model(model, rank=4, progress=False)
    assert [name.rpartition("h.0.")[2] for name in report.quantized[:4]] == [
        "attn.c_attn",
        "attn.c_proj",
        "mlp.c_fc",
        "mlp.c_proj",
    ]
    assert list(report.left_alone) == ["lm_head"]
    return model


def test_it_computes_what_the_decoded_weights_compute(dense, quantized):
    layer = quantized.transformer.h[0].attn.c_attn
    assert isinstance(layer, QLinear)
    assert (layer.out_features, layer.in_features) == (192, 64)
    assert layer.fan_in_fan_out
    expected = decoded(dense, quantized)(IDS).logits
    torch.testing.assert_close(quantized(IDS).logits, expected)
    error = (quantized(IDS).logits - dense(IDS).logits).norm() / dense(IDS).logits.norm()
    assert 0 < error < 0.2
    assert torch.equal(
        copy.deepcopy(quantized).transformer.h[1].mlp.c_fc(torch.ones(64)),
        quantized.transformer.h[1].mlp.c_fc(torch.ones(64)),
    )


def test_hooks_training_mode_and_places_stay(dense):
    seen = []
    dense.transformer.h[0].mlp.c_fc.register_forward_hook(lambda *_: seen.append(1))
    dense.transformer.h[1].mlp.c_fc = dense.transformer.h[0].mlp.c_fc
    dense.train()
    quantize_model(dense, rank=4, progress=False)
    assert dense.transformer.h[1].mlp.c_fc is dense.transformer.h[0].mlp.c_fc
    assert dense.transformer.h[0].mlp.c_fc.training
    dense(IDS)
    assert seen == [1, 1]


def test_a_weight_that_is_not_finite_is_refused(dense):
    dense.transformer.h[1].mlp.c_fc.weight.data[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"h\.1\.mlp\.c_fc\.weight holds nan at index \(3, 5\)"):
        quantize_model(dense, progress=False)


def test_the_rank_is_checked_by_the_layer_not_by_its_transpose(dense):
    with pytest.raises(ValueError, match=r"c_attn: rank 65 is larger than the layer: a weight \[192, 64\]"):
        quantize_model(dense, rank=65, progress=False)


def test_adapters_go_to_peft_and_back(dense, quantized, tmp_path):
    peft = pytest.importorskip("peft")
    randomize(quantized)
    save_adapter(quantized, tmp_path / "ours")
    there = peft.PeftModel.from_pretrained(decoded(dense, quantized), tmp_path / "ours")
    torch.testing.assert_close(there(IDS).logits, quantized(IDS).logits)
    for name, parameter in there.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    there.save_pretrained(tmp_path / "theirs")
    load_adapter(quantized, tmp_path / "theirs")
    torch.testing.assert_close(there(IDS).logits, quantized(IDS).logits)


@pytest.mark.filterwarnings("error:.*fan_in_fan_out")
def test_the_adapters_configuration_says_how_the_weights_lie(dense, quantized, tmp_path):
    peft = pytest.importorskip("peft")
    save_adapter(quantized, tmp_path)
    assert peft.LoraConfig.from_pretrained(tmp_path).fan_in_fan_out
    peft.PeftModel.from_pretrained(dense, tmp_path)  # warns where the configuration is wrong


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_folder(dense, tmp_path, double_quant):
    from qlora_kernels.interop.transformers.load import load_quantized
    from qlora_kernels.interop.transformers.quantize_folder import quantize_folder

    dense.save_pretrained(tmp_path / "dense")
    report = quantize_folder(tmp_path / "dense", tmp_path / "4bit", double_quant=double_quant, progress=False)
    assert report.layers == 8
    model = load_quantized(tmp_path / "4bit", rank=0)
    quantize_model(dense, rank=0, double_quant=double_quant, progress=False)
    assert torch.equal(model(IDS).logits, dense(IDS).logits)
    assert model.transformer.h[0].attn.c_attn.fan_in_fan_out
