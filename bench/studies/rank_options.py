"""Options of the rank study, and its flags: see :mod:`bench.studies.ranks`."""

from __future__ import annotations

import argparse
import itertools
import os
from dataclasses import dataclass, field, fields

from qlora_kernels.errors import InputError
from qlora_kernels.finetune.options import Options

RANKS = (1, 2, 4, 8, 64)
TARGETS = ("q_proj", "q_proj,v_proj", "all-linear")  # as --target-modules of finetune takes them
STEPS = 150  # on two cores, a cell in less than a minute
CACHE = os.path.join("runs", "rank_study")

# Options of finetune that a study can choose, for all cells alike.
_SHARED = {
    "steps": "optimizer steps of a cell",
    "lr": "peak learning rate, one for all ranks (default 4e-3)",
    "alpha": "the low-rank term is scaled by alpha / r, with one alpha for all ranks",
    "batch_size": "sequences in a step",
    "seq_len": "bytes in a sequence (default: as in pretraining)",
    "eval_tokens": "evaluate on at most this many held-out bytes",
    "tiny_hidden": "hidden size of the model, a multiple of 64",
    "tiny_layers": "its layers",
    "tiny_seq_len": "bytes in a sequence of its pretraining",
    "pretrain_steps": "optimizer steps of its pretraining",
    "pretrain_seconds": "on a slow machine, do fewer steps than that to end within this time",
}


@dataclass
class StudyOptions:
    """What a study does.

    Attributes:
        out: the result file.
        ranks: ascending.
        seeds: how many; seed s decides the initial values of A and the order of the batches, for all cells with it.
        restart: start over even if ``out`` holds cells.
        cache: the folder that keeps the pretrained base.
        shared: finetune's options for all cells; its rank, targets, seed and folders are not looked at.
    """

    out: str
    ranks: tuple[int, ...] = RANKS
    seeds: int = 1
    restart: bool = False
    cache: str = CACHE
    shared: Options = field(default_factory=lambda: Options(steps=STEPS))

    def cells(self) -> list[tuple[int, str, int]]:
        """(seed, targets, rank) of each cell: a whole table for a seed before the next one."""
        return list(itertools.product(range(self.seeds), TARGETS, self.ranks))

    def check(self) -> None:
        """
        Raises:
            InputError: for a value that cannot be used; the sentence names the flag.
        """
        if not self.ranks or min(self.ranks) < 1 or list(self.ranks) != sorted(set(self.ranks)):
            found = ",".join(map(str, self.ranks))
            raise InputError(f"--ranks should be numbers from 1 on, each of them once, found {found}")
        if self.seeds < 1:
            raise InputError(f"--seeds should be at least 1, found {self.seeds}")
        if not self.shared.is_tiny or self.shared.steps is None or self.shared.train_seconds is not None:
            raise InputError("a study is of the tiny model, for a given number of steps")
        if os.path.isdir(self.out):
            raise InputError(f"--out {self.out} cannot be written: it should be a file, and is a folder")


def make_parser() -> argparse.ArgumentParser:
    """The flags; those of finetune have its names."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.studies.ranks",
        description="Trains adapters of several ranks on several sets of layers over one NF4 base, and compares them. "
        "A call with the same --out and settings goes on with the cells that are missing.",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the result, JSON, written after each cell")
    parser.add_argument("--plot", metavar="FILE", help="write a plot too, PNG")
    ranks = ",".join(map(str, RANKS))
    parser.add_argument("--ranks", default=ranks, metavar="N,N,...", help="default %(default)s")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="repeat with so many (default %(default)s)")
    parser.add_argument(
        "--cache", default=CACHE, metavar="FOLDER", help="keeps the pretrained base (default %(default)s)"
    )
    parser.add_argument("--restart", action="store_true", help="start over, whatever cells --out holds")
    parser.add_argument("--rslora", action="store_true", help="scale by alpha / sqrt(r) instead")
    parser.add_argument("--quiet", action="store_true", help="no progress, only the table")
    defaults = {f.name: f.default for f in fields(Options)} | {"steps": STEPS}
    for name, meaning in _SHARED.items():
        default = defaults[name]
        kind = type(default) if default is not None else {"seq_len": int, "lr": float}[name]
        meaning += f" (default {default})" if default is not None else ""
        metavar = "N" if kind is int else "X"
        parser.add_argument("--" + name.replace("_", "-"), type=kind, default=default, metavar=metavar, help=meaning)
    return parser


def from_arguments(arguments: argparse.Namespace) -> StudyOptions:
    """
    Raises:
        InputError: for ranks that are no numbers.
    """
    try:
        ranks = tuple(sorted(int(part) for part in arguments.ranks.split(",")))
    except ValueError:
        raise InputError(f"--ranks should be numbers with commas between them, found {arguments.ranks}") from None
    a = arguments
    shared = Options(rslora=a.rslora, quiet=a.quiet, **{name: getattr(a, name) for name in _SHARED})
    return StudyOptions(a.out, ranks, a.seeds, a.restart, a.cache, shared)
