"""A whole run: base, NF4, adapters, comparison, report."""

from __future__ import annotations

import contextlib
import gc
import importlib
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..console.signals import Interrupted, StopSignal
from ..errors import InputError
from ..interop.transformers.skeleton import cast_parameters, recompute_activations
from ..models.adapter_files import CONFIG_NAME, WEIGHTS_NAME, save_adapter
from ..models.adapters import disable_adapters
from ..storage.atomic_folder import new_folder, sweep_folders
from ..storage.formats import save_json
from . import checkpoint as ckpt
from . import tiny
from .data import load_data
from .dense_lora import add_lora
from .evaluate import generate, held_out_loss
from .memory import PeakMemory
from .options import Options
from .plot import plot_losses
from .report import TITLES, conclusions, machine, recovery, sizes, table, versions
from .source import Source, digest, quantize
from .train import Phase, Trained, Trainer, trainable


def finetune(options: Options, arguments: list[str]) -> int:
    """Carries a run through.

    Args:
        options: resolved.
        arguments: what the command was called with, to say how to go on.

    Returns:
        The exit code: 0, or 128 + signal when one ended the run.

    Raises:
        InputError: for input that cannot be used; nothing is left half changed.
    """
    with StopSignal() as stop:
        try:
            _Run(options, stop).go()
            return 0
        except Interrupted as interrupted:
            signum = interrupted.signum
            print(f"\n{_farewell(options, interrupted, arguments)}", file=sys.stderr)
            return 128 + signum


def _farewell(options: Options, interrupted: Interrupted, arguments: list[str]) -> str:
    name = signal.Signals(interrupted.signum).name
    command = shlex.join(["qlora-kernels", "finetune", *(a for a in arguments if a != "--resume"), "--resume"])
    path = ckpt.path_in(options.out)
    if interrupted.note:
        return f"{name}: stopped after {interrupted.note}; saved in {path}. To go on:\n  {command}"
    if os.path.isfile(path):
        return f"{name}: stopped; the last checkpoint is {path}. To go on:\n  {command}"
    return f"{name}: stopped before there was anything to save."


