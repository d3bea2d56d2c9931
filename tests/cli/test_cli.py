"""The command line: what it prints, how quickly, and one sentence for each kind of bad input."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_kernels import __version__
from qlora_kernels.cli.main import main
from qlora_kernels.console import cores
from qlora_kernels.native.build_info import build_info

TINY = [
    *("--tiny-hidden", "64", "--tiny-layers", "1", "--tiny-seq-len", "32", "--pretrain-steps", "2"),
    *("--steps", "1", "--seq-len", "32", "--batch-size", "1", "--rank", "4"),
    *("--eval-tokens", "64", "--sample-tokens", "0", "--quiet"),
]


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    """A Hugging Face folder: one Llama layer, byte-level tokenizer."""
    from transformers import LlamaForCausalLM

    from qlora_kernels.finetune import tiny
    from qlora_kernels.finetune.options import Options

    folder = str(tmp_path_factory.mktemp("models") / "model")
    torch.manual_seed(0)
    config = tiny.config(Options(tiny_hidden=64, tiny_layers=1))
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def damaged(model: str, folder, kind: str) -> str:
    """A copy of the model with something wrong."""
    subprocess.run(["cp", "-r", model, str(folder)], check=True)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-64])
    elif kind == "foreign":
        path.write_bytes(b"this is no safetensors file")
    elif kind == "no tokenizer":
        os.unlink(folder / "tokenizer.json")
        os.unlink(folder / "tokenizer_config.json")
    else:
        if kind == "not finite":
            tensors["model.layers.0.mlp.up_proj.weight"][1, 2] = float("inf")
        elif kind == "incomplete":
            del tensors["model.layers.0.mlp.up_proj.weight"]
        save_file(tensors, path, metadata={"format": "pt"})
    return str(folder)


def test_help_and_info_are_quick():
    """None of them loads transformers or matplotlib, which take seconds."""
    script = """
import contextlib, sys
from qlora_kernels.cli.main import main

