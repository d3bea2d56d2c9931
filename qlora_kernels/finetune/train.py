"""The training loop, the same for pretraining, QLoRA, 16-bit LoRA and full fine-tuning."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from ..console.progress import bar
from ..console.signals import Interrupted, StopSignal
from ..errors import InputError, sentence
from ..optim.algorithms import PagedAdamW, PagedLion
from . import checkpoint as ckpt
from .data import IGNORED, Batch, Examples, Windows
from .options import Settings

_LEAST_STEPS = 24  # in a phase with a time limit, however slow the machine
_REFIT_EVERY = 12  # steps after which the number of steps is fitted to the time limit again


@dataclass
class Phase:
    """One training job.

    Attributes:
        name: for checkpoints, e.g. "qlora".
        title: for messages and bars.
        model: called with input_ids; its output has logits.
        data: what to train on.
        lr: peak learning rate.
        steps: optimizer steps.
        batch_size, grad_accum: sequences a forward pass, forward passes a step.
        autocast: run the forward pass under autocast to this type (for float32 masters), or None.
        seconds: do fewer than ``steps`` steps when they would take longer than this; None is no limit.
    """

    name: str
    title: str
    model: nn.Module
    data: Windows | Examples
    lr: float
    steps: int
    batch_size: int
    grad_accum: int = 1
    warmup: float = 0.05
    autocast: torch.dtype | None = None
    seconds: float | None = None


@dataclass
class Trained:
    """The outcome of a phase: training loss of each step, time, and the steps done."""

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    steps: int = 0
    tokens_per_second: float = 0.0


def make_optimizer(parameters: list[nn.Parameter], lr: float, settings: Settings) -> torch.optim.Optimizer:
    """Makes the optimizer of a phase. A paged one clips the gradients within its step."""
    common = {"lr": lr, "weight_decay": settings.weight_decay, "betas": (0.9, 0.99)}
    if settings.optim == "adamw":
        return torch.optim.AdamW(parameters, **common, fused=True)
    kind = PagedLion if settings.optim == "paged_lion" else PagedAdamW
    return kind(
        parameters,
        **common,
        state_bits=8 if settings.optim == "paged_adamw_8bit" else 32,
        max_grad_norm=settings.max_grad_norm if 0 < settings.max_grad_norm < math.inf else None,
        page_budget=settings.page_budget,
        page_file=settings.page_file,
    )


@contextlib.contextmanager
def _arena() -> Iterator[None]:
    """A paged optimizer makes its arena in here: no room for it, or too small a budget, becomes one sentence."""
    try:
        yield
    except (MemoryError, ValueError) as error:
        raise InputError(f"the optimizer cannot go on: {sentence(error)}") from error


def learning_rate(step: int, total: int, peak: float, warmup: float, schedule: str) -> float:
    """The learning rate of a step: linear warmup, then cosine or linear decay to a tenth of the peak, or constant.

    Args:
        step: 0-based.
        total: steps in all.
        peak: the highest rate.
        warmup: steps, or below 1 a fraction of ``total``.
        schedule: "cosine", "linear" or "constant".
    """
    rise = warmup if warmup >= 1 else warmup * total
    if step < rise:
        return peak * (step + 1) / (math.floor(rise) + 1)
    if schedule == "constant":
        return peak
    done = (step - rise) / max(total - rise, 1)
    factor = 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return peak * (0.1 + 0.9 * factor)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that get gradients, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def batch_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The sum of the cross-entropy of the labels that count, in nats, in float32."""
    logits = model(input_ids=batch.inputs, use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED, reduction="sum")


def _fitting(phase: Phase, trained: Trained, total: int) -> int:
    """How many steps to do in all: the phase's, or as many as fit its time limit at the pace so far."""
    if phase.seconds is None or trained.steps % _REFIT_EVERY:
        return total
    fitting = int(trained.steps * phase.seconds / trained.seconds)
    return max(min(fitting, phase.steps), min(_LEAST_STEPS, phase.steps), trained.steps)


def _autocast(phase: Phase, device: str):
    if phase.autocast is None:
        return contextlib.nullcontext()
    return torch.autocast(device.split(":")[0], dtype=phase.autocast)


def prefix(phase: str) -> str:
    """What the names of a phase's scalars begin with: nothing for the one that the run is about."""
    return "" if phase == "qlora" else f"{phase}_"


