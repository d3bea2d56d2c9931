"""Model folders that were made to do harm, or were edited by hand: a sentence for each, and nothing is written."""

from __future__ import annotations

import builtins
import json
import os
import resource
import shutil
import time

import forked
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qlora_kernels.cli.main import main
from qlora_kernels.errors import InputError
from qlora_kernels.interop.transformers import skeleton
from qlora_kernels.interop.transformers.load import load_quantized
from qlora_kernels.interop.transformers.quantize_folder import quantize_folder

LAYER = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model's folder, and the same in 4 bits."""
    root = tmp_path_factory.mktemp("folders")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(root / "dense")
    quantize_folder(root / "dense", root / "4bit", progress=False)
    return root


def config(**changes):
    """A change of config.json."""

    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def settings(**changes):
    """A change of its quantization_config."""

    def change(folder):
        path = folder / "config.json"
        value = json.loads(path.read_text())
        value["quantization_config"] |= changes
        path.write_text(json.dumps(value))

    return change


def tensors(function):
    def change(folder):
        path = folder / "model.safetensors"
        values = load_file(path)
        function(values)
        save_file(values, path, metadata={"format": "pt"})

    return change


def fill(key, value):
    return tensors(lambda values: values[key].view(-1)[-1:].fill_(value))


def index(name):
    return lambda folder: (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))


