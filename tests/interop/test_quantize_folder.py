"""Folders with 4-bit weights, written and read one tensor at a time."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import forked
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qlora_kernels.cli.main import main
from qlora_kernels.errors import InputError
from qlora_kernels.finetune.memory import PeakMemory
from qlora_kernels.interop.transformers import quantize_folder as quantizing
from qlora_kernels.interop.transformers.load import load_quantized
from qlora_kernels.interop.transformers.quantize_folder import quantize_folder
from qlora_kernels.interop.transformers.skeleton import dtype_argument, skipped
from qlora_kernels.models.quantize import quantize_model
from qlora_kernels.storage.atomic_folder import sweep_folders, write_folder_atomically


def llama(folder, dtype=torch.bfloat16, shard="5GB", **more) -> str:
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        **more,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return str(folder)


def dense_then_quantized(folder, dtype=torch.bfloat16):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **dtype_argument(dtype))
    quantize_model(model, rank=0, skip=skipped(model), progress=False)
    return model.eval()


@pytest.mark.parametrize(
    ("dtype", "shard", "more"),
    [
        (torch.bfloat16, "5GB", {}),
        (torch.float16, "100KB", {"attention_bias": True}),  # shards; biases beside 4-bit weights
        (torch.float32, "5GB", {"tie_word_embeddings": True}),
    ],
)
def test_a_loaded_folder_equals_a_model_quantized_in_memory(tmp_path, dtype, shard, more):
    source = llama(tmp_path / "model", dtype, shard, **more)
    report = quantize_folder(source, tmp_path / "out", progress=False, max_shard_size=60_000)
    assert (report.layers, list(report.left_alone)) == (14, ["lm_head"])
    assert report.files > 1
    expected = dense_then_quantized(source, dtype)
    loaded = load_quantized(tmp_path / "out", rank=4, adapter_dtype=torch.float32, dtype=dtype)
    state = loaded.state_dict()
    for key, value in expected.state_dict().items():
        assert torch.equal(value, state[key]), key
    tokens = torch.randint(0, 96, (2, 9))
    assert torch.equal(expected(tokens).logits, loaded(tokens).logits)
    trainable = [name for name, parameter in loaded.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 28
    assert all("lora_" in name for name in trainable)


def test_files_are_those_of_the_format(tmp_path):
    source = llama(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    (tmp_path / "model" / "pytorch_model.bin").write_text("other weights")
    quantize_folder(source, tmp_path / "out", progress=False)
    names = sorted(os.listdir(tmp_path / "out"))
    assert names == ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "qlora_kernels"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    layer = "model.layers.0.mlp.down_proj"
    assert tensors[f"{layer}.weight_packed"].numel() == 128 * 192 // 2
    assert f"{layer}.weight" not in tensors
    assert torch.equal(
        tensors["model.embed_tokens.weight"], load_file(source + "/model.safetensors")["model.embed_tokens.weight"]
    )


def test_a_trunk_without_the_prefix_of_its_model(tmp_path):
    source = llama(tmp_path / "model")
    path = source + "/model.safetensors"
    tensors = {key.removeprefix("model."): value.clone() for key, value in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    quantize_folder(source, tmp_path / "out", progress=False)
    assert load_quantized(tmp_path / "out", rank=0)(torch.tensor([[1, 2]])).logits.isfinite().all()


def peak_over_the_start(small: str, large: str, out: str, result: str) -> None:
    """Quantizes a folder and writes how much memory rose meanwhile."""
    quantize_folder(small, out + "-small", progress=False)  # first calls
    with PeakMemory() as memory:
        quantize_folder(large, out, progress=False)
    Path(result).write_text(str(memory.peak - memory.start if memory.peak else -1))


def test_one_weight_in_memory_at_a_time(tmp_path):
    """The peak rises by a few 6 MiB weights at most, while the model has 20 of them."""
    small = llama(tmp_path / "small")
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
        state = transformers.LlamaForCausalLM(config).state_dict()
    (tmp_path / "large").mkdir()
    config.save_pretrained(tmp_path / "large")
    zeros = {key: torch.zeros(value.shape, dtype=torch.bfloat16) for key, value in state.items()}
    save_file(zeros, tmp_path / "large" / "model.safetensors", metadata={"format": "pt"})
    assert sum(value.numel() * 2 for value in zeros.values()) > 130 << 20
    folders = [str(tmp_path / name) for name in ("large", "out", "result")]
    process = forked.start(peak_over_the_start, small, *folders)
    process.join()
    assert process.exitcode == 0
    peak = int((tmp_path / "result").read_text())
    if peak < 0:
        pytest.skip("no /proc here")
    assert peak < 36 << 20


def bad_model(tmp_path, kind: str) -> str:
    source = llama(tmp_path / "model", shard="100KB" if kind == "missing shard" else "5GB")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path) if path.exists() else {}
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "foreign":
        path.write_bytes(b"not safetensors at all")
    elif kind == "no weights":
        path.unlink()
    elif kind == "no config":
        (tmp_path / "model" / "config.json").unlink()
    elif kind == "missing shard":
        os.unlink(next(p for p in (tmp_path / "model").iterdir() if "00002" in p.name))
    elif kind == "not finite":
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
        save_file(tensors, path, metadata={"format": "pt"})
    elif kind == "near infinity":
        tensors = {key: tensor.half() for key, tensor in tensors.items()}
        scales = torch.tensor([1.0, 1.0, 0.995, 0.99, 1.0, 0.98, 0.97, 0.0])
        tensors["model.layers.1.mlp.up_proj.weight"] = (65504 * scales).half().repeat(24).unsqueeze(1).repeat(1, 128)
        save_file(tensors, path, metadata={"format": "pt"})
    elif kind == "missing tensor":
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, path, metadata={"format": "pt"})
    elif kind == "strange tensor":
        save_file({**tensors, "adapter.weight": torch.ones(3)}, path, metadata={"format": "pt"})
    elif kind == "other shape":
        save_file({**tensors, "model.layers.0.mlp.up_proj.weight": torch.ones(3, 3)}, path, metadata={"format": "pt"})
    elif kind == "other dtype":
        key = "model.layers.0.mlp.up_proj.weight"
        save_file({**tensors, key: tensors[key].double()}, path, metadata={"format": "pt"})
    elif kind == "4-bit already":
        quantize_folder(source, tmp_path / "quantized", progress=False)
        return str(tmp_path / "quantized")
    return source


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "not a whole safetensors file"),
        ("foreign", "not a whole safetensors file"),
        ("no weights", "neither model.safetensors nor"),
        ("no config", "no config.json"),
        ("missing shard", "no such file"),
        ("not finite", r"model.layers.1.mlp.up_proj.weight holds nan at index \(3, 5\)"),
        ("near infinity", "up_proj.weight holds values so near the largest torch.float16"),
        ("missing tensor", "lacks 1 tensors of LlamaForCausalLM, first model.layers.1.mlp.up_proj.weight"),
        ("strange tensor", "holds adapter.weight"),
        ("other shape", r"is \[3, 3\], but the config says \[192, 128\]"),
        ("other dtype", "F64; F32, BF16 and F16 can be quantized"),
        ("4-bit already", "quantized already"),
    ],
)
def test_bad_models_leave_nothing_behind(tmp_path, kind, message):
    source = bad_model(tmp_path, kind)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(InputError, match=message):
        quantize_folder(source, tmp_path / "deep" / "out", progress=False)
    assert sorted(os.listdir(tmp_path)) == before


def test_an_output_that_holds_something_is_left_alone(tmp_path):
    source = llama(tmp_path / "model")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        quantize_folder(source, tmp_path / "out", progress=False)
    (tmp_path / "out" / "mine").unlink()
    quantize_folder(source, tmp_path / "out", progress=False)  # an empty folder is fine


@pytest.mark.parametrize("damage", ["truncated", "missing shard tensor", "dense"])
def test_loading_a_damaged_folder(tmp_path, damage):
    source = llama(tmp_path / "model")
    quantize_folder(source, tmp_path / "out", progress=False)
    path = tmp_path / "out" / "model.safetensors"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "dense":
        shutil.copy(tmp_path / "model" / "config.json", tmp_path / "out" / "config.json")
    else:
        tensors = load_file(path)
        del tensors["model.layers.1.mlp.up_proj.weight_absmax"]
        save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError):
        load_quantized(tmp_path / "out")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing_behind(tmp_path, monkeypatch, capsys, signum):
    model = llama(tmp_path / "model")
    capsys.readouterr()
    monkeypatch.setattr(quantizing, "_write_tensor", lambda *_: os.kill(os.getpid(), signum))
    assert main(["quantize", model, str(tmp_path / "new" / "out"), "--quiet"]) == 128 + signum
    assert capsys.readouterr().err == "qlora-kernels quantize: interrupted\n"
    assert os.listdir(tmp_path) == ["model"]


def killed_at_the_first_tensor(model: str, out: str) -> None:
    quantizing._write_tensor = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    quantize_folder(model, out, progress=False)


@pytest.mark.slow
def test_what_a_kill_left_is_swept_and_a_living_writers_folder_is_not(tmp_path):
    model = llama(tmp_path / "model")
    out = tmp_path / "out"
    process = forked.start(killed_at_the_first_tensor, model, str(out))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    others = [tmp_path / ".out.more.abcdefgh.part", tmp_path / ".out.part"]
    for other in others:
        other.mkdir()
        (other / "file").write_text("mine")
    [left] = set(tmp_path.glob(".out.*-*.part"))
    living = []

    def write(folder):
        (tmp_path / folder / "file").write_text("mine")
        living.append(folder)
        sweep_folders(str(tmp_path), "out")
        assert os.path.isdir(folder)

    write_folder_atomically(out, write)
    assert living
    assert not left.exists()
    assert all(other.exists() for other in others)
    assert (out / "file").exists()


@pytest.mark.parametrize("size", [0, -1, 0.1, float("nan")])
def test_a_shard_of_no_bytes_is_refused(tmp_path, size):
    with pytest.raises(InputError, match="max_shard_size should be at least 1 byte"):
        quantize_folder(llama(tmp_path / "model"), tmp_path / "out", progress=False, max_shard_size=size)
    assert os.listdir(tmp_path) == ["model"]
