"""Which rank is enough: the LoRA paper's study, over the NF4 base of the tiny model.

python -m bench.studies.ranks --out FILE.json

Hu et al. 2021 (arXiv 2106.09685), section 7.2, table 6, train adapters of rank 1, 2, 4, 8 and 64 on Wq, on Wq and Wv,
and on all four weights of attention. Here they sit on q_proj, on q_proj and v_proj, and on all linear layers, those of
the MLP as well, as in QLoRA (Dettmers et al. 2023, arXiv 2305.14314, section 4). A cell is one rank on one of these.

Cells differ in nothing else. Every linear layer but the output embedding is 4-bit in all of them, with an adapter or
without; that all have the same base, bit for bit, is checked before and after each training. They see the same batches
in the same order, for as many steps, with one learning rate. alpha is one for all ranks, as in the paper (section 4.1):
the low-rank term is scaled by alpha / r, which is there so that one learning rate does for all ranks. It does roughly:
what a rank reaches is what it reaches by this rule, without a search for its own rate. --rslora scales by
alpha / sqrt(r) instead (Kalajdzievski 2023, arXiv 2312.03732).
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import json
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from bench.studies.rank_options import TARGETS, StudyOptions, from_arguments, make_parser
from bench.studies.rank_report import label, markdown, plot, with_shares
from qlora_kernels.bench.timing.machine import describe_commit, describe_machine, describe_versions
from qlora_kernels.console.signals import Interrupted, StopSignal
from qlora_kernels.errors import InputError, missing_extra, sentence
from qlora_kernels.finetune import tiny
from qlora_kernels.finetune.data import Data, Windows, load_data
from qlora_kernels.finetune.evaluate import held_out_loss
from qlora_kernels.finetune.options import Settings
from qlora_kernels.finetune.results.report import sizes
from qlora_kernels.finetune.source import Source, quantize
from qlora_kernels.finetune.train import Phase, Trainer
from qlora_kernels.models.adapters import disable_adapters
from qlora_kernels.storage import digest, formats
from qlora_kernels.storage.atomic_folder import new_folder, sweep_folders

__all__ = ["StudyOptions", "main", "markdown", "plot", "run"]

STUDY, FORMAT = "rank_study", 1
_LAST = 20  # steps whose training loss is averaged: one batch alone says little
# What decides a run's numbers, and is not the same for all cells, or is of no account here.
_NOT_SHARED = {"rank", "target_modules", "seed", "epochs", "compare", "full_lr"}
_CELL = {
    "targets", "rank", "seed", "adapted_layers", "trainable", "loss_before", "loss", "share", "train_loss", "steps",
    "seconds", "tokens_per_second",
}  # fmt: skip


def run(options: StudyOptions) -> dict[str, Any]:
    """Carries a study through, or what is missing of it; ``options.out`` is written whole after each cell.

    Returns:
        The result, as the file holds it. Losses are in nats per byte. ``train_loss`` is the mean of the last 20 steps,
        ``seconds`` the time of training alone, ``share`` the part that a cell has of the largest reduction of the
        held-out loss that a cell with its seed reaches (None where no cell reduces it).

    Raises:
        InputError: for options that cannot be used, or a file that holds another study or none.
        Interrupted: by a signal; the cells that were done are in the file.
    """
    for package in ("transformers", "safetensors", "tqdm", "matplotlib"):  # rather now than after the pretraining
        try:
            importlib.import_module(package)
        except ImportError:
            raise missing_extra(package, "finetune") from None
    options.check()
    # Trainer leaves a checkpoint; a cell takes less than a minute and is not resumed within.
    with StopSignal() as stop, tempfile.TemporaryDirectory() as folder:
        study = _Run(options, stop, folder)
        try:
            return study.go()
        except Interrupted as interrupted:
            raise Interrupted(interrupted.signum, study.left()) from None


class _Run:
    """A study in progress."""

    def __init__(self, options: StudyOptions, stop: StopSignal, folder: str) -> None:
        self.options, self.stop = options, stop
        self.kept = 0  # cells in the file
        own = {"out": folder, "cache": options.cache, "seed": 0, "save_every": 0}
        self.shared = replace(options.shared, **own).resolve()
        self.source = Source(self.shared)
        for targets in TARGETS:
            Source(replace(self.shared, rank=max(options.ranks), target_modules=targets)).check()
        self.data: Data = load_data(
            None, self.source.encode, self.source.end, self.shared.seq_len, self.shared.held_out, self.shared.seed
        )

    def note(self, text: str) -> None:
        if not self.shared.quiet:
            from tqdm import tqdm

            tqdm.write(text)

    def go(self) -> dict[str, Any]:
        self.result = self._begin()
        earlier = _earlier(self.options.out)
        if earlier is not None and not self.options.restart:
            _check_same(earlier, self.result, self.options.out)
            self.result, self.kept = earlier, len(earlier["cells"])
        if self.result["complete"]:
            return self.result
        with _writable(os.path.dirname(self.options.out) or "."), _writable(self.options.cache):
            self._base()
            cells = self.options.cells()
            done = {(cell["seed"], cell["targets"], cell["rank"]) for cell in self.result["cells"]}
            for number, cell in enumerate(cells, 1):
                if cell not in done:
                    self._add(self._cell(*cell, f"{number} of {len(cells)}"))
        return self.result

    def left(self) -> str:
        """What an interrupted study leaves, and how to go on."""
        if not self.kept:
            return "no cell was done"
        again = "the same command without --restart" if self.options.restart else "the same command"
        return f"{self.options.out} keeps {self.kept} of {len(self.options.cells())} cells, and {again} goes on"

    def _begin(self) -> dict[str, Any]:
        """A result without cells."""
        decisive = self.shared.decisive()
        return {
            "format": FORMAT,
            "study": STUDY,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            **describe_commit(),
            "machine": describe_machine(),
            "versions": describe_versions(),
            "settings": {
                **{name: value for name, value in decisive.items() if name not in _NOT_SHARED},
                "ranks": list(self.options.ranks),
                "targets": list(TARGETS),
                "seeds": self.options.seeds,
                "activations": str(self.source.dtype),
                "threads": torch.get_num_threads(),
                "data": self.data.summary,
            },
            "base": {},
            "cells": [],
            "complete": False,
        }

    def _base(self) -> None:
        """Pretrains the base unless it is there, and measures it unless the file has that.

        Raises:
            InputError: when it is not the base of the cells in the file.
        """
        folder, base = self.source.folder, self.result["base"]
        sweep_folders(os.path.dirname(folder), "tiny-base-[0-9a-f]+")
        if os.path.isdir(folder):
            self.note(f"the tiny base is in {folder}")
        else:
            tiny.pretrain(self.shared, self._trainer(self.shared), folder, self.note)
        model = self.source.load()
        dense_loss = None if base else self._loss(model, "the 16-bit base")
        report = quantize(model, replace(self.shared, rank=self.options.ranks[0], target_modules=TARGETS[0]))
        digest = base_digest(model)
        if base and base["digest"] != digest:
            raise InputError(
                f"--out {self.options.out} holds cells of another base than the one in {folder}; name the --cache "
                "where theirs is, or start over with --restart"
            )
        if not base:
            size = sizes(model, report)
            pretraining = formats.load_json(os.path.join(folder, "pretraining.json"))
            with disable_adapters(model):
                loss = self._loss(model, "the NF4 base")
            self.result["base"] = {
                "digest": digest,
                "loss": loss,
                "loss_16bit": dense_loss,
                "quantized_layers": report.quantized,
                "left_alone": report.left_alone,
                "parameters": size["quantized_weights"] + size["other_parameters"],
                "bits_per_weight": size["bits_per_weight"],
                "pretrain_steps": pretraining["steps"],
                "pretrain_seconds": pretraining["seconds"],
            }
            self.note(f"held-out loss {loss:.4f} nats per byte with the NF4 base, {dense_loss:.4f} with its 16 bits")
            self._save()

    def _cell(self, seed: int, targets: str, rank: int, number: str) -> dict[str, Any]:
        """Trains and evaluates one cell."""
        options = replace(self.shared, rank=rank, target_modules=targets, seed=seed)
        train, steps = self.data.train, options.steps
        # StudyOptions.check() asks for steps; the standard library's sources, which are the data, are one long text.
        assert isinstance(train, Windows)
        assert steps is not None
        title = f"{label(targets)}, r = {rank}" + (f", seed {seed}" if self.options.seeds > 1 else "")
        model = self.source.load()
        report = quantize(model, options)
        self._check_base(model, title)
        phase = Phase(
            name="qlora",
            title=f"{number}: {title}",
            model=model,
            data=Windows(train.tokens, options.seq_len, seed),
            lr=options.lr,
            steps=steps,
            batch_size=options.batch_size,
            grad_accum=options.grad_accum,
            warmup=options.warmup,
        )
        trained = self._trainer(options).run(phase, self.note)
        loss = self._loss(model, title)
        self._check_base(model, title)
        speed = f"{trained.seconds:.0f} s, {trained.tokens_per_second:,.0f} tokens/s"
        self.note(f"{number}: {title}: held-out loss {loss:.4f}, {speed}")
        return {
            "targets": targets,
            "rank": rank,
            "seed": seed,
            "adapted_layers": len(report.adapted),
            "trainable": report.trainable_parameters,
            "loss_before": self.result["base"]["loss"],
            "loss": loss,
            "train_loss": statistics.fmean(trained.losses[-_LAST:]),
            "steps": trained.steps,
            "seconds": trained.seconds,
            "tokens_per_second": trained.tokens_per_second,
        }

    def _trainer(self, options: Settings) -> Trainer:
        return Trainer(options, {}, self.stop, {})

    def _loss(self, model: nn.Module, title: str) -> float:
        o = self.shared
        title = f"evaluating {title}"
        return held_out_loss(model, self.data.held_out, o.batch_size, o.eval_tokens, o.device, title, o.quiet)

    def _check_base(self, model: nn.Module, title: str) -> None:
        """The base's loss, measured once, is a cell's loss before training because of this."""
        if base_digest(model) != self.result["base"]["digest"]:
            raise RuntimeError(f"{title}: the base is not that of the other cells; it should never change")

    def _add(self, cell: dict[str, Any]) -> None:
        self.result["cells"] = with_shares([*self.result["cells"], cell])
        self.result["complete"] = len(self.result["cells"]) == len(self.options.cells())
        self._save()

    def _save(self) -> None:
        with self.stop.deferred():
            formats.save_json(self.result, self.options.out)
            self.kept = len(self.result["cells"])
        self.stop.check()


def base_digest(model: nn.Module) -> str:
    """SHA-256 of every tensor of a model but its adapters', byte for byte, with their names."""
    state = model.state_dict()
    return digest.digest({k: state[k] for k in sorted(state) if ".lora_A." not in k and ".lora_B." not in k})


