"""How fast this package sets out to be: for each kind of device, ratios that a run is held against.

They stand beside what was reached and fail nothing: a time on someone else's machine is no test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..case import OURS
from ..contenders.names import (
    BNB,
    COPY,
    DENSE,
    DEQUANTIZED,
    EQUAL_COPY,
    FOREACH,
    FUSED,
    LINK,
    NO_ADAPTER,
    PEFT,
)
from ..points import DTYPES, RANK, K, N, Point, point_of
from .ratios import find_contender, gb_per_s, ratio_to_ours

#: The CPU's bars are for so many threads.
BARS_THREADS = 2
#: On a card, a call should return to Python within this time.
HOST_MS = 0.015


def _of_bandwidth(case: dict[str, Any], contender: str, results: dict[str, Any]) -> float | None:
    """This package's bytes per second, of the large copy's."""
    ours = find_contender(case, OURS)
    roofs = (find_contender(c, contender) for c in results["cases"] if c["operation"] == "limits")
    roof = next((one for one in roofs if one and "failed" not in one), None)
    if ours is None or roof is None or "failed" in ours:
        return None
    rate, most = gb_per_s(ours), gb_per_s(roof)
    return rate / most if rate and most else None


def _by_medians(case: dict[str, Any], contender: str, results: dict[str, Any]) -> float | None:
    other = find_contender(case, contender)
    return None if other is None else ratio_to_ours(case, other)


def _by_wall(case: dict[str, Any], contender: str, results: dict[str, Any]) -> float | None:
    ours, other = find_contender(case, OURS), find_contender(case, contender)
    if not ours or not other or not ours.get("wall_ms") or not other.get("wall_ms"):
        return None
    return other["wall_ms"] / ours["wall_ms"]


def _by_host(case: dict[str, Any], contender: str, results: dict[str, Any]) -> float | None:
    ours = find_contender(case, OURS)
    return HOST_MS / ours["host_ms"] if ours and ours.get("host_ms") else None


#: What can be compared, and how: from a case, the bar's contender and the whole result to what was reached.
MEASURES: dict[str, Callable[[dict[str, Any], str, dict[str, Any]], float | None]] = {
    "time": _by_medians,
    "time by the wall clock": _by_wall,
    "time on the host": _by_host,
    "share of its bandwidth": _of_bandwidth,
}


@dataclass(frozen=True)
class Bar:
    """What this package should reach at a point.

    Attributes:
        point: where.
        contender: it should take at least ``at_least`` times as long as this package; or, of OURS, what is asked of
            this package alone.
        at_least: the ratio.
        measure: a key of MEASURES.
    """

    point: Point
    contender: str
    at_least: float
    measure: str = "time"

    @property
    def title(self) -> str:
        if self.measure == "time on the host":
            return f"{self.point}: {HOST_MS * 1e3:.0f} us on the host"
        how = "" if self.measure == "time" else f", {self.measure}"
        return f"{self.point}: {self.contender}{how}"


def _forward(m: int, n: int = N, rank: int = 0) -> Point:
    return Point("linear_forward", n=n, k=K, m=m, rank=rank)


def _step(m: int) -> Point:
    return Point("linear_step", n=N, k=K, m=m, rank=RANK)


def _optimizer(name: str) -> Point:
    return Point(name, "float32", rank=RANK, model="llama-2-7b")


LAYER_BARS = (
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
_WIDE = 14336  # N of an 8-billion-parameter Llama's MLP
CARD_BARS = (
    *(Bar(Point("dequantize", dtype, 8192, 8192), COPY, 0.90, "share of its bandwidth") for dtype in DTYPES),
    *(Bar(Point("dequantize", dtype, 4096, 4096), BNB, 2.0) for dtype in DTYPES),
    Bar(_forward(1), EQUAL_COPY, 0.55),
    Bar(_forward(1), DENSE, 2.2),
    Bar(_forward(1), BNB, 1.8),
    Bar(_forward(1), OURS, 1.0, "time on the host"),
    Bar(_forward(1, _WIDE), EQUAL_COPY, 0.80),
    Bar(_forward(1, _WIDE), DENSE, 3.0),
    Bar(_forward(16), DENSE, 2.0),
    Bar(_forward(16), BNB, 4.0),
    Bar(_forward(64), DENSE, 1.6),
    Bar(_forward(64), BNB, 4.0),
    Bar(_forward(16, _WIDE), DENSE, 3.0),
    Bar(_forward(64, _WIDE), DENSE, 2.1),
    Bar(_forward(512), DENSE, 0.70),
    Bar(_forward(512), BNB, 1.1),
    Bar(_forward(512, _WIDE), DENSE, 0.70),
    Bar(_forward(512, _WIDE), BNB, 1.1),
    Bar(_forward(4096), DENSE, 0.70),
    Bar(_forward(4096, _WIDE), DENSE, 0.70),
    Bar(_step(2048), DEQUANTIZED, 1.2),
    Bar(_step(4096), DEQUANTIZED, 1.2),
    # The adapter's share: at most 2% of forward and 10% of backward. Without it backward is one product, dx, as forward
    # is; of a whole step that makes 6%.
    Bar(_forward(4096, rank=RANK), NO_ADAPTER, 1 / 1.02),
    Bar(Point("linear_backward", n=N, k=K, m=4096, rank=RANK), NO_ADAPTER, 1 / 1.10),
    Bar(_step(4096), NO_ADAPTER, 1 / 1.06),
    Bar(_forward(4096, rank=RANK), OURS, 1.0, "time on the host"),
    Bar(_optimizer("adamw_step"), BNB, 10.0, "time by the wall clock"),
    Bar(_optimizer("adamw_step"), FUSED, 1.0, "time by the wall clock"),
    Bar(_optimizer("adamw_paged_step"), LINK, 0.80, "time by the wall clock"),
)
#: By kind of device.
BARS = {"cpu": (*LAYER_BARS, *OPTIMIZER_BARS), "cuda": CARD_BARS}


@dataclass(frozen=True)
class Verdict:
    """A bar and what was reached: a ratio, or None with the reason why there is none."""

    bar: Bar
    case: dict[str, Any]
    ratio: float | None
    reason: str | None = None

    @property
    def share(self) -> float:
        """What was reached of what was asked for; 0 when nothing was measured, so that it stands first."""
        return 0.0 if self.ratio is None else self.ratio / self.bar.at_least

    @property
    def word(self) -> str:
        if self.ratio is None:
            return "not measured"
        return "pass" if self.share >= 1 else "miss"


def judge(results: dict[str, Any], bars: Sequence[Bar]) -> list[Verdict]:
    """Every bar with what was reached, the worst first; a bar whose case is missing is there, as not measured."""
    cases = {point_of(case): case for case in results["cases"]}
    verdicts = []
    for bar in bars:
        case = cases.get(bar.point)
        if case is None:
            verdicts.append(Verdict(bar, {**bar.point.as_dict(), "contenders": []}, None, "the case was not run"))
            continue
        ratio = MEASURES[bar.measure](case, bar.contender, results)
        verdicts.append(Verdict(bar, case, ratio, _why_not(case, bar) if ratio is None else None))
    return sorted(verdicts, key=lambda verdict: verdict.share)


def require_cases(results: dict[str, Any], bars: Sequence[Bar]) -> None:
    """
    Raises:
        ValueError: when the results lack a bar's case, or its contender in a case that did not fail as a whole: a bar
            must not vanish by not being measured.
    """
    cases = {point_of(case): case for case in results["cases"]}
    for bar in bars:
        case = cases.get(bar.point)
        if case is None:
            raise ValueError(f"the results lack {bar.point}, for which there is a bar against {bar.contender}")
        if find_contender(case, bar.contender) is None and "failed" not in case:
            raise ValueError(f"the results of {bar.point} lack {bar.contender}, and there is a bar against it")


def _why_not(case: dict[str, Any], bar: Bar) -> str:
    """Why a bar has no figure: the contender failed, or this package, or the case as a whole."""
    entries = (find_contender(case, name) for name in (bar.contender, OURS))
    failures = [entry["failed"] for entry in entries if entry and "failed" in entry]
    if failures:
        return failures[0]
    if "failed" in case:
        return case["failed"]
    missing = next((name for name in (bar.contender, OURS) if find_contender(case, name) is None), None)
    return f"no {missing}" if missing else "not measured by this clock"
