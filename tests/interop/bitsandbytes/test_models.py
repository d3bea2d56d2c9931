"""from_bitsandbytes and to_bitsandbytes on live layers and models of the real library."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from torch import nn

from qlora_kernels import QLinear, from_bitsandbytes, quantize_model, reference, to_bitsandbytes

bnb = pytest.importorskip("bitsandbytes")
transformers = pytest.importorskip("transformers")
from bnb_models import decoded, dense_folder, in_4_bits, linear4bit, load, logits  # noqa: E402


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    dense_folder(folder)
    return folder


def net():
    return nn.Sequential(nn.Embedding(16, 64), linear4bit(128, 64), nn.GELU(), linear4bit(32, 128, bias=False))


def state_of(model):
    """Everything that a refused call must leave."""
    modules = [(name, id(module)) for name, module in model.named_modules()]
    tensors = {key: (value.data_ptr(), value.requires_grad) for key, value in model.named_parameters()}
    return modules, tensors, {key: value.clone() for key, value in model.state_dict().items()}


def assert_unchanged(model, before):
    modules, tensors, values = state_of(model)
    assert (modules, tensors) == before[:2]
    assert values.keys() == before[2].keys()
    assert all(torch.equal(values[key], before[2][key]) for key in values)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_layer_there_and_back(double_quant, kind):
    layer = linear4bit(96, 128, quant_type=kind, compress_statistics=double_quant)
    expected = decoded(layer.weight.data, layer.weight.quant_state)
    bias = layer.bias
    ours = from_bitsandbytes(layer)
    assert isinstance(ours, QLinear)
    assert torch.equal(ours.weight.dequantize(), expected)
    assert ours.bias is bias
    assert (ours.rank, ours.dtype, ours.weight.double_quant) == (0, torch.bfloat16, double_quant)
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    torch.testing.assert_close(ours(x), nn.functional.linear(x, expected, bias), rtol=0.02, atol=0.02)
    theirs = to_bitsandbytes(ours)
    assert type(theirs) is bnb.nn.Linear4bit
    assert theirs.bias is bias
    assert theirs.weight.quant_type == kind
    assert theirs.compute_dtype == torch.bfloat16
    assert torch.equal(decoded(theirs.weight.data, theirs.weight.quant_state), expected)
    assert torch.equal(theirs.train()(x), layer.train()(x))


def test_a_layer_that_has_run_in_eval_mode():
    """On a CPU with AVX512-BF16 bitsandbytes then has other codes and constants in the layer."""
    layer = linear4bit(64, 128).eval()
    before = copy.deepcopy(layer)
    with torch.no_grad():
        layer(torch.randn(2, 128, dtype=torch.bfloat16))
    changed = getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    assert changed == before.support_avx512bf16_for_cpu
    packed, weight = layer.weight.data.clone(), from_bitsandbytes(before).weight
    now = from_bitsandbytes(layer).weight
    assert torch.equal(layer.weight.data, packed)
    assert torch.equal(now.packed, weight.packed)
    constants = reference.decode_absmax(weight.pieces)
    assert torch.equal(reference.decode_absmax(now.pieces), constants.bfloat16().float() if changed else constants)
    assert now.dtype == torch.bfloat16


def test_a_layer_that_has_run_in_eval_mode_and_was_saved():
    """On such a CPU its constants are then in another order, which bitsandbytes does not know any more."""
    layer = linear4bit(64, 256, compress_statistics=False).eval()
    expected = decoded(layer.weight.data, layer.weight.quant_state)
    with torch.no_grad():
        layer(torch.randn(2, 256, dtype=torch.bfloat16))
    layer.state_dict()
    torch.testing.assert_close(from_bitsandbytes(layer).weight.dequantize(), expected, rtol=1 / 64, atol=0)


def test_a_model_keeps_hooks_places_and_modes():
    model = net()
    model.append(model[1])
    model[1].eval()
    seen = []
    model[3].register_forward_hook(lambda *_: seen.append("called"))
    grads = {name: p.requires_grad for name, p in model.named_parameters() if "bias" in name or name == "0.weight"}
    assert from_bitsandbytes(model) is model
    assert [type(module) for module in model] == [nn.Embedding, QLinear, nn.GELU, QLinear, QLinear]
    assert model[4] is model[1]
    assert (model[1].training, model[3].training) == (False, True)
    assert {name: p.requires_grad for name, p in model.named_parameters() if name in grads} == grads
    model[3](torch.randn(2, 128))
    assert seen == ["called"]
    assert to_bitsandbytes(model) is model
    assert model[4] is model[1]
    assert not model[1].training
    model[3](torch.randn(2, 128))
    assert len(seen) == 2


def test_adapters():
    model = from_bitsandbytes(net(), rank=4, alpha=8, target_modules=["1"], adapter_dtype=torch.float32)
    assert (model[1].rank, model[1].scaling, model[3].rank) == (4, 2.0, 0)
    assert model[1].lora_A["default"].dtype == torch.float32
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "1.lora_A.default",
        "1.lora_B.default",
    ]
    model(torch.randint(16, (2, 3))).sum().backward()
    assert model[1].lora_B["default"].grad.abs().sum() > 0
    before = state_of(model)
    with pytest.raises(ValueError, match=r"1 \(default\).*save_adapter.*merge_adapters.*unchanged"):
        to_bitsandbytes(model)
    assert_unchanged(model, before)
    nn.init.normal_(model[1].lora_B["default"], std=0.5)
    plain = copy.deepcopy(model)
    model[1].merge()
    merged = model[1].weight.dequantize()
    to_bitsandbytes(model)
    assert torch.equal(decoded(model[1].weight.data, model[1].weight.quant_state), merged)
    base = plain[1].weight.dequantize()
    to_bitsandbytes(plain, drop_adapters=True)
    assert torch.equal(decoded(plain[1].weight.data, plain[1].weight.quant_state), base)


def test_adapters_that_are_there_stay_trained():
    model = net()
    model[1] = from_bitsandbytes(model[1], rank=2)
    from_bitsandbytes(model, rank=4)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [f"{i}.lora_{kind}.default" for i in (1, 3) for kind in "AB"]


@pytest.mark.parametrize("config", [{"hidden_size": 64}, types.MappingProxyType({}), None])
def test_a_config_that_is_not_of_transformers_stays(config):
    class Saved(nn.Sequential):
        def save_pretrained(self, folder):
            pass

    model = Saved(linear4bit(64, 64))
    model.config = config
    assert type(from_bitsandbytes(model)[0]) is QLinear
    assert type(to_bitsandbytes(model)[0]) is bnb.nn.Linear4bit
    assert model.config is config


def bad_forward(model):
    model[3].forward = lambda x: x


def bad_block(model):
    model[3] = linear4bit(32, 128)
    model[3].weight = bnb.nn.Params4bit(torch.randn(32, 128), blocksize=32, quant_type="nf4").to("cpu")


def bad_unquantized(model):
    model[3] = bnb.nn.Linear4bit(128, 32, quant_type="nf4")


def bad_meta(model):
    model[3].weight = bnb.nn.Params4bit(torch.empty(2048, 1, dtype=torch.uint8, device="meta"), bnb_quantized=True)


def bad_wrapper(model):
    model[3] = nn.ModuleDict({"base_layer": model[3]})
    model[3].base_layer = model[3]["base_layer"]


def bad_parametrization(model):
    nn.utils.parametrize.register_parametrization(model[3], "weight", nn.Identity(), unsafe=True)


def bad_shape(model):
    model[3].in_features = 64


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (bad_forward, "^3 computes something else"),
        (bad_block, "^3: .*blocks of 32 weights cannot be represented"),
        (bad_unquantized, r"^3 is not quantized yet.*\.to\(device\)"),
        (bad_meta, "^3 is on the meta device or offloaded"),
        (bad_wrapper, r"^3\.base_layer is inside an adapter of another library \(3\)"),
        (bad_parametrization, "^3 has parametrizations; call"),
        (bad_shape, r"^3 has a weight of the shape \[32, 128\], but its features say \[32, 64\]"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_layer_that_cannot_be_converted_leaves_the_model_unchanged(spoil, message):
    model = net()
    spoil(model)
    before = [(name, id(module)) for name, module in model.named_modules()]
    codes = model[1].weight.data.clone()
    with pytest.raises(ValueError, match=message):
        from_bitsandbytes(model, rank=2)
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    assert torch.equal(model[1].weight.data, codes)
    assert model[0].weight.requires_grad


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 2, "target_modules": ["q"]}, ValueError, "'q' matches no layer.*candidates: 1, 3"),
        ({"rank": 200, "target_modules": ["3"]}, ValueError, "rank"),
        ({"rank": -1}, ValueError, "rank"),
        ({"rank": 2, "dropout": 2}, ValueError, "dropout"),
        ({"compute_dtype": torch.int8}, TypeError, "dtype should be one of"),
        ({"r": 2}, TypeError, "'r' is called 'rank'"),
    ],
)
def test_options_that_do_not_fit_leave_the_model_unchanged(options, error, message):
    model = net()
    before = state_of(model)
    with pytest.raises(error, match=message):
        from_bitsandbytes(model, **options)
    assert_unchanged(model, before)


def test_arguments_that_are_of_no_use():
    layer = linear4bit(64, 64)
    with pytest.raises(ValueError, match=r"'q' matches no layer to adapt"):
        from_bitsandbytes(layer, rank=2, target_modules=["q"])
    for convert in (from_bitsandbytes, to_bitsandbytes):
        with pytest.raises(TypeError, match=r"should be a torch\.nn\.Module, found list"):
            convert([layer])
    ours = from_bitsandbytes(layer)
    for dtype in (torch.int8, "bfloat16"):
        with pytest.raises(TypeError, match=r"compute_dtype should be torch\.float32, bfloat16 or float16, found"):
            to_bitsandbytes(ours, compute_dtype=dtype)


def test_quantize_model_says_how_to_convert_them():
    with pytest.raises(ValueError, match="4-bit already, by bitsandbytes; convert it with from_bitsandbytes"):
        quantize_model(nn.Sequential(linear4bit(64, 64)), progress=False)


def test_models_without_such_layers():
    with pytest.raises(ValueError, match=r"no 4-bit layers.*Linear4bit.*it has Linear8bitLt"):
        from_bitsandbytes(nn.Sequential(bnb.nn.Linear8bitLt(8, 8)))
    with pytest.raises(ValueError, match="no 4-bit layers of qlora_kernels"):
        to_bitsandbytes(nn.Sequential(nn.Linear(8, 8)))


def test_layers_without_data_or_in_float64_are_not_written():
    model = nn.Sequential(QLinear(64, 32, rank=0), QLinear(64, 32, rank=0, device="meta"))
    with pytest.raises(ValueError, match=r"^1: its weight is on the meta device"):
        to_bitsandbytes(model)
    model[1] = QLinear(64, 32, rank=0, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^1: a weight for torch\.float64"):
        to_bitsandbytes(model)
    assert all(type(layer) is QLinear for layer in model)


# -------------------------------------------------------------------------------------------- models of transformers


def test_a_transformers_model_there_and_back(dense, tmp_path):
    model = in_4_bits(dense, bnb_4bit_use_double_quant=True)
    expected = logits(model)
    ours = from_bitsandbytes(model)
    assert ours is model
    assert sum(isinstance(module, QLinear) for module in model.modules()) == 14
    assert torch.equal(logits(model), expected)
    assert not getattr(model, "is_quantized", False)
    assert model.config.quantization_config.quant_method == "qlora_kernels"  # save_pretrained writes ours
    to_bitsandbytes(model)
    assert model.config.quantization_config.llm_int8_skip_modules == ["lm_head"]
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert type(again.model.layers[0].mlp.up_proj) is bnb.nn.Linear4bit
    assert type(again.lm_head) is nn.Linear
    assert torch.equal(logits(again), expected)


def test_a_model_inside_another_module(dense, tmp_path):
    """Such as PEFT's."""
    peft = pytest.importorskip("peft")
    model = in_4_bits(dense)
    expected = logits(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"]))
    to_bitsandbytes(from_bitsandbytes(wrapped))
    assert model.is_quantized
    assert model.config.quantization_config.llm_int8_skip_modules == ["lm_head"]
    wrapped.unload().save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), expected)


