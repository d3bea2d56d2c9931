"""Models with 4-bit experts, written by save_pretrained and read by from_pretrained of transformers."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qlora_kernels
from qlora_kernels import NF4Config
from qlora_kernels.errors import InputError
from qlora_kernels.interop.transformers.load import load_quantized
from qlora_kernels.interop.transformers.quantize_folder import quantize_folder
from qlora_kernels.layers.experts import QExpertsModule
from qlora_kernels.models.experts import adapted_layers, experts_layers

transformers = pytest.importorskip("transformers")

COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 16,
}
# gpt-oss has transposed weights, and biases.
KINDS = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
BOTH = ["gate_up_proj", "down_proj"]
TOKENS = torch.arange(18).view(2, 9)


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**COMMON, **KINDS[kind])
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("_bias"):  # zero at the start
            nn.init.normal_(parameter, std=0.1)
    return model


def quantized(kind: str, rank: int = 0, **options) -> nn.Module:
    model = make(kind)
    qlora_kernels.quantize_model(model, rank=rank, progress=False, **options)
    for _, layer in adapted_layers(model):
        for B in layer.lora_B.values():
            nn.init.normal_(B, std=0.1)
    return model


def load(folder, **options) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def assert_equal(first: nn.Module, second: nn.Module, cast: bool = False) -> None:
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype, key
        assert torch.equal(a[key], b[key]), key
    for (name, one), (_, other) in zip(adapted_layers(first), adapted_layers(second), strict=True):
        assert (one.adapters, one.active_adapter, one.dtype) == (other.adapters, other.active_adapter, other.dtype), (
            name
        )
    # A cast model has rotary frequencies in its type, and a loaded one in float32, as dense models do.
    assert cast or torch.equal(first(TOKENS).logits, second(TOKENS).logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [0, 4])
def test_a_saved_model_comes_back(tmp_path, kind, rank):
    model = quantized(kind, rank, target_modules=["q_proj"], target_parameters=BOTH)
    model.save_pretrained(tmp_path / "first")
    settings = json.loads((tmp_path / "first" / "config.json").read_text())["quantization_config"]
    assert settings["experts"] == [f"model.layers.{n}.mlp.experts" for n in (0, 1)]
    loaded = load(tmp_path / "first")
    assert_equal(model, loaded)
    trained = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    loaded.save_pretrained(tmp_path / "again")  # what was loaded from a 4-bit folder has other rules
    assert_equal(model, load(tmp_path / "again"))


def test_stacks_that_differ_come_back(tmp_path):
    model = make("GptOss").bfloat16()
    qlora_kernels.quantize_model(
        model, 2, skip=["layers.0", "lm_head"], compute_dtype=torch.float32, progress=False, target_parameters=BOTH[:1]
    )
    qlora_kernels.quantize_model(model, rank=0, double_quant=False, progress=False)
    stacks = dict(experts_layers(model))
    stacks["model.layers.0.mlp.experts.down_proj"].add_adapter("other", 3, rslora=True)
    stacks["model.layers.1.mlp.experts.gate_up_proj"].set_adapter(None)
    assert len({layer.weight.double_quant for layer in stacks.values()}) == 2
    model.save_pretrained(tmp_path)
    assert_equal(model, load(tmp_path), cast=True)


def test_dense_experts_beside_4_bit_ones_come_back(tmp_path):
    model = quantized("Mixtral", skip=["layers.0.mlp.experts", "lm_head"])
    assert isinstance(model.model.layers[1].mlp.experts, QExpertsModule)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert not isinstance(loaded.model.layers[0].mlp.experts, QExpertsModule)
    assert_equal(model, loaded)


def test_the_trunk_of_a_folder(tmp_path):
    model = quantized("Qwen3Moe")
    model.save_pretrained(tmp_path)
    trunk = transformers.AutoModel.from_pretrained(tmp_path)
    assert torch.equal(trunk(TOKENS).last_hidden_state, model.model(TOKENS).last_hidden_state)


def test_only_experts_are_4_bit(tmp_path):
    model = quantized("Mixtral", skip=r".*self_attn\..*|.*gate|lm_head")
    assert not any(True for _ in qlora_kernels.qlora_layers(model))
    model.save_pretrained(tmp_path)
    assert_equal(model, load(tmp_path))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_dense_folder_is_quantized_while_it_is_loaded(tmp_path, kind, double_quant):
    make(kind).save_pretrained(tmp_path / "dense")
    loaded = load(tmp_path / "dense", quantization_config=NF4Config(double_quant))
    model = quantized(kind, double_quant=double_quant)
    assert_equal(model, loaded)
    assert loaded.hf_quantizer.report.experts == [name for name, _ in experts_layers(model)]
    assert not any("experts" in name for name in loaded.hf_quantizer.report.left_alone)
    loaded.save_pretrained(tmp_path / "packed")
    assert_equal(model, load(tmp_path / "packed"))


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_added_while_a_folder_is_loaded(tmp_path, kind):
    """From a dense folder and from a 4-bit one, the same as by quantize_model."""
    make(kind).save_pretrained(tmp_path / "dense")
    quantized(kind).save_pretrained(tmp_path / "packed")
    options = {"rank": 4, "alpha": 8, "rslora": True, "target_modules": ["q_proj"], "target_parameters": BOTH[:1]}
    model = quantized(kind, **options)
    on_the_fly = load(tmp_path / "dense", quantization_config=NF4Config(**options))
    assert on_the_fly.hf_quantizer.report.adapted_experts == [
        name for name, layer in experts_layers(model) if layer.adapters
    ]
    for loaded in (
        on_the_fly,
        load(tmp_path / "packed", quantization_config=NF4Config(**options)),
        load_quantized(tmp_path / "packed", **options),
    ):
        assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]
        adapters = {key: tensor for key, tensor in model.state_dict().items() if "lora_" in key}
        assert any("experts" in key for key in adapters)
        loaded.load_state_dict(adapters, strict=False)
        assert_equal(model, loaded)


def test_adapters_of_experts_that_cannot_be(tmp_path):
    make("Mixtral").save_pretrained(tmp_path / "dense")
    quantized("Mixtral").save_pretrained(tmp_path / "packed")
    quantized("Mixtral", 2, target_modules=["q_proj"], target_parameters=BOTH).save_pretrained(tmp_path / "adapted")
    with pytest.raises(TypeError, match="target_parameters should be a list of names, found 'down_proj'"):
        NF4Config(rank=2, target_parameters="down_proj")
    for folder in (tmp_path / "dense", tmp_path / "packed"):
        for options, words in (
            ({"target_parameters": ["w1"]}, "'w1' matches no weights of experts; candidates: gate_up_proj, down_proj"),
            ({"target_parameters": BOTH, "dropout": 0.1}, "have no dropout, found 0.1"),
        ):
            with pytest.raises(ValueError, match=words):
                load(folder, quantization_config=NF4Config(rank=2, **options))
    with pytest.raises(ValueError, match="matches no weights of experts"):
        load_quantized(tmp_path / "packed", target_parameters=["w1"])
    with pytest.raises(TypeError, match="target_parameters should be a list of names, found None"):
        NF4Config(rank=2, target_parameters=None)
    with pytest.raises(ValueError, match="'down_proj' matches no weights of experts; they are 4-bit already"):
        quantized("Mixtral", skip=["q_proj", "lm_head"]).save_pretrained(tmp_path / "some")
        qlora_kernels.quantize_model(load(tmp_path / "some"), 2, target_parameters=["down_proj"], progress=False)
    config = NF4Config(rank=2, target_modules=["k_proj"], target_parameters=BOTH)
    with pytest.raises(ValueError, match=r"has adapters already, such as 'default' of .*experts\.gate_up_proj"):
        load(tmp_path / "adapted", quantization_config=config)


def test_adapters_for_experts_that_a_folder_has_not_in_4_bits(tmp_path):
    """Whatever its list of dense parts says."""
    quantized("Mixtral", skip=["lm_head", "model.layers.1.mlp.experts"]).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["modules_to_not_convert"] = ["lm_head"]
    path.write_text(json.dumps(config))
    name = "model.layers.1.mlp.experts.down_proj"
    with pytest.raises(ValueError, match="matches no weights of experts; candidates: gate_up_proj, down_proj"):
        load(tmp_path, quantization_config=NF4Config(rank=2, target_parameters=[name]))
    with pytest.raises(ValueError, match="matches no weights of experts; candidates: gate_up_proj, down_proj"):
        load_quantized(tmp_path, rank=2, target_parameters=[name])


def test_load_quantized_says_who_reads_dense_experts(tmp_path):
    quantized("Mixtral", skip=["lm_head", "experts"]).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="from_pretrained of transformers reads folders with dense experts"):
        load_quantized(tmp_path, rank=0)


def test_skipped_experts_stay_dense_while_they_are_loaded(tmp_path):
    make("Mixtral").save_pretrained(tmp_path)
    loaded = load(tmp_path, quantization_config=NF4Config(skip=["layers.1.mlp.experts", "lm_head"]))
    assert_equal(quantized("Mixtral", skip=["layers.1.mlp.experts", "lm_head"]), loaded)
    assert any("named in skip" in reason for reason in loaded.hf_quantizer.report.left_alone.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dense", [True, False])
def test_missing_tensors_are_an_error(tmp_path, kind, dense):
    """One expert's, a whole weight, or a piece of it; never random numbers."""
    (make(kind) if dense else quantized(kind)).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    options = {"quantization_config": NF4Config()} if dense else {}
    keys = [key for key in tensors if "layers.1." in key and "experts" in key]
    assert keys
    for lost in {key.rpartition("experts.")[2]: key for key in keys}.values():
        save_file({key: tensor for key, tensor in tensors.items() if key != lost}, path, {"format": "pt"})
        with pytest.raises((ValueError, RuntimeError)):
            load(tmp_path, **options)


