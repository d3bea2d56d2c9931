"""One call of this package, for a profiler to look into: python -m bench.card.profiled OPERATION N K M RANK

Everything before that call is outside the profiler's range: under `ncu --profile-from-start off` its kernels alone are
profiled. Counters, and with them times, are those of a kernel that is replayed again and again, so no measurement of
speed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from bench.card.facts import tool
from qlora_kernels.bench.case import Settings
from qlora_kernels.bench.contenders.weights import Lab
from qlora_kernels.bench.operations import CASES
from qlora_kernels.bench.points import Point

#: Calls before the one that is profiled.
WARM = 3


def words_of(point: Point) -> list[str]:
    """A point as this program's arguments."""
    return [point.operation, *(str(value or 0) for value in (point.n, point.k, point.m, point.rank))]


def point_of(words: Sequence[str]) -> Point:
    """The point that arguments name.

    Raises:
        ValueError: for other words.
    """
    operation, *numbers = words
    if operation not in CASES or len(numbers) != 4:
        raise ValueError(
            f"'{' '.join(words)}' is no product: OPERATION N K M RANK, such as linear_forward 4096 4096 16 0"
        )
    n, k, m, rank = map(int, numbers)
    return Point(operation, n=n, k=k, m=m or None, rank=rank)


def command(program: str, point: Point, log: str, python: Sequence[str]) -> list[str]:
    """ncu's command line. Clocks stay as they are on the card."""
    return [
        *(program, "--clock-control", "none", "--profile-from-start", "off", "--target-processes", "application-only"),
        *("--kernel-name-base", "mangled", "--kernel-name", "regex:qlk", "--set", "full", "--page", "details", "--csv"),
        *("--log-file", log, *python, *words_of(point)),
    ]


def ncu() -> str | None:
    return tool("ncu")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.card.profiled", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("point", nargs=5, metavar="WORD", help="operation, N, K, M, rank")
    point = point_of(parser.parse_args(argv).point)
    if not torch.cuda.is_available():
        print(f"no CUDA device is seen by torch {torch.__version__}: nothing to profile", file=sys.stderr)
        return 2
    ready = CASES[point.operation](Lab(Settings("cuda", cache_bytes=1), point)).contenders[0].prepare()
    for i in range(WARM):
        ready.run(i % ready.copies)
    torch.cuda.synchronize()
    with torch.cuda.profiler.profile():
        ready.run(WARM % ready.copies)
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
