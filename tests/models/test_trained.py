"""What was trained beside the adapters: heads, embeddings, norms and biases, both ways with PEFT itself."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from contract import relative_error
from safetensors.torch import load_file, save_file
from small.llama import CONFIG, IDS, assert_unchanged, logits, randomize, state, transformers
from torch import nn

from qlora_kernels import load_adapter, qlora_layers, quantize_model, save_adapter


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def llama(**options):
    torch.manual_seed(3)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG.to_dict() | options)).eval()


def quantized(dense, rank=4, **options):
    model = copy.deepcopy(dense)
    quantize_model(model, rank, progress=False, **options)
    randomize(model)
    return model


def base_of(dense, model):
    """The dense model on the 4-bit model's weights, with everything else as before training."""
    base = copy.deepcopy(dense)
    with torch.no_grad():
        for name, layer in qlora_layers(model):
            base.get_submodule(name).weight.copy_(layer.weight.dequantize())
    return base


def train(model, *names):
    """Other values for these parameters, which ask for gradients."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if any(name.endswith(end) for end in names):
            parameter.requires_grad_(True)
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


TRAINED = {
    "head": ({}, ["lm_head.weight"], ["lm_head"], "none"),
    "embedding": ({}, ["embed_tokens.weight"], ["embed_tokens"], "none"),
    "tied": ({"tie_word_embeddings": True}, ["embed_tokens.weight"], ["embed_tokens", "lm_head"], "none"),
    "all norms": ({}, ["norm.weight"], ["input_layernorm", "norm", "post_attention_layernorm"], "none"),
    "one norm": ({}, ["0.input_layernorm.weight"], ["model.layers.0.input_layernorm"], "none"),
    "biases": ({"attention_bias": True}, ["proj.bias"], None, "lora_only"),
    "biases without adapters": ({"attention_bias": True, "mlp_bias": True}, ["proj.bias"], None, "all"),
    "all": (
        {"attention_bias": True},
        ["bias", "lm_head.weight", "embed_tokens.weight", "model.norm.weight"],
        ["embed_tokens", "lm_head", "model.norm"],
        "lora_only",
    ),
}


@pytest.mark.parametrize("case", TRAINED)
def test_peft_reads_what_was_trained(peft, tmp_path, case):
    config, names, modules, bias = TRAINED[case]
    dense = llama(**config)
    targets = ["q_proj", "v_proj"] if case == "biases without adapters" else "all-linear"
    model = quantized(dense, target_modules=targets)
    base = base_of(dense, model)
    train(model, *names)
    save_adapter(model, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["modules_to_save"], written["bias"]) == (modules, bias)

    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert relative_error(logits(model), logits(theirs).double()) < 1e-5
    again = quantized(dense, target_modules=targets)
    assert not torch.equal(logits(again), logits(model))
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
    # what comes back is trained on, and saved again
    save_adapter(again, tmp_path / "again")
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    # and PEFT, which saves its own, writes the same
    theirs.save_pretrained(tmp_path / "peft")
    third = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert {key: third[key].shape for key in first} == {key: value.shape for key, value in first.items()}


PEFT = {
    "head": ({}, {"modules_to_save": ["lm_head"]}),
    "embedding": ({}, {"modules_to_save": ["embed_tokens", "norm"]}),
    "tied, of which PEFT makes two": ({"tie_word_embeddings": True}, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied, one of them": ({"tie_word_embeddings": True}, {"modules_to_save": ["embed_tokens"]}),
    "tied for good": (
        {"tie_word_embeddings": True},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "lora_only": ({"attention_bias": True}, {"bias": "lora_only"}),
    "all": ({"attention_bias": True, "mlp_bias": True}, {"bias": "all"}),
    "all, of which there are none": ({}, {"bias": "all"}),
    "tokens": ({}, {"trainable_token_indices": [3, 1, 8]}),
    "tokens of tied weights": ({"tie_word_embeddings": True}, {"trainable_token_indices": {"embed_tokens": [3, 1]}}),
}


@pytest.mark.parametrize("case", PEFT)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_we_read_what_peft_trained(peft, tmp_path, case):
    config, options = PEFT[case]
    dense = llama(**config)
    model = quantized(dense, rank=0)
    base = base_of(dense, model)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], **options)
    theirs = peft.get_peft_model(copy.deepcopy(base), settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    theirs.eval().save_pretrained(tmp_path)
    load_adapter(model, tmp_path)
    assert relative_error(logits(model), logits(theirs).double()) < 1e-5
    save_adapter(model, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again")
    assert relative_error(logits(again), logits(theirs).double()) < 1e-5


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_embeddings_that_peft_saves_on_request(peft, tmp_path):
    dense = llama()
    model = quantized(dense, rank=0)
    theirs = peft.get_peft_model(base_of(dense, model), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    train(theirs, "embed_tokens.weight", "lm_head.weight")
    theirs.eval().save_pretrained(tmp_path, save_embedding_layers=True)
    load_adapter(model, tmp_path)
    assert relative_error(logits(model), logits(theirs).double()) < 1e-5


def test_parameters_keep_their_dtype_and_stay_the_same_objects(tmp_path):
    dense = llama(tie_word_embeddings=True)
    model = quantized(dense)
    train(model, "embed_tokens.weight")
    save_adapter(model, tmp_path)
    other = quantized(dense).bfloat16()
    before = other.lm_head.weight
    load_adapter(other, tmp_path)
    assert other.lm_head.weight is before
    assert other.model.embed_tokens.weight is before
    assert before.dtype == torch.bfloat16
    assert before.requires_grad
    assert torch.equal(before, model.lm_head.weight.bfloat16())


@pytest.mark.parametrize("task", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
@pytest.mark.parametrize("family", ["Llama", "Bert", "GPT2"])
def test_new_heads_are_saved_with_the_adapters(peft, tmp_path, task, family):
    """With the defaults, rank 16 beside a head of 2."""
    sizes = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = getattr(transformers, f"{family}Config")(**sizes, pad_token_id=0)
    torch.manual_seed(3)
    dense = getattr(transformers, f"AutoModelFor{task}").from_config(config).eval()
    model = copy.deepcopy(dense)
    quantize_model(model, progress=False)
    base = copy.deepcopy(dense)
    with torch.no_grad():
        for name, layer in qlora_layers(model):
            weight, values = base.get_submodule(name).weight, layer.weight.dequantize()
            weight.copy_(values.t() if layer.fan_in_fan_out else values)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    save_adapter(model, tmp_path)
    head = {"SequenceClassification": ("score", "classifier"), "QuestionAnswering": ("qa_outputs",)}
    named = json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"]
    assert len(named) == 1
    assert named[0] in head.get(task, ("score", "classifier"))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        assert relative_error(model(IDS)[0], theirs(IDS)[0].double()) < 1e-5


class Odd(nn.Module):
    """A module in two places, one with parameters of its own around a 4-bit layer, and names that end alike."""

    def __init__(self):
        super().__init__()
        self.prenorm, self.norm = nn.LayerNorm(8), nn.LayerNorm(8)
        self.twice = nn.ModuleList([nn.Linear(8, 8)] * 2)
        self.linear = nn.Linear(8, 8)
        self.token = nn.Parameter(torch.zeros(8))
        self.batch = nn.BatchNorm1d(8)

    def forward(self, x):
        x = self.norm(self.prenorm(self.linear(x + self.token)))
        return self.batch(self.twice[1](self.twice[0](x)))


def odd():
    torch.manual_seed(0)
    return nn.ModuleDict({"odd": Odd()}).eval()


def test_odd_modules(peft, tmp_path):
    model = odd()
    quantize_model(model, 2, progress=False, skip=["twice"])
    base = base_of(odd(), model)
    randomize(model)
    train(model, "odd.norm.weight", "twice.0.weight", "odd.token", "batch.weight")
    model["odd"].batch.running_mean.fill_(0.5)
    save_adapter(model, tmp_path)
    x = torch.randn(3, 8)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    assert relative_error(model["odd"](x), theirs.base_model.model["odd"](x).detach().double()) < 1e-5
    other = odd()
    quantize_model(other, 2, progress=False, skip=["twice"])
    load_adapter(other, tmp_path)
    assert torch.equal(other["odd"](x), model["odd"](x))
    assert other["odd"].twice[0].weight is other["odd"].twice[1].weight


def test_a_name_that_peft_would_confuse_with_a_4_bit_layer(tmp_path):
    model = nn.ModuleDict({"head": nn.Linear(8, 8), "prehead": nn.Linear(8, 8)})
    quantize_model(model, 2, progress=False, skip=["head"])
    model["head"].requires_grad_(True)
    with pytest.raises(ValueError, match="head is trained, but PEFT's format cannot name it without prehead, which"):
        save_adapter(model, tmp_path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_head_that_is_not_finite_is_neither_saved_nor_loaded(tmp_path, value):
    model = quantized(llama())
    train(model, "lm_head.weight")
    save_adapter(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.lm_head.weight"][1, 2] = value
    save_file(tensors, path)
    before = state(model)
    with pytest.raises(ValueError, match=r"base_model\.model\.lm_head\.weight holds NaN or infinity"):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = value
    with pytest.raises(ValueError, match=r"lm_head\.weight of adapter 'default' holds NaN"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def _head_missing(tensors):
    del tensors["base_model.model.lm_head.weight"]


def _head_misshaped(tensors):
    tensors["base_model.model.lm_head.weight"] = torch.zeros(3, 3)


def _head_of_integers(tensors):
    tensors["base_model.model.lm_head.weight"] = torch.zeros(64, 64, dtype=torch.int32)


def _head_too_large(tensors):
    tensors["base_model.model.lm_head.weight"] = torch.full((64, 64), 1e300, dtype=torch.float64)


def _foreign(tensors):
    tensors["base_model.model.model.nothing.weight"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_head_missing, "modules_to_save names lm_head, but the file lacks lm_head.weight"),
        (_head_misshaped, r"lm_head\.weight should be \[64, 64\], found \[3, 3\]"),
        (_head_of_integers, r"lm_head\.weight should be torch\.float32, found I32"),
        (_head_too_large, r"lm_head\.weight holds values too large for the model's torch\.float32"),
        (_foreign, r"or name a dense tensor of the model; found base_model\.model\.model\.nothing\.weight"),
    ],
)
def test_files_that_do_not_fit_change_nothing(tmp_path, change, message):
    model = quantized(llama())
    train(model, "lm_head.weight", "norm.weight")
    save_adapter(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    randomize(model)
    before = state(model)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)


@pytest.mark.parametrize("indices", [[1, 1], [-1, 3], [64, 3], [10**30, 3], [1], [1.5, 2], "12", {"other": [1, 2]}])
def test_rows_of_tokens_that_do_not_fit(tmp_path, indices):
    model = quantized(llama())
    save_adapter(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    save_file(load_file(path) | {key: torch.ones(2, 64)}, path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"trainable_token_indices": indices}))
    before = state(model)
    with pytest.raises(ValueError, match="trainable_token_indices"):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_a_trained_head_does_not_load_onto_a_4_bit_one_or_beside_other_adapters(tmp_path):
    dense = llama()
    model = quantized(dense)
    train(model, "lm_head.weight")
    save_adapter(model, tmp_path)
    whole = quantized(dense, skip=())
    before = state(whole)
    with pytest.raises(ValueError, match=r"lm_head is 4-bit .*with 'lm_head' in skip"):
        load_adapter(whole, tmp_path)
    assert_unchanged(whole, before)
    before = state(model)
    with pytest.raises(ValueError, match=r"its own lm_head\.weight, which the model has only once; delete .*: 'defau"):
        load_adapter(model, tmp_path, "second")
    assert_unchanged(model, before)


def test_a_model_on_the_meta_device_keeps_no_values(tmp_path):
    dense = llama()
    model = quantized(dense)
    save_adapter(model, tmp_path)
    model.to("meta")
    with pytest.raises(RuntimeError, match="q_proj is on the meta device, where an adapter's values would be lost"):
        load_adapter(model, tmp_path)
    with pytest.raises(RuntimeError, match="on the meta device and has no values to save"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_nothing_else_is_saved_with_a_model_as_it_was_quantized(tmp_path):
    save_adapter(quantized(llama(attention_bias=True)), tmp_path)
    assert all("lora_" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