def test_a_weight_that_is_not_finite_is_an_error(tmp_path):
    model = make("Mixtral")
    model.model.layers[1].mlp.experts.down_proj.data[2, 1, 0] = float("inf")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj\[2\] holds inf"):
        load(tmp_path, quantization_config=NF4Config())


def test_settings_that_do_not_fit(tmp_path):
    quantized("Mixtral").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    name = "model.layers.0.mlp.experts"
    for change, message in (
        ({"experts": name}, "experts in quantization_config should be a list of names"),
        ({"experts": [1]}, "experts in quantization_config should be a list of names"),
        ({"experts": ["model.layers.0.mlp.expert"]}, "no module of experts that can be 4-bit; did you mean"),
        ({"layers": {f"{name}.down_proj": {"nf4_levels": False}}}, "have NF4's levels only"),
        ({"experts": [name]}, "lacks 2 tensors of its 4-bit layers"),
        ({"experts": []}, "lacks 4 tensors of its 4-bit layers"),
    ):
        path.write_text(json.dumps({**config, "quantization_config": {**config["quantization_config"], **change}}))
        with pytest.raises((ValueError, RuntimeError), match=message):
            load(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_folder_is_quantized_by_the_command(tmp_path, kind, double_quant):
    make(kind).save_pretrained(tmp_path / "dense")
    report = quantize_folder(tmp_path / "dense", tmp_path / "packed", double_quant=double_quant, progress=False)
    assert report.experts == 4
    assert "and 4 stacks of experts in NF4" in str(report)
    assert not any("experts" in name for name in report.left_alone)
    model = quantized(kind, double_quant=double_quant)
    assert_equal(model, load(tmp_path / "packed"))
    loaded = load_quantized(tmp_path / "packed", rank=0)
    assert_equal(model, loaded)
    loaded.save_pretrained(tmp_path / "again")
    assert_equal(model, load(tmp_path / "again"))
    assert_equal(model, load_quantized(tmp_path / "again", rank=0))


def test_load_quantized_refuses_what_does_not_fit(tmp_path):
    quantized("Mixtral").save_pretrained(tmp_path)
    path, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    config = json.loads(path.read_text())
    for experts, message in (
        ("model", "experts in quantization_config should be a list of names"),
        (["model.layers.7.mlp.experts"], "no module of experts that can be 4-bit"),
        ([], "which its model does not have"),
    ):
        path.write_text(
            json.dumps({**config, "quantization_config": {**config["quantization_config"], "experts": experts}})
        )
        with pytest.raises(InputError, match=message):
            load_quantized(tmp_path, rank=0)
    path.write_text(json.dumps(config))
    tensors = load_file(weights)
    lost = next(key for key in tensors if key.endswith("experts.down_proj.weight_absmax"))
    save_file({key: tensor for key, tensor in tensors.items() if key != lost}, weights, {"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 tensors of its model, first .*down_proj\.weight_absmax"):
        load_quantized(tmp_path, rank=0)


@pytest.mark.parametrize("kind", KINDS)
def test_trainer_resumes(tmp_path, kind):
    """Trainer loads a checkpoint by the model's own names, and only warns of others."""
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(96, (4, 8)).tolist()]

    def losses(folder, resume=None):
        model = quantized(kind, 4, target_modules=["q_proj"], target_parameters=BOTH)
        options = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 0.01}
        quiet = {"report_to": "none", "disable_tqdm": True}
        arguments = transformers.TrainingArguments(str(folder), **options, **quiet)
        trainer = transformers.Trainer(model, arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    expected = losses(tmp_path / "first")
    assert expected[-1] < expected[0]
    assert losses(tmp_path / "second", str(tmp_path / "first" / "checkpoint-2")) == expected
