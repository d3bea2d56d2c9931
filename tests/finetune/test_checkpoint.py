"""Checkpoints that no run has saved, with a digest that fits."""

from __future__ import annotations

import copy
import re

import pytest
import torch

pytest.importorskip("transformers")

from small.runs import cache_fixture, run_fixture  # noqa: F401 - fixtures
from torch import nn

from qlora_kernels.errors import InputError
from qlora_kernels.finetune import checkpoint as ckpt
from qlora_kernels.finetune.train import Trainer
from qlora_kernels.optim import PagedAdamW

BASE = {"loss": 2.5, "seconds": 1.5, "peak": 100}
NF4 = {**BASE, "sample": "text", "quantize_seconds": 0.5}
TRAINED = {
    **{**BASE, "peak": None, "losses": [3.0, 2.0], "steps": 2, "trainable": 10, "tokens_per_second": 5.0},
    **{"memory_method": "unknown"},
}
QLORA = {**TRAINED, "sample": "text"}


def checkpoint(**changed) -> ckpt.Checkpoint:
    optimizer = PagedAdamW([nn.Parameter(torch.ones(3))])
    fields = {
        "options": {"lr": 0.5},
        "identity": {"data": "0"},
        "phase": "lora16",
        "step": 2,
        "total": 4,
        "losses": [3.0, 2.0],
        "tensors": {"weight": torch.ones(3)},
        "optimizer": optimizer.state_dict(),
        "rng": ckpt.rng_state("cpu"),
        "seconds": 1.0,
        "results": {"base16": BASE, "nf4": NF4, "qlora": QLORA},
    }
    return ckpt.Checkpoint(**{**fields, **changed})


def test_what_a_run_saves_is_read(tmp_path):
    for results in ({}, {"base16": BASE}, {"nf4": {**NF4, "loss": float("nan")}, "qlora": QLORA, "full": TRAINED}):
        ckpt.save(checkpoint(results=results), str(tmp_path))
        assert ckpt.load(str(tmp_path)).results.keys() == results.keys()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", 10**30),
        ("step", 1),
        ("step", True),
        ("step", "two"),
        ("total", 1),
        ("total", 10**30),
        ("losses", [1.0, float("nan")]),
        ("losses", [1.0, 10**400]),
        ("losses", "ab"),
        ("seconds", float("nan")),
        ("seconds", float("inf")),
        ("seconds", -1.0),
        ("seconds", 10**400),
        ("tensors", {"weight": torch.ones(3, dtype=torch.complex64)}),
        ("tensors", {"weight": torch.ones(3, dtype=torch.int32)}),
        ("tensors", {"weight": torch.tensor([1.0, float("nan")])}),
        ("tensors", {"weight": torch.tensor([1.0, float("inf")], dtype=torch.bfloat16)}),
        ("results", {"nf4": 5}),
        ("results", {"nf4": {}}),
        ("results", {1: NF4}),
        ("results", {"qlora": QLORA}),
        ("results", {"nf4": {**NF4, "loss": "2"}}),
        ("results", {"nf4": {**NF4, "loss": 10**400}}),
        ("results", {"nf4": {**NF4, "seconds": float("nan")}}),
        ("results", {"nf4": {**NF4, "peak": "much"}}),
        ("results", {"nf4": {**NF4, "sample": 5}}),
        ("results", {"nf4": NF4, "qlora": {**QLORA, "steps": 10**18}}),
        ("results", {"nf4": NF4, "qlora": {**QLORA, "losses": [None, 1.0]}}),
        ("results", {"nf4": NF4, "qlora": {**QLORA, "memory_method": None}}),
        ("results", {"full": {**TRAINED, "trainable": -1}}),
    ],
)
def test_a_field_that_no_run_saves_is_refused(tmp_path, field, value):
    ckpt.save(checkpoint(**{field: copy.deepcopy(value)}), str(tmp_path))
    expected = rf"{re.escape(ckpt.path_in(str(tmp_path)))} is not a checkpoint of this command: \w+ is not what a run"
    with pytest.raises(InputError, match=expected):
        ckpt.load(str(tmp_path))


def stopped_after_two_steps(run, monkeypatch, *options: str) -> None:
    step = Trainer._step

    def interrupted(self, phase, optimizer, parameters, number, total):
        if phase.name == "qlora" and number == 2:
            raise KeyboardInterrupt
        return step(self, phase, optimizer, parameters, number, total)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupted)
        assert run(*options, "--save-every", "1") == 130


def test_more_steps_than_asked_for_are_refused(run, tmp_path, monkeypatch, capsys):
    """The run would train without end."""
    stopped_after_two_steps(run, monkeypatch)
    out = str(tmp_path / "out")
    saved = ckpt.load(out)
    saved.total = 10**18
    ckpt.save(saved, out)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", lambda *_: pytest.fail("trained"))
        assert run("--resume") == 2
    assert f"checkpoint.pt wants {10**18} steps of NF4 + LoRA, and there should be 6" in capsys.readouterr().err
    saved.total = 6
    ckpt.save(saved, out)
    assert run("--resume") == 0


@pytest.mark.parametrize("optimizer", [{}, {"state": 5, "param_groups": [{"params": []}]}, {"param_groups": 5}])
def test_a_state_that_torch_cannot_load_is_refused(run, tmp_path, monkeypatch, capsys, optimizer):
    stopped_after_two_steps(run, monkeypatch, "--optim", "adamw")
    out = str(tmp_path / "out")
    saved = ckpt.load(out)
    saved.optimizer = optimizer
    ckpt.save(saved, out)
    capsys.readouterr()
    assert run("--optim", "adamw", "--resume") == 2
    assert capsys.readouterr().err.count("\n") == 1
