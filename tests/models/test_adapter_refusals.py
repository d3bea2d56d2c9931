"""Adapters on disk: files that are broken or foreign, and what a kill can leave."""

from __future__ import annotations

import json
import os
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from small.llama import assert_unchanged, llama, logits, quantized, state

from qlora_kernels import load_adapter, save_adapter


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model = quantized(target_modules=["q_proj", "v_proj"])
    save_adapter(model, folder)
    return folder, model


def _config(**changes):
    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        _weights(lambda tensors: None)(folder)  # without the copy of the configuration, as PEFT writes them

    return change


def _weights(function):
    def change(folder):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        function(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return change


def _copy(text):
    def change(folder):
        path = folder / "adapter_model.safetensors"
        save_file(load_file(path), path, metadata={"format": "pt", "qlora_kernels.adapter_config": text})

    return change


def _text(name, text):
    return lambda folder: (folder / name).write_text(text)


def _truncate(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _remove(*names):
    return lambda folder: [os.unlink(folder / name) for name in names]


def _only_pickle(folder):
    os.rename(folder / "adapter_model.safetensors", folder / "adapter_model.bin")


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
Q9 = "base_model.model.model.layers.9.self_attn.q_proj"


def _rename(old, new):
    def change(tensors):
        for side in "AB":
            tensors[f"{new}.lora_{side}.weight"] = tensors.pop(f"{old}.lora_{side}.weight")

    return _weights(change)


def _put(key, value):
    return _weights(lambda tensors: tensors.update({key: value}))


BAD_FOLDERS = {
    "no config": (
        lambda f: (_weights(lambda t: None)(f), _remove("adapter_config.json")(f)),
        FileNotFoundError,
        r"adapter_config\.json: no such file; not an adapter's folder",
    ),
    "no weights": (_remove("adapter_model.safetensors"), FileNotFoundError, r"safetensors: no such file$"),
    "pickle": (_only_pickle, FileNotFoundError, r"adapter_model\.bin is a pickle"),
    "broken json": (_text("adapter_config.json", "{"), ValueError, r"config\.json should hold a JSON object \(Exp"),
    "json list": (_text("adapter_config.json", "[]"), ValueError, "should hold a JSON object, found list"),
    "truncated": (_truncate, ValueError, "not a whole safetensors file"),
    "foreign file": (_text("adapter_model.safetensors", "hello" * 9), ValueError, "not a whole safetensors file"),
    "ia3": (_config(peft_type="IA3"), ValueError, "peft_type should be LORA, found IA3"),
    "no type": (_config(peft_type=None), ValueError, "peft_type should be LORA, found None"),
    "dora": (_config(use_dora=True), ValueError, "use_dora = True is not supported"),
    "bias": (_config(bias="some"), ValueError, "bias = 'some' is not supported"),
    "modules": (_config(modules_to_save=["lm_head"]), ValueError, "names lm_head, but the file lacks lm_head.weight"),
    "modules text": (_config(modules_to_save="all"), ValueError, "modules_to_save should be a list of names, found 'a"),
    "pissa": (_config(init_lora_weights="pissa"), ValueError, "'pissa' changes the base weights"),
    "no rank": (_config(r=None), ValueError, "r should be a whole number, found None"),
    "alpha text": (_config(lora_alpha="8"), ValueError, "lora_alpha should be a number, found '8'"),
    "alpha huge": (_config(lora_alpha=10**400), ValueError, r"config\.json: lora_alpha should be a number, found 1000"),
    "alpha of infinite scaling": (_config(lora_alpha=1e308), ValueError, r"q_proj: alpha 1e\+308 is too large: the sc"),
    "alpha infinite": (_config(lora_alpha=float("inf")), ValueError, r"lora_alpha should be a number, found inf"),
    "dropout huge": (_config(lora_dropout=10**400), ValueError, r"config\.json: lora_dropout should be a number"),
    "pattern with late flags": (
        _config(alpha_pattern={"x(?i)": 8}),
        ValueError,
        r"config\.json: 'x\(\?i\)' is not a regular expression",
    ),
    "patterns without end": (
        _config(rank_pattern={f"{i}{'a' * 1000}": 8 for i in range(1000)}),
        ValueError,
        r"config\.json: the patterns have more than 1,000,000 characters",
    ),
    "repeated key": (
        _text("adapter_config.json", '{"r": 4, "r": 8}'),
        ValueError,
        r"config\.json should hold a JSON object \(the key 'r' occurs twice\)",
    ),
    "pipe": (
        lambda f: (_remove("adapter_config.json")(f), os.mkfifo(f / "adapter_config.json")),
        ValueError,
        r"adapter_config\.json is not a regular file",
    ),
    "device": (
        lambda f: (
            _remove("adapter_model.safetensors")(f),
            os.symlink("/dev/zero", f / "adapter_model.safetensors"),
        ),
        ValueError,
        r"adapter_model\.safetensors is not a regular file",
    ),
    "alpha zero": (_config(lora_alpha=0), ValueError, r"q_proj: alpha should be positive"),
    "dropout": (_config(lora_dropout=1.0), ValueError, "dropout should be in"),
    "dropout list": (
        _config(lora_dropout=[1]),
        ValueError,
        r"config\.json: lora_dropout should be a number, found \[1\]",
    ),
    "alphas text": (
        _config(alpha_pattern={"0": "y"}),
        ValueError,
        r"alpha_pattern\['0'\] should be a number, found 'y'",
    ),
    "alphas null": (
        _config(alpha_pattern={"0": None}),
        ValueError,
        r"alpha_pattern\['0'\] should be a number, found None",
    ),
    "ranks": (
        _config(rank_pattern={"0": 2.5}),
        ValueError,
        r"rank_pattern\['0'\] should be a whole number, found 2\.5",
    ),
    "rslora text": (_config(use_rslora="no"), ValueError, "use_rslora should be true or false, found 'no'"),
    "targets number": (_config(target_modules=5), ValueError, "target_modules should be a list of names or .* found 5"),
    "targets numbers": (
        _config(target_modules=[1, 2]),
        ValueError,
        r"target_modules should be a list .* found \[1, 2\]",
    ),
    "copy list": (
        _copy("[1]"),
        ValueError,
        r"model\.safetensors: the metadata .* a JSON object, found list",
    ),
    "copy broken": (_copy("{"), ValueError, r"model\.safetensors: the metadata .*should hold a JSON object \("),
    "pattern": (_config(rank_pattern=[1]), ValueError, "rank_pattern should be an object"),
    "bad pattern": (_config(alpha_pattern={"(": 1}), ValueError, r"'\(' is not a regular expression"),
    "bad target": (_config(target_modules="("), ValueError, r"'\(' is not a regular expression"),
    "another rank": (_config(r=8), ValueError, r"of another rank: .*takes A \[8, 64\].*found \[4, 64\]"),
    "empty": (_weights(lambda t: t.clear()), ValueError, "no tensor"),
    "foreign key": (_put("lm_head.weight", torch.ones(2, 2)), ValueError, r"found lm_head\.weight"),
    "embedding": (
        _put("base_model.model.model.embed_tokens.lora_embedding_A", torch.ones(2, 2)),
        ValueError,
        "found base_model.*lora_embedding_A",
    ),
    "half a pair": (
        _weights(lambda t: t.pop(f"{Q0}.lora_B.weight")),
        ValueError,
        r"one is missing for model\.layers\.0\.self_attn\.q_proj",
    ),
    "missing layer": (
        _weights(lambda t: [t.pop(f"{Q0}.lora_{p}.weight") for p in "AB"]),
        ValueError,
        r"target_modules covers model\.layers\.0\.self_attn\.q_proj, but .*does not",
    ),
    "another model": (
        _rename(Q0, Q9),
        ValueError,
        r"for another model: model\.layers\.9\.self_attn\.q_proj is not among its QLinear layers, such as model\.",
    ),
    "dense layer": (_rename(Q0, "base_model.model.lm_head"), ValueError, "lm_head is not among its QLinear layers"),
    "another shape": (
        _put(f"{Q0}.lora_A.weight", torch.ones(4, 32)),
        ValueError,
        r"takes A \[4, 64\] and B \[64, 4\], found \[4, 32\] and \[64, 4\]",
    ),
    "one-dimensional": (_put(f"{Q0}.lora_A.weight", torch.ones(4)), ValueError, r"floating matrix, found .*\[4\]"),
    "integers": (_put(f"{Q0}.lora_A.weight", torch.ones(4, 64).int()), ValueError, r"found torch\.int32"),
    "nan": (_put(f"{Q0}.lora_A.weight", torch.full((4, 64), torch.nan)), ValueError, "holds NaN or infinity"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folders_change_nothing(saved, tmp_path, case):
    source, model = saved
    change, raised, message = BAD_FOLDERS[case]
    for name in os.listdir(source):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    change(tmp_path)
    before = state(model)
    with pytest.raises(raised, match=message) as caught:
        load_adapter(model, tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert_unchanged(model, before)


def test_other_bad_input(saved, tmp_path):
    folder, model = saved
    before = state(model)
    for call, raised, message in (
        (lambda: load_adapter(model, tmp_path / "nowhere"), FileNotFoundError, "nowhere: no such folder"),
        (lambda: load_adapter(model, folder, "a.b"), ValueError, "an adapter's name is a word without '.'"),
        (lambda: load_adapter(llama(), folder), ValueError, "no QLinear layers; quantize it with quantize_model"),
        (lambda: load_adapter(model.model.layers[0].self_attn.q_proj, folder), ValueError, "is itself a QLinear"),
        (lambda: save_adapter(model, tmp_path / "new", "nobody"), KeyError, "no adapter 'nobody' .*it has: 'default'"),
        (lambda: save_adapter(llama(), tmp_path / "new"), ValueError, "no QLinear layers"),
    ):
        with pytest.raises(raised, match=message):
            call()
    assert_unchanged(model, before)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_adapter_that_is_not_finite_is_not_saved(tmp_path, value):
    model = quantized()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.lora_B["default"][3, 1] = value
    with pytest.raises(ValueError, match=rf"{re.escape(Q0)}\.lora_B\.weight .* holds NaN or infinity"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made(saved, tmp_path):
    _, model = saved
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=re.escape(str(tmp_path / "file"))):
        save_adapter(model, tmp_path / "file")
    with pytest.raises(OSError, match=re.escape(str(tmp_path / "file"))):
        save_adapter(model, tmp_path / "file" / "below")


# ------------------------------------------------------------------------------------------- kills


class Kill(BaseException):
    """Stands for a kill -9: no handler of the code under test may clean up."""


@pytest.mark.parametrize("foreign", [False, True])
def test_a_kill_between_two_files_leaves_the_old_or_the_new_or_an_error(tmp_path, monkeypatch, foreign):
    old, new = quantized(rank=4, alpha=8), quantized(rank=4, alpha=32)
    save_adapter(old, tmp_path)
    if foreign:
        _weights(lambda tensors: None)(tmp_path)
    files = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    probe = quantized(rank=4)
    seen = []
    for point in range(20):
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        finished = _killed_at(point, monkeypatch, lambda: save_adapter(new, tmp_path))
        try:
            load_adapter(probe, tmp_path)
        except ValueError as error:
            mixture = "do not belong together (lora_alpha is 32 beside the weights, 8 in"
            seen.append("mixture" if mixture in str(error) else str(error))
        else:
            y = logits(probe)
            seen.append("old" if torch.equal(y, logits(old)) else "new" if torch.equal(y, logits(new)) else "wrong")
        if finished:
            break
    assert seen[0] == "old"
    assert seen[-1] == "new"
    assert set(seen) == ({"old", "mixture", "new"} if foreign else {"old", "new"})


def _killed_at(point, monkeypatch, call) -> bool:
    """Runs call and stops it before its `point`-th change to the folder; True if it finished."""
    count = 0

    def dying(function):
        def wrapped(*args, **kwargs):
            nonlocal count
            if count == point:
                raise Kill
            count += 1
            return function(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        for name in ("replace", "unlink"):
            patch.setattr(os, name, dying(getattr(os, name)))
        try:
            call()
        except Kill:
            return False
    return True


def test_a_save_that_fails_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    save_adapter(quantized(rank=4, alpha=8), tmp_path)
    files = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}

    def full(self, name, tensor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qlora_kernels.storage.safetensors_stream.Writer.write", full)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(quantized(rank=2, alpha=32), tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == files


def test_an_edited_configuration_is_noticed(tmp_path):
    model = quantized()
    save_adapter(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "elsewhere"}))
    load_adapter(model, tmp_path)  # what does not change the meaning may be edited
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 99}))
    with pytest.raises(ValueError, match="lora_alpha is 16 beside the weights, 99 in"):
        load_adapter(model, tmp_path)
    os.unlink(path)
    y = logits(model)
    load_adapter(model, tmp_path)
    assert torch.equal(logits(model), y)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.float64])
