"""Options of a run: what the user says, checked, and the settings that follow from it."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from ..errors import InputError
from ..native.bfloat16 import slow_bfloat16

SCHEDULES = ("cosine", "linear", "constant")
COMPUTE = ("auto", "bfloat16", "float32")
TRACKERS = ("tensorboard", "wandb")
OPTIMIZERS = ("paged_adamw", "paged_adamw_8bit", "paged_lion", "adamw")

# Settings that decide the numbers of a run: --resume refuses to go on when one of them has changed.
_DECISIVE = (
    "model", "data", "eval_data", "chat_template", "held_out", "seq_len", "steps", "epochs", "batch_size",
    "grad_accum", "optim", "lr", "full_lr", "warmup", "schedule", "weight_decay", "max_grad_norm", "seed", "rank",
    "alpha", "lora_dropout", "rslora", "target_modules", "target_parameters", "double_quant", "compute", "compare",
    "device", "eval_tokens", "tiny_hidden", "tiny_layers", "tiny_seq_len", "pretrain_steps",
)  # fmt: skip

_AT_LEAST_1 = (
    "batch_size", "grad_accum", "rank", "eval_tokens", "tiny_hidden", "tiny_layers", "tiny_seq_len", "pretrain_steps",
)  # fmt: skip
_POSITIVE = ("steps", "epochs", "lr", "full_lr", "alpha", "page_budget", "train_seconds", "pretrain_seconds")
_FINITE = ("epochs", "lr", "full_lr", "alpha", "warmup", "weight_decay")
_NOT_NEGATIVE = ("warmup", "weight_decay", "max_grad_norm", "save_every", "sample_tokens")
_NAMES = ("target_modules", "target_parameters")
_CHOICES = {"schedule": SCHEDULES, "compute": COMPUTE, "optim": OPTIMIZERS}


@dataclass(frozen=True)
class Options:
    """What the user says about a run; :mod:`qlora_kernels.finetune.arguments` says what each means.

    None stands for a default that depends on other options: see :meth:`resolve`.
    """

    model: str = "tiny"
    data: str | None = None
    eval_data: str | None = None
    chat_template: str | None = None
    out: str | None = None
    cache: str | None = None
    held_out: float | None = None
    eval_tokens: int = 65536
    seq_len: int | None = None
    steps: int | None = None
    epochs: float | None = None
    train_seconds: float | None = None
    batch_size: int = 8
    grad_accum: int = 1
    gradient_checkpointing: bool = False
    optim: str = "paged_adamw"
    page_file: str | None = None
    page_budget: int | None = None
    lr: float | None = None
    full_lr: float | None = None
    warmup: float = 0.05
    schedule: str = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    rank: int = 16
    alpha: float = 32.0
    lora_dropout: float = 0.0
    rslora: bool = False
    target_modules: str = "all-linear"
    target_parameters: str = ""
    double_quant: bool = True
    compute: str = "auto"
    compare: bool = False
    device: str = "cpu"
    resume: bool = False
    save_every: int = 50
    sample_tokens: int = 200
    quiet: bool = False
    report_to: str = "none"
    tiny_hidden: int = 256
    tiny_layers: int = 4
    tiny_seq_len: int = 128
    pretrain_steps: int = 630
    pretrain_seconds: float = 95.0

    @property
    def is_tiny(self) -> bool:
        return self.model == "tiny"

    def resolve(self) -> Settings:
        """The settings of the run: every value checked, every default filled in.

        Raises:
            InputError: for a value out of range; the sentence names the flag.
        """
        check(self)
        tiny = self.is_tiny
        name = os.path.basename(os.path.normpath(self.model)) or "model"
        steps, train_seconds = self.steps, self.train_seconds
        if steps is None and self.epochs is None:
            steps = 200 if tiny else 300
            if tiny and train_seconds is None:
                train_seconds = 100.0  # with the limit on pretraining, a first run ends within five minutes
        given = {field.name: getattr(self, field.name) for field in fields(Options)}
        filled = {
            "out": self.out or os.path.join("runs", name),
            "steps": steps,
            "train_seconds": train_seconds,
            # The tiny model was pretrained on sequences no longer than this.
            "seq_len": self.seq_len or (self.tiny_seq_len if tiny else 512),
            # A tiny model takes, and needs, far larger steps than one of billions of parameters.
            "lr": self.lr if self.lr is not None else self._scaled_lr(4e-3 if tiny else 2e-4),
            "full_lr": self.full_lr if self.full_lr is not None else self._scaled_lr(1e-3 if tiny else 1e-5),
        }
        return Settings(**given | filled)

    def _scaled_lr(self, adamw: float) -> float:
        """The learning rate that does for the chosen optimizer what ``adamw`` does for AdamW.

        Lion wants a third to a tenth (Chen et al. 2023, section 5), because all its steps have full length. For the
        tiny model a third gave the lowest losses, against a fifth and a tenth.
        """
        if self.optim != "paged_lion":
            return adamw
        return adamw / 3 if self.is_tiny else adamw / 10


@dataclass(frozen=True)
class Settings(Options):
    """Options with their defaults filled in: what a run does. Only ``steps`` is open while ``epochs`` decides it."""

    out: str = ""
    seq_len: int = 0
    lr: float = 0.0
    full_lr: float = 0.0

    def for_data(self, sequences: int) -> Settings:
        """The same with the number of steps, once it is known how many sequences the training data has.

        Raises:
            InputError: for more passes than a float can count.
        """
        if self.steps is not None or self.epochs is None:
            return self
        passes = self.epochs * sequences / (self.batch_size * self.grad_accum)
        if math.isinf(passes):
            raise InputError(f"--epochs should be fewer, found {self.epochs}")
        steps = math.ceil(passes)
        return replace(self, steps=max(steps, 1))

    def trackers(self) -> list[str]:
        """The names in ``report_to``."""
        return [] if self.report_to == "none" else names_in(self.report_to)

    def target_names(self) -> str | list[str]:
        """``target_modules`` as :func:`qlora_kernels.quantize_model` takes it."""
        if self.target_modules == "all-linear":
            return self.target_modules
        return names_in(self.target_modules)

    def target_experts(self) -> list[str]:
        """``target_parameters`` as :func:`qlora_kernels.quantize_model` takes it."""
        return names_in(self.target_parameters)

    @property
    def pretraining_lr(self) -> float:
        # By trial, with initial weights of tiny.config's size: 650 steps at 1e-3 left a lower held-out loss than at
        # 1.2e-3 and at 1.5e-3.
        return self._scaled_lr(1e-3)

    @property
    def activation_dtype(self) -> torch.dtype:
        """The type of activations in training and evaluation."""
        if self.compute != "auto":
            return getattr(torch, self.compute)
        return torch.float32 if slow_bfloat16(self.device) else torch.bfloat16

    @property
    def pretraining_dtype(self) -> torch.dtype:
        """The type of activations in the tiny model's pretraining: without bfloat16 instructions float32, which is
        faster there, whatever ``compute`` says of the run itself."""
        return torch.float32 if slow_bfloat16(self.device) else self.activation_dtype

    def about_dtype(self) -> str:
        """Which type activations have, why, and how to have another: a sentence for the user."""
        why = slow_bfloat16(self.device)
        if self.compute == "float32":
            return "computing in float32, as --compute says"
        if self.compute == "bfloat16":
            if why is None:
                return "computing in bfloat16, as --compute says"
            but = "; the tiny model is pretrained in float32 all the same" if self.is_tiny else ""
            return f"computing in bfloat16, as --compute says, though float32 is faster here: {why}{but}"
        if why is None:
            return "computing in bfloat16, which is fast here; --compute float32 is slower and more accurate"
        return f"computing in float32, which is faster here than bfloat16: {why}; --compute bfloat16 overrides that"

    def decisive(self) -> dict[str, Any]:
        """The settings that decide the numbers."""
        values = asdict(self)
        return {name: values[name] for name in _DECISIVE}

    def differences(self, earlier: dict[str, Any]) -> list[str]:
        """How the decisive settings differ from those of an earlier run, a phrase each."""
        # Checkpoints without an optimizer's name are from when there was only torch's.
        # Nor did they have adapters of experts.
        now, earlier = self.decisive(), {"optim": "adamw", "target_parameters": "", **earlier}
        return [
            f"{flag(name)} was {_shown(earlier[name])} and is {_shown(now[name])}"
            for name in _DECISIVE
            if name in earlier and _meaning(name, earlier[name]) != _meaning(name, now[name])
        ]


def _shown(value: Any) -> Any:
    return "none" if value == "" else value


def _meaning(name: str, value: Any) -> Any:
    """What a value says: names in whatever order, with or without spaces between them."""
    return set(names_in(value)) if name in _NAMES and isinstance(value, str) else value


def names_in(text: str) -> list[str]:
    """Names between commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def flag(name: str) -> str:
    """The flag on the command line of an option."""
    return "--" + name.replace("_", "-")


