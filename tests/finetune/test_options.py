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
    assert (settings.rank, settings.seq_len, settings.steps, settings.train_seconds) == (3, 64, 200, 100.0)
    assert settings.out == os.path.join("runs", "tiny")
    assert Options(**asdict(settings)).resolve() == settings == settings.resolve()
    for value in (given, settings):
        with pytest.raises(FrozenInstanceError):
            value.rank = 5


def test_epochs_beyond_counting_are_refused():
    with pytest.raises(InputError, match=r"--epochs should be fewer, found 1e\+308"):
        Options(epochs=1e308).resolve().for_data(20)


def test_epochs_become_steps_when_the_data_is_known():
    settings = Options(epochs=1.5, batch_size=4, grad_accum=2).resolve()
    assert settings.steps is None
    assert settings.for_data(100).steps == 19  # 150 sequences, 8 in a step
    assert settings.for_data(1).steps == 1
    assert Options(steps=7).resolve().for_data(100).steps == 7


@pytest.mark.parametrize("why", [None, "it is 1999"])
def test_activations_are_bfloat16_where_that_is_fast(monkeypatch, why):
    monkeypatch.setattr(options, "slow_bfloat16", lambda device: why)
    chosen = torch.float32 if why else torch.bfloat16
    settings = Options().resolve()
    assert settings.activation_dtype == settings.pretraining_dtype == chosen
    assert Options(compute="float32").resolve().pretraining_dtype == torch.float32
    forced = Options(compute="bfloat16").resolve()
    assert forced.activation_dtype == torch.bfloat16
    assert forced.pretraining_dtype == chosen


def test_a_sentence_says_which_type_was_chosen_and_why(monkeypatch):
    def said(**given) -> str:
        return Options(**given).resolve().about_dtype()

    monkeypatch.setattr(options, "slow_bfloat16", lambda device: None)
    assert said().startswith("computing in bfloat16, which is fast here; --compute float32 ")
    assert said(compute="bfloat16") == "computing in bfloat16, as --compute says"
    assert said(compute="float32") == "computing in float32, as --compute says"
    monkeypatch.setattr(options, "slow_bfloat16", lambda device: "it is 1999")
    assert said().startswith("computing in float32, ")
    assert said().endswith(": it is 1999; --compute bfloat16 overrides that")
    assert "float32 is faster here: it is 1999; the tiny model is pretrained in float32" in said(compute="bfloat16")
    assert said(compute="bfloat16", model="some/folder").endswith("it is 1999")
    assert said(compute="float32") == "computing in float32, as --compute says"


def test_bases_of_two_types_have_two_folders(monkeypatch):
    folders = set()
    for why in ("it is 1999", None):
        monkeypatch.setattr(options, "slow_bfloat16", lambda device: why)  # noqa: B023
        folders.add(tiny.cache_folder(Options().resolve()))
    assert len(folders) == 2
