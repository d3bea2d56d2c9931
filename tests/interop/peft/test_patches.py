"""What import qlora_kernels changes in PEFT, and what it says about a model with adapters of its own."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from small.blocks import IDS, Model, quantize, randomize
from small.llama import llama

from qlora_kernels import disable_adapters, merge_adapters, qlora_layers, save_adapter, set_adapter
from qlora_kernels.interop.peft.layer import LoraQLinear

CONFIG = {"target_modules": ["q_proj"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import qlora_kernels; from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training",
        "from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training; import qlora_kernels",
    ],
)
def test_the_order_of_imports_does_not_matter(imports):
    code = f"""
{imports}
from torch import nn
model = nn.Sequential(qlora_kernels.QLinear(64, 64, rank=0))
model = get_peft_model(model, LoraConfig(target_modules=["0"]))
print(type(model.base_model.model[0]).__name__, prepare_model_for_kbit_training.__wrapped__.__name__)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LoraQLinear prepare_model_for_kbit_training"


def test_untrained_adapters_of_the_layers_are_removed_with_a_warning():
    model = Model()
    quantize(model)
    expected = model(IDS)
    with pytest.warns(UserWarning, match=r"8 layers had untrained adapters .*layers.0.q_proj .*rank=0"):
        peft_model = get_peft_model(model, LoraConfig(**CONFIG))
    assert not any(layer.adapters for _, layer in qlora_layers(model))
    assert torch.allclose(peft_model(IDS), expected, atol=1e-5)
    trained = [name for name, parameter in peft_model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 4
    assert all("q_proj.lora_" in name for name in trained)


@pytest.mark.parametrize("config", [LoraConfig(**CONFIG), IA3Config(target_modules=["q_proj"], feedforward_modules=[])])
@pytest.mark.parametrize("merged", [False, True])
def test_trained_adapters_of_the_layers_are_refused(config, merged):
    model = Model()
    quantize(model)
    randomize(model)
    if merged:
        next(qlora_layers(model))[1].merge()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"layers\.0\.q_proj \('default'\).*save_adapter, quantize .*rank=0"):
        get_peft_model(model, config)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_functions_for_the_layers_own_adapters_point_to_peft_s(tmp_path):
    model = Model()
    quantize(model, rank=0)
    with disable_adapters(model):  # none is there, which is no error
        base = model(IDS)
    peft_model = get_peft_model(model, LoraConfig(**CONFIG, init_lora_weights=False))
    expected = peft_model(IDS)
    assert not torch.equal(expected, base)
    with disable_adapters(peft_model), disable_adapters(peft_model):
        assert torch.equal(peft_model(IDS), base)
    assert torch.equal(peft_model(IDS), expected)
    hint = r"PEFT manages the adapters of .*layers\.0\.q_proj: use "
    with pytest.raises(ValueError, match=hint + "disable_adapters"), disable_adapters(model):
        pass
    with pytest.raises(KeyError, match=hint + r"model\.set_adapter"):
        set_adapter(peft_model, "default")
    with pytest.raises(KeyError, match=hint + r"model\.save_pretrained"):
        save_adapter(peft_model, tmp_path / "adapter")
    with pytest.raises(RuntimeError, match=hint + r"model\.merge_adapter"):
        merge_adapters(peft_model)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    "config", [PromptTuningConfig(num_virtual_tokens=2), AdaptionPromptConfig(adapter_len=2, adapter_layers=1)]
)
def test_methods_that_inject_no_layers_do_not_lose_them_either(config):
    config.task_type = "CAUSAL_LM"
    model = llama()
    quantize(model)
    randomize(model)
    with pytest.raises(ValueError, match=r"trained adapters of their own.*save_adapter"):
        get_peft_model(model, config)
    model = llama()
    quantize(model)
    with pytest.warns(UserWarning, match="untrained adapters of their own"):
        get_peft_model(model, config)
    assert not any(layer.adapters for _, layer in qlora_layers(model))


@pytest.mark.parametrize("mixed", [False, True])
def test_parameters_are_counted_as_those_of_the_dense_model(mixed):
    counts = []
    for four_bit in (False, True):
        model = Model()
        if four_bit:
            quantize(model, rank=0)
        counts.append(get_peft_model(model, LoraConfig(**CONFIG), mixed=mixed).get_nb_trainable_parameters())
    assert counts[0] == counts[1]


def test_the_way_that_the_refusal_names(tmp_path):
    torch.manual_seed(0)
    dense = Model()
    state = {name: value.clone() for name, value in dense.state_dict().items()}
    quantize(dense)
    randomize(dense)
    save_adapter(dense, tmp_path)
    again = Model()
    again.load_state_dict(state)
    quantize(again, rank=0)
    peft_model = PeftModel.from_pretrained(again, tmp_path)
    assert torch.allclose(peft_model(IDS), dense(IDS), atol=1e-5)


