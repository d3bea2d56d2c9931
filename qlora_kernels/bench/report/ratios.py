"""Figures of a case beside what the machine does at most, and beside this package's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..case import OURS
from ..contenders.names import COPY, IN_PLACE, PRODUCT


@dataclass(frozen=True)
class Limits:
    """What the machine does at most.

    Attributes:
        bytes_per_s: read and written, of a large copy or by scaling in place, whichever is more.
        flops: a second, of a large dense product, by dtype.
    """

    bytes_per_s: float | None
    flops: dict[str, float]

    def seconds(self, case: dict[str, Any], contender: dict[str, Any]) -> float | None:
        """The least that a contender's work could take: its bytes or its multiplications, whichever takes longer.

        The roofline (Williams et al. 2009). None where nothing is known.
        """
        parts = []
        if self.bytes_per_s and contender.get("bytes"):
            parts.append(contender["bytes"] / self.bytes_per_s)
        if case.get("flops") and self.flops.get(case["dtype"]):
            parts.append(case["flops"] / self.flops[case["dtype"]])
        return max(parts) if parts else None

    def share(self, case: dict[str, Any], contender: dict[str, Any]) -> float | None:
        """How much of the roof a contender reaches; 1 is all."""
        least = None if "failed" in contender else self.seconds(case, contender)
        return None if least is None else least / (contender["median_ms"] / 1e3)


def limits_of(results: dict[str, Any]) -> Limits:
    """From a run's cases of "limits"."""
    rates, flops = [], {}
    for case in results["cases"]:
        if case["operation"] != "limits":
            continue
        streams = [find_contender(case, name) for name in (COPY, IN_PLACE)]
        speeds = (gb_per_s(one) for one in streams if one and "failed" not in one)
        rates += [speed * 1e9 for speed in speeds if speed is not None]
        product = find_contender(case, PRODUCT)
        if product and "failed" not in product and case["flops"]:
            flops[case["dtype"]] = case["flops"] / product["median_ms"] * 1e3
    return Limits(max(rates, default=None), flops)


def find_contender(case: dict[str, Any], name: str) -> dict[str, Any] | None:
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
