"""Fine-tuning runs that are interrupted, killed and resumed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from dataclasses import replace

import forked
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

from small.runs import SMALL, cache_fixture, hf_folder_fixture, losses, metrics, run_fixture  # noqa: F401 - fixtures

from qlora_kernels.cli.main import main
from qlora_kernels.finetune import run as run_module
from qlora_kernels.finetune.options import Options
from qlora_kernels.finetune.train import Trainer
from qlora_kernels.interop.transformers.quantize_folder import quantize_folder


def interrupt(monkeypatch, phase: str, step: int, signum: int = signal.SIGINT) -> None:
    """Sends a signal to this process in the middle of a training step."""
    original = Trainer._step

    def stepped(self, current, optimizer, parameters, number, total):
        if current.name == phase and number == step:
            os.kill(os.getpid(), signum)
        return original(self, current, optimizer, parameters, number, total)

    monkeypatch.setattr(Trainer, "_step", stepped)


# Dropout draws from torch's generator, so its state must come back too.
THOROUGH = ("--compare", "--lora-dropout", "0.1", "--grad-accum", "2")


@pytest.fixture(scope="session")
def whole(tmp_path_factory, cache):
    """The output of a run that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert main(["finetune", *SMALL, *THOROUGH, "--cache", cache, "--out", str(folder)]) == 0
    return folder


@pytest.mark.share(4)
@pytest.mark.parametrize("phase", ["qlora", "lora16", "full"])
def test_ctrl_c_saves_and_resume_goes_on_bit_for_bit(run, whole, tmp_path, monkeypatch, capsys, phase):
    with monkeypatch.context() as patch:
        interrupt(patch, phase, 2)
        assert run(*THOROUGH) == 130
    message = capsys.readouterr().err
    assert "SIGINT: stopped after step 3 of 6" in message
    assert message.rstrip().endswith("--resume")
    assert not (tmp_path / "out" / "metrics.json").exists()
    assert run(*THOROUGH, "--resume") == 0
    assert losses(tmp_path / "out") == losses(whole)
    for key, value in metrics(whole)["results"].items():
        assert metrics(tmp_path / "out")["results"][key]["loss"] == value["loss"]
    first, second = (load_file(o / "adapter" / "adapter_model.safetensors") for o in (tmp_path / "out", whole))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.share(5)
@pytest.mark.parametrize("name", ["paged_adamw_8bit", "paged_lion", "adamw"])
def test_resume_with_every_optimizer(run, tmp_path, monkeypatch, name):
    options = ("--optim", name, "--weight-decay", "0.1")
    assert run(*options, out="whole") == 0
    with monkeypatch.context() as patch:
        interrupt(patch, "qlora", 2)
        assert run(*options) == 130
    paged = () if name == "adamw" else ("--page-file", str(tmp_path))  # where states lie is no part of the run
    assert run(*options, *paged, "--resume") == 0
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    first, second = (load_file(tmp_path / o / "adapter" / "adapter_model.safetensors") for o in ("out", "whole"))
    assert all(torch.equal(first[key], second[key]) for key in second)


def test_a_checkpoint_without_an_optimizer_s_name_is_of_torch_s():
    options = Options().resolve()
    earlier = {key: value for key, value in options.decisive().items() if key != "optim"}
    assert options.differences(earlier) == ["--optim was adamw and is paged_adamw"]
    assert replace(options, optim="adamw").differences(earlier) == []
    # Nor did they have adapters of experts; and names are the same in any order.
    spaced = replace(options, optim="adamw", target_modules="v_proj, q_proj", target_parameters=" ")
    assert spaced.differences({**earlier, "target_modules": "q_proj,v_proj"}) == []
    experts = replace(options, optim="adamw", target_parameters="down_proj")
    assert experts.differences(earlier) == ["--target-parameters was none and is down_proj"]


@pytest.mark.parametrize("save_every", ["2", "0"])
def test_a_signal_after_the_last_step_loses_no_training(run, whole, tmp_path, monkeypatch, save_every):
    original = run_module.held_out_loss

    def evaluated(model, held_out, batch_size, limit, device, title, quiet):
        if "LoRA" in title:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(model, held_out, batch_size, limit, device, title, quiet)

    options = (*THOROUGH[1:], "--save-every", save_every)
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "held_out_loss", evaluated)
        assert run(*options) == 143
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", lambda *_: pytest.fail("trained again"))
        assert run(*options, "--resume") == 0
    assert losses(tmp_path / "out")["qlora"] == losses(whole)["qlora"]
    assert metrics(tmp_path / "out")["results"]["qlora"]["loss"] == metrics(whole)["results"]["qlora"]["loss"]


def test_a_signal_between_steps_saves_them(run, tmp_path, monkeypatch, capsys):
    from tqdm import tqdm

    class Bar(tqdm):
        def update(self, n=1):
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_bar", lambda *_: Bar(disable=True))
        assert run("--save-every", "0") == 130
    assert "SIGINT: stopped after step 1 of 6" in capsys.readouterr().err
    assert run("--resume", "--save-every", "0") == 0
    assert len(losses(tmp_path / "out")["qlora"]) == 6


