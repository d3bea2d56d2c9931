"""Adapters on disk: both ways with PEFT itself, and several adapters in one model."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import threading
import time

import pytest
import torch
from contract import relative_error
from safetensors.torch import load_file, save_file
from small.llama import assert_unchanged, llama, logits, quantized, randomize, state
from torch import nn

import qlora_kernels
from qlora_kernels import load_adapter, quantize_model, save_adapter
from qlora_kernels.models import adapter_files, peft_config, targets
from qlora_kernels.storage import safetensors_stream


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def dense_base(model):
    """A plain Llama on the dequantized weights."""
    base = llama()
    with torch.no_grad():
        for name, layer in targets.qlora_layers(model):
            base.get_submodule(name).weight.copy_(layer.weight.dequantize())
    return base


# ------------------------------------------------------------------------------------------- with PEFT, both ways


def unequal(model):
    """Ranks and alphas that differ from layer to layer, and layers with no adapter at all."""
    for name, layer in targets.qlora_layers(model):
        layer.delete_adapter("default")
        if "up_proj" not in name:
            layer.add_adapter("default", rank=2 if "layers.1" in name else 4, alpha=3 if "q_proj" in name else 8.5)
    randomize(model)


def mixed_scaling(model):
    for name, layer in targets.qlora_layers(model):
        layer.delete_adapter("default")
        layer.add_adapter("default", rank=4, alpha=8, rslora="q_proj" in name)
    randomize(model)


SHAPES = {
    "all": ({}, None),
    "some": ({"target_modules": ["q_proj", "v_proj"]}, None),
    "one layer": ({"target_modules": ["model.layers.1.mlp.down_proj"]}, None),
    "rslora": ({"rslora": True, "alpha": 5.5}, None),
    "unequal": ({}, unequal),
    "mixed scaling": ({}, mixed_scaling),
}


@pytest.mark.parametrize("case", SHAPES)
def test_peft_reads_what_we_write(peft, tmp_path, case):
    options, change = SHAPES[case]
    model = quantized(**options)
    if change:
        change(model)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(dense_base(model), tmp_path)
    assert relative_error(logits(model), logits(theirs).double()) < 1e-5
    with qlora_kernels.disable_adapters(model):
        assert relative_error(logits(model), logits(theirs).double()) > 1e-3

    again = quantized(rank=0)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
    for (_, ours), (_, layer) in zip(targets.qlora_layers(again), targets.qlora_layers(model), strict=True):
        assert (ours.rank, ours.scaling) == pytest.approx((layer.rank, layer.scaling))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": r".*layers\.1.*down_proj"},
        {"target_modules": "all-linear", "use_rslora": True, "lora_dropout": 0.1},
        {"target_modules": ["q_proj", "o_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"0.*o_proj": 32}},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    ],
    ids=lambda o: "-".join(o),
)
def test_we_read_what_peft_writes(peft, tmp_path, options):
    model = quantized(rank=0)
    theirs = peft.get_peft_model(
        dense_base(model), peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options)
    )
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    theirs.eval().save_pretrained(tmp_path)
    layers = load_adapter(model, tmp_path)
    assert relative_error(logits(model), logits(theirs).double()) < 1e-5
    assert {f"base_model.model.{name}.lora_A.weight" for name in layers} == {
        key for key in load_file(tmp_path / "adapter_model.safetensors") if "lora_A" in key
    }
    # and back to PEFT
    save_adapter(model, tmp_path / "again")
    base = dense_base(model)
    assert (
        relative_error(logits(peft.PeftModel.from_pretrained(base, tmp_path / "again")), logits(theirs).double()) < 1e-5
    )


def test_the_files_are_as_peft_has_them(tmp_path):
    model = quantized(target_modules=["q_proj", "v_proj"], dropout=0.1).bfloat16()
    save_adapter(model, tmp_path / "new" / "folder", base_model_name_or_path="some/base")
    folder = tmp_path / "new" / "folder"
    assert sorted(os.listdir(folder)) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 16, 0.1)
    assert (config["peft_type"], config["task_type"], config["bias"]) == ("LORA", "CAUSAL_LM", "none")
    assert config["inference_mode"] is True
    assert config["base_model_name_or_path"] == "some/base"
    tensors = load_file(folder / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert len(tensors) == 8
    assert tensors[key].dtype == torch.bfloat16
    assert torch.equal(tensors[key], model.model.layers[0].self_attn.q_proj.lora_A["default"])


def test_peft_knows_every_key_of_the_configuration(peft, tmp_path):
    save_adapter(quantized(), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(config) <= set(peft.LoraConfig().to_dict())


def test_target_modules_describe_these_layers_alone():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj, self.other = nn.Linear(64, 64), nn.Linear(64, 64)

    model = nn.ModuleDict({"a": Inner(), "b": Inner(), "x": nn.ModuleDict({"a": Inner()})})
    quantize_model(model, 2, progress=False)
    for layers, expected in (
        (["a.proj", "b.proj", "x.a.proj"], ["proj"]),
        (["b.proj"], ["b.proj"]),
        (["a.proj"], r"a\.proj"),  # as a list it would take x.a.proj too
    ):
        assert peft_config.target_modules(model, layers) == expected


# ------------------------------------------------------------------------------------------- names and activity


def test_loading_replaces_an_adapter_of_another_rank_and_drops_what_is_not_covered(tmp_path):
    source = quantized(rank=2, target_modules=["q_proj"])
    save_adapter(source, tmp_path)
    model = quantized(rank=8, adapter_dtype=torch.bfloat16)
    load_adapter(model, tmp_path)
    assert model.model.layers[0].self_attn.q_proj.adapters["default"].rank == 2
    assert model.model.layers[0].self_attn.q_proj.lora_A["default"].dtype == torch.bfloat16
    assert model.model.layers[0].self_attn.v_proj.adapters == {}
    assert relative_error(logits(model), logits(source).double()) < 1e-2
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}


def test_loading_under_a_new_name_leaves_the_active_one(tmp_path):
    source = quantized(rank=2, target_modules=["q_proj"])
    save_adapter(source, tmp_path)
    model = quantized(rank=4)
    before = logits(model)
    load_adapter(model, tmp_path, "style")
    assert torch.equal(logits(model), before)
    qlora_kernels.set_adapter(model, "style")
    assert torch.equal(logits(model), logits(source))
    load_adapter(model, tmp_path, "style")  # active: replaced and still active
    assert torch.equal(logits(model), logits(source))
    save_adapter(model, tmp_path / "style", "style")
    save_adapter(model, tmp_path / "default", "default")
    fresh = quantized(rank=0)
    load_adapter(fresh, tmp_path / "style", "anything")
    assert torch.equal(logits(fresh), logits(source))


def test_a_merged_adapter_can_be_saved_but_not_replaced(tmp_path):
    model = quantized()
    save_adapter(model, tmp_path / "unmerged")
    qlora_kernels.merge_adapters(model)
    save_adapter(model, tmp_path / "merged")
    unmerged, merged = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("unmerged", "merged"))
    assert unmerged.keys() == merged.keys()
    assert all(torch.equal(unmerged[key], merged[key]) for key in unmerged)
    before = state(model)
    with pytest.raises(RuntimeError, match=r"adapter 'default' is merged into model\.layers\.0"):
        load_adapter(model, tmp_path / "unmerged")
    assert_unchanged(model, before)


def test_nothing_is_loaded_where_another_adapter_is_merged(tmp_path):
    save_adapter(quantized(), tmp_path)
    model = quantized(target_modules=["q_proj"])
    model.model.layers[1].self_attn.v_proj.add_adapter("style", rank=2)
    model.model.layers[1].self_attn.v_proj.merge()
    before = state(model)
    with pytest.raises(RuntimeError, match=r"adapter 'style' is merged into model\.layers\.1\.self_attn\.v_proj"):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_compiled_models_have_the_same_names(tmp_path):
    model = quantized()
    save_adapter(torch.compile(model, backend="aot_eager"), tmp_path)
    assert all("_orig_mod" not in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="aot_eager")
    before = state(model)
    load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_copies_do_not_share_adapters(tmp_path):
    model = quantized()
    other = copy.deepcopy(model)
    randomize(other)
    save_adapter(other, tmp_path)
    y = logits(model)
    assert not torch.equal(logits(other), y)
    load_adapter(model, tmp_path)
    assert torch.equal(logits(model), logits(other))


def test_two_saves_at_once_take_turns(tmp_path, monkeypatch):
    """The slow one writes its weights first and its configuration last, around all of the quick one's."""
    slow, quick = quantized(rank=4), quantized(rank=8)
    weights_are_written, original, saves = threading.Event(), adapter_files.save_json, []

    def save_json(value, path):
        weights_are_written.set()
        if value["r"] == 4:
            time.sleep(0.3)
        original(value, path)
        saves.append(value["r"])

    monkeypatch.setattr(adapter_files, "save_json", save_json)
    thread = threading.Thread(target=save_adapter, args=(slow, tmp_path / "adapter"))
    thread.start()
    assert weights_are_written.wait(10)
    save_adapter(quick, tmp_path / "adapter")
    thread.join()
    assert saves == [4, 8]
    read = quantized(rank=2)
    load_adapter(read, tmp_path / "adapter")
    assert {layer.lora_A["default"].shape[0] for _, layer in targets.qlora_layers(read)} == {8}
    assert sorted(os.listdir(tmp_path / "adapter")) == ["adapter_config.json", "adapter_model.safetensors"]


