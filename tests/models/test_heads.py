"""Heads on top of a pretrained trunk: dense, and where a task adds them, trained."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qlora_kernels import qlora_layers, quantize_model
from qlora_kernels.models.heads import heads, new_heads

transformers = pytest.importorskip("transformers")
IDS = torch.arange(3, 19).view(2, 8)
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA = transformers.LlamaConfig(**SIZES, pad_token_id=0, num_labels=2)
BERT = transformers.BertConfig(**SIZES, num_labels=2)
ROBERTA = transformers.RobertaConfig(**SIZES, num_labels=2)

NEW = [
    (transformers.LlamaForSequenceClassification, LLAMA, ["score"]),
    (transformers.LlamaForTokenClassification, LLAMA, ["score"]),
    (transformers.BertForSequenceClassification, BERT, ["classifier"]),
    (transformers.BertForQuestionAnswering, BERT, ["qa_outputs"]),
    (transformers.RobertaForSequenceClassification, ROBERTA, ["classifier.dense", "classifier.out_proj"]),
]


@pytest.mark.parametrize(("kind", "config", "names"), NEW, ids=lambda value: getattr(value, "__name__", ""))
def test_a_new_head_stays_dense_and_is_trained(kind, config, names):
    torch.manual_seed(0)
    model = kind(config)
    report = quantize_model(model, progress=False)  # rank 16, which two labels do not take
    assert {name: reason for name, reason in report.left_alone.items() if name in names} == dict.fromkeys(
        names, f"a head of {kind.__name__}, trained with the adapters"
    )
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.{key}" for name in names for key, _ in model.get_submodule(name).named_parameters()} | {
        f"{name}.{kind}.default" for name, _ in qlora_layers(model) for kind in ("lora_A", "lora_B")
    }
    output = model(IDS)
    (output.logits if "logits" in output else output.start_logits).sum().backward()
    assert model.get_submodule(names[0]).weight.grad.abs().sum() > 0


WHISPER = transformers.WhisperConfig(
    vocab_size=64, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=128, decoder_ffn_dim=128, classifier_proj_size=32,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
)  # fmt: skip
CLIP = transformers.CLIPConfig(
    vision_config={**SIZES, "image_size": 32, "patch_size": 16}, text_config=SIZES, num_labels=20
)
T5 = transformers.T5Config(vocab_size=64, d_model=64, d_kv=32, d_ff=128, num_layers=1, num_heads=2)
SIDE_BY_SIDE = [
    (transformers.WhisperForAudioClassification, WHISPER, ["projector", "classifier"]),
    (transformers.CLIPForImageClassification, CLIP, ["classifier"]),
    (transformers.T5ForQuestionAnswering, T5, ["qa_outputs"]),
]


@pytest.mark.parametrize(("kind", "config", "names"), SIDE_BY_SIDE, ids=lambda value: getattr(value, "__name__", ""))
def test_a_new_head_of_a_model_that_has_no_trunk_of_the_usual_name(kind, config, names):
    model = kind(config)
    report = quantize_model(model, progress=False)
    assert list(report.left_alone) == names
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora" not in name}
    assert {name.rpartition(".")[0] for name in trained} == set(names)


def test_layers_without_a_trunk_that_are_no_heads():
    projections = {"text_projection", "visual_projection"}
    assert projections <= set(quantize_model(transformers.CLIPModel(CLIP), progress=False).quantized)
    model = transformers.T5ForConditionalGeneration(T5)
    assert list(heads(model)) == ["lm_head"]
    assert new_heads(model) == []


def test_norms_and_convolutions_of_a_new_head_are_trained():
    config = transformers.SegformerConfig(
        num_encoder_blocks=1, depths=[1], sr_ratios=[1], hidden_sizes=[64], num_attention_heads=[2], mlp_ratios=[2],
        patch_sizes=[7], strides=[4], decoder_hidden_size=32,
    )  # fmt: skip
    model = transformers.SegformerForSemanticSegmentation(config)
    quantize_model(model, progress=False)
    assert all(parameter.requires_grad for parameter in model.decode_head.parameters())
    assert not any(p.requires_grad for name, p in model.segformer.named_parameters() if "lora" not in name)


def test_a_4_bit_head_is_not_trained_itself():
    model = transformers.BertForSequenceClassification(BERT)
    quantize_model(model, rank=2, skip=["pooler"], progress=False)
    model.classifier.add_adapter("other", 1)
    assert new_heads(model) == []
    model.bert.pooler.dense = torch.nn.Linear(64, 64)
    quantize_model(model, rank=2, progress=False)
    assert not model.classifier.weight_packed.requires_grad
    assert not model.classifier.lora_A["other"].requires_grad


def test_a_language_models_head_stays_dense_and_frozen():
    for model in (transformers.LlamaForCausalLM(LLAMA), transformers.BertForMaskedLM(BERT)):
        report = quantize_model(model, progress=False)
        assert new_heads(model) == []
        assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "lora" not in name)
        assert all(name.startswith(("model.", "bert.")) for name in report.quantized)
    assert heads(model) == {
        "cls.predictions.transform.dense": "a head of BertForMaskedLM",
        "cls.predictions.decoder": "the output embeddings",
    }


def test_without_adapters_everything_is_frozen():
    model = transformers.BertForSequenceClassification(BERT)
    report = quantize_model(model, rank=0, progress=False)
    assert "classifier" in report.left_alone
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_with_a_skip_of_ones_own_a_head_is_a_layer_like_others():
    model = transformers.BertForSequenceClassification(BERT)
    with pytest.raises(ValueError, match=r"classifier: rank 16 is larger than the layer"):
        quantize_model(model, skip=["pooler"], progress=False)
    report = quantize_model(model, rank=2, skip=["pooler"], progress=False)
    assert "classifier" in report.quantized
    assert list(report.left_alone) == ["bert.pooler.dense"]


def test_a_pattern_for_a_head_says_why_it_gets_no_adapter():
    model = transformers.BertForSequenceClassification(BERT)
    with pytest.raises(ValueError, match=r"classifier is left alone: a head of BertForSequenceClassification"):
        quantize_model(model, target_modules=["classifier"], progress=False)


def test_a_trunk_alone_and_other_models_have_no_heads():
    class Small(nn.Sequential):
        base_model_prefix = "0"  # of transformers' name, but holding next to nothing

    small = Small(nn.Linear(64, 1), nn.Linear(64, 64))
    for model in (transformers.BertModel(BERT), nn.Sequential(nn.Linear(64, 64)), small):
        assert heads(model) == {}
        assert quantize_model(model, rank=1, progress=False).left_alone == {}
