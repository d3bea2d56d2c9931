"""A whole run: base, NF4, adapters, comparison, report."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import shlex
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from ..console.signals import Interrupted, StopSignal
from ..errors import InputError, sentence_of
from ..interop.transformers.skeleton import cast_parameters, recompute_activations
from ..models.adapter_files import save_adapter
from ..models.adapters import disable_adapters
from ..storage.atomic_folder import sweep_folders
from ..storage.formats import save_json
from . import checkpoint as ckpt
from . import tiny
from .data import load_data
from .dense_lora import add_lora
from .evaluate import generate, held_out_loss
from .memory import PeakMemory
from .options import Settings
from .report_to import Reporter, check_trackers
from .results.outputs import Outputs
from .results.plot import plot_losses
from .results.report import TITLES, conclusions, machine, recovery, sizes, table, versions
from .source import Source, digest, quantize
from .train import Phase, Trained, Trainer, prefix, trainable


def finetune(settings: Settings, arguments: list[str]) -> int:
    """Carries a run through.

    Args:
        settings: of the run.
        arguments: what the command was called with, for the message that says how to resume.

    Returns:
        The exit code: 0, or 128 + signal when one ended the run.

    Raises:
        InputError: for input that cannot be used; nothing is left half changed.
    """
    _check_single_process(os.environ)
    with StopSignal() as stop:
        try:
            _Run(settings, stop).go()
            return 0
        except OSError as error:
            if not os.path.isfile(ckpt.path_in(settings.out)):
                raise
            raise InputError(f"{sentence_of(error)}; --resume goes on from {ckpt.path_in(settings.out)}") from error
        except Interrupted as interrupted:
            print(f"\n{_farewell(settings.out, interrupted, arguments)}", file=sys.stderr)
            return 128 + interrupted.signum


def _check_single_process(environment: Mapping[str, str]) -> None:
    """Refuses to be one of several processes that torchrun and its like start.

    They would all do the same run and write into the same folder.

    Raises:
        InputError: naming the variable that shows it.
    """
    # One process alone is fine. Where the number is not given, a rank means that there may be others.
    names = ("WORLD_SIZE",) if environment.get("WORLD_SIZE") else ("RANK", "LOCAL_RANK")
    for name in names:
        if environment.get(name) and (name, environment[name]) != ("WORLD_SIZE", "1"):
            raise InputError(
                f"finetune runs in one process, but {name}={environment[name]} is set, as torchrun does for several; "
                "start it without torchrun"
            )


def _farewell(out: str, interrupted: Interrupted, arguments: list[str]) -> str:
    name = signal.Signals(interrupted.signum).name
    command = shlex.join(["qlora-kernels", "finetune", *(a for a in arguments if a != "--resume"), "--resume"])
    path = ckpt.path_in(out)
    if interrupted.note:
        return f"{name}: stopped after {interrupted.note}; saved in {path}. To go on:\n  {command}"
    if os.path.isfile(path):
        return f"{name}: stopped; the last checkpoint is {path}. To go on:\n  {command}"
    return f"{name}: stopped before there was anything to save."


class _Run:
    """The state of a run between its phases."""

    def __init__(self, settings: Settings, stop: StopSignal) -> None:
        self.settings, self.stop = settings, stop
        self.outputs = Outputs(settings.out)
        self.began = time.perf_counter()

    def note(self, text: str) -> None:
        if not self.settings.quiet:
            from tqdm import tqdm

            tqdm.write(text)

    def go(self) -> None:
        for package in ("transformers", "safetensors", "tqdm", "matplotlib"):  # to fail now, not after the training
            importlib.import_module(package)
        check_trackers(self.settings)
        with contextlib.ExitStack() as stack:
            exists = os.path.isdir(self.outputs.folder)
            if exists:  # claimed before anything is read, so that the checkpoint stays the one that is read
                stack.enter_context(self.outputs.claimed())
            resumed = ckpt.load(self.settings.out) if self.settings.resume else None
            self._prepare()
            if resumed is not None:
                ckpt.check_same_run(resumed, self.settings, self.identity)
            settings = self.settings
            self.outputs.check_unobstructed(self.source.folder if settings.is_tiny else None)
            stack.enter_context(self.outputs.writable(settings.cache))
            if not exists:
                stack.enter_context(self.outputs.claimed())
            self.note(settings.about_dtype())
            repeated, held_out = (self.data.summary.get(f"held_out_{key}") for key in ("in_training", "examples"))
            if repeated:
                self.note(f"{repeated} of {held_out} examples to evaluate on are in the training data too")
            self.reporter = Reporter(settings, self.note)
            stack.callback(self.reporter.end)
            self._phases(resumed)

    def _prepare(self) -> None:
        """Finds the model and the data, and checks that they can be used. From here on the settings are complete."""
        settings = self.settings
        self.source = Source(settings)
        if settings.compare and self.source.four_bit:
            raise InputError("--compare needs the 16-bit weights, but the model's are 4-bit already")
        self.data = load_data(
            settings.data,
            self.source.encode,
            self.source.end,
            settings.seq_len,
            settings.held_out,
            settings.seed,
            settings.eval_data,
            self.source.chat,
        )
        template = self.data.summary.get("chat_template")
        if settings.chat_template is not None and template is None:
            raise InputError("--chat-template is for messages, and the data has none")
        self.source.check()
        self.identity = {"data": str(self.data.summary["sha256"]), "activation type": str(self.source.dtype)}
        if isinstance(template, dict):
            self.identity["chat template"] = str(template["sha256"])
        found = {"double_quant": self.source.double_quant, "held_out": self.data.fraction}
        self.settings = replace(settings, **found).for_data(len(self.data.train))

    def _phases(self, resumed: ckpt.Checkpoint | None) -> None:
        settings = self.settings
        self.results: dict[str, Any] = {} if resumed is None else resumed.results
        self.outputs.sweep()
        self.trainer = Trainer(settings, self.identity, self.stop, self.results, resumed, self.reporter.log)
        if resumed is None and os.path.exists(self.outputs.checkpoint):
            self.note(f"starting from the beginning; --resume would use the checkpoint in {settings.out}")
        if settings.is_tiny:
            self._pretrain()
        with PeakMemory(settings.device) as libraries:
            pass
        model = self.source.load()
        self.reporter.begin(model)
        self.identity["base model"] = digest(model)
        if resumed is not None:
            ckpt.check_same_run(resumed, settings, self.identity)
        if not self.source.four_bit and "base16" not in self.results:
            self.results["base16"] = self._evaluated(model, "base16")
        self._qlora(model)
        del model
        if settings.compare:
            self._compare()
        self._report(libraries)

    def _pretrain(self) -> None:
        """Makes the tiny base, unless an earlier run left it."""
        folder = self.source.folder
        sweep_folders(os.path.dirname(folder), "tiny-base-[0-9a-f]+")
        if os.path.isdir(folder):
            self.note(f"the tiny base is in {folder}")
        else:
            tiny.pretrain(self.settings, self.trainer, folder, self.note)

    def _qlora(self, model: nn.Module) -> None:
        """Quantizes the base, trains its adapters and writes them."""
        settings = self.settings
        began = time.perf_counter()
        report = quantize(model, settings)
        self.size = sizes(model, report)
        self.adapted = report.adapted
        if "qlora" in self.results:
            return
        self.note(str(report))
        if "nf4" not in self.results:
            seconds = time.perf_counter() - began
            with disable_adapters(model):
                self.results["nf4"] = self._evaluated(model, "nf4")
                self.results["nf4"]["sample"] = self._sample(model)
            self.results["nf4"]["quantize_seconds"] = seconds
        self.results["qlora"] = self._trained(model, "qlora", TITLES["qlora"], settings.lr)
        self.results["qlora"]["sample"] = self._sample(model)
        with self.stop.deferred():
            save_adapter(model, self.outputs.adapter, base_model_name_or_path=self._base_name())
            self._phase_done()
        self.stop.check()

    def _base_name(self) -> str | None:
        """What to name as the adapter's base; None where the model says it better, with its revision."""
        own = self.source.four_bit or not os.path.isdir(self.source.folder)
        return None if own else os.path.abspath(self.source.folder)

    def _compare(self) -> None:
        """LoRA on the dense 16-bit base, and full fine-tuning, on the same data in the same order."""
        settings = self.settings
        rates = {"lora16": settings.lr, "full": settings.full_lr}
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
                    settings.rank,
                    settings.alpha,
                    settings.lora_dropout,
                    settings.rslora,
                    settings.seed,
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
        settings = self.settings
        if settings.gradient_checkpointing:
            recompute_activations(model, True)
        # The others get as many steps as qlora had.
        steps = settings.steps if key == "qlora" else self.results["qlora"]["steps"]
        assert steps is not None  # for_data filled it in
        phase = Phase(
            name=key,
            title=title,
            model=model,
            data=self.data.train,
            lr=lr,
            steps=steps,
            seconds=settings.train_seconds if key == "qlora" else None,
            batch_size=settings.batch_size,
            grad_accum=settings.grad_accum,
            warmup=settings.warmup,
            autocast=autocast,
        )
        with PeakMemory(settings.device) as memory:
            trained: Trained = self.trainer.run(phase, self.note)
        if settings.gradient_checkpointing:
            recompute_activations(model, False)
        if autocast is not None:
            cast_parameters(model, self.source.dtype)  # deployed, and so evaluated, in 16 bits
        loss = self._loss(model, title)
        self.reporter.log(trained.steps, {f"eval_{prefix(key)}loss": loss})
        return {
            "loss": loss,
            "losses": trained.losses,
            "seconds": trained.seconds,
            "tokens_per_second": trained.tokens_per_second,
            "steps": trained.steps,
            "trainable": sum(p.numel() for p in trainable(model).values()),
            "peak": memory.peak,
            "memory_method": memory.method,
        }

    def _loss(self, model: nn.Module, title: str) -> float:
        settings = self.settings
        return held_out_loss(
            model,
            self.data.held_out,
            settings.batch_size,
            settings.eval_tokens,
            settings.device,
            f"evaluating {title}",
            settings.quiet,
        )

    def _evaluated(self, model: nn.Module, key: str) -> dict[str, Any]:
        began = time.perf_counter()
        with PeakMemory(self.settings.device) as memory:
            loss = self._loss(model, TITLES[key])
        self.reporter.log(0, {f"eval_{prefix(key)}loss": loss})
        return {"loss": loss, "seconds": time.perf_counter() - began, "peak": memory.peak}

    def _sample(self, model: nn.Module) -> str:
        settings = self.settings
        ids = generate(model, self.data.prompt, settings.sample_tokens, settings.seed, settings.device)
        return self.source.decode(ids)

    def _phase_done(self) -> None:
        """A checkpoint between phases: results alone."""
        ckpt.save(
            ckpt.Checkpoint(
                options=self.settings.decisive(),
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
            self.settings.out,
        )

    def _report(self, libraries: PeakMemory) -> None:
        settings, outputs, results = self.settings, self.outputs, self.results
        share = recovery(results)
        metrics = {
            "options": asdict(settings),
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
            name = os.path.basename(os.path.normpath(settings.model))
            plot_losses(results, outputs.plot, f"QLoRA on {name}: loss")
            save_json(metrics, outputs.metrics)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(outputs.checkpoint)
        if settings.sample_tokens and not settings.quiet:
            print("\nprompt (held-out):\n" + _indent(self.source.decode(self.data.prompt)))
            print("\nthe NF4 base continues:\n" + _indent(results["nf4"]["sample"]))
            print("\nNF4 + LoRA continues:\n" + _indent(results["qlora"]["sample"]))
        print("\n" + table(results, self.size) + "\n")
        method = results["qlora"]["memory_method"]
        for line in conclusions(results, libraries.start, method):
            print(line)
        written = ", ".join((outputs.metrics, outputs.plot, outputs.adapter))
        print(f"Written: {written}. Took {metrics['seconds_this_call']:.0f} s.")


def _indent(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())
