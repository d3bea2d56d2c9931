"""Options of a run, and the settings that they resolve to."""

from __future__ import annotations

import os
from dataclasses import FrozenInstanceError, asdict

import pytest
import torch

pytest.importorskip("transformers")

from qlora_kernels import finetune
from qlora_kernels.errors import InputError
from qlora_kernels.finetune import options, tiny
from qlora_kernels.finetune.options import Options


def test_lion_takes_a_lower_learning_rate_unless_one_is_given():
    for model, factor in (("tiny", 3), ("some/folder", 10)):
        adamw, lion = (Options(model=model, optim=name).resolve() for name in ("paged_adamw", "paged_lion"))
        assert (lion.lr, lion.full_lr) == pytest.approx((adamw.lr / factor, adamw.full_lr / factor))
        given = Options(model=model, optim="paged_lion", lr=0.5, full_lr=0.25).resolve()
        assert (given.lr, given.full_lr) == (0.5, 0.25)


def test_options_refuse_nonsense():
    for field, value in (
        ("rank", 0),
        ("steps", 0),
        ("lr", -1.0),
        ("optim", "sgd"),
        ("held_out", 1.0),
        ("tiny_hidden", 65),
    ):
        with pytest.raises(InputError, match=f"--{field.replace('_', '-')}"):
            finetune.Options(**{field: value}).resolve()


def test_resolving_fills_every_default_and_changes_nothing_given():
    given = Options(rank=3, seq_len=64)
    settings = given.resolve()
    assert given == Options(rank=3, seq_len=64)
    assert (settings.rank, settings.seq_len, settings.steps, settings.train_seconds) == (3, 64, 300, 100.0)
    assert settings.out == os.path.join("runs", "tiny")
    assert Options(**asdict(settings)).resolve() == settings == settings.resolve()
    for value in (given, settings):
        with pytest.raises(FrozenInstanceError):
            value.rank = 5


def test_epochs_become_steps_when_the_data_is_known():
    settings = Options(epochs=1.5, batch_size=4, grad_accum=2).resolve()
    assert settings.steps is None
    assert settings.for_data(100).steps == 19  # 150 sequences, 8 in a step
    assert settings.for_data(1).steps == 1
    assert Options(steps=7).resolve().for_data(100).steps == 7


@pytest.mark.parametrize(
    ("machine", "isas", "expected"),
    [
        ("x86_64", ["avx512_bf16", "avx512", "avx2", "portable"], True),
        ("x86_64", ["amx", "avx512_bf16", "avx512", "avx2", "portable"], True),
        ("x86_64", ["avx512", "avx2", "portable"], False),
        ("AMD64", ["avx2", "portable"], False),
        ("x86_64", None, False),
    ],
)
def test_activations_are_bfloat16_where_there_are_instructions(monkeypatch, machine, isas, expected):
    monkeypatch.setattr(options.platform, "machine", lambda: machine)
    monkeypatch.setattr(options, "build_info", lambda: {} if isas is None else {"isas_available": isas})
    fast, slow = torch.bfloat16, torch.float32
    settings = Options().resolve()
    assert settings.activation_dtype == settings.pretraining_dtype == (fast if expected else slow)
    assert Options(compute="float32").resolve().pretraining_dtype == slow
    forced = Options(compute="bfloat16").resolve()
    assert forced.activation_dtype == fast
    assert forced.pretraining_dtype == (fast if expected else slow)
    assert Options(device="cuda").resolve().pretraining_dtype == fast


def test_bases_of_two_types_have_two_folders(monkeypatch):
    folders = set()
    for has_instructions in (False, True):
        monkeypatch.setattr(options, "multiplies_bfloat16", lambda device: has_instructions)  # noqa: B023
        folders.add(tiny.cache_folder(Options().resolve()))
    assert len(folders) == 2