def test_other_floating_types_load(saved, tmp_path, dtype):
    folder, model = saved
    for name in os.listdir(folder):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({key: value.to(dtype) for key, value in weights.items()}, tmp_path / "adapter_model.safetensors")
    [first, *_] = load_adapter(model, tmp_path, "other")
    expected = weights[f"base_model.model.{first}.lora_A.weight"].to(dtype).float()
    assert expected.abs().max() > 0
    assert torch.equal(model.get_submodule(first).lora_A["other"].float(), expected)


def test_a_value_that_overflows_the_layers_type_is_refused(tmp_path):
    model = quantized()
    save_adapter(model, tmp_path)
    _put(f"{Q0}.lora_B.weight", torch.full((64, 4), 1e30))(tmp_path)
    load_adapter(model, tmp_path)
    model.model.layers[0].self_attn.q_proj.lora_B["default"].data.zero_()
    model.half()
    before = state(model)
    with pytest.raises(ValueError, match=r"lora_B of .*q_proj holds values too large for the layer's torch\.float16"):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_a_load_without_the_memory_for_all_copies_changes_nothing(saved, monkeypatch):
    folder, _ = saved
    model = quantized(rank=2, target_modules=["q_proj", "v_proj"])
    before, copies, original = state(model), [0], torch.Tensor.to

    def to(tensor, *args, **options):
        copies[0] += bool(options.get("copy"))
        if copies[0] == 5:
            raise torch.OutOfMemoryError("out of memory")
        return original(tensor, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", to)
    with pytest.raises(torch.OutOfMemoryError):
        load_adapter(model, folder)
    monkeypatch.undo()
    assert_unchanged(model, before)
    load_adapter(model, folder)


def test_patterns_that_would_take_years_are_matched_or_refused(saved, tmp_path, monkeypatch):
    folder, model = saved
    for name in os.listdir(folder):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    hostile = "([a-z._0-9]+)+!"  # a name of 30 characters would keep re busy for minutes, and each more for twice that
    _config(rank_pattern={hostile: 8}, alpha_pattern={hostile: 8}, target_modules=hostile)(tmp_path)
    assert len(load_adapter(model, tmp_path, "other")) == 4
    monkeypatch.setattr("qlora_kernels.models.peft_config._MOST_STEPS", 1000)
    before = state(model)
    with pytest.raises(ValueError, match=r"config\.json: '.*' takes too long to match; write it more simply"):
        load_adapter(model, tmp_path, "third")
    assert_unchanged(model, before)
