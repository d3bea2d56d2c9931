"""Measures everything of a suite and prints the tables:

python -m bench.run --out bench/results/cpu-NAME.json
python -m bench.run --suite optimizer --out bench/results/optimizer-NAME.json

``pytest bench/ --benchmark-only`` measures the same cases under pytest-benchmark.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from qlora_kernels.bench.common import Case, Settings, measure
from qlora_kernels.bench.contenders import Lab
from qlora_kernels.bench.operations import dequantize, linear_forward, linear_step, optimizer, quantize

from . import results as result_files
from . import tables

SUITES = {
    "linear": (quantize, dequantize, linear_forward, linear_step),
    "optimizer": (optimizer,),
}


def all_cases(lab: Lab, suite: str = "linear") -> Iterator[Case]:
    for module in SUITES[suite]:
        yield from module.cases(lab)


def run(settings: Settings, retries: int = 0, show: bool = True, suite: str = "linear") -> dict[str, Any]:
    """Measures every case of a suite.

    Args:
        settings: sizes and durations.
        retries: see :func:`qlora_kernels.bench.common.measure`.
        show: name each case on stderr as it begins.
        suite: one of SUITES.

    Returns:
        The result, as :func:`bench.results.save` writes it.
    """
    results = result_files.begin(settings, suite)
    lab = Lab(settings)
    start = time.monotonic()
    for case in all_cases(lab, suite):
        if show:
            print(f"{time.monotonic() - start:6.1f} s  {case.name}", file=sys.stderr, flush=True)
        results["cases"].append(measure(case, settings, retries))
    if show:
        print(f"{time.monotonic() - start:6.1f} s  done", file=sys.stderr, flush=True)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    default = Settings()
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__.splitlines()[0])
    parser.add_argument("--out", metavar="FILE", help="write the result here, as JSON")
    parser.add_argument("--suite", choices=SUITES, default="linear", help="what to measure (default %(default)s)")
    parser.add_argument(
        "--size", type=int, default=default.n, metavar="N", help="N = K, or the hidden size (default %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=default.threads, metavar="N", help="default %(default)s")
    parser.add_argument(
        "--seconds", type=float, default=default.seconds, metavar="X", help="for each case (default %(default)s)"
    )
    parser.add_argument(
        "--min-rounds", type=int, default=default.min_rounds, metavar="N", help="at least (default %(default)s)"
    )
    parser.add_argument(
        "--retries",
        type=int,
        default=0,
        metavar="N",
        help="measure a case again, up to N times, while other processes disturb it; the quietest time counts",
    )
    arguments = parser.parse_args(argv)
    settings = Settings(
        n=arguments.size,
        k=arguments.size,
        threads=arguments.threads,
        seconds=arguments.seconds,
        min_rounds=arguments.min_rounds,
    )
    results = run(settings, arguments.retries, suite=arguments.suite)
    if arguments.out:
        result_files.save(results, arguments.out)
    print(tables.terminal(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