class _Run:
    """The state of a run between its phases."""

    def __init__(self, options: Options, stop: StopSignal) -> None:
        self.options, self.stop = options, stop
        self.began = time.perf_counter()

    def note(self, text: str) -> None:
        if not self.options.quiet:
            from tqdm import tqdm

            tqdm.write(text)

    def go(self) -> None:
        options = self.options
        for package in ("transformers", "safetensors", "tqdm", "matplotlib"):  # rather now than after the training
            importlib.import_module(package)
        resumed = ckpt.load(options.out) if options.resume else None
        self.source = Source(options)
        if options.compare and self.source.four_bit:
            raise InputError("--compare needs the 16-bit weights, but the model's are 4-bit already")
        self.data = load_data(
            options.data, self.source.encode, self.source.end, options.seq_len, options.held_out, options.seed
        )
        self.source.check()
        if options.steps is None:
            per_step = options.batch_size * options.grad_accum
            options.steps = max(math.ceil(options.epochs * len(self.data.train) / per_step), 1)
        self.identity = {"data": str(self.data.summary["sha256"]), "activation type": str(self.source.dtype)}
        if resumed is not None:
            ckpt.check_same_run(resumed, options, self.identity)
        _check_targets(options.out, self.source.folder if options.is_tiny else None)
        adapter = os.path.join(options.out, "adapter")
        with contextlib.ExitStack() as stack:
            for folder in (options.out, options.cache or options.out, adapter if os.path.isdir(adapter) else None):
                if folder is not None:
                    stack.enter_context(_writable(folder))
            self._phases(resumed)

    def _phases(self, resumed: ckpt.Checkpoint | None) -> None:
        options = self.options
        self.results: dict[str, Any] = {} if resumed is None else resumed.results
        ckpt.sweep(options.out)
        if options.is_tiny:
            sweep_folders(os.path.dirname(self.source.folder), "tiny-base-[0-9a-f]+")
        self.trainer = Trainer(options, self.identity, self.stop, self.results, resumed)
        if resumed is None and os.path.exists(ckpt.path_in(options.out)):
            self.note(f"starting afresh; --resume would go on from the checkpoint that is in {options.out}")
        if options.is_tiny and not os.path.isdir(self.source.folder):
            tiny.pretrain(options, self.trainer, self.source.folder, self.source.dtype, self.note)
        elif options.is_tiny:
            self.note(f"the tiny base is in {self.source.folder}")
        with PeakMemory(options.device) as libraries:
            pass
        model = self.source.load()
        self.identity["base model"] = digest(model)
        if resumed is not None:
            ckpt.check_same_run(resumed, options, self.identity)
        if not self.source.four_bit and "base16" not in self.results:
            self.results["base16"] = self._evaluated(model, TITLES["base16"])
        model = self._qlora(model)
        del model
        if options.compare:
            self._compare()
        self._report(libraries)

    def _qlora(self, model: nn.Module) -> nn.Module:
        """Quantizes the base, trains its adapters and writes them."""
        options = self.options
        began = time.perf_counter()
        report = quantize(model, options)
        self.size = sizes(model, report)
        self.adapted = report.adapted
        if "qlora" in self.results:
            return model
        self.note(str(report))
        if "nf4" not in self.results:
            seconds = time.perf_counter() - began
            with disable_adapters(model):
                self.results["nf4"] = self._evaluated(model, TITLES["nf4"])
                self.results["nf4"]["sample"] = self._sample(model)
            self.results["nf4"]["quantize_seconds"] = seconds
        self.results["qlora"] = self._trained(model, "qlora", TITLES["qlora"], options.lr)
        self.results["qlora"]["sample"] = self._sample(model)
        with self.stop.deferred():
            folder = os.path.join(options.out, "adapter")
            save_adapter(model, folder, base_model_name_or_path=_base_name(self.source.folder))
            self._phase_done()
        self.stop.check()
        return model

    def _compare(self) -> None:
        """LoRA on the dense 16-bit base, and full fine-tuning, on the same data in the same order."""
        options = self.options
        rates = {"lora16": options.lr, "full": options.full_lr}
        for key, rate in rates.items():
            title = TITLES[key]
            if key in self.results:
                continue
            gc.collect()
            model = self.source.load()
            autocast = None
            if key == "lora16":
                add_lora(
                    model,
                    self.adapted,
                    options.rank,
                    options.alpha,
                    options.lora_dropout,
                    options.rslora,
                    options.seed,
                )
            else:
                # Mixed precision: masters in float32, products in the type of the activations.
                autocast = self.source.dtype if self.source.dtype != torch.float32 else None
                model = model.float().requires_grad_(True)
            self.results[key] = self._trained(model, key, title, rate, autocast)
            del model
            with self.stop.deferred():
                self._phase_done()
            self.stop.check()

    def _trained(
        self, model: nn.Module, key: str, title: str, lr: float, autocast: torch.dtype | None = None
    ) -> dict[str, Any]:
        options = self.options
        if options.gradient_checkpointing:
            recompute_activations(model, True)
        phase = Phase(
            name=key,
            title=title,
            model=model,
            data=self.data.train,
            lr=lr,
            # What is compared had the same number of steps.
            steps=options.steps if key == "qlora" else self.results["qlora"]["steps"],
            seconds=options.train_seconds if key == "qlora" else None,
            batch_size=options.batch_size,
            grad_accum=options.grad_accum,
            warmup=options.warmup,
            autocast=autocast,
        )
        with PeakMemory(options.device) as memory:
            trained: Trained = self.trainer.run(phase, self.note)
        if options.gradient_checkpointing:
            recompute_activations(model, False)
        if autocast is not None:
            cast_parameters(model, self.source.dtype)  # deployed, and so evaluated, in 16 bits
        return {
            "loss": self._loss(model, title),
            "losses": trained.losses,
            "seconds": trained.seconds,
            "tokens_per_second": trained.tokens_per_second,
            "steps": trained.steps,
            "trainable": sum(p.numel() for p in trainable(model).values()),
            "peak": memory.peak,
            "memory_method": memory.method,
        }

    def _loss(self, model: nn.Module, title: str) -> float:
        o = self.options
        title = f"evaluating {title}"
        return held_out_loss(model, self.data.held_out, o.batch_size, o.eval_tokens, o.device, title, o.quiet)

    def _evaluated(self, model: nn.Module, title: str) -> dict[str, Any]:
        began = time.perf_counter()
        with PeakMemory(self.options.device) as memory:
            loss = self._loss(model, title)
        return {"loss": loss, "seconds": time.perf_counter() - began, "peak": memory.peak}

    def _sample(self, model: nn.Module) -> str:
        options = self.options
        ids = generate(model, self.data.prompt, options.sample_tokens, options.seed, options.device)
        return self.source.decode(ids)

    def _phase_done(self) -> None:
        """A checkpoint between phases: results alone."""
        ckpt.save(
            ckpt.Checkpoint(
                options=self.options.decisive(),
                identity=self.identity,
                phase="between",
                step=0,
                total=0,
                losses=[],
                tensors={},
                optimizer={},
                rng={},
                seconds=0.0,
                results=self.results,
            ),
            self.options.out,
        )

    def _report(self, libraries: PeakMemory) -> None:
        options, results = self.options, self.results
        path = {name: os.path.join(options.out, name) for name in ("metrics.json", "loss.png", "adapter")}
        share = recovery(results)
        metrics = {
            "options": vars(options),
            "versions": versions(),
            "machine": machine(),
            "model": self.source.folder,
            "activations": str(self.source.dtype),
            "data": self.data.summary,
            "size": self.size,
            "results": results,
            "recovery": share,
            "library_memory": libraries.start,
            "seconds_this_call": time.perf_counter() - self.began,
        }
        with self.stop.deferred():
            name = os.path.basename(os.path.normpath(options.model))
            plot_losses(results, path["loss.png"], f"QLoRA on {name}: loss")
            save_json(metrics, path["metrics.json"])
            with contextlib.suppress(FileNotFoundError):
                os.unlink(ckpt.path_in(options.out))
        if options.sample_tokens and not options.quiet:
            print("\nprompt (held-out):\n" + _indent(self.source.decode(self.data.prompt)))
            print("\nthe NF4 base goes on:\n" + _indent(results["nf4"]["sample"]))
            print("\nNF4 + LoRA goes on:\n" + _indent(results["qlora"]["sample"]))
        print("\n" + table(results, self.size) + "\n")
        method = results["qlora"]["memory_method"]
        for line in conclusions(results, libraries.start, method):
            print(line)
        print(f"Written: {', '.join(path.values())}. Took {metrics['seconds_this_call']:.0f} s.")


