"""from_pretrained and save_pretrained of transformers, with 4-bit layers."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small.llama import CONFIG, IDS, llama, logits, quantized, randomize
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM

import qlora_kernels
from qlora_kernels import NF4Config, merge_adapters, quantize_model, unmerge_adapters
from qlora_kernels.errors import InputError
from qlora_kernels.interop.transformers.load import load_quantized
from qlora_kernels.interop.transformers.quantize_folder import quantize_folder
from qlora_kernels.models.targets import qlora_layers


def fresh(rank=4, **options):
    """A quantized model."""
    model = LlamaForCausalLM(CONFIG).eval()
    quantize_model(model, rank, progress=False, **options)
    randomize(model)
    return model


def saved(model, folder) -> str:
    model.save_pretrained(folder)
    return str(folder)


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def assert_equal(first, second, cast=False):
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype, key
        assert torch.equal(a[key], b[key]), key
    for (name, one), (_, other) in zip(qlora_layers(first), qlora_layers(second), strict=True):
        assert one.adapters == other.adapters, name
        assert (one.active_adapter, one.dtype) == (other.active_adapter, other.dtype), name
    # A cast model has rotary frequencies in its type, and a loaded one in float32, as dense models do.
    assert cast or torch.equal(logits(first), logits(second))


@pytest.mark.parametrize("shard", ["5GB", "50KB"])
def test_a_saved_model_comes_back(tmp_path, shard):
    model = fresh(dropout=0.25, rslora=True, alpha=3)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    loaded = load(tmp_path)
    assert_equal(model, loaded)
    trainable = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 28
    assert not loaded.training


def test_layers_that_differ_come_back(tmp_path):
    """Types, double quantization, ranks and names of adapters, which is active, and biases in another type."""
    model = LlamaForCausalLM(CONFIG).bfloat16()
    for block in model.model.layers:
        block.mlp.up_proj = nn.Linear(64, 128).bfloat16()
    quantize_model(model, 2, skip=["model.layers.0", "lm_head"], compute_dtype=torch.float32, progress=False)
    quantize_model(
        model, 4, alpha=7, double_quant=False, target_modules=["q_proj"], adapter_dtype=torch.float16, progress=False
    )
    layers = dict(qlora_layers(model))
    layers["model.layers.1.mlp.up_proj"].add_adapter("other", 3)
    layers["model.layers.1.mlp.up_proj"].set_adapter("other")
    layers["model.layers.1.mlp.down_proj"].set_adapter(None)
    randomize(model)
    folder = saved(model.eval(), tmp_path)

    class Wide(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            for block in self.model.layers:
                block.mlp.up_proj = nn.Linear(64, 128)

    assert_equal(model, Wide.from_pretrained(folder), cast=True)


def test_a_folder_of_the_command_is_loaded(tmp_path):
    source = str(tmp_path / "dense")
    llama().bfloat16().save_pretrained(source)
    quantize_folder(source, tmp_path / "out", progress=False, max_shard_size=20_000)
    expected = load_quantized(tmp_path / "out", rank=0)
    loaded = load(tmp_path / "out")
    assert_equal(expected, loaded)
    assert_equal(load(saved(loaded, tmp_path / "again")), expected)
    assert_equal(load_quantized(tmp_path / "again", rank=0), expected)  # one format
    again = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert again == json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]


@pytest.mark.skipif(
    not hasattr(transformers.quantizers.auto, "LOADING_ATTRIBUTES_CONFIG_TYPES"),
    reason="this transformers 5 takes nothing from the argument, and warns",
)
def test_adapters_for_a_folder_that_has_none(tmp_path):
    folder = saved(fresh(rank=0), tmp_path)
    with pytest.warns(UserWarning, match="loading attributes"):
        loaded = load(folder, quantization_config=NF4Config(rank=2, alpha=4, target_modules=["q_proj"]))
    adapted = [name for name, layer in qlora_layers(loaded) if layer.adapters]
    assert adapted == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    assert all("lora" in name for name, parameter in loaded.named_parameters() if parameter.requires_grad)
    folder = saved(loaded, tmp_path / "again")
    assert_equal(loaded, load(folder))
    with pytest.warns(UserWarning, match="loading attributes"), pytest.raises(ValueError, match="adapters already"):
        load(folder, quantization_config=NF4Config(rank=2))
    with pytest.raises(InputError, match="from_pretrained"):
        load_quantized(folder)


def test_the_trunk_alone_and_another_head(tmp_path):
    model = fresh()
    folder = saved(model, tmp_path)
    trunk = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(trunk(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert type(classifier.score) is nn.Linear
    trainable = [name for name, parameter in classifier.named_parameters() if parameter.requires_grad]
    assert "score.weight" in trainable
    assert all("lora" in name or name == "score.weight" for name in trainable)
    again = AutoModelForSequenceClassification.from_pretrained(saved(classifier, tmp_path / "again"))
    assert torch.equal(again.score.weight, classifier.score.weight)


@pytest.mark.parametrize("key", ["weight_packed", "weight_absmax", "weight_nested_table", "lora_A.default", "all"])
def test_missing_tensors_are_an_error(tmp_path, key):
    folder = saved(fresh(), tmp_path)
    layer = "model.layers.1.mlp.up_proj."
    tensors = load_file(tmp_path / "model.safetensors")
    rest = {
        name: value for name, value in tensors.items() if not name.startswith(layer + ("" if key == "all" else key))
    }
    assert len(rest) < len(tensors)
    save_file(rest, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks \d tensors of its 4-bit layers: model.layers.1.mlp.up_proj"):
        load(folder)


@pytest.mark.parametrize("key", ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"])
def test_missing_dense_parts_are_an_error(tmp_path, key):
    folder = saved(fresh(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[key]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks 1 tensors of its dense parts: {key}"):
        load(folder)


def test_a_layer_is_not_dense_by_the_config_and_4bit_in_the_files(tmp_path):
    folder = saved(fresh(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"].append("q_proj")
    (tmp_path / "config.json").write_text(json.dumps(config))
    for kind in (AutoModelForCausalLM, AutoModel):
        with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj.weight.* in 4 bits, but modules_to_not"):
            kind.from_pretrained(folder)


def test_another_number_of_labels_makes_a_new_head(tmp_path):
    """ignore_mismatched_sizes asks for it: the head is in the files, in another shape."""
    model = AutoModelForSequenceClassification.from_config(transformers.LlamaConfig(**CONFIG.to_dict(), num_labels=3))
    folder = saved(quantize_model(model, 2, progress=False) and model, tmp_path)
    options = {"num_labels": 5, "ignore_mismatched_sizes": True}
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):  # which does not ignore them here
        with pytest.raises(ValueError, match=r"score\.weight should be \[5, 64\], found \[3, 64\] in the checkpoint"):
            AutoModelForSequenceClassification.from_pretrained(folder, **options)
        return
    loaded = AutoModelForSequenceClassification.from_pretrained(folder, **options)
    assert loaded.score.weight.shape == (5, 64)
    assert loaded.score.weight.requires_grad


@pytest.mark.parametrize("ignore", [False, True])
def test_wrong_shapes_are_an_error(tmp_path, ignore):
    folder = saved(fresh(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    key = "model.layers.0.mlp.up_proj.weight_packed"
    save_file({**tensors, key: tensors[key][:-1].clone()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((RuntimeError, ValueError)):
        load(folder, ignore_mismatched_sizes=ignore)


def test_constants_that_are_not_finite_are_an_error(tmp_path):
    folder = saved(fresh(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_nested_absmax"][0] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="weight_nested_absmax"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fancy": 1, "version": "9.0"}, r"no setting 'fancy'; it was written by version '9.0'.*upgrade"),
        ({"fancy": 1}, "no setting 'fancy'"),
        ({"block_size": 128}, "block_size in quantization_config should be 64, found 128"),
        ({"double_quant": "yes"}, "double_quant should be true or false"),
        ({"modules_to_not_convert": 3}, "modules_to_not_convert should be a list"),
        ({"adapters": {}}, "adapters in quantization_config should be a list"),
        ({"adapters": [{"name": "a", "rank": 10**6, "alpha": 1}]}, "rank 1000000 is larger than the layer"),
        ({"adapters": [{"name": "a.b", "rank": 2, "alpha": 1}]}, "a word without"),
        ({"adapters": [{"name": "a", "rank": 2}]}, "alpha is missing"),
        ({"adapters": [{"name": "a", "rank": 2, "alpha": 1, "layers": ["model.x"]}]}, "'model.x', which is no 4-bit"),
        ({"adapters": [{"name": "a", "rank": 2, "alpha": 1, "dtype": "int8"}]}, "dtype should be one of"),
        ({"layers": {"model.layers.0.mlp.up_proj": {"bits": 3}}}, "unknown setting 'bits'"),
        ({"layers": ["model"]}, "layers in quantization_config should be a JSON object"),
    ],
)
def test_settings_that_this_version_does_not_know(tmp_path, change, message):
    folder = saved(fresh(rank=0), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"].update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_a_merged_adapter_is_not_saved(tmp_path):
    model = fresh()
    merge_adapters(model)
    with pytest.raises(ValueError, match="unmerge_adapters"):
        model.save_pretrained(tmp_path)
    unmerge_adapters(model)
    assert_equal(model, load(saved(model, tmp_path)))


def test_casts_are_saved(tmp_path):
    model = fresh()
    for cast in (torch.float16, torch.float32, torch.bfloat16):
        model.to(cast)
        assert_equal(model, load(saved(model, tmp_path)), cast=True)
    model.float()
    assert_equal(model, load(saved(model, tmp_path)), cast=True)


def test_another_type_is_loaded_on_request(tmp_path):
    model = fresh(adapter_dtype=torch.float32).bfloat16()
    quantize_model(other := LlamaForCausalLM(CONFIG).bfloat16(), 4, adapter_dtype=torch.float32)
    assert load(saved(model, tmp_path / "a"), dtype=torch.float16).model.layers[0].mlp.up_proj.dtype == torch.float16
    loaded = load(saved(other, tmp_path / "b"), dtype=torch.float16)
    assert loaded.dtype == torch.float16
    assert loaded.model.layers[0].mlp.up_proj.lora_A["default"].dtype == torch.float32  # master copies stay


def test_a_model_made_dense_again_is_saved_dense(tmp_path):
    model = fresh(rank=0)
    for name, layer in list(qlora_layers(model)):
        model.set_submodule(name, layer.to_linear())
    loaded = load(saved(model, tmp_path))
    assert not list(qlora_layers(loaded))
    assert torch.equal(logits(model), logits(loaded))


def test_other_models_with_the_same_config_stay_dense(tmp_path):
    config = copy.deepcopy(CONFIG)
    model, other = LlamaForCausalLM(config), LlamaForCausalLM(config)
    quantize_model(model, 2, progress=False)
    assert not hasattr(config, "quantization_config")
    assert all(module.config is model.config for module in model.modules() if hasattr(module, "config"))
    assert not list(qlora_layers(load(saved(other, tmp_path))))


def test_layers_from_bitsandbytes_are_saved_too(tmp_path):
    """In FP4, whose levels are not NF4's, with bitsandbytes' own second level."""
    pytest.importorskip("bitsandbytes")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    folder = saved(LlamaForCausalLM(CONFIG), tmp_path / "dense")
    model = qlora_kernels.from_bitsandbytes(load(folder, quantization_config=config, device_map="cpu"), rank=2)
    randomize(model)
    assert not next(iter(qlora_layers(model)))[1].weight.has_nf4_levels
    assert_equal(model, load(saved(model, tmp_path / "out")))
    back = qlora_kernels.to_bitsandbytes(model, drop_adapters=True)
    assert not list(qlora_layers(load(saved(back, tmp_path / "back"))))


def test_a_copy_is_saved_too(tmp_path):
    model = quantized()
    assert_equal(model, load(saved(copy.deepcopy(model), tmp_path)))


QUANTIZER = "qlora_kernels.interop.transformers.quantizer"


@pytest.mark.parametrize("first", ["qlora_kernels", "transformers.quantizers.auto", "transformers", QUANTIZER])
@pytest.mark.slow
def test_registered_whatever_is_imported_first(first):
    code = (
        f"import sys, {first}, qlora_kernels\n"
        f"print('transformers.quantizers.auto' in sys.modules)\n"
        "from transformers.quantizers import auto\n"
        "import inspect\n"
        "assert 'AwqConfig' in inspect.getsource(auto)\n"
        "from qlora_kernels.interop import import_hooks\n"
        "assert 'transformers.quantizers.auto' not in import_hooks._waiting\n"
        "assert auto.AUTO_QUANTIZER_MAPPING['qlora_kernels'].__name__ == 'NF4Quantizer'\n"
        "print(auto.AUTO_QUANTIZATION_CONFIG_MAPPING['qlora_kernels'] is qlora_kernels.NF4Config)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = first.endswith(("auto", "quantizer"))
    assert done.stdout.split() == [str(loaded), "True"]


def test_a_config_prints_and_takes_no_names_of_peft():
    config = NF4Config(skip=["lm_head"], rank=4)
    assert "rank=4" in repr(config)
    assert "rank" not in config.to_dict()
    assert qlora_kernels.NF4Config.from_dict(config.to_dict()).to_dict() == config.to_dict()
    with pytest.raises(TypeError, match="'r' is called 'rank'"):
        NF4Config(r=4)
    with pytest.raises(ValueError, match="no setting 'bits'"):
        NF4Config(bits=4)
    with pytest.raises(ValueError, match="the same"):
        NF4Config(skip=[], modules_to_not_convert=[])
