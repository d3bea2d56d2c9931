"""Options of ``qlora-kernels bench``: flags, checks, and the points that they choose."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..native.bfloat16 import slow_bfloat16
from .case import OURS, Settings
from .contenders.names import DENSE, DENSE_F32, GGML, INT4
from .instruction_sets import SETS
from .points import (
    CARD_OPERATIONS,
    CPU_OPERATIONS,
    DTYPES,
    FULL_MINUTES_CUDA,
    MINUTES,
    MODELS,
    OPTIMIZER,
    RANK,
    SWEEPS,
    K,
    N,
    Point,
    gpt2,
    rank_study,
)

#: What each operation is measured over.
AXES = {
    "limits": ("dtypes",),
    "quantize": ("shapes", "dtypes"),
    "dequantize": ("shapes", "dtypes"),
    "dequantize_out": ("shapes", "dtypes"),
    "linear_forward": ("shapes", "rows", "ranks", "dtypes"),
    "linear_busy": ("shapes", "rows", "dtypes"),
    "linear_dx": ("shapes", "rows", "dtypes"),
    "linear_step": ("shapes", "rows", "ranks", "dtypes"),
    "linear_backward": ("shapes", "rows", "ranks", "dtypes"),
    "experts": ("rows", "dtypes"),
    "decode": ("models", "ranks", "dtypes"),
    "block_step": ("models", "rows", "ranks", "dtypes"),
    "adamw_step": ("models", "ranks"),
    "adamw_clipped_step": ("models", "ranks"),
    "adamw_8bit_step": ("models", "ranks"),
    "lion_step": ("models", "ranks"),
    "adamw_paged_step": ("models", "ranks"),
    "adamw_budget_step": ("models", "ranks"),
    "finetune": ("ranks",),
    "gpt2_forward": ("ranks", "dtypes"),
    "rank_study": ("ranks",),
}
_DEFAULTS = {
    "shapes": [(N, K)],
    "rows": [1, 16, 512],
    "ranks": [RANK],
    "models": ["llama-2-7b"],
}
#: What --rivals measures.
RIVALS = (OURS, DENSE, DENSE_F32, INT4, GGML)
_NEEDS_ADAPTER = (
    *(
        "linear_backward",
        "decode",
        "block_step",
        *OPTIMIZER,
        *CARD_OPERATIONS,
        "finetune",
        "gpt2_forward",
        "rank_study",
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    what = parser.add_argument_group("what to measure")
    size = what.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a look at everything, in less than two minutes")
    size.add_argument("--full", action="store_true", help="every axis: within eight minutes on a card, hours on a CPU")
    size.add_argument("--card", action="store_true", help="on a card, the cases that have bars, within three minutes")
    size.add_argument("--bars", action="store_true", help="on a CPU, the cases that have bars")
    size.add_argument(
        "--rivals",
        action="store_true",
        help="within a minute, forward beside torch's products and ggml's; shown, and written only with --out",
    )
    what.add_argument("--operations", metavar="NAMES", help=f"only these, separated by commas: {', '.join(AXES)}")
    what.add_argument("--shapes", metavar="NxK,...", help=f"weights, such as {N}x{K},11008x4096")
    what.add_argument("--rows", metavar="M,...", help="rows of x, such as 1,16,512")
    what.add_argument("--ranks", metavar="R,...", help="of the adapter, such as 0,16,64; 0 for none")
    what.add_argument(
        "--dtypes",
        metavar="NAMES",
        help=f"{', '.join(DTYPES)} (default: bfloat16; where it is slow, float32, but not for --bars and --card)",
    )
    what.add_argument("--models", metavar="NAMES", help=", ".join(name for name in MODELS if name != "tiny"))
    what.add_argument("--list", action="store_true", help="show what would be measured, and end")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a card if there is one"
    )
    how.add_argument(
        "--isa",
        metavar="SET",
        help="on a CPU, limit this package, torch and its libraries to a set: " + ", ".join(SETS),
    )
    how.add_argument("--threads", type=int, metavar="N", help="of the CPU (default: as many as torch uses here)")
    how.add_argument(
        "--seconds", type=float, metavar="X", help="to time a case, at most (default 6; with --quick and --rivals 1.5)"
    )
    how.add_argument("--minutes", type=float, metavar="X", help="for all; what does not fit is left out and named")
    how.add_argument(
        "--retries",
        type=int,
        default=0,
        metavar="N",
        help="measure a case again, up to N times, while other processes disturb it; the quietest time counts",
    )
    out = parser.add_argument_group("results")
    out.add_argument("--out", metavar="FILE", help="JSON lines (default: bench-DEVICE-DATE.jsonl, here)")
    out.add_argument(
        "--into", metavar="FOLDER", help="a file there, named after processor, instruction set and threads"
    )
    out.add_argument("--no-plots", dest="plots", action="store_false", help="no PNG files beside it")
    out.add_argument("--quiet", action="store_true", help="no progress")
    out.add_argument("--show", metavar="FILE", help="the tables of an earlier result, and measure nothing")
    out.add_argument(
        "--compare", nargs=2, metavar=("A", "B"), help="what became slower from one result to another; measure nothing"
    )


def slow_dtype(namespace: argparse.Namespace) -> str | None:
    """Why float32 is measured rather than bfloat16, as a clause; None where bfloat16 is, or the user has chosen.

    To be called within :func:`qlora_kernels.bench.instruction_sets.limited_to`.

    Products in bfloat16 are emulated on some machines, and nobody would use them there. The bars are for bfloat16.
    """
    if namespace.dtypes is not None or namespace.bars or namespace.card:
        return None
    return slow_bfloat16(_device(namespace))


def points_of(namespace: argparse.Namespace, dtype: str = "bfloat16") -> list[Point]:
    """What to measure: a sweep, in other dtypes or cut down to some operations; or every combination of axes.

    Args:
        namespace: the flags.
        dtype: of activations and results, where no flag says which.

    Raises:
        InputError: for a value that no operation has.
    """
    parsers: dict[str, Callable[[str], list]] = {
        "operations": lambda text: _words(text, "--operations", AXES),
        "shapes": lambda text: [_shape(word) for word in text.split(",")],
        "rows": lambda text: _numbers(text, "--rows", 1),
        "ranks": lambda text: _numbers(text, "--ranks", 0),
        "dtypes": lambda text: _words(text, "--dtypes", DTYPES),
        "models": lambda text: _words(text, "--models", MODELS),
    }
    given = {name: parsers[name](text) for name, text in _chosen(namespace).items()}
    operations = given.pop("operations", None)
    given = {name: given.get(name) for name in ("dtypes", *_DEFAULTS)}
    usual = {**_DEFAULTS, "dtypes": [dtype]}
    if given["dtypes"] and operations is None and not any(given[name] for name in _DEFAULTS):
        points = [point for one in given["dtypes"] for point in SWEEPS[_sweep(namespace)](one)]
    elif any(given.values()):
        points = _combined(operations or ["linear_forward"], given, usual)
    else:
        points = SWEEPS[_sweep(namespace)](dtype)
        if operations is not None:
            points = [p for p in points if p.operation in (*operations, "limits")]
            missing = [name for name in operations if name not in {p.operation for p in points}]
            points += _combined(missing, given, usual) if missing else []
    return list(dict.fromkeys(points))


def _chosen(namespace: argparse.Namespace) -> dict[str, str]:
    """Operations and axes, as far as they were given, as they were given."""
    texts = {name: getattr(namespace, name) for name in ("operations", "dtypes", *_DEFAULTS)}
    return {name: text for name, text in texts.items() if text is not None}


def _sweep(namespace: argparse.Namespace) -> str:
    return next((name for name in ("quick", "full", "card", "bars", "rivals") if getattr(namespace, name)), "usual")


def sweep_of(namespace: argparse.Namespace) -> str:
    """What was asked for, as a result tells it: a sweep, and the operations and axes that were chosen instead."""
    chosen = [f"--{name} {text}" for name, text in _chosen(namespace).items()]
    return " ".join([_sweep(namespace), *chosen])


def _combined(operations: Sequence[str], given: dict[str, list | None], usual: dict[str, list[Any]]) -> list[Point]:
    """Every combination of what was given, and of what is usual where nothing was."""
    dtypes = given["dtypes"] or usual["dtypes"]
    for name in (name for name, values in given.items() if values):
        if not any(name in AXES[operation] for operation in operations):
            raise InputError(f"--{name} says nothing about {', '.join(operations)}")
    points = []
    if "limits" not in operations:
        points += [Point("limits", dtype) for dtype in dtypes]
    for operation in operations:
        if operation == "gpt2_forward":
            points += gpt2(given["ranks"], dtypes)
            continue
        if operation == "rank_study" and not given["ranks"]:
            points += rank_study()
            continue
        axes = {name: (given[name] or usual[name]) if name in AXES[operation] else [None] for name in usual}
        ranks = [r for r in axes["ranks"] if r or operation not in _NEEDS_ADAPTER]
        if not ranks:
            raise InputError(f"{operation} needs an adapter: --ranks should hold a number above 0")
        for dtype in axes["dtypes"]:
            for model in axes["models"]:
                for shape in axes["shapes"]:
                    for rank in ranks:
                        for m in axes["rows"] if operation != "decode" else [1]:
                            n, k = shape or (None, None)
                            points.append(Point(operation, dtype or "float32", n, k, m, rank, model))
    return [_without_dtype(point) for point in points]


def _without_dtype(point: Point) -> Point:
    """The tiny model's own choice is not the point's."""
    tiny = point.operation in ("finetune", "rank_study")
    return dataclasses.replace(point, dtype="bfloat16") if tiny else point


def settings_of(namespace: argparse.Namespace) -> Settings:
    """How to measure.

    Raises:
        InputError: for a device that is not there, and for numbers out of range.
    """
    device = _device(namespace)
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device cuda: torch {torch.__version__} sees no card here")
    threads = torch.get_num_threads() if namespace.threads is None else namespace.threads
    if threads < 1:
        raise InputError(f"--threads should be at least 1, found {threads}")
    usual = 1.5 if namespace.quick or namespace.rivals else Settings.seconds
    seconds = usual if namespace.seconds is None else namespace.seconds
    if not 0 < seconds <= 86400:
        raise InputError(f"--seconds should be positive, and at most a day, found {seconds:g}")
    if namespace.minutes is not None and not 0 < namespace.minutes < float("inf"):
        raise InputError(f"--minutes should be positive, found {namespace.minutes:g}")
    if namespace.into is not None and namespace.out is not None:
        raise InputError("--into and --out each say where the result goes; give one of them")
    if namespace.retries < 0:
        raise InputError(f"--retries should not be negative, found {namespace.retries}")
    # More time than usual is for more rounds.
    rounds = round(Settings.max_rounds * max(1.0, seconds / Settings.seconds))
    if namespace.isa is not None and device != "cpu":
        raise InputError(f"--isa {namespace.isa} is for a CPU; add --device cpu")
    only = RIVALS if namespace.rivals else ()
    return Settings(device, threads, cache_bytes=largest_cache(device), seconds=seconds, max_rounds=rounds, only=only)


def _device(namespace: argparse.Namespace) -> str:
    if namespace.device != "auto":
        return namespace.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(points: Sequence[Point], device: str) -> None:
    """
    Raises:
        InputError: for operations that the device does not have.
    """
    lacking = dict.fromkeys(p.operation for p in points if p.operation in CARD_OPERATIONS and device != "cuda")
    if lacking:
        raise InputError(f"{', '.join(lacking)} can only be measured on a card; choose others with --operations")


def on_device(points: Sequence[Point], device: str) -> list[Point]:
    """Without the operations that only a CPU has, on a card.

    Raises:
        InputError: where none is left.
    """
    left = [p for p in points if device == "cpu" or p.operation not in CPU_OPERATIONS]
    if points and not left:
        raise InputError(f"{', '.join(CPU_OPERATIONS)} can only be measured on a CPU; add --device cpu")
    return left


def minutes_of(namespace: argparse.Namespace, device: str) -> float | None:
    """For all cases, or None."""
    if namespace.minutes is not None:
        return namespace.minutes
    sweep = _sweep(namespace)
    return FULL_MINUTES_CUDA if sweep == "full" and device == "cuda" else MINUTES[sweep]


def largest_cache(device: str) -> int:
    """Bytes of the last cache before memory: as the system tells, or else 64 MiB; thrice a card's."""
    if device == "cuda":
        return 3 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
        sizes.append(int(text.rstrip("KMG")) * units.get(text[-1], 1))
    # A virtual machine may be told of a cache that it shares with many: no more than a 32nd of the memory is spent.
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 32
    return min(max(sizes, default=64 << 20), limit)


def _words(text: str, flag: str, known: Sequence[str] | dict) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    wrong = [word for word in words if word not in known]
    if wrong or not words:
        raise InputError(f"{flag} should be some of {', '.join(known)}; found {', '.join(wrong) or 'nothing'}")
    return words


def _numbers(text: str, flag: str, least: int) -> list[int]:
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        raise InputError(f"{flag} should be whole numbers separated by commas, found {text or 'nothing'}") from None
    if min(numbers) < least:
        raise InputError(f"{flag} should be at least {least}, found {min(numbers)}")
    return numbers


def _shape(word: str) -> tuple[int, int]:
    parts = [number.strip() for number in word.lower().split("x")]
    # More digits than these are no size, and some thousand of them int() refuses.
    numbers = [int(number) for number in parts if number.isascii() and number.isdecimal() and len(number) < 10]
    if len(parts) != 2 or len(numbers) != 2 or min(numbers) < 1:
        raise InputError(f"--shapes should be weights such as {N}x{K}, separated by commas; found {word or 'nothing'}")
    return numbers[0], numbers[1]
