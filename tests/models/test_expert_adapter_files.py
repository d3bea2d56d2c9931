"""Adapters of experts on disk: both ways with PEFT's target_parameters, and files that do not fit."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from contract import relative_error
from safetensors.torch import load_file, save_file
from small.mixtures import BOTH, KINDS, decoded, logits, make, quantized, randomize
from torch import nn

import qlora_kernels
from qlora_kernels import load_adapter, save_adapter
from qlora_kernels.models.experts import adapted_layers, experts_layers

EXPERTS = "model.layers.0.mlp.experts"
KEYS = f"base_model.model.{EXPERTS}"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def adapted(kind: str = "Mixtral", parameters=BOTH, rank: int = 4, **options) -> tuple[nn.Module, nn.Module]:
    """The dense model, and its 4-bit twin with adapters that do something."""
    model = make(kind)
    packed, _ = quantized(model, rank, **{"target_modules": ["q_proj"], "target_parameters": parameters} | options)
    randomize(packed)
    return model, packed


def state(model: nn.Module):
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    return tensors, {name: (layer.adapters, layer.active_adapter) for name, layer in adapted_layers(model)}


def assert_same(model: nn.Module, before) -> None:
    after = state(model)
    assert after[1] == before[1]
    assert after[0].keys() == before[0].keys()
    assert all(torch.equal(after[0][key], before[0][key]) for key in before[0])


def assert_peft_computes_the_same(peft, folder, model: nn.Module, packed: nn.Module) -> None:
    theirs = peft.PeftModel.from_pretrained(decoded(model, packed), folder).eval()
    assert relative_error(logits(packed), logits(theirs).double()) < 1e-5
    with qlora_kernels.disable_adapters(packed):
        assert relative_error(logits(packed), logits(theirs).double()) > 1e-2


# ------------------------------------------------------------------------------------------- with PEFT, both ways


@pytest.mark.parametrize("parameters", [BOTH, BOTH[:1], BOTH[1:]], ids="+".join)
@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_what_we_write(peft, tmp_path, kind, parameters):
    model, packed = adapted(kind, parameters)
    save_adapter(packed, tmp_path)
    assert_peft_computes_the_same(peft, tmp_path, model, packed)


def _experts_alone(packed):
    for _, layer in qlora_kernels.qlora_layers(packed):
        if layer.adapters:
            layer.delete_adapter("default")


def _unequal(packed):
    """Nested twice in one layer, once in the other; ranks and alphas that differ, some with rslora."""
    for name, layer in adapted_layers(packed):
        if layer.adapters:
            layer.delete_adapter("default")
        if name != "model.layers.1.mlp.experts.gate_up_proj":
            layer.add_adapter("default", rank=2 if "down" in name else 4, alpha=3.5, rslora="layers.1" in name)
    randomize(packed)


@pytest.mark.parametrize("change", [_experts_alone, _unequal])
def test_peft_reads_adapters_of_some_layers(peft, tmp_path, change):
    model = make("Qwen3Moe", num_hidden_layers=2)
    packed, _ = quantized(model, 4, target_modules=["q_proj"], target_parameters=BOTH)
    randomize(packed)
    change(packed)
    save_adapter(packed, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    if change is _experts_alone:
        assert (config["target_modules"], config["target_parameters"]) == ([], sorted(BOTH))
    else:
        assert "model.layers.1.mlp.experts.down_proj" in config["target_parameters"]
    assert_peft_computes_the_same(peft, tmp_path, model, packed)
    other, _ = quantized(model)
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(packed))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Mixtral", {"target_parameters": BOTH, "target_modules": ["q_proj"]}),
        ("Mixtral", {"target_parameters": ["experts.down_proj"], "target_modules": [], "use_rslora": True}),
        # The order of target_parameters does not matter, that of the module's parameters does.
        ("GptOss", {"target_parameters": BOTH[::-1], "rank_pattern": {"down_proj": 2}, "target_modules": "all-linear"}),
        ("Qwen3Moe", {"target_parameters": BOTH[:1], "alpha_pattern": {r".*experts\.gate_up_proj": 11}}),
        # Names of transformers 4, which PEFT turns into target_parameters, with rank_pattern and alpha_pattern.
        ("Qwen3Moe", {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]}),
    ],
)
def test_we_read_what_peft_writes(peft, tmp_path, kind, options):
    model = make(kind)
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, lora_alpha=6, **options))
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path)
    packed, _ = quantized(model)
    names = load_adapter(packed, tmp_path)
    assert any(name.startswith(EXPERTS) for name in names)
    assert_peft_computes_the_same(peft, tmp_path, model, packed)


def test_an_adapter_from_transformers_4_comes_by_way_of_peft(peft, tmp_path):
    model, packed = make("Mixtral"), quantized(make("Mixtral"))[0]
    tensors = {}
    for e in range(4):
        for key, (n, k) in {"w1": (96, 64), "w2": (64, 96), "w3": (96, 64)}.items():
            name = f"base_model.model.model.layers.0.block_sparse_moe.experts.{e}.{key}"
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = torch.randn(4, k), torch.randn(n, 4)
    save_file(tensors, tmp_path / WEIGHTS)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 1,
        "target_modules": ["w1", "w2", "w3"],
    }
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"an adapter from transformers 4, .*load it with PEFT onto the dense model"):
        load_adapter(packed, tmp_path)
    peft.PeftModel.from_pretrained(decoded(model, packed), tmp_path).save_pretrained(tmp_path / "new")
    assert load_adapter(packed, tmp_path / "new") == [f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"]
    assert_peft_computes_the_same(peft, tmp_path, model, packed)


def test_biases_that_were_trained_come_along(peft, tmp_path):
    model, packed = adapted("GptOss")
    experts = packed.get_submodule(EXPERTS)
    for bias in (experts.gate_up_proj_bias, experts.down_proj_bias):
        nn.init.normal_(bias.requires_grad_(True))
    save_adapter(packed, tmp_path)
    assert f"{KEYS}.base_layer.base_layer.down_proj_bias" in load_file(tmp_path / WEIGHTS)
    assert_peft_computes_the_same(peft, tmp_path, model, packed)
    other, _ = quantized(model)
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(packed))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"], "target_parameters": BOTH},
        {"target_modules": ["q_proj", "w1", "w2", "w3"]},
    ],
)
def test_peft_does_not_leave_out_4_bit_experts(peft, options):
    packed, _ = quantized(make("Mixtral"))
    with pytest.raises(
        ValueError, match=r"target_parameters covers 4-bit experts \(model.*gate_up_proj, .*load_adapter"
    ):
        peft.get_peft_model(packed, peft.LoraConfig(**options))


# ------------------------------------------------------------------------------------------- files and adapters


def test_the_file_is_as_peft_has_it(tmp_path):
    _, packed = adapted("Qwen3Moe")
    save_adapter(packed, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    assert {key.removeprefix(KEYS): list(value.shape) for key, value in tensors.items() if "experts" in key} == {
        ".base_layer.lora_A.weight": [6 * 4, 64],
        ".base_layer.lora_B.weight": [80, 4 * 6],
        ".lora_A.weight": [6 * 4, 40],
        ".lora_B.weight": [64, 4 * 6],
    }
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["target_modules"], config["target_parameters"]) == (["q_proj"], sorted(BOTH))
    layer = packed.get_submodule(f"{EXPERTS}.down_proj")
    A, B = tensors[f"{KEYS}.lora_A.weight"], tensors[f"{KEYS}.lora_B.weight"]
    for e in range(6):  # an expert has r rows of A in sequence, and every sixth column of B
        assert torch.equal(A[4 * e : 4 * e + 4], layer.lora_A["default"][e])
        assert torch.equal(B[:, e::6], layer.lora_B["default"][e])


def test_a_round_trip_keeps_bits_names_and_the_active_adapter(tmp_path):
    model, packed = adapted()
    packed = packed.bfloat16()
    save_adapter(torch.compile(packed), tmp_path)
    other, _ = quantized(model, 2, target_parameters=BOTH)
    names = load_adapter(other.bfloat16(), tmp_path, "second")
    assert set(names) == {"model.layers.0.self_attn.q_proj", f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"}
    for name, layer in experts_layers(other):
        own = packed.get_submodule(name)
        assert (layer.active_adapter, list(layer.adapters)) == ("default", ["default", "second"])
        assert layer.adapters["second"] == own.adapters["default"]
        assert torch.equal(layer.lora_A["second"], own.lora_A["default"])
        assert torch.equal(layer.lora_B["second"], own.lora_B["default"])
        assert layer.lora_B["second"].is_contiguous()
        assert not layer.lora_B["second"].requires_grad
    qlora_kernels.set_adapter(other, "second")
    assert torch.equal(logits(other), logits(packed))


def test_experts_that_the_file_does_not_cover_lose_the_adapter(tmp_path):
    model, packed = adapted()
    linear, _ = quantized(model, 4, target_modules=["q_proj"])
    save_adapter(linear, tmp_path)
    load_adapter(packed, tmp_path)
    assert not any(layer.adapters for _, layer in experts_layers(packed))
    assert torch.equal(logits(packed), logits(linear))


def test_names_that_another_stack_has_too_are_given_in_full(tmp_path):
    model = make("Mixtral", num_hidden_layers=2)
    packed, _ = quantized(model, 4, skip=["model.layers.1.mlp.experts"], target_parameters=BOTH[1:])
    save_adapter(packed, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_parameters"] == [f"{EXPERTS}.down_proj"]


def test_dropout_of_linear_layers_is_not_written_beside_experts(peft, tmp_path):
    model, packed = adapted()
    layer = packed.model.layers[0].self_attn.q_proj
    layer.delete_adapter("default")
    layer.add_adapter("default", rank=4, dropout=0.1)
    save_adapter(packed, tmp_path)
    assert_peft_computes_the_same(peft, tmp_path, model, packed)


# ------------------------------------------------------------------------------------------- what does not fit


def _config(**changes):
    def change(folder):
        path = folder / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={"format": "pt"})  # without the copy

    return change


def _put(key, value):
    """Another value for a key, or with None no such key."""

    def change(folder):
        _config()(folder)
        tensors = load_file(folder / WEIGHTS)
        tensors.pop(key, None)
        save_file(tensors if value is None else tensors | {key: value}, folder / WEIGHTS, metadata={"format": "pt"})

    return change


def _move(old, new):
    def change(folder):
        _config()(folder)
        tensors = {key.replace(old, new): value for key, value in load_file(folder / WEIGHTS).items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return change


def _without_inner(folder):
    for letter in "AB":
        _put(f"{KEYS}.base_layer.lora_{letter}.weight", None)(folder)


A, B = f"{KEYS}.lora_A.weight", f"{KEYS}.lora_B.weight"
BAD = {
    "no list": (_config(target_parameters="down_proj"), "target_parameters should be a list of names, found 'down_pro"),
    "dropout": (_config(lora_dropout=0.1), "adapters of parameters have no dropout, but lora_dropout is 0.1; set it"),
    "none named": (_config(target_parameters=None), r"experts\.base_layer, .*experts are not among its QLinear layers"),
    "one named": (
        _config(target_parameters=BOTH[1:]),
        r"experts\.base_layer is not among its QLinear layers or the exp",
    ),
    "a bias": (
        _config(target_parameters=["down_proj_bias"]),
        r"covers model.*experts\.down_proj_bias, which can have n",
    ),
    "half": (_put(B, None), r"lora_A and lora_B come together, but one is missing for .*experts"),
    "one missing": (
        _without_inner,
        r"target_parameters covers .*gate_up_proj, but adapter_model\.safetensors does not",
    ),
    "own name": (
        _move(f"{KEYS}.lora", f"{KEYS}.down_proj.lora"),
        r"experts\.down_proj is not among its QLinear layers",
    ),
    "rank": (_config(r=2), r"down_proj takes A \[8, 96\] and B \[64, 8\], found \[16, 96\] and \[64, 16\]"),
    "experts": (_put(A, torch.ones(12, 96)), r"down_proj takes A \[16, 96\] and B \[64, 16\], found \[12, 96\]"),
    "3-D": (_put(A, torch.ones(4, 4, 96)), r"should be a floating matrix, found torch\.float32 \[4, 4, 96\]"),
    "integers": (_put(A, torch.ones(16, 96).int()), r"should be a floating matrix, found torch\.int32 \[16, 96\]"),
    "nan": (_put(B, torch.full((64, 16), torch.nan)), "lora_B of .*down_proj holds NaN or infinity"),
}


@pytest.mark.parametrize("case", BAD)
def test_files_that_do_not_fit_change_nothing(tmp_path, case):
    change, message = BAD[case]
    _, packed = adapted("GptOss")
    save_adapter(packed, tmp_path)
    change(tmp_path)
    before = state(packed)
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(packed, tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert_same(packed, before)


@pytest.mark.parametrize(
    ("kind", "changes", "refused"),
    [
        ("Mixtral", {"peft_version": "0.18.1"}, "PEFT 0.18 wrote"),
        ("Mixtral", {"megatron_config": None}, "PEFT 0.17 wrote"),
        ("Mixtral", {"peft_version": "0.19.0.dev0@UNKNOWN", "megatron_config": None}, None),
        ("Mixtral", {"peft_version": "1.0"}, None),
        ("GptOss", {"peft_version": "0.18.1"}, None),  # transposed weights never had another layout
    ],
)
def test_the_layout_of_early_releases_is_refused(tmp_path, kind, changes, refused):
    """Where weights are square, the shapes would not tell."""
    _, packed = adapted(kind)
    save_adapter(packed, tmp_path)
    _config(**changes)(tmp_path)
    before = state(packed)
    if refused is None:
        load_adapter(packed, tmp_path)
    else:
        with pytest.raises(ValueError, match=refused):
            load_adapter(packed, tmp_path)
    assert_same(packed, before)


def test_an_edited_list_of_parameters_is_noticed(tmp_path):
    _, packed = adapted()
    save_adapter(packed, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"target_parameters": BOTH[:1]}))
    with pytest.raises(ValueError, match=r"do not belong together \(target_parameters is"):
        load_adapter(packed, tmp_path)


def test_what_peft_cannot_hold_is_not_saved(tmp_path):
    _, packed = adapted(parameters=BOTH[1:])
    new = tmp_path / "new"
    with pytest.raises(ValueError, match="the model is itself a QExperts"):
        save_adapter(packed.get_submodule(f"{EXPERTS}.down_proj"), new)
    with pytest.raises(ValueError, match="down_proj is a parameter of the model itself"):
        save_adapter(packed.get_submodule(EXPERTS), new)
    with torch.no_grad():
        packed.get_submodule(f"{EXPERTS}.down_proj").lora_B["default"][3, 1, 0] = torch.inf
    with pytest.raises(ValueError, match=rf"{re.escape(B)} .* holds NaN or infinity"):
        save_adapter(packed, new)
    assert not new.exists()


def test_a_stack_whose_name_ends_anothers_cannot_be_saved_alone(tmp_path):
    model, packed = adapted(parameters=BOTH[1:])
    pair = nn.ModuleDict({"model": packed.model, "more": nn.ModuleDict({"model": quantized(model)[0].model})})
    with pytest.raises(ValueError, match=rf"cannot name {EXPERTS}\.down_proj without more\.{EXPERTS}\.down_proj"):
        save_adapter(pair, tmp_path / "new")
    assert not (tmp_path / "new").exists()