def _earlier(path: str) -> dict[str, Any] | None:
    """The result in a file; None when there is no file.

    Raises:
        InputError: for a file that is no result of this study, which is left alone.
    """
    if not os.path.lexists(path):
        return None
    refusal = f"--out {path} is there and no result of this study; name another file"
    try:
        result = formats.load_json(path)
    except (OSError, ValueError):
        raise InputError(refusal) from None
    cells = result.get("cells")
    if (
        (result.get("study"), result.get("format")) != (STUDY, FORMAT)
        or not all(isinstance(result.get(key), dict) for key in ("machine", "versions", "settings", "base"))
        or not {"commit", "modified", "date", "complete"} <= set(result)
        or not isinstance(cells, list)
        or not all(isinstance(cell, dict) and set(cell) == _CELL for cell in cells)
    ):
        raise InputError(refusal)
    return result


def _check_same(earlier: dict[str, Any], now: dict[str, Any], path: str) -> None:
    """Refuses to put cells into one file that were not made alike, or whose times were not.

    Raises:
        InputError: with what differs.
    """
    now = json.loads(json.dumps(now, default=str))  # as a file gives it back
    keys = ("settings", "commit", "modified", "versions", "machine")
    differences = [part for key in keys for part in _differences(earlier[key], now[key], key)]
    if differences:
        raise InputError(
            f"--out {path} holds cells that were made otherwise: {'; '.join(differences)}; name another file, or start "
            "over with --restart"
        )


