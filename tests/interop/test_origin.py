"""Adapters that were trained on a 4-bit folder name the dense model that it was made from."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from contract import relative_error
from small.llama import llama, logits, randomize

from qlora_kernels import qlora_layers, quantize_model, save_adapter
from qlora_kernels.interop.transformers.load import load_quantized
from qlora_kernels.interop.transformers.quantize_folder import quantize_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module", name="dense")
def dense_fixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "model"
    llama().save_pretrained(folder)
    return folder


def named(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    return config["base_model_name_or_path"], config["revision"]


def test_auto_peft_model_adapts_the_dense_model(dense, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    quantize_folder(dense, tmp_path / "4bit", progress=False)
    monkeypatch.chdir(tmp_path)
    model = load_quantized("4bit", rank=4)
    randomize(model)
    save_adapter(model, tmp_path / "adapter")
    assert named(tmp_path / "adapter") == (str(dense), None)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(theirs.base_model.model.lm_head.weight, llama().lm_head.weight)
    with torch.no_grad():
        for name, layer in qlora_layers(model):
            theirs.base_model.model.get_submodule(name).base_layer.weight.copy_(layer.weight.dequantize())
    assert relative_error(logits(model), logits(theirs).double()) < 1e-5


def test_a_snapshot_of_the_cache_is_an_id_and_a_commit(dense, tmp_path):
    snapshot = tmp_path / "hub" / "models--some--base-model" / "snapshots" / COMMIT
    shutil.copytree(dense, snapshot)
    quantize_folder(snapshot, tmp_path / "4bit", progress=False)
    settings = json.loads((tmp_path / "4bit" / "config.json").read_text())["quantization_config"]
    assert (settings["base_model_name_or_path"], settings["base_model_revision"]) == ("some/base-model", COMMIT)
    save_adapter(load_quantized(tmp_path / "4bit", rank=2), tmp_path / "adapter")
    assert named(tmp_path / "adapter") == ("some/base-model", COMMIT)
    save_adapter(load_quantized(tmp_path / "4bit", rank=2), tmp_path / "adapter", base_model_name_or_path="other")
    assert named(tmp_path / "adapter") == ("other", None)


@pytest.mark.parametrize("value", [None, 5, ""])
def test_a_folder_that_does_not_say(dense, tmp_path, value):
    """As one that was written before."""
    quantize_folder(dense, tmp_path / "4bit", progress=False)
    path = tmp_path / "4bit" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["base_model_name_or_path"] = value
    path.write_text(json.dumps(config))
    model = load_quantized(tmp_path / "4bit", rank=2)
    with pytest.warns(UserWarning, match="4-bit folder that does not say which dense model .*pass base_model_name"):
        save_adapter(model, tmp_path / "adapter")
    assert named(tmp_path / "adapter") == (None, None)


def test_a_model_that_was_quantized_in_memory(dense, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(dense)
    quantize_model(model, 2, progress=False)
    save_adapter(model, tmp_path / "a")
    assert named(tmp_path / "a") == (str(dense), None)
    model = transformers.AutoModelForCausalLM.from_pretrained(dense)
    model.name_or_path, model.config._commit_hash = "some/base", COMMIT  # as one that came from the hub
    quantize_model(model, 2, progress=False)
    save_adapter(model, tmp_path / "b")
    assert named(tmp_path / "b") == ("some/base", COMMIT)
