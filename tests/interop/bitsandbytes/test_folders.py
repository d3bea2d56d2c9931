"""Folders that save_pretrained wrote for models of the real bitsandbytes, in load_quantized and the command."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_kernels import QLinear, quantize_model, to_bitsandbytes
from qlora_kernels.cli.main import main
from qlora_kernels.errors import InputError
from qlora_kernels.interop.transformers.load import load_quantized

pytest.importorskip("bitsandbytes")
transformers = pytest.importorskip("transformers")
from bnb_models import decoded, dense_folder, in_4_bits, load, logits  # noqa: E402

LAYER = "model.layers.1.mlp.down_proj"
STATE = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    dense_folder(folder)
    return folder


@pytest.fixture(scope="module")
def saved(dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    in_4_bits(dense, bnb_4bit_use_double_quant=True).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {"bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": torch.bfloat16},
        {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
        {"bnb_4bit_quant_type": "fp4", "llm_int8_skip_modules": ["up_proj", "lm_head"]},
    ],
    ids=["bf16 storage, shards", "fp4", "fp4, skipped"],
)
def test_a_saved_model_computes_the_same(dense, tmp_path, options):
    model = in_4_bits(dense, **options)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = load_quantized(tmp_path, rank=0)
    skipped = "llm_int8_skip_modules" in options
    layers = {name: layer for name, layer in ours.named_modules() if isinstance(layer, QLinear)}
    assert len(layers) == (12 if skipped else 14)
    assert not ours.training
    for name, layer in layers.items():
        theirs = model.get_submodule(name).weight
        assert torch.equal(layer.weight.dequantize(), decoded(theirs.data, theirs.quant_state)), name
        assert layer.weight.double_quant == options.get("bnb_4bit_use_double_quant", False)
    assert torch.equal(logits(ours), logits(model))


def test_gpt2_whose_layers_lie_transposed(tmp_path):
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=64, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0
    dense_folder(tmp_path / "dense", config)
    model = in_4_bits(tmp_path / "dense")
    model.save_pretrained(tmp_path / "saved")
    ours = load_quantized(tmp_path / "saved", rank=2)
    assert (ours.transformer.h[0].mlp.c_fc.out_features, ours.transformer.h[0].mlp.c_fc.rank) == (256, 2)
    assert torch.equal(logits(ours), logits(model))


def test_adapters_and_types(saved):
    model = load_quantized(saved, rank=4, target_modules=["q_proj"], adapter_dtype=torch.float32, dtype=torch.float32)
    adapted = {name for name, layer in model.named_modules() if isinstance(layer, QLinear) and layer.adapters}
    assert adapted == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    assert model.lm_head.weight.dtype == torch.float32
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="matches no layer to adapt"):
        load_quantized(saved, rank=4, target_modules=["c_attn"])


def test_what_to_bitsandbytes_saves_is_loaded_here(dense, tmp_path):
    model = load(dense)
    quantize_model(model, rank=0, progress=False)
    expected = logits(model)
    to_bitsandbytes(model).save_pretrained(tmp_path)
    assert torch.equal(logits(load_quantized(tmp_path, rank=0)), expected)


@pytest.mark.slow
def test_the_command_trains_on_it(saved, tmp_path, capsys):
    tokens = {chr(97 + i): i for i in range(26)} | {"<unk>": 26, " ": 27}
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 40)
    out = str(tmp_path / "out")
    arguments = ["--model", str(folder), "--data", str(tmp_path / "text.txt"), "--out", out, "--rank", "2"]
    code = main(["finetune", *arguments, "--steps", "2", "--seq-len", "16", "--batch-size", "2"])
    assert code == 0, capsys.readouterr()
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()


# ---------------------------------------------------------------------------------------------------- what is refused


def tensors(**changes):
    """A change of the layer's tensors; None removes one."""

    def change(folder):
        state = load_file(folder / "model.safetensors")
        for name, value in changes.items():
            key = {"weight": f"{LAYER}.weight", "state": STATE}.get(name, f"{LAYER}.weight.{name}")
            state.pop(key)
            if value is not None:
                state[key] = value
        save_file(state, folder / "model.safetensors", {"format": "pt"})

    return change


def quant_state(**changes):
    def change(folder):
        state = load_file(folder / "model.safetensors")
        value = json.loads(bytes(state[STATE].tolist())) | changes
        state[STATE] = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
        save_file(state, folder / "model.safetensors", {"format": "pt"})

    return change


def settings(**changes):
    def change(folder):
        path = folder / "config.json"
        value = json.loads(path.read_text())
        value["quantization_config"] |= changes
        path.write_text(json.dumps(value))

    return change


CASES = {
    "8 bits": (settings(load_in_4bit=False, _load_in_4bit=False, load_in_8bit=True), "not to 4 bits"),
    "blocks of 32": (quant_state(blocksize=32), rf"{LAYER}\.weight.*blocks of 32 weights"),
    "another shape": (quant_state(shape=[128, 64]), rf"{LAYER}\.weight should be \[64, 128\]"),
    "a huge shape": (quant_state(shape=[2**39, 2**39]), rf"{LAYER}\.weight' should have"),
    "no constants": (tensors(absmax=None), rf"no '{LAYER}\.weight\.absmax'"),
    "no settings": (tensors(state=None), rf"'{LAYER}\.weight' has no quant_state"),
    "settings of floats": (tensors(state=torch.zeros(4)), "bitsandbytes__nf4' should be at most"),
    "other levels": (tensors(quant_map=torch.linspace(-1, 1, 16)), rf"{LAYER}\.weight\.quant_map"),
    "NaN": (tensors(nested_absmax=torch.full((1,), torch.nan)), rf"{LAYER}\.weight.*NaN"),
    "too few codes": (tensors(weight=torch.zeros(4000, 1, dtype=torch.uint8)), rf"{LAYER}\.weight' should have 4096"),
}


@pytest.mark.parametrize(("change", "message"), CASES.values(), ids=CASES.keys())
def test_a_folder_that_lies(saved, tmp_path, change, message):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    change(folder)
    with pytest.raises(InputError, match=message):
        load_quantized(folder)


def test_a_config_with_more_layers_than_the_files_have(saved, tmp_path):
    """It is refused before they are made, which would take long."""
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 65536}))
    with pytest.raises(InputError, match=r"its config\.json asks for more than 1,\d\d\d parameters"):
        load_quantized(folder)


def test_a_tensor_that_is_there_twice(saved, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    state = load_file(folder / "model.safetensors")
    state |= {key.removeprefix("model."): value.clone() for key, value in state.items() if key.startswith(LAYER)}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=rf"holds {LAYER}\.weight.* twice, with and without the prefix 'model\.'"):
        load_quantized(folder)


def test_a_truncated_file(saved, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"model\.safetensors is not a whole safetensors file"):
        load_quantized(folder)
