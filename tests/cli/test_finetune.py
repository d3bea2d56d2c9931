"""``qlora-kernels finetune``: one sentence for each kind of bad input."""

from __future__ import annotations

import json
import os
import shutil
import sys

import pytest
from small.model_folder import TINY, damaged, model_fixture  # noqa: F401 - fixtures

from qlora_kernels.cli.main import main


@pytest.mark.share(2)
def test_quantize_then_finetune(tmp_path, model, capsys):
    assert main(["quantize", model, str(tmp_path / "4bit"), "--quiet"]) == 0
    assert "7 linear layers in NF4" in capsys.readouterr().out
    assert main(["finetune", *TINY, "--model", str(tmp_path / "4bit"), "--out", str(tmp_path / "out")]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert sorted(metrics["results"]) == ["nf4", "qlora"]
    dense = ["finetune", *TINY, "--model", model, "--out", str(tmp_path / "dense")]
    assert main(dense) == 0
    dense_results = json.loads((tmp_path / "dense" / "metrics.json").read_text())["results"]
    assert dense_results["nf4"]["loss"] == metrics["results"]["nf4"]["loss"]


BAD = [
    # what is wrong, arguments ({t}: a folder, {m}: a good model), what the sentence says
    ("rank of zero", ["--rank", "0"], "--rank should be at least 1, found 0"),
    ("negative rank", ["--rank", "-3"], "--rank should be at least 1, found -3"),
    ("rank larger than a layer", ["--rank", "65"], "rank 65 is larger than the layer"),
    ("unknown target", ["--target-modules", "q_proj,nonsense"], "'nonsense' matches no layer"),
    ("steps and epochs", ["--epochs", "1"], "--steps and --epochs"),
    ("dropout of one", ["--lora-dropout", "1"], "--lora-dropout should be in [0, 1)"),
    ("rate of zero", ["--lr", "0"], "--lr should be positive"),
    ("not a number", ["--lr", "nan"], "--lr should be positive"),
    ("sequence of one", ["--seq-len", "1"], "--seq-len should be at least 8"),
    ("sequence longer than the model takes", ["--seq-len", "4000"], "--seq-len 4000 is more than the 2048"),
    ("page file that is none", ["--page-file", "{t}/nowhere"], "--page-file should be a folder that exists"),
    ("page file without pages", ["--optim", "adamw", "--page-file", "{t}"], "--page-file needs a paged optimizer"),
    ("page budget of zero", ["--page-budget", "0"], "--page-budget should be positive"),
    ("seed that is too large", ["--seed", str(2**32)], "--seed should be"),
    ("negative seed", ["--seed", "-1"], "--seed should be"),
    ("endless warmup", ["--warmup", "inf"], "--warmup should be finite"),
    ("endless epochs", ["--epochs", "inf"], "--epochs should be finite"),
    ("device without memory", ["--device", "meta"], "--device meta cannot be used"),
    ("no such device", ["--device", "nonsense"], "--device nonsense cannot be used"),
    ("missing data", ["--data", "{t}/nowhere"], "no such file or folder"),
    ("missing lines", ["--data", "{t}/nowhere.jsonl"], "no such file or folder"),
    ("empty data", ["--data", "{t}/empty.txt"], "is empty"),
    ("empty lines", ["--data", "{t}/empty.jsonl"], "is empty"),
    ("empty folder", ["--data", "{t}/folder"], "a folder without text files"),
    ("too little data", ["--data", "{t}/short.txt"], "is too short"),
    ("line that is no JSON", ["--data", "{t}/bad.jsonl"], "line 2: not JSON"),
    ("line without completion", ["--data", "{t}/lacking.jsonl"], "line 3: expected an object"),
    ("line of brackets", ["--data", "{t}/deep.jsonl"], "line 1: brackets nested too deeply"),
    ("line with a long number", ["--data", "{t}/number.jsonl"], "line 1: Exceeds the limit"),
    ("one example", ["--data", "{t}/one.jsonl"], "1 distinct examples"),
    ("missing model", ["--model", "{t}/nowhere"], "no such folder"),
    ("model that is a file", ["--model", "{t}/short.txt"], "is a file"),
    ("folder that is no model", ["--model", "{t}/folder"], "has no config.json"),
    ("config that is a list", ["--model", "{t}/config: []"], "should hold a JSON object"),
    ("quantized by a string", ["--model", '{t}/config: {{"quantization_config": "x"}}'], "should be a JSON object"),
    ("truncated weights", ["--model", "{t}/truncated"], "--model {t}/truncated"),
    ("foreign weights", ["--model", "{t}/foreign"], "--model {t}/foreign"),
    ("incomplete weights", ["--model", "{t}/incomplete"], "lacks 1 tensors"),
    ("non-finite weights", ["--model", "{t}/not finite"], "up_proj.weight holds NaN or infinity"),
    ("no tokenizer", ["--model", "{t}/no tokenizer"], "no usable tokenizer"),
    ("nothing to resume", ["--resume"], "no run was interrupted"),
    ("output in a file", ["--out", "{t}/short.txt/out"], "cannot be written"),
    ("output that is a file", ["--out", "{t}/short.txt"], "cannot be written"),
    ("output with a long name", ["--out", "{t}/" + 300 * "x"], "cannot be written: File name too long"),
    ("output that is a device", ["--out", "/dev/null"], "cannot be written"),
    ("output where nobody may write", ["--out", "/proc/sys"], "cannot be written"),
    ("new output where nobody may write", ["--out", "/proc/new"], "cannot be written"),
    ("cache where nobody may write", ["--cache", "/proc/sys"], "cannot be written"),
    ("cache in a file", ["--cache", "{t}/short.txt/cache"], "cannot be written"),
]


@pytest.mark.parametrize(("arguments", "expected"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path, model, capsys, arguments, expected):
    (tmp_path / "folder").mkdir()
    files = {
        "empty.txt": " \n",
        "empty.jsonl": "\n\n",
        "short.txt": "too short",
        "one.jsonl": '{"prompt": "a", "completion": "b"}',
        "bad.jsonl": '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "comp\n',
        "lacking.jsonl": '{"prompt": "a", "completion": "b"}\n\n{"prompt": "a"}\n',
    }
    files |= {"deep.jsonl": "[" * 200_000, "number.jsonl": '{"prompt": ' + "1" * 6000 + "}"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for kind in ("truncated", "foreign", "incomplete", "not finite", "no tokenizer"):
        if any(kind in argument for argument in arguments):
            damaged(model, tmp_path / kind, kind)
    filled = [argument.format(t=tmp_path, m=model) for argument in arguments]
    for folder in (tmp_path / name.split("/")[-1] for name in filled if "/config: " in name):
        folder.mkdir()
        (folder / "config.json").write_text(folder.name.removeprefix("config: "))
    default = [] if "--model" in filled else ["--model", model]
    before = sorted(os.listdir(tmp_path))
    assert main(["finetune", *TINY, *default, "--out", str(tmp_path / "out"), *filled]) == 2
    captured = capsys.readouterr()
    assert expected.format(t=tmp_path) in captured.err
    assert captured.err.startswith("qlora-kernels finetune: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert sorted(os.listdir(tmp_path)) == before, "something was left behind"


def test_a_quantization_config_of_null_is_none(tmp_path, model):
    shutil.copytree(model, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": None}))
    out = str(tmp_path / "out")
    assert main(["finetune", *TINY, "--model", str(tmp_path / "model"), "--out", out]) == 0


def test_an_id_that_cannot_be_fetched(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else it tries for twenty seconds
    assert main(["finetune", *TINY, "--model", "nobody/nothing", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("qlora-kernels finetune: --model nobody/nothing: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["transformers", "matplotlib"])
def test_a_missing_package_is_named_before_anything_happens(tmp_path, model, capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["finetune", *TINY, "--model", model, "--out", str(tmp_path / "out")]) == 2
    assert f"needs the package '{package}': pip install 'qlora_kernels[finetune]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