def test_prepared_for_training():
    model = llama().to(torch.bfloat16)
    quantize(model, rank=0)
    packed = [layer.weight_packed.clone() for _, layer in qlora_layers(model)]
    model = prepare_model_for_kbit_training(model)
    assert model.is_gradient_checkpointing
    assert not hasattr(model, "is_loaded_in_4bit")
    assert model.lm_head.weight.dtype == torch.float32
    assert all(
        torch.equal(layer.weight_packed, one) for (_, layer), one in zip(qlora_layers(model), packed, strict=True)
    )
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    ids = torch.arange(8).view(1, 8)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    layers = [module for module in model.modules() if isinstance(module, LoraQLinear)]
    assert layers
    assert all(layer.lora_B["default"].weight.grad.abs().sum() > 0 for layer in layers)


def test_a_quantized_module_to_save_is_refused():
    model = Model()
    quantize(model, rank=0, skip=())
    with pytest.raises(ValueError, match=r"'lm_head' cannot be trained: .*lm_head.*skip=\['lm_head'"):
        get_peft_model(model, LoraConfig(**CONFIG, modules_to_save=["lm_head"]))
    assert not any(isinstance(module, LoraQLinear) for module in model.modules())


def test_corda_is_refused_before_it_writes_to_the_layers():
    pytest.importorskip("attr")  # PEFT's module needs it, though PEFT does not ask for it
    from peft.tuners.lora.corda import preprocess_corda

    model = Model()
    quantize(model, rank=0)
    with pytest.raises(ValueError, match="CorDA needs the dense weights"):
        preprocess_corda(model, LoraConfig(**CONFIG))


def test_prepared_for_compiled_hotswaps():
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    model = Model()
    quantize(model, rank=0)
    peft_model = get_peft_model(model, LoraConfig(**CONFIG, r=4)).eval()
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    expected = peft_model(IDS)
    prepare_model_for_compiled_hotswap(peft_model, target_rank=8)
    layer = peft_model.base_model.model.layers[0].q_proj
    assert layer.lora_A["default"].weight.shape == (8, 64)
    assert isinstance(layer.scaling["default"], torch.Tensor)
    assert torch.allclose(peft_model(IDS), expected, atol=1e-5)


def test_a_models_adapters_are_not_quantized_with_it():
    model = Model()
    quantize(model, rank=0, skip=("down", "lm_head"))
    peft_model = get_peft_model(model, LoraConfig(**CONFIG, r=8))
    report = quantize(peft_model, rank=0)
    assert report.quantized == [f"base_model.model.layers.{i}.down" for i in range(2)]
    assert type(peft_model.base_model.model.layers[0].q_proj.lora_A["default"]) is torch.nn.Linear


def test_another_method_is_right_and_its_merge_refused():
    model = Model()
    dense = copy.deepcopy(model)
    quantize(model, rank=0)
    for name, layer in list(qlora_layers(model)):
        dense.get_submodule(name).weight.data = layer.weight.dequantize(torch.float32)
    config = {"target_modules": ["q_proj", "up"], "feedforward_modules": ["up"], "init_ia3_weights": False}
    outputs = []
    for base in (dense, model):
        torch.manual_seed(0)
        peft_model = get_peft_model(base, IA3Config(**config)).eval()
        outputs.append(peft_model(IDS))
    assert torch.allclose(*outputs, atol=1e-5)
    with pytest.raises(RuntimeError, match="4-bit"):
        peft_model.merge_adapter()
    assert torch.equal(peft_model(IDS), outputs[1])


def test_adapters_of_experts_are_not_lost_either():
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    config = transformers.MixtralConfig(
        **shape, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, use_cache=False
    )

    def mixture():
        model = transformers.MixtralForCausalLM(config)
        quantize(model, target_parameters=["gate_up_proj"])
        return model

    model = mixture()
    experts = model.model.layers[0].mlp.experts.gate_up_proj
    torch.nn.init.normal_(experts.lora_B["default"])
    with pytest.raises(ValueError, match=r"1 layers have trained adapters.*gate_up_proj"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"'experts' cannot be trained: it is 4-bit"):
        get_peft_model(mixture(), LoraConfig(target_modules=["q_proj"], modules_to_save=["experts"]))
    dense = get_peft_model(transformers.MixtralForCausalLM(config), LoraConfig(target_modules=["q_proj"]))
    model = mixture()
    with pytest.warns(UserWarning, match="untrained adapters of their own"):
        peft_model = get_peft_model(model, LoraConfig(target_modules=r".*q_proj.*"))
    assert not model.model.layers[0].mlp.experts.gate_up_proj.adapters
    assert peft_model.get_nb_trainable_parameters() == dense.get_nb_trainable_parameters()
