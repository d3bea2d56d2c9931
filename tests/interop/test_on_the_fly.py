"""Dense checkpoints that become 4-bit while transformers loads them."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import forked
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small.llama import CONFIG, IDS, logits
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM

from qlora_kernels import NF4Config, QLinear, quantize_model
from qlora_kernels.interop.transformers.quantizer import NF4Quantizer
from qlora_kernels.models.targets import qlora_layers

LAYER = "model.layers.1.mlp.up_proj"


def dense(folder, dtype=torch.bfloat16, shard="5GB", **changes) -> str:
    config = copy.deepcopy(CONFIG)
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(3)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return str(folder)


def load(folder, config=None, **options):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config or NF4Config(), **options)


def assert_equals_quantize_model(folder, loaded, dtype="auto", **options):
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    quantize_model(expected, 0, progress=False, **options)
    a, b = expected.state_dict(), loaded.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype, key
        assert torch.equal(a[key], b[key]), key
    assert torch.equal(logits(expected), logits(loaded))


@pytest.mark.parametrize(
    ("dtype", "shard", "changes", "options"),
    [
        (torch.bfloat16, "5GB", {}, {}),
        (torch.float16, "50KB", {"attention_bias": True, "mlp_bias": True}, {"double_quant": False}),
        (torch.float32, "5GB", {"tie_word_embeddings": True}, {"skip": ["layers.0", "lm_head"]}),
        (torch.float32, "5GB", {}, {"skip": r".*(down_proj|lm_head)"}),
    ],
)
def test_equals_quantize_model_after_loading(tmp_path, dtype, shard, changes, options):
    folder = dense(tmp_path / "dense", dtype, shard, **changes)
    loaded = load(folder, NF4Config(**options))
    assert_equals_quantize_model(folder, loaded, **options)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    loaded.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(again))


def test_another_type_on_request(tmp_path):
    folder = dense(tmp_path, torch.float32)
    assert_equals_quantize_model(folder, load(folder, dtype=torch.bfloat16), dtype=torch.bfloat16)


def test_adapters_and_what_stays_dense(tmp_path, caplog):
    folder = dense(tmp_path)
    with caplog.at_level(logging.INFO, logger="qlora_kernels"):
        loaded = load(folder, NF4Config(rank=4, alpha=8, target_modules=["v_proj"], adapter_dtype=torch.float32))
    adapted = {name: layer.lora_A["default"].dtype for name, layer in qlora_layers(loaded) if layer.adapters}
    assert adapted == {f"model.layers.{i}.self_attn.v_proj": torch.float32 for i in range(2)}
    trainable = [name for name, parameter in loaded.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 4
    report, parts = loaded.hf_quantizer.report, loaded.hf_quantizer.dense_bytes
    assert (len(report.quantized), len(report.adapted)) == (14, 2)
    assert report.left_alone == {"lm_head": "named in skip"}
    assert report.bytes_after < report.bytes_before
    assert parts["model.embed_tokens"] == parts["lm_head"] == 64 * 64 * 2
    assert "14 linear layers quantized to NF4" in caplog.text
    assert "MiB stay dense: " in caplog.text


def test_a_new_head_stays_dense_and_is_trained_and_saved(tmp_path):
    folder = dense(tmp_path / "dense")
    kind = AutoModelForSequenceClassification
    model = kind.from_pretrained(folder, num_labels=3, quantization_config=NF4Config(rank=4))
    assert type(model.score) is nn.Linear
    assert model.score.weight.requires_grad
    assert model.score.weight.std() > 0
    assert "new, dense and trainable" in model.hf_quantizer.report.left_alone["score"]
    assert not model.model.norm.weight.requires_grad
    model.config.pad_token_id = 0
    model.save_pretrained(tmp_path / "out")
    again = kind.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, again(IDS).logits)


def changed(folder, key, value):
    path = Path(folder) / "model.safetensors"
    tensors = load_file(path)
    if value is None:
        del tensors[key]
    else:
        tensors[key] = value(tensors[key])
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_weight_that_is_not_finite_is_an_error(tmp_path):
    folder = dense(tmp_path)
    changed(folder, f"{LAYER}.weight", lambda weight: weight.index_fill(0, torch.tensor([3]), float("nan")))
    with pytest.raises(ValueError, match=f"{LAYER}.weight holds nan"):
        load(folder)


def test_a_weight_of_another_shape_is_an_error(tmp_path):
    folder = dense(tmp_path)
    changed(folder, f"{LAYER}.weight", lambda weight: weight[:-1].clone())
    with pytest.raises((RuntimeError, ValueError), match=r"ignore_mismatched_sizes|should be"):
        load(folder)


def test_a_missing_weight_stays_dense_and_is_told(tmp_path):
    """transformers warns and makes it new, as in any model; so it is not frozen in 4 bits."""
    folder = dense(tmp_path)
    changed(folder, f"{LAYER}.weight", None)
    loaded = load(folder)
    assert type(loaded.get_submodule(LAYER)) is nn.Linear
    assert LAYER in loaded.hf_quantizer.report.left_alone
    assert len(list(qlora_layers(loaded))) == 13


def test_a_checkpoint_of_another_model_is_an_error(tmp_path):
    folder = dense(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {f"other.{key}": value for key, value in tensors.items()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"holds the weight of none of the layers to quantize"):
        load(folder)


def test_a_typo_in_skip_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'down_proj'"):
        load(dense(tmp_path), NF4Config(skip=["down_prj"]))


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_maps(tmp_path, device_map):
    pytest.importorskip("accelerate")
    folder = dense(tmp_path / "dense")
    loaded = load(folder, device_map=device_map)
    assert_equals_quantize_model(folder, loaded)
    loaded.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map=device_map)
    assert torch.equal(logits(loaded), logits(again))


def test_the_disk_is_refused(tmp_path):
    folder = dense(tmp_path)
    with pytest.raises(ValueError, match="cannot be offloaded to the disk"):
        load(folder, device_map={"model": "cpu", "lm_head": "disk"}, offload_folder=str(tmp_path / "offload"))


# ---------------------------------------------------------------------------------------------------------- memory


def _anonymous() -> int:
    """Bytes of the process that no file on the disk stands for: transformers maps the checkpoint into memory."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def peak_of_loading(small: str, large: str, result: str) -> None:
    """Loads a folder in 4 bits, and writes how much memory rose meanwhile, and the bytes that the model holds."""
    sizes = []
    whole = NF4Quantizer.quantize

    def measured(*args):
        sizes.append(_anonymous())  # the dense weight is there
        return whole(*args)

    load(small)  # first calls
    NF4Quantizer.quantize = measured
    start = _anonymous()
    model = load(large)
    held = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    Path(result).write_text(f"{max(sizes) - start} {held} {len(sizes)}")


def test_one_dense_weight_in_memory_at_a_time(tmp_path):
    """Of 130 MiB a quarter stays; the peak is that and a weight or two of 6 MiB."""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc here")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=1,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        state = LlamaForCausalLM(config).state_dict()
    (tmp_path / "large").mkdir()
    config.save_pretrained(tmp_path / "large")
    ones = {key: torch.ones(value.shape, dtype=torch.bfloat16) for key, value in state.items()}
    save_file(ones, tmp_path / "large" / "model.safetensors", metadata={"format": "pt"})
    total = sum(value.numel() * 2 for value in ones.values())
    assert total > 130 << 20
    process = forked.start(
        peak_of_loading, dense(tmp_path / "small"), str(tmp_path / "large"), str(tmp_path / "result")
    )
    process.join()
    assert process.exitcode == 0
    peak, held, calls = map(int, (tmp_path / "result").read_text().split())
    assert calls == 42
    assert held < total // 3
    assert peak < held + (24 << 20)


def test_layers_are_made_once(tmp_path):
    loaded = load(dense(tmp_path))
    assert all(type(layer) is QLinear for _, layer in qlora_layers(loaded))
    assert loaded.hf_quantizer._loading is None
    copy.deepcopy(loaded)
