"""How fast this package sets out to be: ratios that a run is held against, for two threads and N = K = 4096.

They are shown beside what was reached and asserted nowhere: a time on somebody else's machine is no test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qlora_kernels.bench.common import OURS
from qlora_kernels.bench.contenders import BNB, DENSE, FOREACH, FUSED, PEFT

BARS_SIZE, BARS_THREADS = 4096, 2


@dataclass(frozen=True)
class Bar:
    """In this case the contender should take at least so many times as long as this package."""

    operation: str
    m: int | None
    contender: str
    at_least: float


BARS = (
    Bar("linear_forward", 1, BNB, 30),
    Bar("linear_forward", 1, DENSE, 4),
    Bar("linear_forward", 16, BNB, 10),
    Bar("linear_forward", 16, DENSE, 1.5),
    Bar("linear_forward", 64, BNB, 4.5),
    Bar("linear_forward", 64, DENSE, 1.1),
    Bar("linear_forward", 512, BNB, 1.6),
    Bar("linear_forward", 512, DENSE, 0.95),
    Bar("linear_backward", 512, PEFT, 2),
    Bar("linear_backward", 16, PEFT, 8),
    Bar("dequantize", None, BNB, 4),
    Bar("quantize", None, BNB, 20),
)
OPTIMIZER_BARS = (
    Bar("adamw_step", None, FUSED, 1),
    Bar("adamw_step", None, FOREACH, 3),
    Bar("adamw_clipped_step", None, FUSED, 1),
)
#: By the suite that a result file is of.
SUITE_BARS = {"linear": BARS, "optimizer": OPTIMIZER_BARS}


@dataclass(frozen=True)
class Verdict:
    """A bar and what was reached: a ratio, or None with the reason why there is none."""

    bar: Bar
    title: str
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


def find_contender(case: dict[str, Any], name: str) -> dict[str, Any] | None:
    return next((c for c in case["contenders"] if c["name"] == name), None)


def title_of(case: dict[str, Any]) -> str:
    return case["title"] if case["m"] is None else f"{case['title']}, M = {case['m']}"


def ratio_to_ours(case: dict[str, Any], contender: dict[str, Any]) -> float | None:
    """How many times as long as this package the contender took, by medians; None for one that failed."""
    if "failed" in contender:
        return None
    return contender["median_ms"] / find_contender(case, OURS)["median_ms"]


def suite_of(results: dict[str, Any]) -> str:
    """Which of :data:`bench.run.SUITES` a result is of."""
    return results.get("suite", "linear")


def bars_apply(results: dict[str, Any]) -> bool:
    """Whether a result is of the size and threads that the bars are for."""
    s = results["settings"]
    return s["n"] == s["k"] == BARS_SIZE and s["threads"] == BARS_THREADS


def judge(results: dict[str, Any], bars: tuple[Bar, ...] | None = None) -> list[Verdict]:
    """Every bar (by default of the results' suite) with what was reached, the worst first.

    Raises:
        ValueError: when the results have no such case or contender: a bar must not vanish by not being measured.
    """
    cases = {(case["operation"], case["m"]): case for case in results["cases"]}
    verdicts = []
    for bar in SUITE_BARS[suite_of(results)] if bars is None else bars:
        where = bar.operation if bar.m is None else f"{bar.operation}, M = {bar.m}"
        case = cases.get((bar.operation, bar.m))
        if case is None:
            raise ValueError(f"the results lack {where}, for which there is a bar against {bar.contender}")
        contender = find_contender(case, bar.contender)
        if contender is None:
            raise ValueError(f"the results of {where} lack {bar.contender}, against whom there is a bar")
        verdicts.append(Verdict(bar, title_of(case), ratio_to_ours(case, contender), contender.get("failed")))
    return sorted(verdicts, key=lambda verdict: verdict.share)
