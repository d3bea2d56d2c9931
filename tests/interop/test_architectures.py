"""Shapes of models that people have, with random weights: loaded in 4 bits, saved, loaded again, and decoding."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from qlora_kernels import NF4Config, quantize_model
from qlora_kernels.interop.transformers.skeleton import skipped
from qlora_kernels.models.targets import qlora_layers

IDS = torch.arange(1, 17).view(2, 8)
SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# The configuration's class, what is special about it, and how many layers become 4-bit.
DECODERS = {
    "llama": ("LlamaConfig", {}, 14),
    "llama, tied": ("LlamaConfig", {"tie_word_embeddings": True}, 14),
    "qwen2": ("Qwen2Config", {}, 14),
    "qwen3": ("Qwen3Config", {}, 14),
    "gemma2": ("Gemma2Config", {"sliding_window": 4, "query_pre_attn_scalar": 16}, 14),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 4, "query_pre_attn_scalar": 16}, 14),
    "mistral": ("MistralConfig", {"sliding_window": 4}, 14),
    "phi": ("PhiConfig", {"num_key_value_heads": 4}, 12),
    "gpt2": ("GPT2Config", {}, 8),
    "phi3": ("Phi3Config", {"sliding_window": 4}, 8),
}
QUICK = ("qwen3",)


def decoders():
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in DECODERS]


def config_of(name):
    kind, changes, layers = DECODERS[name]
    return getattr(transformers, kind)(**{**SMALL, **changes}), layers


def dense(config, folder, auto=AutoModelForCausalLM) -> str:
    torch.manual_seed(3)
    auto.from_config(config).save_pretrained(folder)
    return str(folder)


def outputs(model):
    with torch.no_grad():
        found = model(IDS)
    return found.logits if "logits" in found else found.last_hidden_state


@pytest.mark.parametrize("name", decoders())
def test_decoders(name, tmp_path):
    config, layers = config_of(name)
    folder = dense(config, tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=NF4Config())
    assert len(list(qlora_layers(model))) == layers
    assert len(model.hf_quantizer.report.left_alone) <= 1  # the head
    expected = AutoModelForCausalLM.from_pretrained(folder)
    quantize_model(expected, 0, skip=skipped(expected), progress=False)
    assert torch.equal(outputs(model), outputs(expected))
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(list(qlora_layers(again))) == layers
    assert torch.equal(outputs(model), outputs(again))
    decode_with_caches(again)


def decode_with_caches(model):
    """The same tokens with no cache, one that grows, and one of a fixed size; both slide where the model does."""
    options = {"max_new_tokens": 12, "do_sample": False, "min_new_tokens": 12}
    plain = model.generate(IDS[:1], use_cache=False, **options)
    for cache in ("dynamic", "static"):
        assert torch.equal(model.generate(IDS[:1], cache_implementation=cache, **options), plain), cache


ENCODER = {key: value for key, value in SMALL.items() if key not in ("num_key_value_heads", "head_dim")}


@pytest.mark.parametrize(
    "shape", [{}, pytest.param({"hidden_size": 96, "num_hidden_layers": 3}, marks=pytest.mark.slow)]
)
def test_encoders(shape, tmp_path):
    """BERT's shape, and that of MiniLM, which is a BERT as well: all layers, the pooler's too."""
    config = transformers.BertConfig(**{**ENCODER, **shape})
    folder = dense(config, tmp_path / "dense", AutoModel)
    layers = 6 * config.num_hidden_layers + 1
    model = AutoModel.from_pretrained(folder, quantization_config=NF4Config())
    assert len(list(qlora_layers(model))) == layers
    expected = AutoModel.from_pretrained(folder)
    quantize_model(expected, 0, progress=False)
    assert torch.equal(outputs(model), outputs(expected))
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(outputs(model), outputs(AutoModel.from_pretrained(tmp_path / "out")))

    classifier = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=2, quantization_config=NF4Config(rank=4)
    )
    assert classifier.classifier.weight.requires_grad
    classifier.save_pretrained(tmp_path / "classifier")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert torch.equal(outputs(classifier), outputs(again))


@pytest.mark.slow
def test_models_that_are_quantized_in_memory_come_back(tmp_path):
    for name in DECODERS:
        config, layers = config_of(name)
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
        quantize_model(model, 4, skip=skipped(model), progress=False)
        for _, layer in qlora_layers(model):
            torch.nn.init.normal_(layer.lora_B["default"], std=0.1)
        model.save_pretrained(tmp_path / name)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert len(list(qlora_layers(again))) == layers
        assert torch.equal(outputs(model), outputs(again)), name