def pipe(name):
    def change(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def link(name, target):
    def change(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return change


def _other_config(folder):
    config(configuration_files=["config.4.0.0.json"])(folder)
    (folder / "config.4.0.0.json").write_text(json.dumps({"num_hidden_layers": 10**8}))


def _two_links(folder):
    link(".hidden", __file__)(folder)
    link("secret.txt", ".hidden")(folder)


OUTSIDE = r"is a link to a file outside the folder; put the file itself there"
#: For both kinds of folder.
BAD = {
    "10^7 layers": (config(num_hidden_layers=10**7), "num_hidden_layers should be at most 100,000, found 10,000,000"),
    "10^400 layers": (config(num_hidden_layers=10**400), "num_hidden_layers should be at most 100,000, found more"),
    "layers inside": (config(text_config={"n_layer": 10**7}), "n_layer should be at most 100,000, found 10,000,000"),
    "experts": (config(model_type="mixtral", num_local_experts=10**6), "num_local_experts should be at most 100,000"),
    "labels": (config(num_labels=10**8), "num_labels should be at most 100,000, found 100,000,000"),
    "other config": (_other_config, r"config\.4\.0\.0\.json: num_hidden_layers should be at most 100,000"),
    "configs elsewhere": (config(configuration_files=["../config.4.0.0.json"]), "configuration_files should be names"),
    "hub kernel": (config(attn_implementation="someone/kernel"), "attn_implementation = 'someone/kernel' names code"),
    "hub kernels": (config(_attn_implementation={"": "a/b"}), "_attn_implementation = 'a/b' names code to download"),
    "odd dtype": (config(dtype="nn"), "dtype should be the name of a floating type, found|has no attribute|nn"),
    "integer dtype": (config(dtype="int8"), "dtype should be the name of a floating type, found torch.int8"),
    "deep config": (
        config(a=json.loads("[" * 200 + "]" * 200)),
        "config.json should hold a JSON object nested at most",
    ),
    "settings": (config(quantization_config=5), "quantization_config should be a JSON object"),
    "shard elsewhere": (index("../dense/model.safetensors"), r"index\.json is not an index .* '\.\./dense/model"),
    "absolute shard": (index("/etc/passwd"), r"index\.json is not an index .* it names '/etc/passwd'"),
    "shard of zero bytes": (index("a\0b"), r"index\.json is not an index .* it names 'a\\x00b'"),
    "folder as shard": (index(".."), r"index\.json is not an index .* it names '\.\.'"),
    "list as shard": (index(["a"]), r"index\.json is not an index"),
    "linked weights": (link("model.safetensors", __file__), f"model.safetensors {OUTSIDE}"),
    "pipe as config": (pipe("config.json"), "config.json is not a regular file"),
    "pipe as weights": (pipe("model.safetensors"), "model.safetensors is not a regular file"),
    "pipe as tokenizer": (pipe("tokenizer.json"), "tokenizer.json is not a regular file"),
    "device as index": (link("model.safetensors.index.json", "/dev/zero"), r"index\.json is not a regular file"),
}
BAD_DENSE = {
    "linked secret": (link("secret.txt", __file__), f"secret.txt {OUTSIDE}"),
    "linked by a detour": (_two_links, f"secret.txt {OUTSIDE}"),
}
BAD_4BIT = {
    "no layers": (config(num_hidden_layers=0), "model: the model has no nn.Linear to quantize"),
    "names as a number": (settings(modules_to_not_convert=5), "modules_to_not_convert in .* a list of names, found 5"),
    "names as text": (settings(modules_to_not_convert="(a+)+!"), "modules_to_not_convert in .* should be a list of"),
    "names as numbers": (settings(modules_to_not_convert=[5]), r"modules_to_not_convert in .* names, found \[5\]"),
    "double_quant as text": (settings(double_quant="no"), "double_quant in .* should be true or false, found 'no'"),
    "blocks": (settings(block_size=128), "block_size in quantization_config should be 64, found 128"),
    "nested blocks": (settings(nested_block_size=None), "nested_block_size in .* should be 256, found None"),
    "nan offset": (fill(f"{LAYER}.weight_nested_offset", torch.nan), "weight_nested_offset' holds NaN or infinity"),
    "infinite scale": (fill(f"{LAYER}.weight_nested_absmax", torch.inf), "weight_nested_absmax' holds NaN or infinity"),
    "nan table": (fill(f"{LAYER}.weight_nested_table", torch.nan), "weight_nested_table' holds NaN or infinity"),
    "overflow": (
        tensors(lambda t: [t[f"{LAYER}.weight_nested_{name}"].fill_(3e38) for name in ("absmax", "offset")]),
        "weight_nested_absmax' holds 3e.38, with which the weight's constants overflow",
    ),
    "nan in a norm": (fill("model.norm.weight", torch.nan), "model.norm.weight holds NaN or infinity"),
    "infinite embedding": (fill("model.embed_tokens.weight", -torch.inf), "model.embed_tokens.weight holds NaN or inf"),
    "other shape": (
        tensors(lambda t: t.update({"model.norm.weight": torch.ones(3)})),
        r"model\.norm\.weight should be \[64\], found \[3\]",
    ),
    "packed as floats": (
        tensors(lambda t: t.update({f"{LAYER}.weight_packed": t[f"{LAYER}.weight_packed"].float()})),
        "weight_packed should be torch.uint8, found F32",
    ),
}


def refused(source, target, change, message, call):
    shutil.copytree(source, target / "model")
    change(target / "model")
    began = time.process_time()
    with pytest.raises(InputError, match=message) as caught:
        call(target / "model")
    assert "\n" not in str(caught.value)
    assert time.process_time() - began < 5
    assert os.listdir(target) == ["model"]


@pytest.mark.parametrize("case", BAD | BAD_DENSE)
def test_quantize_refuses(folders, tmp_path, case):
    call = lambda folder: quantize_folder(folder, tmp_path / "out", progress=False)  # noqa: E731
    refused(folders / "dense", tmp_path, *(BAD | BAD_DENSE)[case], call)


@pytest.mark.parametrize("case", BAD | BAD_4BIT)
def test_load_refuses(folders, tmp_path, case):
    refused(folders / "4bit", tmp_path, *(BAD | BAD_4BIT)[case], load_quantized)


def test_a_folder_without_constants_of_the_second_level_is_checked_too(folders, tmp_path):
    quantize_folder(folders / "dense", tmp_path / "4bit", double_quant=False, progress=False)
    load_quantized(tmp_path / "4bit")
    fill(f"{LAYER}.weight_absmax", torch.nan)(tmp_path / "4bit")
    with pytest.raises(InputError, match="weight_absmax' holds NaN or infinity"):
        load_quantized(tmp_path / "4bit")


def test_weights_that_overflow_the_type_asked_for_are_refused(folders, tmp_path):
    shutil.copytree(folders / "4bit", tmp_path / "4bit")
    fill("model.norm.weight", 1e30)(tmp_path / "4bit")
    load_quantized(tmp_path / "4bit", dtype=torch.bfloat16)
    with pytest.raises(
        InputError, match=r"model\.norm\.weight holds values too large for torch\.float16; load it with"
    ):
        load_quantized(tmp_path / "4bit", dtype=torch.float16)


def refused_with_little_memory(folder, kind):
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=r"should be|but the config says|that no file holds"):
        if kind == "dense":
            quantize_folder(folder, f"{folder} 4bit", progress=False)
        else:
            load_quantized(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 200 << 10  # KiB


@pytest.mark.parametrize("key", ["hidden_size", "head_dim", "intermediate_size", "vocab_size"])
@pytest.mark.parametrize("kind", ["dense", "4bit"])
def test_widths_that_no_file_has_take_no_memory(folders, tmp_path, key, kind):
    shutil.copytree(folders / kind, tmp_path / "model")
    config(**{"head_dim": 32, key: 4 * 10**8})(tmp_path / "model")
    process = forked.start(refused_with_little_memory, tmp_path / "model", kind)
    process.join()
    assert process.exitcode == 0


def test_buffers_that_no_file_has_are_refused():
    class Module(torch.nn.Module):
        def __init__(self, persistent):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((3, 1 << 25), 0.5))
            self.register_buffer("small", torch.ones(3), persistent=False)
            self.register_buffer("mask", torch.zeros(size=(3, 1 << 25)), persistent=persistent)

    with skeleton._parameters_on_meta():
        made = Module(persistent=True)  # the files have it
        assert made.weight.is_meta
        assert made.mask.is_meta
        assert not made.small.is_meta
        with pytest.raises(
            InputError, match=r"its config\.json asks for tensors of 1e\+08 elements that no file holds"
        ):
            Module(persistent=False)
    torch.nn.Module().register_buffer("mask", torch.zeros(1, device="meta"), persistent=False)


def test_more_parameters_than_any_model_has(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(skeleton, "_MOST_PARAMETERS", 100)
    change = config(num_hidden_layers=9999)
    message = "its config.json asks for more than 100 parameters"
    refused(folders / "dense", tmp_path, change, message, lambda folder: quantize_folder(folder, tmp_path / "out"))


@pytest.mark.parametrize("model_type", ["unheard_of", "llama"])
def test_code_in_a_folder_is_never_run_and_never_asked_about(folders, tmp_path, monkeypatch, capsys, model_type):
    """transformers would ask on the terminal: "Do you wish to run the custom code? [y/N]"."""
    shutil.copytree(folders / "dense", tmp_path / "model")
    code = f"open({str(tmp_path / 'was here')!r}, 'w')\n"
    (tmp_path / "model" / "code.py").write_text(code)
    auto = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": ["code.T", "code.T"]}
    config(model_type=model_type, auto_map=auto)(tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto}))
    asked = []
    monkeypatch.setattr(builtins, "input", lambda *prompt: asked.append(prompt) or "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE", 1)
    for command in ("quantize {} {}/out --quiet", "finetune --model {} --out {}/run --quiet"):
        main(command.format(tmp_path / "model", tmp_path).split())
    assert not asked
    assert not (tmp_path / "was here").exists()
    assert "custom code? [y/N]" not in capsys.readouterr().out


