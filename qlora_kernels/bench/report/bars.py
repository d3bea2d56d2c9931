"""How fast this package sets out to be: for cards and for each instruction set of a CPU, ratios that a run is held to.

They stand beside what was reached and fail nothing: a time on someone else's machine is no test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..case import OURS
from ..contenders.names import (
    BEST_BNB,
    BEST_DENSE,
    BNB,
    COPY,
    DENSE,
    DEQUANTIZED,
    EQUAL_COPY,
    FOREACH,
    FUSED,
    GGML,
    INT4,
    LINK,
    NO_ADAPTER,
    PEFT,
)
from ..points import DTYPES, RANK, WIDE, K, N, Point, mixtures, point_of
from .ratios import find_contender, gb_per_s, limits_of, ratio_to_ours
from .results import BARS_SINCE

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


def _of_reading(case: dict[str, Any], contender: str, results: dict[str, Any]) -> float | None:
    """This package's bytes per second, of the most that anything read."""
    ours, most = find_contender(case, OURS), limits_of(results).read_per_s
    if ours is None or "failed" in ours or most is None:
        return None
    rate = gb_per_s(ours)
    return rate * 1e9 / most if rate else None


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
    "share of the speed of reading": _of_reading,
}


@dataclass(frozen=True)
class Bar:
    """What this package should reach at a point.

    Attributes:
        point: where.
        contender: it should take at least ``at_least`` times as long as this package; or, of OURS, what is asked of
            this package alone. A key of BEST_OF stands for the fastest of several.
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
        if self.measure == "share of the speed of reading":
            return f"{self.point}: {self.measure}"
        how = "" if self.measure == "time" else f", {self.measure}"
        return f"{self.point}: {self.contender}{how}"


def _forward(m: int, n: int = N, rank: int = 0) -> Point:
    return Point("linear_forward", n=n, k=K, m=m, rank=rank)


def _step(m: int, n: int = N) -> Point:
    return Point("linear_step", n=n, k=K, m=m, rank=RANK)


def _optimizer(name: str) -> Point:
    return Point(name, "float32", rank=RANK, model="llama-2-7b")


def _wide_and_square(bars: Callable[[int], tuple[Bar, ...]]) -> tuple[Bar, ...]:
    return (*bars(N), *bars(WIDE))


def _layer_bars(dense: float, bnb: float, ggml: tuple[float, ...]) -> tuple[Bar, ...]:
    """Of one instruction set.

    Args:
        dense, bnb: at M = 1, against torch's bf16 product and the better of bitsandbytes' layers.
        ggml: at M = 4, 16, 64 and 512.
    """

    def at(n: int) -> tuple[Bar, ...]:
        return (
            Bar(_forward(1, n), OURS, 0.6, "share of the speed of reading"),
            Bar(_forward(1, n), DENSE, dense),
            Bar(_forward(1, n), BEST_BNB, bnb),
            Bar(_forward(1, n), GGML, 0.9),
            *(Bar(_forward(m, n), GGML, least) for m, least in zip((4, 16, 64, 512), ggml, strict=True)),
            *(Bar(_forward(m, n), INT4, 1.3) for m in (1, 4, 16)),
            Bar(Point("linear_busy", n=n, k=K, m=1), GGML, 0.7),
            *(Bar(_forward(m, n), BEST_DENSE, 1.3) for m in (16, 64)),
            *(Bar(_forward(m, n), BEST_DENSE, 0.95) for m in (512, 2048)),
            Bar(_step(16, n), PEFT, 8),
            Bar(_step(512, n), PEFT, 2),
            Bar(Point("dequantize", n=n, k=K), BNB, 4),
        )

    experts = (Bar(point, BNB, 3) for point in mixtures())
    return (*_wide_and_square(at), Bar(Point("quantize", "float32", n=N, k=K), BNB, 20), *experts)


#: By instruction set, best first.
CPU_LAYER_BARS = {
    "amx": _layer_bars(dense=4, bnb=2, ggml=(4, 4, 4, 4)),
    "avx512_bf16": _layer_bars(dense=4, bnb=2, ggml=(2, 2, 2, 2)),
    "avx2": _layer_bars(dense=3, bnb=10, ggml=(1.5, 1.5, 1.5, 2)),
}
OPTIMIZER_BARS = (
    Bar(_optimizer("adamw_step"), FUSED, 1),
    Bar(_optimizer("adamw_step"), FOREACH, 3),
    Bar(_optimizer("adamw_clipped_step"), FUSED, 1),
    Bar(_optimizer("adamw_8bit_step"), FUSED, 1),
)
CARD_BARS = (
    *(Bar(Point("dequantize", dtype, 8192, 8192), COPY, 0.90, "share of its bandwidth") for dtype in DTYPES),
    *(Bar(Point("dequantize", dtype, 4096, 4096), BNB, 2.0) for dtype in DTYPES),
    Bar(_forward(1), EQUAL_COPY, 0.55),
    Bar(_forward(1), DENSE, 2.2),
    Bar(_forward(1), BNB, 1.8),
    Bar(_forward(1), OURS, 1.0, "time on the host"),
    Bar(_forward(1, WIDE), EQUAL_COPY, 0.80),
    Bar(_forward(1, WIDE), DENSE, 3.0),
    Bar(_forward(16), DENSE, 2.0),
    Bar(_forward(16), BNB, 4.0),
    Bar(_forward(64), DENSE, 1.6),
    Bar(_forward(64), BNB, 4.0),
    Bar(_forward(16, WIDE), DENSE, 3.0),
    Bar(_forward(64, WIDE), DENSE, 2.1),
    Bar(_forward(512), DENSE, 0.70),
    Bar(_forward(512), BNB, 1.1),
    Bar(_forward(512, WIDE), DENSE, 0.70),
    Bar(_forward(512, WIDE), BNB, 1.1),
    Bar(_forward(4096), DENSE, 0.70),
    Bar(_forward(4096, WIDE), DENSE, 0.70),
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


def layer_bars(results: dict[str, Any]) -> tuple[Bar, ...]:
    """A layer's, for the instruction set that a run on a CPU used."""
    return CPU_LAYER_BARS[_set_of(results["machine"].get("isa_in_use"))]


