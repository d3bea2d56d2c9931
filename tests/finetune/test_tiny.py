"""The tiny base: pretrained once, shared by runs, in the type that the machine is fast in."""

from __future__ import annotations

import json
import os
import shutil

import forked
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

from small.runs import SMALL, base_in, cache_fixture, losses, metrics, run_fixture  # noqa: F401 - fixtures

from qlora_kernels.cli.main import main
from qlora_kernels.finetune import options, tiny
from qlora_kernels.finetune.train import Trainer


def test_pretraining_happens_once(run, tmp_path, monkeypatch):
    assert run("--pretrain-steps", "5", cached=False) == 0
    first = metrics(tmp_path / "out")
    monkeypatch.setattr(tiny, "pretrain", lambda *_: pytest.fail("pretrained again"))
    assert run("--pretrain-steps", "5", cached=False) == 0
    assert losses(tmp_path / "out")["qlora"] == first["results"]["qlora"]["losses"]


@pytest.mark.slow
def test_the_first_of_two_runs_that_share_a_cache_writes_the_base(run, tmp_path, monkeypatch):
    assert run("--pretrain-steps", "3", "--cache", str(tmp_path / "a")) == 0
    original = Trainer.run

    def trained(self, phase, note):
        result = original(self, phase, note)
        if phase.name == "pretrain":  # meanwhile the other run ends
            base = base_in(tmp_path / "a")
            other = shutil.copytree(base, tmp_path / "b" / base.name)
            tensors = load_file(other / "model.safetensors")
            tensors["lm_head.weight"] *= 1.5
            save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
        return result

    monkeypatch.setattr(Trainer, "run", trained)
    assert run("--pretrain-steps", "3", "--cache", str(tmp_path / "b"), out="second") == 0
    assert len(os.listdir(tmp_path / "b")) == 1, "litter"
    # It continued from the other run's base, which is still there: its own would have another loss.
    first, second = (metrics(tmp_path / out)["results"]["base16"]["loss"] for out in ("out", "second"))
    assert first != second
    assert run("--pretrain-steps", "3", "--cache", str(tmp_path / "b"), out="third") == 0
    assert metrics(tmp_path / "third")["results"]["base16"]["loss"] == second


@pytest.mark.slow
def test_two_runs_at_the_same_time_with_one_cache(tmp_path):
    command = ["finetune", *SMALL, "--cache", str(tmp_path / "cache"), "--out"]
    logs = [tmp_path / "a.log", tmp_path / "b.log"]
    runs = [forked.start(main, [*command, str(tmp_path / log.stem)], errors=log) for log in logs]
    for process in runs:
        process.join()
    errors = [log.read_text() for log in logs]
    assert [process.exitcode for process in runs] == [0, 0], errors
    assert errors == ["", ""]  # --quiet
    assert base_in(tmp_path / "cache")
    assert len(os.listdir(tmp_path / "cache")) == 1, "litter"
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_a_slow_machine_does_fewer_pretraining_steps(run, tmp_path):
    # A limit that no machine meets: the least number of steps remains.
    assert run("--pretrain-steps", "100", "--pretrain-seconds", "1e-6", "--steps", "1", cached=False) == 0
    assert json.loads((base_in(tmp_path / "out") / "pretraining.json").read_text())["steps"] == 24


@pytest.mark.parametrize("has_instructions", [False, True])
def test_pretraining_is_in_float32_without_bfloat16_instructions(run, tmp_path, monkeypatch, has_instructions):
    """Whatever the run's own dtype; and a base of one dtype is never used for the other."""
    reasons = {True: None, False: "it is 1999"}
    monkeypatch.setattr(options, "slow_bfloat16", lambda device: reasons[has_instructions])
    types = {}
    original = Trainer.run

    def trained(self, phase, note):
        types[phase.name] = phase.autocast
        return original(self, phase, note)

    monkeypatch.setattr(Trainer, "run", trained)
    more = ("--compute", "bfloat16", "--pretrain-steps", "2", "--steps", "1")
    assert run(*more, cached=False) == 0
    assert types["pretrain"] == (torch.bfloat16 if has_instructions else None)
    assert metrics(tmp_path / "out")["activations"] == "torch.bfloat16"
    monkeypatch.setattr(options, "slow_bfloat16", lambda device: reasons[not has_instructions])
    types.clear()
    assert run(*more, cached=False) == 0
    assert "pretrain" in types
    assert len(list((tmp_path / "out").glob("tiny-base-*"))) == 2