def _differences(earlier: Any, now: Any, name: str) -> Iterator[str]:
    """A phrase for each value that differs, under its own name rather than its group's."""
    if isinstance(earlier, dict) and isinstance(now, dict):
        for key in sorted({*earlier, *now}):
            yield from _differences(earlier.get(key), now.get(key), key)
    elif earlier != now:
        yield f"{name} was {earlier} and is {now}"


@contextlib.contextmanager
def _writable(folder: str) -> Iterator[None]:
    """The folder made and checked; see :func:`qlora_kernels.folders.new_folder`."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(new_folder(folder))
        except OSError as error:
            raise InputError(f"the folder {folder} cannot be written: {error.strerror}") from None
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a study from the command line and prints its table.

    Returns:
        0; 2 for input that cannot be used, after one sentence on stderr; 128 + signal when interrupted.
    """
    arguments = make_parser().parse_args(argv)
    try:
        options = from_arguments(arguments)
        if arguments.plot and not os.path.isdir(os.path.dirname(arguments.plot) or "."):
            raise InputError(f"--plot {arguments.plot} cannot be written: there is no such folder")
        result = run(options)
        if arguments.plot:
            plot(result, arguments.plot, arguments.out)
    except Interrupted as interrupted:
        name, left = signal.Signals(interrupted.signum).name, interrupted.note or "no cell was done"
        print(f"\n{name}: stopped; {left}", file=sys.stderr)
        return 128 + interrupted.signum
    except (InputError, ImportError) as error:
        print(f"rank_study: {sentence(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"rank_study: {where}{error.strerror or sentence(error)}", file=sys.stderr)
        return 2
    print(markdown(result, arguments.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