for arguments in (["--help"], ["info"], ["finetune", "--help"]):
    print("printed by", *arguments)
    with contextlib.suppress(SystemExit):
        main(arguments)
    print([name for name in ("transformers", "matplotlib") if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.split() == ["[]"] * 3
    printed = done.stdout.split("printed by ")[1:]
    for text, words in zip(printed, ("usage: qlora-kernels [-h]", "compiler", "--target-modules"), strict=True):
        assert words in text


def test_module_and_version():
    done = subprocess.run([sys.executable, "-m", "qlora_kernels", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, f"qlora-kernels {__version__}")


def test_info(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for title in ("compiler", "instruction sets built in", "in use", "CUDA architectures", "GPUs seen", "torch"):
        assert title in text
    assert main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info == json.loads(json.dumps(build_info()))
    assert info["native"]
    assert info["isa_in_use"] in info["isas_available"]
    assert set(info["isas_available"]) <= set(info["isas_built"])


@pytest.mark.parametrize(
    "arguments", [["info"], ["info", "--json"], ["quantize", "{m}", "{t}/out"], ["finetune", *TINY, "--out", "{t}/out"]]
)
def test_an_instruction_set_that_is_not_there(tmp_path, model, capsys, monkeypatch, arguments):
    monkeypatch.setenv("QLORA_KERNELS_CPU_ISA", "nonsense")
    command = [argument.format(t=tmp_path, m=model) for argument in arguments]
    assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(
        f"qlora-kernels {command[0]}: QLORA_KERNELS_CPU_ISA=nonsense is not to be had here; built in: "
    )
    assert captured.err.count("\n") == 1
    assert "portable" in captured.err
    assert ".cpp" not in captured.err
    assert captured.out == ""
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("command", [["info"], ["info", "--dispatch", "64", "64"], ["finetune", *TINY]])
def test_a_kernel_that_is_not_there(tmp_path, capsys, monkeypatch, command):
    monkeypatch.setenv("QLORA_KERNELS_CUDA_KERNEL", "nonsense")
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    captured = capsys.readouterr()
    words = f"qlora-kernels {command[0]}: QLORA_KERNELS_CUDA_KERNEL=nonsense names no kernel; there are few, middle8"
    assert captured.err.startswith(words)
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert os.listdir(tmp_path) == []


def test_info_without_the_extension(capsys, monkeypatch):
    from qlora_kernels.native import extension

    def absent():
        raise ImportError("the native extension could not be loaded; build it with 'pip install -e .'")

    monkeypatch.setattr(extension, "native", absent)
    assert main(["info"]) == 0
    assert "pip install -e ." in capsys.readouterr().out


def test_quantize_then_finetune(tmp_path, model, capsys):
    assert main(["quantize", model, str(tmp_path / "4bit"), "--quiet"]) == 0
    assert "7 linear layers in NF4" in capsys.readouterr().out
    assert main(["finetune", *TINY, "--model", str(tmp_path / "4bit"), "--out", str(tmp_path / "out")]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert sorted(metrics["results"]) == ["nf4", "qlora"]
    dense = ["finetune", *TINY, "--model", model, "--out", str(tmp_path / "dense")]
    assert main(dense) == 0
    found = json.loads((tmp_path / "dense" / "metrics.json").read_text())["results"]
    assert found["nf4"]["loss"] == metrics["results"]["nf4"]["loss"]


def test_double_quantization_of_a_4_bit_folder_is_as_it_is(tmp_path, model, capsys):
    for name, flags in (("nested", []), ("plain", ["--no-double-quant"])):
        assert main(["quantize", model, str(tmp_path / name), "--quiet", *flags]) == 0
    capsys.readouterr()

    def finetune(name, *flags):
        return main(["finetune", *TINY, "--model", str(tmp_path / name), "--out", str(tmp_path / "out"), *flags])

    assert finetune("nested", "--no-double-quant") == 2
    error = capsys.readouterr().err
    assert f"--no-double-quant comes too late: {tmp_path / 'nested'} is 4-bit and double-quantized already" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    for flags in ([], ["--no-double-quant"]):  # agreed, or nothing said
        assert finetune("plain", *flags) == 0
        metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
        assert metrics["options"]["double_quant"] is False
        assert metrics["size"]["bits_per_weight"] == 4.5
    for name in ("nested", "plain"):
        assert main(["quantize", str(tmp_path / name), str(tmp_path / "again"), "--no-double-quant"]) == 2
        error = capsys.readouterr().err
        assert "is quantized already (by qlora_kernels); a model with dense weights was expected" in error
        assert error.count("\n") == 1
    assert not (tmp_path / "again").exists()


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


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["{t}/nowhere", "{t}/out"], "no such folder"),
        (["{m}", "{t}/full"], "exists already"),
        (["{m}", "{t}/full/file/out"], "cannot be written"),
        (["{m}", "{t}/out", "--max-shard-size", "huge"], "--max-shard-size should be a size"),
        (["{m}", "{t}/out", "--max-shard-size", "0.1"], "--max-shard-size should be a size"),
    ],
)
def test_bad_input_of_quantize(tmp_path, model, capsys, arguments, expected):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    filled = [argument.format(t=tmp_path, m=model) for argument in arguments]
    assert main(["quantize", *filled]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == ["full"]
    assert (tmp_path / "full" / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("config.json", '{"quantization_config": "x"}', "quantization_config should be a JSON object"),
        ("config.json", "[]", "should hold a JSON object"),
        ("model.safetensors.index.json", '{"weight_map": {"a": 5}}', "is not an index of safetensors files"),
    ],
)
def test_quantize_refuses_odd_json(tmp_path, model, capsys, name, text, expected):
    subprocess.run(["cp", "-r", model, str(tmp_path / "model")], check=True)
    (tmp_path / "model" / name).write_text(text)
    assert main(["quantize", str(tmp_path / "model"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


def test_a_quantization_config_of_null_is_none(tmp_path, model):
    subprocess.run(["cp", "-r", model, str(tmp_path / "model")], check=True)
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


def test_threads_sleep_where_other_programs_use_the_cores(monkeypatch):
    class Restarted(Exception):
        pass

    def execve(path, arguments, environment):
        assert arguments == sys.orig_argv
        raise Restarted(environment["OMP_WAIT_POLICY"])

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(sys, "argv", ["qlora-kernels", "finetune", "--rank", "0"])
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    assert 0 <= cores.free_cores() <= os.cpu_count()
    monkeypatch.setattr(cores, "free_cores", lambda: math.inf)
    assert main() == 2
    monkeypatch.setattr(cores, "free_cores", lambda: 0.0)
    with pytest.raises(Restarted, match="passive"):
        main()
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")  # what the user says, holds; and no restart without end
    assert main() == 2


def test_unknown_flags_are_argparse_errors():
    with pytest.raises(SystemExit) as caught:
        main(["finetune", "--no-such-flag"])
    assert caught.value.code == 2


def test_dispatch_prints_which_kernel_runs(capsys, monkeypatch):
    monkeypatch.delenv("QLORA_KERNELS_CUDA_KERNEL", raising=False)
    assert main(["info", "--dispatch", "4096", "4096", "--arch", "90"]) == 0
    text = capsys.readouterr().out
    assert "sm_90, 132 multiprocessors, 227 KiB" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["1", "to", "4", "few", "1", "0.0"] in rows
    # 128 wide tiles fill 132 multiprocessors; of what does not, the last round's tiles are shared.
    assert ["257", "to", "896", "tiles128", "1,", "last", "more", "7.5"] in rows
    assert ["897", "to", "1024", "tiles128wide", "1", "0.0"] in rows
    assert ["6401", "and", "more", "tiles128wide", "1", "0.0"] in rows
    assert main(["info", "--dispatch", "4096", "100", "--arch", "75", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["card"]["architecture"] == 75
    assert {row["kernel"] for row in found["table"]} == {"floats"}, "K is no multiple of 64"
    monkeypatch.setenv("QLORA_KERNELS_CUDA_KERNEL", "tiles64")
    assert main(["info", "--dispatch", "4096", "4096", "--arch", "80"]) == 0
    text = capsys.readouterr().out
    assert " few " in text
    assert text.endswith("QLORA_KERNELS_CUDA_KERNEL=tiles64 is set: that one runs, or the call fails.\n")
    assert os.environ["QLORA_KERNELS_CUDA_KERNEL"] == "tiles64"
    for arguments, words in (
        (["--dispatch", "0", "64"], "N and K should be from 1"),
        (["--dispatch", "64", "64", "--arch", "42"], "there are figures for 75, 80"),
        (["--arch", "90"], "--arch goes with --dispatch"),
    ):
        assert main(["info", *arguments]) == 2
        assert words in capsys.readouterr().err


def test_ptx_of_an_older_card_gets_kernels_that_have_code_there():
    from dataclasses import replace

    from qlora_kernels.native import dispatch

    h200 = dispatch.CARDS[90]
    for architecture in (75, 86, 89):
        old = replace(h200, architecture=architecture)
        native = replace(h200, architecture=architecture, shared_bytes=dispatch.CARDS[architecture].shared_bytes)
        for m in (1, 10, 40, 100, 5000):
            chosen = [dispatch.choose(card, m, 4096, 4096, torch.float16, False) for card in (old, native)]
            assert chosen[0] == chosen[1]


def test_every_range_of_the_dispatch_is_what_runs():
    from qlora_kernels.native import dispatch

    for card in dispatch.CARDS.values():
        for backward in (False, True):
            for dtype in dispatch.DTYPES.values():
                end = 0
                for first, last, plan in dispatch.ranges(card, 1024, 2048, dtype, backward):
                    assert first == end + 1
                    chosen = dispatch.choose(card, first, 1024, 2048, dtype, backward)
                    assert chosen["kernel"] == plan["kernel"]
                    if chosen["tiles"] <= card.multiprocessors or chosen["shared_tiles"] > 1:
                        assert all(chosen[key] == plan[key] for key in ("splits", "shared_tiles"))
                    assert 0 <= plan["scratch"] <= 2**24
                    assert chosen["splits"] == 1 or chosen["scratch"] > 0
                    end = last
                assert end is None
                for m in (30000, 10**6):
                    assert dispatch.choose(card, m, 1024, 2048, dtype, backward)["kernel"] == plan["kernel"]
