"""The fine-tuning run: training, comparing, and what it writes. Models here are far smaller than the tiny one."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace

import pytest

pytest.importorskip("transformers")

from small.runs import SMALL, cache_fixture, hf_folder_fixture, losses, metrics, run_fixture  # noqa: F401 - fixtures

from qlora_kernels.finetune import data
from qlora_kernels.finetune.options import Options
from qlora_kernels.finetune.train import Trainer
from qlora_kernels.storage import leftovers


def test_a_run_writes_what_it_promises(run, tmp_path, capsys):
    assert run("--compare", plot=True) == 0
    out = tmp_path / "out"
    text = capsys.readouterr().out
    for title in ("16-bit base", "NF4 base", "NF4 + LoRA", "16-bit + LoRA", "full fine-tuning", "recovers"):
        assert title in text
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir(out / "adapter")) == ["adapter_config.json", "adapter_model.safetensors"]
    assert not (out / "checkpoint.pt").exists()
    report = metrics(out)
    assert report["size"]["bits_per_weight"] == pytest.approx(4.127, abs=0.02)
    assert report["size"]["base_bytes_nf4"] < report["size"]["base_bytes_16bit"]
    results = report["results"]
    assert all(len(value) == 6 for value in losses(out).values())
    # The first step sees the base alone, B being zero: both bases have the same loss but for quantization.
    assert results["qlora"]["losses"][0] == pytest.approx(results["lora16"]["losses"][0], rel=0.02)
    assert all(math.isfinite(value["loss"]) and value["seconds"] > 0 for value in results.values())
    assert results["qlora"]["loss"] < results["nf4"]["loss"]


@pytest.mark.slow
def test_nf4_recovers_what_16_bit_lora_gains(run, tmp_path, monkeypatch):
    """QLoRA's claim, on held-out text, trained until the gain is far above the differences between seeds."""
    small = [
        *("--tiny-hidden", "128", "--tiny-layers", "1", "--tiny-seq-len", "64", "--pretrain-steps", "60"),
        *("--steps", "140", "--seq-len", "64", "--batch-size", "4", "--rank", "8", "--save-every", "0"),
        *("--eval-tokens", "16384", "--sample-tokens", "0", "--quiet"),
    ]
    original = Trainer.run

    def trained(self, phase, note):
        return original(self, replace(phase, steps=1) if phase.name == "full" else phase, note)  # not asked about

    monkeypatch.setattr(Trainer, "run", trained)
    assert run("--compare", small=small) == 0
    report = metrics(tmp_path / "out")
    loss = {key: result["loss"] for key, result in report["results"].items()}
    gain = loss["base16"] - loss["lora16"]
    assert gain > 0.2
    assert loss["base16"] - loss["qlora"] >= 0.95 * gain
    assert report["recovery"] == pytest.approx((loss["base16"] - loss["qlora"]) / gain)


def test_the_adapter_on_disk_has_the_loss_that_was_reported(run, tmp_path):
    from qlora_kernels.finetune.evaluate import held_out_loss
    from qlora_kernels.finetune.source import Source, quantize
    from qlora_kernels.models import adapter_files

    of_a_killed_write = f".adapter_model.safetensors.{leftovers.here()}-{'9' * 10}-0abcdef0.part"
    litter = tmp_path / "out" / "adapter" / of_a_killed_write
    litter.mkdir(parents=True)
    (litter / ".tmpAbCdEf").write_text("safetensors's own")
    assert run() == 0
    assert not litter.exists()
    report = metrics(tmp_path / "out")
    options = Options(**report["options"]).resolve()
    source = Source(options)
    model = source.load()
    quantize(model, options)
    adapter_files.load_adapter(model, tmp_path / "out" / "adapter")
    held_out = data.load_data(None, source.encode, source.end, options.seq_len, 0.1, 0).held_out
    loss = held_out_loss(model, held_out, options.batch_size, options.eval_tokens, "cpu", "", True)
    assert loss == pytest.approx(report["results"]["qlora"]["loss"], rel=1e-6)


def test_a_time_limit_and_what_is_compared(run, tmp_path):
    assert run("--train-seconds", "1e-6", "--steps", "50", "--compare") == 0
    assert {key: len(value) for key, value in losses(tmp_path / "out").items()} == dict.fromkeys(
        ("qlora", "lora16", "full"), 24
    )


def test_pairs_and_epochs(run, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"{i}+1=", "completion": str(i + 1)}) for i in range(20)))
    at = SMALL.index("--steps")
    small = SMALL[:at] + SMALL[at + 2 :]
    assert run("--data", str(path), "--epochs", "1", small=small) == 0
    assert len(losses(tmp_path / "out")["qlora"]) == 9  # 18 examples, 2 in a batch


def test_text_folder_and_a_hugging_face_model(run, tmp_path, hf_folder):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.txt").write_text(f"the quick brown fox number {i} jumps over the lazy dog again\n" * 40)
    more = ("--model", hf_folder, "--data", str(folder), "--target-modules", "q_proj,v_proj")
    assert run(*more) == 0
    report = metrics(tmp_path / "out")
    assert report["size"]["adapted_layers"] == 2
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == hf_folder


@pytest.mark.parametrize(
    ("name", "is_folder"),
    [
        ("adapter", False),
        ("adapter/adapter_model.safetensors", True),
        ("metrics.json", True),
        ("loss.png", True),
        ("checkpoint.pt", True),
    ],
)
def test_what_cannot_be_written_is_found_before_the_training(run, tmp_path, monkeypatch, capsys, name, is_folder):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.mkdir() if is_folder else path.write_text("mine")
    monkeypatch.setattr(Trainer, "run", lambda *_: pytest.fail("training has begun"))
    assert run() == 2
    error = capsys.readouterr().err
    assert f"{path} cannot be written" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, "WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2"),
        ({"RANK": "0"}, "RANK=0"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1"),
    ],
)
def test_several_processes_are_refused(run, tmp_path, monkeypatch, capsys, variables, named):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run() == 2
    error = capsys.readouterr().err
    assert error.startswith(f"qlora-kernels finetune: finetune runs in one process, but {named} is set, as torchrun ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_one_process_of_torchrun_is_fine(run, monkeypatch):
    for name, value in {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert run("--steps", "1") == 0