class Trainer:
    """Runs phases, keeps checkpoints.

    Args:
        settings: of the run.
        identity: digests that a checkpoint records.
        stop: receives signals.
        results: of finished phases, for checkpoints.
        resumed: the checkpoint to go on from, or None.
        report: called after each step, with its number and scalars by name.
    """

    def __init__(
        self,
        settings: Settings,
        identity: dict[str, str],
        stop: StopSignal,
        results: dict,
        resumed: ckpt.Checkpoint | None = None,
        report: Callable[[int, dict[str, float]], None] = lambda step, scalars: None,
    ) -> None:
        self.settings, self.identity, self.stop, self.results = settings, identity, stop, results
        self.resumed, self.report = resumed, report

    def run(self, phase: Phase, note: Callable[[str], None] = print) -> Trained:
        """Trains a phase to its end, from its checkpoint when the run resumes in it.

        Raises:
            Interrupted: by a signal, after a checkpoint was written.
            InputError: when the loss is no longer finite, or the checkpoint is of another model.
        """
        settings, device = self.settings, self.settings.device
        parameters = trainable(phase.model)
        optimizer = make_optimizer(list(parameters.values()), phase.lr, settings)
        torch.manual_seed(settings.seed)
        trained, total = Trained(), phase.steps
        if self.resumed is not None and self.resumed.phase == phase.name:
            saved = self.resumed
            if saved.total > phase.steps:
                raise InputError(
                    f"--resume: {ckpt.path_in(settings.out)} wants {saved.total} steps of {phase.title}, and there "
                    f"should be {phase.steps}"
                )
            ckpt.restore_tensors(saved, parameters)
            try:
                with _arena():
                    optimizer.load_state_dict(saved.optimizer)
            except (KeyError, TypeError, AttributeError, RuntimeError) as error:  # torch's own checks little
                path = ckpt.path_in(settings.out)
                raise InputError(
                    f"--resume: the optimizer's state in {path} cannot be used ({sentence(error)})"
                ) from None
            ckpt.restore_rng(saved.rng, device)
            trained.losses, trained.seconds, trained.steps, total = saved.losses, saved.seconds, saved.step, saved.total
            note(f"resuming {phase.title} after step {saved.step} of {total}")
        phase.model.train()
        earlier, began, tokens = trained.seconds, time.perf_counter(), 0
        saved_at = trained.steps
        with self._bar(phase, total, trained.steps) as progress, self.stop.deferred():
            while trained.steps < total and self.stop.signum is None:
                step = trained.steps
                loss, count = self._step(phase, optimizer, parameters, step, total)
                trained.losses.append(loss)
                trained.steps, tokens = step + 1, tokens + count
                trained.seconds = earlier + time.perf_counter() - began
                total = _fitting(phase, trained, total)
                trained.tokens_per_second = tokens / (trained.seconds - earlier)
                if settings.save_every and trained.steps % settings.save_every == 0:
                    self._save(phase, trained, total, parameters, optimizer)
                    saved_at = trained.steps
                self._report(phase, trained, optimizer.param_groups[0]["lr"])
                progress.total = total
                progress.update(1)
                speed = f"{trained.tokens_per_second:,.0f} tokens/s"
                progress.set_postfix_str(f"loss {loss:.4f}, {speed}", refresh=False)
            # At the end too: evaluation or the adapter's files may yet be interrupted or killed.
            if trained.steps > saved_at:
                self._save(phase, trained, total, parameters, optimizer)
        if self.stop.signum is not None:
            where = f"step {trained.steps} of {total} of {phase.title}"
            raise Interrupted(self.stop.signum, where if trained.steps else "")
        if total < phase.steps:
            note(f"{phase.title}: {total} steps instead of {phase.steps}, to end within {phase.seconds:.0f} s")
        phase.model.eval()
        return trained

    def _step(
        self, phase: Phase, optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], step: int, total: int
    ) -> tuple[float, int]:
        """One optimizer step; returns the mean loss of its tokens and how many tokens went through the model."""
        settings = self.settings
        rate = learning_rate(step, total, phase.lr, phase.warmup, settings.schedule)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batches = [
            phase.data.batch(step * phase.grad_accum + i, phase.batch_size).to(settings.device)
            for i in range(phase.grad_accum)
        ]
        # Every counted token weighs the same, however the step is cut into forward passes.
        counted = max(sum(batch.counted for batch in batches), 1)
        total_loss = 0.0
        for batch in batches:
            with _autocast(phase, settings.device):
                loss = batch_loss(phase.model, batch) / counted
            loss.backward()
            total_loss += loss.item()
        if not math.isfinite(total_loss):
            raise InputError(f"the loss became {total_loss} at step {step + 1} of {phase.title}; try a smaller --lr")
        if settings.max_grad_norm and settings.optim == "adamw":
            torch.nn.utils.clip_grad_norm_(parameters.values(), settings.max_grad_norm, foreach=True)
        with _arena():
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total_loss, sum(batch.inputs.numel() for batch in batches)

    def _report(self, phase: Phase, trained: Trained, rate: float) -> None:
        scalars = {"loss": trained.losses[-1], "learning_rate": rate, "tokens_per_second": trained.tokens_per_second}
        self.report(trained.steps, {prefix(phase.name) + name: value for name, value in scalars.items()})

    def _save(self, phase: Phase, trained: Trained, total: int, parameters, optimizer) -> None:
        ckpt.save(
            ckpt.Checkpoint(
                options=self.settings.decisive(),
                identity=self.identity,
                phase=phase.name,
                step=trained.steps,
                total=total,
                losses=trained.losses,
                tensors={name: parameter.detach() for name, parameter in parameters.items()},
                optimizer=optimizer.state_dict(),
                rng=ckpt.rng_state(self.settings.device),
                seconds=trained.seconds,
                results=self.results,
            ),
            self.settings.out,
        )

    def _bar(self, phase: Phase, total: int, done: int):
        return bar(show=not self.settings.quiet, total=total, initial=done, desc=phase.title, unit="step")
