"""One product several times, each with another value of an environment variable: python -m bench.card.variants SET

SET is "kernels": QLORA_KERNELS_CUDA_KERNEL, the kernels that could take a product against each other; or "early":
QLORA_KERNELS_CUDA_EARLY, whether a product may start before the adapter's is done. Contenders are named after the
values and take turns, as in `qlora-kernels bench`, whose result file this writes. A point after a fault begins in a new
process.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from qlora_kernels.bench.case import Case, Contender, Ready, Settings
from qlora_kernels.bench.command import run
from qlora_kernels.bench.contenders.weights import Lab
from qlora_kernels.bench.operations import CASES
from qlora_kernels.bench.options import largest_cache
from qlora_kernels.bench.points import Point
from qlora_kernels.bench.report import results
from qlora_kernels.bench.timing.measure import start

_SQUARE, _WIDE = (4096, 4096), (14336, 4096)
_TILES = ("tiles128", "tiles128wide", "tiles128x3")
_LARGE = ("warpgroup128", *_TILES)


def _points(
    rows: Sequence[int],
    values: Sequence[str],
    operation: str = "linear_forward",
    rank: int | None = 0,
    shapes=(_SQUARE,),
):
    return {Point(operation, n=n, k=k, m=m, rank=rank): values for n, k in shapes for m in rows}


#: For each set, the variable, and the values to compare at each point. What is worth most comes first.
SETS: dict[str, tuple[str, dict[Point, Sequence[str]]]] = {
    "kernels": (
        "QLORA_KERNELS_CUDA_KERNEL",
        {
            **_points((4096, 2048, 1024), _LARGE),
            **_points((4096,), _TILES, "linear_dx", None),
            **_points((1, 4), ("few", "warpgroup16", "middle8", "tiles16")),
            **_points((16,), ("warpgroup16", "middle16", "tiles16")),
            **_points((64,), ("warpgroup64", "middle32", "tiles64", "tiles128")),
            **_points((4096,), _LARGE, shapes=(_WIDE,)),
            **_points((8,), ("few", "warpgroup16", "middle8", "tiles16")),
            **_points((32,), ("warpgroup32", "middle32", "tiles32")),
            **_points((512, 256), ("tiles64", *_LARGE)),
        },
    ),
    "early": (
        "QLORA_KERNELS_CUDA_EARLY",
        _points((1, 16, 64, 512, 4096), ("1", "0"), rank=16),
    ),
}


def _prepared(contender: Contender, variable: str, value: str) -> Ready:
    """A contender that is set up, and always called, with this value."""
    ready = _with(contender.prepare, variable, value)()
    return replace(ready, call=_with(ready.call, variable, value))


def _with(function: Callable[..., Any], variable: str, value: str) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        before = os.environ.get(variable)
        os.environ[variable] = value
        try:
            return function(*arguments)
        finally:
            if before is None:
                del os.environ[variable]
            else:
                os.environ[variable] = before

    return call


def case_of(chosen: str, lab: Lab) -> Case:
    """This package's contender of a point, once for each value."""
    variable, points = SETS[chosen]
    case = CASES[lab.point.operation](lab)
    ours = case.contenders[0]
    values = [Contender(value, partial(_prepared, ours, variable, value)) for value in points[lab.point]]
    return Case(f"{case.title}, {variable}", case.flops, values)


def begin(
    chosen: str,
    settings: Settings,
    point: Point,
    without: Mapping[str, str] | None = None,
    announce: Callable[[str], None] = lambda name: None,
) -> Any:
    """A measurement of a point; see :func:`qlora_kernels.bench.operations.begin`."""
    return start(case_of(chosen, Lab(settings, point)), settings, point, without, announce)


def measure(chosen: str, settings: Settings, minutes: float, out: Path, cases: Any = None) -> int:
    """Measures a set and writes the result after each point; 1 when a point has no figure at all."""
    points = list(SETS[chosen][1])
    found = results.begin(settings, f"variants {chosen}")
    with closing(cases or run(points, settings, minutes, begin=partial(begin, chosen))) as measured:
        for case in measured:
            found["cases"].append(case)
            results.save(found, out)
    found["complete"] = True
    results.save(found, out)
    return int(any(all("failed" in one for one in case["contenders"]) for case in found["cases"]))


def main(argv: Sequence[str] | None = None) -> int:
    import torch

    parser = argparse.ArgumentParser(prog="python -m bench.card.variants", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("chosen", choices=SETS, metavar="SET", help=", ".join(SETS))
    parser.add_argument("--minutes", type=float, default=1.0, metavar="X", help="for all (default 1)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(f"no CUDA device is seen by torch {torch.__version__}: nothing to measure", file=sys.stderr)
        return 2
    settings = Settings("cuda", torch.get_num_threads(), cache_bytes=largest_cache("cuda"), seconds=3.0)
    return measure(arguments.chosen, settings, arguments.minutes, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