def check(options: Options) -> None:
    """
    Raises:
        InputError: for a value out of range; the sentence names the flag.
    """
    _check_ranges(options)
    if options.steps is not None and options.epochs is not None:
        raise InputError("--steps and --epochs say the same thing twice; give one of them")
    if options.seq_len is not None and options.seq_len < 8:
        raise InputError(f"--seq-len should be at least 8, found {options.seq_len}")
    if options.tiny_hidden % 64:
        raise InputError(f"--tiny-hidden should be a multiple of 64, found {options.tiny_hidden}")
    for name, choices in _CHOICES.items():
        value = getattr(options, name)
        if value not in choices:
            raise InputError(f"{flag(name)} should be one of {', '.join(choices)}, found {value}")
    if options.report_to != "none" and not set(names_in(options.report_to) or [""]) <= set(TRACKERS):
        raise InputError(f"--report-to should be none, or names among {', '.join(TRACKERS)}, found {options.report_to}")
    if options.compare and names_in(options.target_parameters):
        raise InputError("--compare has no adapters of experts on the 16-bit base; leave out --target-parameters")
    if options.eval_data is not None and options.held_out is not None:
        raise InputError("--eval-data and --held-out both say what to evaluate on; give one of them")
    for name in ("page_file", "page_budget"):
        if options.optim == "adamw" and getattr(options, name) is not None:
            raise InputError(f"{flag(name)} needs a paged optimizer, and --optim is adamw")
    if options.page_file is not None and not os.path.isdir(options.page_file):
        raise InputError(f"--page-file should be a folder that exists, found {options.page_file}")


def _check_ranges(options: Options) -> None:
    values = {field.name: getattr(options, field.name) for field in fields(Options)}
    for name in _AT_LEAST_1:
        if values[name] < 1:
            raise InputError(f"{flag(name)} should be at least 1, found {values[name]}")
    for name in _POSITIVE:
        if values[name] is not None and not values[name] > 0:
            raise InputError(f"{flag(name)} should be positive, found {values[name]}")
    for name in _FINITE:
        if values[name] is not None and math.isinf(values[name]):
            raise InputError(f"{flag(name)} should be finite, found {values[name]}")
    for name in _NOT_NEGATIVE:
        if not values[name] >= 0:
            raise InputError(f"{flag(name)} should not be negative, found {values[name]}")
    if not 0 <= options.seed < 2**32:
        raise InputError(f"--seed should be at least 0 and less than 2**32, found {options.seed}")
    if not 0 <= options.lora_dropout < 1:
        raise InputError(f"--lora-dropout should be in [0, 1), found {options.lora_dropout}")
    if options.held_out is not None and not 0 < options.held_out < 1:
        raise InputError(f"--held-out should be a fraction between 0 and 1, found {options.held_out}")
