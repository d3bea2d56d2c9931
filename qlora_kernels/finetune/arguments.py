"""The flags of ``qlora-kernels finetune``, a group at a time. A flag's destination is a field of Options.

A flag that is not given leaves nothing behind, so that a file of settings, and then the defaults, can fill it in.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import fields
from typing import Any

from ..errors import InputError
from .config import read_config_file
from .options import COMPUTE, OPTIMIZERS, SCHEDULES, Options, Settings, flag

_DEFAULTS = {field.name: field.default for field in fields(Options)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags to a parser."""
    for title, add_group in (
        ("model, data, output", _add_model),
        ("training", _add_training),
        ("adapters", _add_adapters),
        ("the run", _add_run),
        ("the tiny model", _add_tiny_model),
    ):
        add_group(_Group(parser.add_argument_group(title)))


def from_arguments(namespace: argparse.Namespace) -> Settings:
    """The settings of a run from parsed flags, and from the file that ``--config`` names for those not given.

    Raises:
        InputError: for a value that cannot be used, or a file that cannot be read.
    """
    given = {name: value for name, value in vars(namespace).items() if name in _DEFAULTS}
    path = getattr(namespace, "config", None)
    values = {} if path is None else read_config_file(path)
    try:
        return Options(**{**values, **given}).resolve()
    except InputError as error:
        blamed = [name for name in values if name not in given and re.search(flag(name) + r"(?![\w-])", str(error))]
        raise InputError(f"--config {path}: {error}" if blamed else str(error)) from None


class _Group:
    """Flags whose type, default and metavar follow from the field of Options."""

    def __init__(self, group: argparse._ArgumentGroup) -> None:
        self.group = group

    def add(self, name: str, help: str, **more: Any) -> None:
        default = _DEFAULTS[name]
        if isinstance(default, bool):
            more.setdefault("action", argparse.BooleanOptionalAction)
        else:
            more.setdefault("type", type(default) if default is not None else str)
            more.setdefault("metavar", {int: "N", float: "X"}.get(more["type"], "PATH"))
            if default not in (None, ""):
                help += f" (default {default})"
        self.group.add_argument(flag(name), dest=name, default=argparse.SUPPRESS, help=help, **more)


def _add_model(group: _Group) -> None:
    group.add(
        "model",
        "'tiny', a byte-level model that is first pretrained on this machine; a Hugging Face folder or id; or a 4-bit "
        "folder, from 'qlora-kernels quantize' or of bitsandbytes",
        metavar="MODEL",
    )
    group.add(
        "data",
        "a text file, a folder of text files, or rows (JSONL, a JSON array, CSV, TSV, Parquet, or a Hugging Face data "
        "set's folder) with 'messages' (loss on the assistant's turns), 'prompt' and 'completion' (loss on "
        "completions), 'instruction' and 'output', or 'text'; default: the language reference that ships with Python",
    )
    group.add(
        "eval_data",
        "evaluate on this, in any form that --data takes, instead of on a part of the data",
    )
    group.add(
        "chat_template",
        "a chat template (Jinja) for messages, instead of the tokenizer's",
        metavar="FILE",
    )
    group.add("out", "folder for the adapter, metrics.json, loss.png and the checkpoint (default runs/MODEL)")
    group.add("cache", "folder that keeps the pretrained tiny model; runs may share it (default: the output folder)")
    group.add(
        "held_out",
        "fraction of the data held out for evaluation (default 0.1, or the data set's own split 'validation' or "
        "'test')",
        type=float,
    )
    group.add("eval_tokens", "evaluate on at most this many held-out tokens")
    group.add("device", "device to train on", metavar="DEVICE")
    group.add(
        "compute",
        "type of activations: bfloat16, float32, or auto: bfloat16 where there are instructions for it, else float32, "
        "which is faster there",
        choices=COMPUTE,
        metavar="TYPE",
    )


