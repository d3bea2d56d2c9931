"""The training loop: learning rates, optimizers, accumulation, and when it ends early."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from small.runs import SMALL, base_in, cache_fixture, losses, metrics, run_fixture  # noqa: F401 - fixtures

from qlora_kernels import PagedAdamW, PagedLion
from qlora_kernels.finetune.options import OPTIMIZERS, Options
from qlora_kernels.finetune.train import learning_rate, make_optimizer
from qlora_kernels.optim.engines import host as host_engine


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0.1, 10])
def test_learning_rate(schedule, warmup):
    rates = [learning_rate(step, 100, 1.0, warmup, schedule) for step in range(100)]
    assert all(a < b for a, b in itertools.pairwise(rates[:10]))
    assert max(rates) == pytest.approx(1.0)
    assert all(rate > 0 for rate in rates)
    end = 1.0 if schedule == "constant" else 0.1
    assert rates[-1] == pytest.approx(end, abs=0.02)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_that_was_asked_for(name, tmp_path):
    limits = {} if name == "adamw" else {"page_file": str(tmp_path), "page_budget": 1 << 20}
    options = Options(optim=name, weight_decay=0.25, max_grad_norm=0.5, **limits).resolve()
    made = make_optimizer([torch.nn.Parameter(torch.ones(300))], 0.125, options)
    expected = {"adamw": torch.optim.AdamW, "paged_lion": PagedLion}.get(name, PagedAdamW)
    assert type(made) is expected
    [group] = made.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.125, 0.25, (0.9, 0.99))
    if name != "adamw":
        assert dataclasses.asdict(made._options) == {
            **{"state_bits": 8 if name.endswith("8bit") else 32, "max_grad_norm": 0.5, **limits},
            **{"master_weights": False, "skip_nonfinite": False},
        }
        for unlimited in (0.0, math.inf):
            settings = replace(options, max_grad_norm=unlimited)
            assert make_optimizer([torch.nn.Parameter(torch.ones(3))], 1.0, settings)._options.max_grad_norm is None


@pytest.mark.slow
def test_paged_adamw_trains_as_torch_does(run, tmp_path):
    """Pretraining, too, and with every gradient clipped."""
    more = (
        "--compare",
        "--max-grad-norm",
        "0.05",
        "--weight-decay",
        "0.1",
        "--compute",
        "float32",
        "--save-every",
        "0",
    )
    assert run(*more, cached=False) == 0
    assert run(*more, "--optim", "adamw", out="torch", cached=False) == 0
    assert run(*more, "--max-grad-norm", "0", out="free", cached=False) == 0
    ours, expected, free = (losses(tmp_path / out) for out in ("out", "torch", "free"))
    for key in ("qlora", "lora16", "full"):
        assert ours[key] == pytest.approx(expected[key], rel=1e-4)
        assert ours[key] != pytest.approx(free[key], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paged_adamw_8bit", "paged_lion"])
def test_the_other_optimizers_learn(run, tmp_path, name):
    """On whatever text this Python's library has: the adapters gain 0.02 to 0.03 in 160 steps."""
    small = [*SMALL, "--pretrain-steps", "40", "--steps", "160", "--save-every", "0", "--compare"]
    assert run("--optim", name, small=small, cached=False) == 0
    pretraining = json.loads((base_in(tmp_path / "out") / "pretraining.json").read_text())["losses"]
    assert sum(pretraining[-4:]) < 0.95 * sum(pretraining[:4])
    results = metrics(tmp_path / "out")["results"]
    before = results["base16"]["loss"]
    for key, least in (("qlora", 0.01), ("lora16", 0.01), ("full", 0.3)):
        assert before - results[key]["loss"] > least, key
    assert metrics(tmp_path / "out")["options"]["optim"] == name


def test_states_in_a_file_give_the_same_numbers(run, tmp_path, monkeypatch):
    kinds = []
    original = host_engine.HostArena

    def arena(*arguments):
        made = original(*arguments)
        kinds.append(made.kind)
        return made

    monkeypatch.setattr(host_engine, "HostArena", arena)
    folder = tmp_path / "states"
    folder.mkdir()
    assert run() == 0
    assert run("--page-file", str(folder), "--page-budget", str(1 << 30), out="paged") == 0
    assert kinds[0] == "host memory"
    assert kinds[-1] == "a memory-mapped file"
    assert losses(tmp_path / "out") == losses(tmp_path / "paged")
    assert not os.listdir(folder), "the file has a name"


def test_no_room_for_the_states_is_one_sentence(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert run("--page-file", str(tmp_path)) == 2
    error = capsys.readouterr().err
    assert f"in a file in {tmp_path}, which cannot be allocated" in error
    assert error.count("\n") == 1


def test_accumulation_and_checkpointing_do_not_change_the_losses(run, tmp_path):
    assert run("--batch-size", "4", "--compute", "float32", out="a") == 0
    assert run("--batch-size", "2", "--grad-accum", "2", "--compute", "float32", out="b") == 0
    assert run("--batch-size", "4", "--gradient-checkpointing", "--compute", "float32", out="c") == 0
    expected = losses(tmp_path / "a")["qlora"]
    assert losses(tmp_path / "b")["qlora"] == pytest.approx(expected, rel=1e-4)
    assert losses(tmp_path / "c")["qlora"] == pytest.approx(expected, rel=1e-4)


def test_a_loss_that_is_not_finite_ends_the_run(run, capsys):
    assert run("--lr", "1e30", "--max-grad-norm", "0") == 2
    assert "the loss became" in capsys.readouterr().err