def _save_filled(folder, value):
    """An adapter whose matrices and alpha are all one number."""
    model = quantized(alpha=value)
    with torch.no_grad():
        for _, layer in targets.qlora_layers(model):
            layer.lora_A["default"].fill_(value)
            layer.lora_B["default"].fill_(value)
    save_adapter(model, folder)


def _numbers(model):
    """What _save_filled saved: one number, if the files were of one save."""
    layers = [layer for _, layer in targets.qlora_layers(model)]
    matrices = {
        value.item() for layer in layers for m in (layer.lora_A, layer.lora_B) for value in m["default"].view(-1)
    }
    return matrices | {layer.adapters["default"].alpha for layer in layers}


@pytest.mark.parametrize("at", ["read_header", "read"])
@pytest.mark.parametrize("copies", [True, False])
def test_a_load_never_mixes_two_saves(tmp_path, monkeypatch, at, copies):
    """Another program, which takes no lock, replaces both files between two steps of the load."""
    for value in (1, 2):
        _save_filled(tmp_path / f"{value}", value)
        if not copies:  # as PEFT writes them
            path = tmp_path / f"{value}" / "adapter_model.safetensors"
            save_file(load_file(path), path, metadata={"format": "pt"})
    (tmp_path / "1").rename(tmp_path / "adapter")
    calls, original = [0], safetensors_stream._read if at == "read" else adapter_files._pair

    def step(*args):
        calls[0] += 1
        if calls[0] == 2 or at == "read_header":
            for name in ("adapter_model.safetensors", "adapter_config.json"):
                if (tmp_path / "2" / name).exists():
                    os.replace(tmp_path / "2" / name, tmp_path / "adapter" / name)
        return original(*args)

    monkeypatch.setattr(*((safetensors_stream, "_read") if at == "read" else (adapter_files, "_pair")), step)
    model = quantized()
    load_adapter(model, tmp_path / "adapter")
    assert _numbers(model) == {2}