def test_folders_of_the_hubs_cache_are_links_and_work(folders, tmp_path):
    blobs = tmp_path / "hub" / "models--someone--model" / "blobs"
    snapshot = blobs.parent / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    local = tmp_path / "local"  # older versions of huggingface_hub linked from there too
    local.mkdir()
    for number, path in enumerate((folders / "dense").iterdir()):
        blob = blobs / f"{number:064x}"
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(os.path.join("..", "..", "blobs", blob.name))
        (local / path.name).symlink_to(blob)
    (snapshot / "tokenizer.json").symlink_to("config.json")  # within the folder
    (tmp_path / "alias").symlink_to(snapshot)
    for source in (snapshot, local, tmp_path / "alias"):
        quantize_folder(source, tmp_path / f"out {source.name}", progress=False)
        written = tmp_path / f"out {source.name}"
        assert not any(path.is_symlink() for path in written.iterdir())
        assert (written / "model.safetensors").read_bytes() == (folders / "4bit" / "model.safetensors").read_bytes()
        load_quantized(written)
    (snapshot / "README.md").symlink_to(os.path.join("..", "..", "refs"))
    (blobs.parent / "refs").write_text("not a blob")
    with pytest.raises(InputError, match=r"README\.md is a link to a file outside the folder"):
        quantize_folder(snapshot, tmp_path / "another", progress=False)
