"""How fast this package sets out to be on a CPU: ratios that a run is held against, for two threads.

They are shown beside what was reached and asserted nowhere: a time on somebody else's machine is no test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qlora_kernels.bench.case import OURS
from qlora_kernels.bench.contenders.names import BNB, DENSE, FOREACH, FUSED, PEFT
from qlora_kernels.bench.points import RANK, K, N, Point, point_of
from qlora_kernels.bench.report.ratios import find_contender, ratio_to_ours

BARS_THREADS = 2


@dataclass(frozen=True)
class Bar:
    """At this point the contender should take at least so many times as long as this package."""

    point: Point
    contender: str
    at_least: float


def _forward(m: int) -> Point:
    return Point("linear_forward", n=N, k=K, m=m, rank=0)


def _step(m: int) -> Point:
    return Point("linear_step", n=N, k=K, m=m, rank=RANK)


def _optimizer(name: str) -> Point:
    return Point(name, "float32", rank=RANK, model="llama-2-7b")


BARS = (
    Bar(_forward(1), BNB, 30),
    Bar(_forward(1), DENSE, 4),
    Bar(_forward(16), BNB, 10),
    Bar(_forward(16), DENSE, 1.5),
    Bar(_forward(64), BNB, 4.5),
    Bar(_forward(64), DENSE, 1.1),
    Bar(_forward(512), BNB, 1.6),
    Bar(_forward(512), DENSE, 0.95),
    Bar(_step(512), PEFT, 2),
    Bar(_step(16), PEFT, 8),
    Bar(Point("dequantize", n=N, k=K), BNB, 4),
    Bar(Point("quantize", "float32", n=N, k=K), BNB, 20),
)
OPTIMIZER_BARS = (
    Bar(_optimizer("adamw_step"), FUSED, 1),
    Bar(_optimizer("adamw_step"), FOREACH, 3),
    Bar(_optimizer("adamw_clipped_step"), FUSED, 1),
)


@dataclass(frozen=True)
class Verdict:
    """A bar and what was reached: a ratio, or None with the reason why there is none."""

    bar: Bar
    case: dict[str, Any]
    ratio: float | None
    reason: str | None = None

    @property
    def share(self) -> float:
        """What was reached of what was asked for; 0 when nothing was measured."""
        return 0.0 if self.ratio is None else self.ratio / self.bar.at_least

    @property
    def word(self) -> str:
        if self.ratio is None:
            return "not measured"
        return "pass" if self.share >= 1 else "miss"


def judge(results: dict[str, Any], bars: tuple[Bar, ...]) -> list[Verdict]:
    """Every bar with what was reached, the worst first.

    Raises:
        ValueError: when the results have no such case, or no such contender in a case that did not fail as a whole: a
            bar must not vanish by not being measured.
    """
    cases = {point_of(case): case for case in results["cases"]}
    verdicts = []
    for bar in bars:
        case = cases.get(bar.point)
        if case is None:
            raise ValueError(f"the results lack {bar.point}, for which there is a bar against {bar.contender}")
        contender = find_contender(case, bar.contender)
        if contender is None and "failed" not in case:
            raise ValueError(f"the results of {bar.point} lack {bar.contender}, against whom there is a bar")
        if contender is None:
            verdicts.append(Verdict(bar, case, None, case["failed"]))
            continue
        ratio = ratio_to_ours(case, contender)
        without = contender.get("failed") or (find_contender(case, OURS) or {}).get("failed", f"no {OURS}")
        verdicts.append(Verdict(bar, case, ratio, without if ratio is None else None))
    return sorted(verdicts, key=lambda verdict: verdict.share)