def test_a_folder_that_always_changes_is_refused(tmp_path, monkeypatch):
    _save_filled(tmp_path, 1)
    original = adapter_files._pair

    def step(*args):
        path = tmp_path / "adapter_model.safetensors"
        shutil.copy(path, tmp_path / "new")
        os.replace(tmp_path / "new", path)
        return original(*args)

    monkeypatch.setattr(adapter_files, "_pair", step)
    model = quantized()
    before = state(model)
    with pytest.raises(ValueError, match="is being written by another program; load it when that is done"):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_a_load_waits_for_a_save(tmp_path, monkeypatch):
    _save_filled(tmp_path, 1)
    begun, original = threading.Event(), adapter_files.save_safetensors

    def save_safetensors(*args, **options):
        begun.set()
        time.sleep(0.2)
        original(*args, **options)

    monkeypatch.setattr(adapter_files, "save_safetensors", save_safetensors)
    thread = threading.Thread(target=_save_filled, args=(tmp_path, 2))
    thread.start()
    assert begun.wait(10)
    model = quantized()
    load_adapter(model, tmp_path)
    thread.join()
    assert _numbers(model) == {2}


@pytest.mark.parametrize("at", [0, 1, 2])
def test_what_a_killed_save_left_goes_with_the_next(tmp_path, at):
    """Killed before each of the renames."""
    model = quantized()
    child = os.fork()
    if child == 0:
        calls, replace = [0], os.replace

        def die_at(*_):
            if calls[0] == at:
                os.kill(os.getpid(), signal.SIGKILL)
            calls[0] += 1
            replace(*_)

        os.replace = die_at
        save_adapter(model, tmp_path / "adapter")
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert [name for name in os.listdir(tmp_path / "adapter") if name.startswith(".")]
    save_adapter(model, tmp_path / "adapter")
    assert sorted(os.listdir(tmp_path / "adapter")) == ["adapter_config.json", "adapter_model.safetensors"]