def _add_training(group: _Group) -> None:
    group.add("steps", "optimizer steps (default 200 for the tiny model, else 300)", type=int)
    group.add("epochs", "passes over the training data, instead of --steps", type=float)
    group.add(
        "train_seconds",
        "on a slow machine, do fewer steps than asked for to end within this time (default: 100 for the tiny model "
        "when neither --steps nor --epochs is given, else no limit)",
        type=float,
    )
    group.add("batch_size", "sequences in a forward pass")
    group.add("grad_accum", "forward passes in an optimizer step")
    group.add("seq_len", "tokens in a sequence (default 128 for tiny, else 512)", type=int)
    group.add("gradient_checkpointing", "recompute activations in the backward pass: less memory, more time")
    _add_optimizer(group)
    group.add("seed", "seed of initial values, data order, dropout and sampling")


def _add_optimizer(group: _Group) -> None:
    group.add(
        "optim",
        "paged_adamw, paged_adamw_8bit (a quarter of its state's memory), paged_lion (half of it), or adamw: torch's",
        choices=OPTIMIZERS,
        metavar="NAME",
    )
    group.add("page_file", "keep a paged optimizer's state in a file in this folder (CPU)", metavar="FOLDER")
    group.add(
        "page_budget",
        "at most this many bytes of a paged optimizer's state on the device at a time (CUDA; default: all of it)",
        type=int,
        metavar="BYTES",
    )
    group.add(
        "lr",
        "peak learning rate of the adapters (default 4e-3 for tiny, else 2e-4; with paged_lion a third of that for "
        "tiny, else a tenth)",
        type=float,
    )
    group.add(
        "full_lr",
        "peak learning rate of full fine-tuning, for --compare (default 1e-3 for tiny, else 1e-5; with paged_lion "
        "less, as for --lr)",
        type=float,
    )
    group.add("warmup", "steps of linear warmup; below 1, a fraction of all steps")
    group.add("schedule", "learning rate after the warmup", choices=SCHEDULES, metavar="NAME")
    group.add("weight_decay", "decoupled weight decay: each step shrinks parameters by lr times this")
    group.add("max_grad_norm", "clip the norm of all gradients to this; 0 does not clip")


def _add_adapters(group: _Group) -> None:
    group.add("rank", "rank of the adapters")
    group.add("alpha", "the low-rank term is scaled by alpha / rank")
    group.add("lora_dropout", "dropout on the adapter's input")
    group.add("rslora", "scale by alpha / sqrt(rank) instead")
    group.add(
        "target_modules",
        "comma-separated names of the layers that get adapters; all are quantized",
        metavar="NAMES",
    )
    group.add(
        "target_parameters",
        "comma-separated names of a mixture's weights, such as gate_up_proj,down_proj, that get an adapter for each "
        "expert (default: none)",
        metavar="NAMES",
    )
    group.group.add_argument(
        "--no-double-quant",
        dest="double_quant",
        action="store_false",
        default=argparse.SUPPRESS,
        help="keep the block constants in float32: 4.5 bits per weight instead of 4.127",
    )


def _add_run(group: _Group) -> None:
    group.group.add_argument(
        "--config",
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="take options from a YAML or TOML file, under their names here; those on the command line count more",
    )
    group.add("compare", "also train LoRA on the 16-bit base, and all weights, for comparison (twice the time)")
    group.add("resume", "go on from the checkpoint in the output folder")
    group.add("save_every", "steps between checkpoints; 0 saves only at the end of a phase and when interrupted")
    group.add("sample_tokens", "length of the generated sample; 0 for none")
    group.add(
        "report_to",
        "also send losses and rates to tensorboard (files in the output folder, under runs), wandb, or both, with a "
        "comma between, where they are installed",
        metavar="NAMES",
    )
    group.add("quiet", "no progress bars and no notes, only the table")


def _add_tiny_model(group: _Group) -> None:
    group.add("tiny_hidden", "its hidden size, a multiple of 64")
    group.add("tiny_layers", "number of layers")
    group.add("tiny_seq_len", "tokens in a sequence of its pretraining")
    group.add("pretrain_steps", "optimizer steps of its pretraining, 8 sequences each")
    group.add("pretrain_seconds", "on a slow machine, do fewer pretraining steps to end within this time")