def test_a_new_head_is_trained_with_the_adapters(tmp_path):
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128
    )
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    options = transformers.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["classifier"])
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path, quantization_config=options)
    from_bitsandbytes(model, rank=2)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "lora" not in name} == {"classifier.weight", "classifier.bias"}


def test_8_bit_layers_beside_4_bit_ones(dense):
    """transformers could not load what save_pretrained writes of such a model."""
    model = in_4_bits(dense)
    model.model.layers[0].mlp.up_proj = bnb.nn.Linear8bitLt(64, 128, bias=False, has_fp16_weights=False)
    from_bitsandbytes(model)
    before = [(name, id(module)) for name, module in model.named_modules()]
    with pytest.raises(
        ValueError, match=r"1 layers of LlamaForCausalLM are 8-bit .*layers\.0\.mlp\.up_proj.*unchanged"
    ):
        to_bitsandbytes(model)
    assert [(name, id(module)) for name, module in model.named_modules()] == before


def test_4_bit_experts_beside_4_bit_layers():
    """bitsandbytes has no such layers, and transformers could not write them for it."""
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    quantize_model(model, rank=0, progress=False)
    before = [(name, id(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=r"MixtralForCausalLM has 4-bit experts.*layers\.0\.mlp\.experts.*unchanged"):
        to_bitsandbytes(model)
    assert [(name, id(module)) for name, module in model.named_modules()] == before


def test_hooks_of_accelerate_are_not_lost():
    hooks = pytest.importorskip("accelerate.hooks")
    model = nn.Sequential(QLinear(64, 32, rank=0))
    hooks.add_hook_to_module(model[0], hooks.AlignDevicesHook("cpu"))
    with pytest.raises(ValueError, match=r"^0 has a hook of accelerate.*remove_hook_from_submodules"):
        to_bitsandbytes(model)
    hooks.remove_hook_from_submodules(model)
    assert type(to_bitsandbytes(model)[0]) is bnb.nn.Linear4bit


def test_a_model_quantized_here_is_loaded_there(dense, tmp_path):
    """Also when layers that transformers would have left dense are 4-bit, and others dense."""
    model = load(dense)
    quantize_model(model, rank=0, skip=["layers.1.mlp", "layers.0.self_attn.q_proj"], progress=False)
    expected = logits(model)
    to_bitsandbytes(model).save_pretrained(tmp_path)
    again = load(tmp_path)
    kinds = {name: type(module) for name, module in again.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name, kind in kinds.items() if kind is nn.Linear} == {
        "model.layers.0.self_attn.q_proj",
        *(f"model.layers.1.mlp.{name}_proj" for name in ("up", "down", "gate")),
    }
    difference = (logits(again) - expected).float().norm() / expected.float().norm()
    assert difference < 0.02


def test_names_that_are_the_ends_of_others():
    from transformers.quantizers.quantizers_utils import should_convert_module

    from qlora_kernels.interop.bitsandbytes.marks import _skipped

    model = nn.ModuleDict(
        {"fc": nn.Linear(4, 4), "a": nn.ModuleDict({"fc": nn.Linear(4, 4), "other": nn.Linear(4, 4)})}
    )
    skip = _skipped(model, {"a.fc"})
    assert skip == ["^fc$", "a.other"]
    assert [name for name in ("fc", "a.fc", "a.other") if should_convert_module(name, skip)] == ["a.fc"]