def _check_targets(out: str, base: str | None) -> None:
    """Finds now, not after the training, that something lies where a file or folder of the run has to go.

    Raises:
        InputError: naming it.
    """
    adapter = os.path.join(out, "adapter")
    for folder in (adapter, base):
        if folder is not None and os.path.lexists(folder) and not os.path.isdir(folder):
            raise InputError(f"{folder} cannot be written: it should be a folder, and is a file")
    files = [os.path.join(out, name) for name in ("metrics.json", "loss.png", ckpt.NAME)]
    files += [os.path.join(adapter, name) for name in (CONFIG_NAME, WEIGHTS_NAME)]
    for file in files:
        if os.path.isdir(file):
            raise InputError(f"{file} cannot be written: it should be a file, and is a folder")


@contextlib.contextmanager
def _writable(folder: str) -> Iterator[None]:
    """The folder made and checked; see :func:`qlora_kernels.folders.new_folder`."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(new_folder(folder))
        except OSError as error:
            raise InputError(f"the output folder {folder} cannot be written: {error.strerror}") from None
        yield


def _base_name(model: str) -> str:
    """A folder as an absolute path, so that the adapter finds it from anywhere; an id as it is."""
    return os.path.abspath(model) if os.path.isdir(model) else model


def _indent(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())