def _set_of(isa: str | None) -> str:
    """AVX-512 without BF16, and what has no bars of its own, are held to AVX2's."""
    return isa if isa in CPU_LAYER_BARS else "avx2"


def bars_of(results: dict[str, Any]) -> tuple[Bar, ...]:
    """Every bar for what a run was on."""
    return CARD_BARS if results["settings"]["device"] != "cpu" else (*layer_bars(results), *OPTIMIZER_BARS)


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
            missing = {**bar.point.as_dict(), "title": bar.point.operation, "contenders": []}
            verdicts.append(Verdict(bar, missing, None, "the case was not run"))
            continue
        ratio = MEASURES[bar.measure](case, bar.contender, results)
        verdicts.append(Verdict(bar, case, ratio, _why_not(case, bar) if ratio is None else None))
    return sorted(verdicts, key=lambda verdict: verdict.share)


def require_cases(results: dict[str, Any], bars: Sequence[Bar]) -> None:
    """
    Raises:
        ValueError: when the results lack a bar's case, or its contender in a case that did not fail as a whole: a bar
            must not vanish by not being measured. Results from before some of the bars have what there was then.
    """
    if results.get("bars", 0) < BARS_SINCE:
        return
    cases = {point_of(case): case for case in results["cases"]}
    for bar in bars:
        case = cases.get(bar.point)
        if case is None:
            raise ValueError(f"the results lack {bar.point}, for which there is a bar against {bar.contender}")
        if find_contender(case, bar.contender) is None and "failed" not in case:
            raise ValueError(f"the results of {bar.point} lack {bar.contender}, and there is a bar against it")


def came_later(results: dict[str, Any], verdict: Verdict) -> bool:
    """Whether there is no figure because the bar is newer than the result, which lacks its case or contender."""
    older = results.get("bars", 0) < BARS_SINCE
    ran = "failed" in verdict.case or any("failed" in one for one in verdict.case["contenders"])
    return older and verdict.ratio is None and not ran


def _why_not(case: dict[str, Any], bar: Bar) -> str:
    """Why a bar has no figure: the contender failed, or this package, or the case as a whole."""
    entries = (find_contender(case, name) for name in (bar.contender, OURS))
    failures = [entry["failed"] for entry in entries if entry and "failed" in entry]
    if failures:
        return failures[0]
    if "failed" in case:
        return case["failed"]
    if bar.measure == "share of the speed of reading":
        return "how fast memory is read was not measured"
    missing = next((name for name in (bar.contender, OURS) if find_contender(case, name) is None), None)
    return f"no {missing}" if missing else "not measured by this clock"