@pytest.mark.slow
def test_sigterm_in_pretraining_saves_too(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, "pretrain", 3, signal.SIGTERM)
        assert run(cached=False) == 143
    assert run("--resume", cached=False) == 0
    assert run(out="whole") == 0  # on a base that was pretrained in one go
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")


@pytest.mark.share(2)
def test_resume_on_a_4_bit_folder(run, tmp_path, monkeypatch, hf_folder):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    quantize_folder(hf_folder, tmp_path / "4bit", progress=False)
    options = ("--model", str(tmp_path / "4bit"), "--data", str(text))
    assert run(*options, out="whole") == 0
    with monkeypatch.context() as patch:
        interrupt(patch, "qlora", 2)
        assert run(*options) == 130
    assert run(*options, "--resume") == 0
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")


def test_resume_refuses_another_run(run, tmp_path, monkeypatch, capsys, hf_folder):
    with monkeypatch.context() as patch:
        interrupt(patch, "qlora", 2)
        assert run() == 130
    before = (tmp_path / "out" / "checkpoint.pt").read_bytes()
    other = tmp_path / "other.txt"
    other.write_text("some other text that is long enough to train on\n" * 50)
    for more, expected in (
        (("--lr", "0.5"), "--lr was 0.004 and is 0.5"),
        (("--optim", "adamw"), "--optim was paged_adamw and is adamw"),
        (("--rank", "2"), "--rank was 4 and is 2"),
        (("--eval-tokens", "256"), "--eval-tokens was 512 and is 256"),
        (("--data", str(other)), "--data was None"),
        (("--model", hf_folder), "--model was tiny"),
    ):
        capsys.readouterr()
        assert run("--resume", *more) == 2
        message = capsys.readouterr().err
        assert expected in message
        assert message.count("\n") == 1
    assert (tmp_path / "out" / "checkpoint.pt").read_bytes() == before
    assert run("--resume") == 0


def test_resume_notices_that_the_base_has_changed(run, tmp_path, monkeypatch, capsys, hf_folder):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    model = tmp_path / "model"
    shutil.copytree(hf_folder, model)
    options = ("--model", str(model), "--data", str(text))
    with monkeypatch.context() as patch:
        interrupt(patch, "qlora", 2)
        assert run(*options) == 130
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    assert run(*options, "--resume") == 2
    assert "the base model differs" in capsys.readouterr().err


@pytest.mark.share(2)
def test_resume_without_or_with_a_damaged_checkpoint(run, tmp_path, monkeypatch, capsys):
    assert run("--resume") == 2
    assert "no run was interrupted" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        interrupt(patch, "qlora", 2)
        assert run() == 130
    path = tmp_path / "out" / "checkpoint.pt"
    whole = path.read_bytes()
    value = torch.load(path, weights_only=True)
    next(iter(value["tensors"].values())).view(torch.int32)[0, 0] ^= 1
    torch.save(value, path)
    flipped = path.read_bytes()
    torch.save({**value, "step": 1}, path)
    for damaged in (whole[:-1000], b"", b"\x80\x02.", b"PK\x03\x04", flipped, path.read_bytes()):
        path.write_bytes(damaged)
        capsys.readouterr()
        assert run("--resume") == 2
        error = capsys.readouterr().err
        assert "not a whole checkpoint" in error or "is damaged" in error
        assert error.count("\n") == 1
    path.write_bytes(whole)
    assert run("--resume") == 0


@pytest.mark.slow
def test_kill_9_leaves_the_last_checkpoint_whole(run, tmp_path, cache):
    more = ("--steps", "40", "--save-every", "1")
    assert run(*more, out="whole") == 0
    out = tmp_path / "out"
    checkpoint = out / "checkpoint.pt"
    command = ["finetune", *SMALL, "--cache", cache, *more, "--out", str(out)]
    chance, kills = random.Random(0), 0
    for attempt in range(3):
        resume = ["--resume"] if checkpoint.exists() else []
        before = checkpoint.stat().st_mtime_ns if resume else 0
        process = forked.start(main, [*command, *resume], errors=tmp_path / "log")
        deadline = time.time() + 60
        while process.is_alive() and time.time() < deadline:
            if checkpoint.exists() and checkpoint.stat().st_mtime_ns != before:
                time.sleep(chance.uniform(0, 0.2))  # somewhere in a step, or in the next write
                break
            time.sleep(0.005)
        process.kill()
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 0), f"attempt {attempt}: {(tmp_path / 'log').read_text()}"
        kills += process.exitcode != 0
    assert kills
    if checkpoint.exists():
        assert run("--resume", *more) == 0
    assert losses(out) == losses(tmp_path / "whole")
    assert not list(out.glob(".checkpoint.pt*")), "litter of a killed write"
