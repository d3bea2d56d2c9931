"""Every case under pytest-benchmark: ``pytest bench/ --benchmark-only``.

pytest-benchmark times one function. Here that function is a whole round, in which all contenders take their turns in a
process of their own, and the clock moves on by this package's share of it alone.
"""

from __future__ import annotations

from typing import Any

import pytest

from qlora_kernels.bench.case import Settings
from qlora_kernels.bench.points import Point
from qlora_kernels.bench.timing.measure import failed_ours
from qlora_kernels.bench.worker import Remote, Worker


class RoundClock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = RoundClock()


def measure(benchmark: Any, worker: Worker, settings: Settings, point: Point) -> dict[str, Any]:
    """Measures a point with pytest-benchmark's fixture, whose table and JSON then hold it; needs CLOCK as its timer."""
    remote = Remote(worker, settings, point, {})

    def one_round() -> None:
        CLOCK.now += remote.round()

    benchmark.pedantic(one_round, rounds=remote.rounds, iterations=1)
    case = remote.result()
    benchmark.extra_info.update(case)
    return case


@pytest.mark.benchmark(timer=CLOCK)
def test_operation(benchmark, worker, settings, cases, point):
    benchmark.group = point.operation
    case = measure(benchmark, worker, settings, point)
    cases.append(case)
    assert failed_ours(case) is None
