"""Options of a run: one dataclass, its checks, and its flags on the command line."""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import InputError

SCHEDULES = ("cosine", "linear", "constant")
COMPUTE = ("auto", "bfloat16", "float32")
OPTIMIZERS = ("paged_adamw", "paged_adamw_8bit", "paged_lion", "adamw")

# Options that decide the numbers of a run: --resume refuses to go on when one of them has changed.
_DECISIVE = (
    "model", "data", "held_out", "seq_len", "steps", "epochs", "batch_size", "grad_accum", "optim", "lr", "full_lr",
    "warmup", "schedule", "weight_decay", "max_grad_norm", "seed", "rank", "alpha", "lora_dropout", "rslora",
    "target_modules", "double_quant", "compute", "compare", "device", "eval_tokens", "tiny_hidden", "tiny_layers",
    "tiny_seq_len", "pretrain_steps",
)  # fmt: skip


@dataclass
class Options:
    """Everything the command line can say about a run; see :func:`add_arguments` for the meanings."""

    model: str = "tiny"
    data: str | None = None
    out: str | None = None
    cache: str | None = None
    held_out: float = 0.1
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
    double_quant: bool = True
    compute: str = "auto"
    compare: bool = False
    device: str = "cpu"
    resume: bool = False
    save_every: int = 50
    sample_tokens: int = 200
    quiet: bool = False
    tiny_hidden: int = 256
    tiny_layers: int = 4
    tiny_seq_len: int = 128
    pretrain_steps: int = 900
    pretrain_seconds: float = 100.0

    @property
    def is_tiny(self) -> bool:
        return self.model == "tiny"

    def resolve(self) -> Options:
        """Fills the defaults that depend on other options, after checking every value.

        Raises:
            InputError: for a value out of range; the sentence names the flag.
        """
        self._check()
        name = os.path.basename(os.path.normpath(self.model)) or "model"
        self.out = self.out or os.path.join("runs", name)
        if self.steps is None and self.epochs is None:
            self.steps = 300
            if self.is_tiny and self.train_seconds is None:
                self.train_seconds = 100.0  # with the limit on pretraining: a first run ends within five minutes
        # The tiny model never saw a longer sequence than it was pretrained on.
        self.seq_len = self.seq_len or (self.tiny_seq_len if self.is_tiny else 512)
        # A tiny model takes, and needs, far larger steps than one of billions of parameters.
        self.lr = self.lr if self.lr is not None else self.usual_lr(4e-3 if self.is_tiny else 2e-4)
        self.full_lr = self.full_lr if self.full_lr is not None else self.usual_lr(1e-3 if self.is_tiny else 1e-5)
        return self

    def usual_lr(self, adamw: float) -> float:
        """The learning rate that does with the optimizer what ``adamw`` does with AdamW.

        Lion wants a third to a tenth (Chen et al. 2023, section 5): its steps are as long as they can be. For the tiny
        model, by trial: of a third, a fifth and a tenth the first gives the lowest losses.
        """
        if self.optim != "paged_lion":
            return adamw
        return adamw / 3 if self.is_tiny else adamw / 10

    def _check(self) -> None:
        positive = (
            "batch_size", "grad_accum", "rank", "eval_tokens", "tiny_hidden", "tiny_layers",
            "tiny_seq_len", "pretrain_steps",
        )  # fmt: skip
        for name in positive:
            if getattr(self, name) < 1:
                raise InputError(f"{_flag(name)} should be at least 1, found {getattr(self, name)}")
        for name in ("steps", "epochs", "lr", "full_lr", "alpha", "page_budget", "train_seconds", "pretrain_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{_flag(name)} should be positive, found {value}")
        for name in ("epochs", "lr", "full_lr", "alpha", "warmup", "weight_decay"):
            if getattr(self, name) is not None and math.isinf(getattr(self, name)):
                raise InputError(f"{_flag(name)} should be finite, found {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed should be at least 0 and less than 2**32, found {self.seed}")
        for name in ("warmup", "weight_decay", "max_grad_norm", "save_every", "sample_tokens"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{_flag(name)} should not be negative, found {getattr(self, name)}")
        if not 0 <= self.lora_dropout < 1:
            raise InputError(f"--lora-dropout should be in [0, 1), found {self.lora_dropout}")
        if not 0 < self.held_out < 1:
            raise InputError(f"--held-out should be a fraction between 0 and 1, found {self.held_out}")
        if self.steps is not None and self.epochs is not None:
            raise InputError("--steps and --epochs say the same thing twice; give one of them")
        if self.seq_len is not None and self.seq_len < 8:
            raise InputError(f"--seq-len should be at least 8, found {self.seq_len}")
        if self.tiny_hidden % 64:
            raise InputError(f"--tiny-hidden should be a multiple of 64, found {self.tiny_hidden}")
        if self.schedule not in SCHEDULES:
            raise InputError(f"--schedule should be one of {', '.join(SCHEDULES)}, found {self.schedule}")
        if self.compute not in COMPUTE:
            raise InputError(f"--compute should be one of {', '.join(COMPUTE)}, found {self.compute}")
        if self.optim not in OPTIMIZERS:
            raise InputError(f"--optim should be one of {', '.join(OPTIMIZERS)}, found {self.optim}")
        for name in ("page_file", "page_budget"):
            if self.optim == "adamw" and getattr(self, name) is not None:
                raise InputError(f"{_flag(name)} needs a paged optimizer, and --optim is adamw")
        if self.page_file is not None and not os.path.isdir(self.page_file):
            raise InputError(f"--page-file should be a folder that is there, found {self.page_file}")

    def targets(self) -> str | list[str]:
        """``target_modules`` as :func:`qlora_kernels.quantize_model` takes it."""
        if self.target_modules == "all-linear":
            return self.target_modules
        return [part.strip() for part in self.target_modules.split(",") if part.strip()]

    def decisive(self) -> dict[str, Any]:
        """The options that decide the numbers."""
        values = asdict(self)
        return {name: values[name] for name in _DECISIVE}

    def differences(self, earlier: dict[str, Any]) -> list[str]:
        """What differs from the options of an earlier run, one phrase each."""
        now, earlier = self.decisive(), {"optim": "adamw", **earlier}  # the only one, before there was a choice
        return [
            f"{_flag(name)} was {earlier[name]} and is {now[name]}"
            for name in _DECISIVE
            if name in earlier and earlier[name] != now[name]
        ]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``qlora-kernels finetune``. A flag's destination is the name of the field."""
    d = {field.name: field.default for field in fields(Options)}

    def add(group, name: str, help: str, **more: Any) -> None:
        kind = d[name]
        if isinstance(kind, bool):
            more.setdefault("action", "store_true")
        else:
            more.setdefault("type", type(kind) if kind is not None else str)
            more.setdefault("metavar", {int: "N", float: "X"}.get(more["type"], "PATH"))
            if kind is not None:
                help += f" (default {kind})"
        group.add_argument(_flag(name), dest=name, default=kind, help=help, **more)

    group = parser.add_argument_group("model, data, output")
    add(
        group,
        "model",
        "'tiny', a byte-level model that is pretrained here first; or a Hugging Face folder or id; or a 4-bit folder "
        "from 'qlora-kernels quantize'",
        metavar="MODEL",
    )
    add(
        group,
        "data",
        "a text file, a folder of text files, or JSONL lines with 'prompt' and 'completion' (loss on completions "
        "only); default: the language reference text that ships with Python",
    )
    add(group, "out", "folder for the adapter, metrics.json, loss.png and the checkpoint (default runs/MODEL)")
    add(group, "cache", "folder that keeps the pretrained tiny model; runs may share it (default: the output folder)")
    add(group, "held_out", "fraction of the data held out for evaluation")
    add(group, "eval_tokens", "evaluate on at most this many held-out tokens")
    add(group, "device", "device to train on", metavar="DEVICE")
    add(
        group,
        "compute",
        "type of activations: bfloat16, float32, or auto: bfloat16 where the processor has instructions for it",
        choices=COMPUTE,
        metavar="TYPE",
    )
    group = parser.add_argument_group("training")
    add(group, "steps", "optimizer steps (default 300)", type=int)
    add(group, "epochs", "passes over the training data, instead of --steps", type=float)
    add(
        group,
        "train_seconds",
        "on a slow machine, do fewer steps than asked for to end within this time (default 100 for the tiny model when "
        "neither --steps nor --epochs is given, else no limit)",
        type=float,
    )
    add(group, "batch_size", "sequences in a forward pass")
    add(group, "grad_accum", "forward passes in an optimizer step")
    add(group, "seq_len", "tokens in a sequence (default 128 for tiny, else 512)", type=int)
    add(group, "gradient_checkpointing", "recompute activations in the backward pass: less memory, more time")
    add(
        group,
        "optim",
        "paged_adamw, paged_adamw_8bit (a quarter of the states' memory), paged_lion (half of it), or adamw: torch's",
        choices=OPTIMIZERS,
        metavar="NAME",
    )
    add(group, "page_file", "keep the states of a paged optimizer in a file in this folder (CPU)", metavar="FOLDER")
    add(
        group,
        "page_budget",
        "most bytes of a paged optimizer's states on the device at a time (CUDA; default: as many as there are)",
        type=int,
        metavar="BYTES",
    )
    add(
        group,
        "lr",
        "peak learning rate of the adapters (default 4e-3 for tiny, else 2e-4; for paged_lion a third of it for tiny, "
        "else a tenth)",
        type=float,
    )
    add(
        group,
        "full_lr",
        "that of full fine-tuning with --compare (default 1e-3 for tiny, else 1e-5; for paged_lion likewise less)",
        type=float,
    )
    add(group, "warmup", "steps of linear warmup; below 1, a fraction of all steps")
    add(group, "schedule", "learning rate after the warmup", choices=SCHEDULES, metavar="NAME")
    add(group, "weight_decay", "weight decay, decoupled: parameters shrink by lr times this in a step")
    add(group, "max_grad_norm", "clip the norm of all gradients to this; 0 does not clip")
    add(group, "seed", "seed of initial values, data order, dropout and sampling")
    group = parser.add_argument_group("adapters")
    add(group, "rank", "rank of the adapters")
    add(group, "alpha", "the low-rank term is scaled by alpha / rank")
    add(group, "lora_dropout", "dropout on the adapter's input")
    add(group, "rslora", "scale by alpha / sqrt(rank) instead")
    add(
        group,
        "target_modules",
        "comma-separated names of the layers that get adapters; all are quantized",
        metavar="NAMES",
    )
    group.add_argument(
        "--no-double-quant",
        dest="double_quant",
        action="store_false",
        help="keep the block constants in float32: 4.5 bits per weight instead of 4.127",
    )
    group = parser.add_argument_group("the run")
    add(
        group,
        "compare",
        "also train LoRA on the 16-bit base, and all weights, for comparison (twice the time)",
    )
    add(group, "resume", "go on from the checkpoint in the output folder")
    add(group, "save_every", "steps between checkpoints; 0 saves only at the end of a phase and when interrupted")
    add(group, "sample_tokens", "length of the generated sample; 0 for none")
    add(group, "quiet", "no progress bars and no notes, only the table")
    group = parser.add_argument_group("the tiny model")
    add(group, "tiny_hidden", "its hidden size, a multiple of 64")
    add(group, "tiny_layers", "its layers")
    add(group, "tiny_seq_len", "tokens in a sequence of its pretraining")
    add(group, "pretrain_steps", "optimizer steps of its pretraining, 8 sequences each")
    add(group, "pretrain_seconds", "on a slow machine, do fewer steps than that to end within this time")


def from_arguments(namespace: argparse.Namespace) -> Options:
    """Options from parsed flags, resolved."""
    return Options(**{f.name: getattr(namespace, f.name) for f in fields(Options)}).resolve()
