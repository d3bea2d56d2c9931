"""rank_study: which rank is enough. The LoRA paper's study, over the NF4 base of the tiny model.

Hu et al. 2021 (arXiv 2106.09685), section 7.2, table 6, train adapters of rank 1, 2, 4, 8 and 64 on Wq, on Wq and Wv,
and on all four weights of attention. Here they sit on q_proj, on q_proj and v_proj, and on all linear layers, those of
the MLP as well, as in QLoRA (Dettmers et al. 2023, arXiv 2305.14314, section 4). A case is one rank; its contenders are
the three sets of layers.

Trainings differ in nothing else. Every linear layer but the output embedding is 4-bit in all of them, with or without
an adapter. The base must stay the same, bit for bit: this is checked before and after each training, and each case
holds its digest. All trainings see the same batches in the same order, take as many steps and use one learning rate and
one alpha, as in the paper (section 4.1): scaling by alpha / r is meant to make one learning rate do for all ranks. It
does so roughly; no rank gets a learning rate of its own.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...console.signals import StopSignal
from ...finetune import tiny
from ...finetune.data import Data, Windows, load_data
from ...finetune.evaluate import held_out_loss
from ...finetune.options import Options
from ...finetune.options import Settings as TrainingSettings
from ...finetune.results.report import sizes
from ...finetune.source import Source, quantize
from ...finetune.train import Phase, Trainer
from ...models.adapters import disable_adapters
from ...storage import digest, formats
from ...storage.atomic_folder import sweep_folders
from ..case import QUANTILES, OtherProcesses, Settings
from ..points import Coordinates, Point

TITLE = "training adapters of the tiny model"
#: As --target-modules of finetune takes them, by the name of a contender.
TARGETS = {"q_proj": "q_proj", "q_proj and v_proj": "q_proj,v_proj", "all linear layers": "all-linear"}
#: What all trainings have in common; on two cores, one takes less than a minute.
TRAINING = Options(steps=150, save_every=0, quiet=True)
#: Keeps the pretrained base: each case runs in a process of its own.
CACHE = os.path.join("runs", "rank_study")
#: Steps whose training loss is averaged: one batch alone says little.
_LAST = 20
#: Settings of a training that differ between contenders and cases, or don't matter here.
_NOT_SHARED = {"rank", "target_modules", "epochs", "compare", "full_lr"}


class RankStudy:
    """One rank: a round trains the adapters on one of the sets of layers, from the same base.

    Args:
        settings: how; the number of steps is fixed, so that its seconds don't matter.
        point: its rank is the adapters'.
        announce: see :class:`qlora_kernels.bench.timing.measure.Measurement`.

    Raises:
        InputError: for a rank that does not fit the model.
        RuntimeError: from :meth:`round`, when the base is no longer the same.
    """

    def __init__(self, settings: Settings, point: Point, announce: Callable[[str], None] = lambda name: None) -> None:
        torch.set_num_threads(settings.threads)
        self.point = point
        self.rounds = len(TARGETS)
        shared = {"rank": Coordinates(point).rank, "alpha": settings.alpha, "device": settings.device, "cache": CACHE}
        self.training = replace(TRAINING, **shared).resolve()
        self.source = Source(self.training)
        for targets in TARGETS.values():
            Source(replace(self.training, target_modules=targets)).check()
        announce("")
        self.data: Data = load_data(
            None,
            self.source.encode,
            self.source.end,
            self.training.seq_len,
            self.training.held_out,
            self.training.seed,
        )
        self._others = OtherProcesses()
        self.base = self._measure_base()
        self.trained: dict[str, dict[str, Any]] = {}

    def round(self) -> float:
        """Trains one contender; returns the mean time of its steps, in seconds."""
        name = list(TARGETS)[len(self.trained)]
        training = replace(self.training, target_modules=TARGETS[name])
        model = self.source.load()
        report = quantize(model, training)
        self._check_base(model, name)
        self._others.resume()
        trained = _train(_phase(name, model, self.data, training), training)
        self._others.pause()
        loss = self._loss(model)
        self._check_base(model, name)
        self.trained[name] = {
            "targets": training.target_modules,
            "adapted_layers": len(report.adapted),
            "trainable": report.trainable_parameters,
            "loss": loss,
            "train_loss": statistics.fmean(trained.losses[-_LAST:]),
            "steps": trained.steps,
            "seconds": trained.seconds,
            "tokens_per_second": trained.tokens_per_second,
        }
        return trained.seconds / trained.steps

    def result(self) -> dict[str, Any]:
        """As :meth:`qlora_kernels.bench.timing.measure.Measurement.result` gives it, with losses in nats per byte.

        ``base`` is about the model before training, ``training`` the settings that decide the numbers. A contender's
        ``train_loss`` is the mean of the last 20 steps, and ``seconds`` the time of training alone.
        """
        decisive = self.training.decisive()
        return {
            **self.point.as_dict(),
            "title": TITLE,
            "flops": None,
            "rounds": len(self.trained),
            "other_processes": self._others.share,
            "training": {
                **{name: value for name, value in decisive.items() if name not in _NOT_SHARED},
                "activations": str(self.source.dtype),
                "data": self.data.summary,
            },
            "base": self.base,
            "contenders": [_contender(name, figures) for name, figures in self.trained.items()],
        }

    def _measure_base(self) -> dict[str, Any]:
        """Pretrains the base unless it is there, and evaluates it in 16 bits and in NF4."""
        folder = self.source.folder
        sweep_folders(os.path.dirname(folder), "tiny-base-[0-9a-f]+")
        if not os.path.isdir(folder):
            with tempfile.TemporaryDirectory() as out:
                tiny.pretrain(self.training, _trainer(self.training, out), folder, lambda text: None)
        model = self.source.load()
        dense_loss = self._loss(model)
        report = quantize(model, self.training)
        size = sizes(model, report)
        pretraining = formats.load_json(os.path.join(folder, "pretraining.json"))
        with disable_adapters(model):
            loss = self._loss(model)
        return {
            "digest": base_digest(model),
            "loss": loss,
            "loss_16bit": dense_loss,
            "quantized_layers": report.quantized,
            "left_alone": report.left_alone,
            "parameters": size["quantized_weights"] + size["other_parameters"],
            "bits_per_weight": size["bits_per_weight"],
            "pretrain_steps": pretraining["steps"],
            "pretrain_seconds": pretraining["seconds"],
        }

    def _loss(self, model: nn.Module) -> float:
        t = self.training
        return held_out_loss(model, self.data.held_out, t.batch_size, t.eval_tokens, t.device, TITLE, t.quiet)

    def _check_base(self, model: nn.Module, name: str) -> None:
        """The base's loss, measured once, is a contender's loss before training because of this."""
        if base_digest(model) != self.base["digest"]:
            raise RuntimeError(f"{name}: the base is not that of the other trainings; it should never change")


def _phase(name: str, model: nn.Module, data: Data, training: TrainingSettings) -> Phase:
    # The standard library's sources, which are the data, are one long text.
    assert isinstance(data.train, Windows)
    assert training.steps is not None
    return Phase(
        name="qlora",
        title=name,
        model=model,
        data=Windows(data.train.tokens, training.seq_len, training.seed),
        lr=training.lr,
        steps=training.steps,
        batch_size=training.batch_size,
        grad_accum=training.grad_accum,
        warmup=training.warmup,
    )


def _trainer(training: TrainingSettings, out: str) -> Trainer:
    # Signals are the first process's business: this one is killed.
    return Trainer(replace(training, out=out), {}, StopSignal(), {})


def _train(phase: Phase, training: TrainingSettings) -> Any:
    """A training; the checkpoint that it leaves is not kept."""
    with tempfile.TemporaryDirectory() as out:
        return _trainer(training, out).run(phase, lambda text: None)


def _contender(name: str, figures: dict[str, Any]) -> dict[str, Any]:
    """A training is one sample: every quantile of a step's time is its mean."""
    step_ms = figures["seconds"] / figures["steps"] * 1e3
    return {
        "name": name,
        "samples": 1,
        "median_ms": step_ms,
        **{f"q{q}_ms": step_ms for q in QUANTILES if q != 50},
        "error": None,
        "bytes": None,
        "copies": 1,
        "peak_allocated": None,
        **figures,
    }


def base_digest(model: nn.Module) -> str:
    """SHA-256 of every tensor of a model but its adapters', byte for byte, with their names."""
    state = model.state_dict()
    return digest.digest({k: state[k] for k in sorted(state) if ".lora_A." not in k and ".lora_B." not in k})
