"""Figures of a case beside what the machine does at most, and beside this package's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..case import OURS
from ..contenders.names import BEST_OF, PRODUCT, PRODUCT_F32, READS, ROOFS

#: Work that reads a weight and writes little else.
_READING = ("linear_forward", "linear_dx", "linear_busy", "decode", "gpt2_forward")


@dataclass(frozen=True)
class Limits:
    """What the machine does at most: the best rates that anything reached in a run, this package included.

    Attributes:
        bytes_per_s: read and written.
        read_per_s: only read; None in a result without that measurement.
        flops: a second, by dtype. What is asked for in 16 bits may be computed in float32.
    """

    bytes_per_s: float | None
    read_per_s: float | None
    flops: dict[str, float]

    def seconds(self, case: dict[str, Any], contender: dict[str, Any]) -> float | None:
        """The least that a contender's work could take: its bytes or its multiplications, whichever takes longer.

        The roofline (Williams et al. 2009). None where nothing is known.
        """
        parts = []
        rate = (self.read_per_s if case["operation"] in _READING else None) or self.bytes_per_s
        if rate and contender.get("bytes"):
            parts.append(contender["bytes"] / rate)
        if case.get("flops") and self.flops.get(case["dtype"]):
            parts.append(case["flops"] / self.flops[case["dtype"]])
        return max(parts) if parts else None

    def share(self, case: dict[str, Any], contender: dict[str, Any]) -> float | None:
        """How much of the roof a contender reaches; 1 is all."""
        least = None if "failed" in contender else self.seconds(case, contender)
        return None if least is None else least / (contender["median_ms"] / 1e3)


def limits_of(results: dict[str, Any]) -> Limits:
    """From all of a run's cases; without one of "limits", which has the large buffers and products, no limits."""
    if not any(case["operation"] == "limits" for case in results["cases"]):
        return Limits(None, None, {})
    cache = results.get("settings", {}).get("cache_bytes") or 0
    moved, read, flops = [], [], {}
    for case in results["cases"]:
        for one in case["contenders"]:
            if "failed" in one:
                continue
            rate = gb_per_s(one)
            # What takes turns must exceed the cache, or the rate is not memory's.
            if rate is not None and one["bytes"] * one["copies"] > cache and one["name"] not in _PRODUCTS:
                moved.append(rate * 1e9)
                if one["name"] in READS or (case["operation"] in _READING and one["name"] not in ROOFS):
                    read.append(rate * 1e9)
            rate = gflop_per_s(case, one)
            if rate is not None and (one["name"] not in ROOFS or one["name"] in _PRODUCTS):
                for dtype in _serves(case, one):
                    flops[dtype] = max(rate * 1e9, flops.get(dtype, 0.0))
    known = any(find_contender(case, name) for case in results["cases"] for name in READS)
    return Limits(max(moved, default=None), max(read, default=None) if known else None, flops)


_PRODUCTS = (PRODUCT, PRODUCT_F32)
_HALVES = ("bfloat16", "float16")


def _serves(case: dict[str, Any], contender: dict[str, Any]) -> tuple[str, ...]:
    """The dtypes of cases that could be computed as a contender did."""
    if case["dtype"] == "float32":
        return ("float32", *_HALVES)
    return (case["dtype"], "float32") if "float32" in contender["name"] else (case["dtype"],)


def find_contender(case: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The contender of that name; of one that stands for several (BEST_OF), the fastest of those that have a figure."""
    if name in BEST_OF:
        several = [c for c in case["contenders"] if c["name"] in BEST_OF[name]]
        measured = [c for c in several if "failed" not in c]
        return min(measured, key=lambda c: c["median_ms"]) if measured else next(iter(several), None)
    return next((c for c in case["contenders"] if c["name"] == name), None)


def times(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """The medians of two contenders, ms, by one clock: on a card by events where one has no time by graph."""
    key = "median_ms"
    if one.get("by") != other.get("by") and one.get("event_ms") and other.get("event_ms"):
        key = "event_ms"
    return one[key], other[key]


def ratio_to_ours(case: dict[str, Any], contender: dict[str, Any]) -> float | None:
    """How many times as long as this package the contender took, by medians; None where either failed."""
    ours = find_contender(case, OURS)
    if ours is None or "failed" in ours or "failed" in contender:
        return None
    mine, theirs = times(ours, contender)
    return theirs / mine


def gb_per_s(contender: dict[str, Any]) -> float | None:
    return contender["bytes"] / contender["median_ms"] / 1e6 if contender.get("bytes") else None


def gflop_per_s(case: dict[str, Any], contender: dict[str, Any]) -> float | None:
    return case["flops"] / contender["median_ms"] / 1e6 if case.get("flops") else None


def sizes(case: dict[str, Any]) -> str:
    """A case's coordinates in words."""
    parts = [] if case["model"] is None else [case["model"]]
    parts += [] if case["n"] is None else [f"{case['n']} x {case['k']}"]
    parts += [] if case.get("batch") is None else [f"batch = {case['batch']}"]
    parts += [] if case["m"] is None else [f"M = {case['m']}"]
    parts += [] if case["rank"] is None else [f"r = {case['rank']}"]
    parts += [] if case["dtype"] == "bfloat16" else [case["dtype"]]
    return ", ".join(parts)
