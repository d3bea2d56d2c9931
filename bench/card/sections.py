"""Parts of the report of a visit: kernel cases, rates, variants, profiles, clocks; empty where nothing is known."""

from __future__ import annotations

from typing import Any

from bench.compiled.cards import Card
from bench.text import number, table
from qlora_kernels.bench.report.ratios import sizes

#: What stands above everything that a stand-in for a card has given.
REHEARSAL = "**A rehearsal on a stand-in: no card was there. Its times are made up, and are no measurements.**"
NO_TIMES = "Stand-in times, which are no measurements"


def kernel_lines(found: dict[str, Any]) -> list[str]:
    """Right or wrong for each family, and every case that is wrong."""
    if not found:
        return []
    rows = [
        [name, str(one["cases"]), str(one["right"]), str(len(one["wrong"])), str(one["not_run"])]
        for name, one in found["families"].items()
    ]
    rows.append(["all", str(found["cases"]), str(found["right"]), str(len(found["wrong"])), str(found["not_run"])])
    lines = ["## Small cases of each kernel", "", *table(("", "cases", "right", "wrong", "not run"), rows), ""]
    return [*lines, *(f"- {name}: {problem}" for name, problem in found["wrong"]), ""]


def rate_lines(found: dict[str, Any], card: Card | None) -> list[str]:
    """What the tensor cores reach, beside the rate that predictions take."""
    if not found.get("rates"):
        return []
    rows = []
    for name, rate in found["rates"].items():
        assumed = None if card is None else (card.mma_rate if name.startswith("mma") else card.dense_rate) / 1e12
        share = None if card is None else rate["tflops"] / card.tensor
        spread = f"{rate['least']:.0f}-{rate['most']:.0f}"
        rows.append([name, f"{rate['tflops']:.0f}", spread, number(share, ".1%"), number(assumed, ".0f")])
    head = ("", "TFLOP/s", "least-most", "of the data sheet", "TFLOP/s in predictions")
    return ["", "## Rates of the tensor cores", "", *table(head, rows)]


def variant_lines(name: str, found: dict[str, Any], stand_in: bool) -> list[str]:
    """Times of a point by the value of a variable, and each over the first one's."""
    if not found.get("cases"):
        return []
    rows, reasons = [], []
    for case in found["cases"]:
        title = ", ".join(filter(None, (case["title"], sizes(case))))
        times = {one["name"]: one.get("median_ms") for one in case["contenders"]}
        first = next(iter(times.values()), None)
        for one in case["contenders"]:
            if "failed" in one:
                reasons.append(f"- {title}, {one['name']}: {one['failed']}")
                continue
            us, ratio = one["median_ms"] * 1e3, one["median_ms"] / first if first else None
            spread = f"{one['q20_ms'] * 1e3:.1f}-{one['q80_ms'] * 1e3:.1f}"
            rows.append([title, one["name"], f"{us:.1f}", spread, number(ratio, ".2f")])
        if "failed" in case:
            reasons.append(f"- {title}: {case['failed']}")
    heading = {"forced": "Kernels against each other", "early": "Early launches"}[name]
    head = ("", "", "stand-in us" if stand_in else "us", "20-80%", "/ the first")
    return ["", f"## {heading}", "", *table(head, rows, left=2), "", *reasons]


#: Of a profile, what is shown; the JSON file has all of it.
_SHOWN = (
    *("Duration", "DRAM Throughput", "Memory Throughput", "Compute (SM) Throughput", "L2 Hit Rate"),
    *("Registers Per Thread", "Achieved Occupancy", "Issue Slots Busy", "Executed Ipc Active"),
)


def profile_lines(found: dict[str, Any]) -> list[str]:
    """Counters of each kernel that was profiled."""
    if not found:
        return []
    lines = ["", "## Profiles", ""]
    for title, kernels in found.items():
        if isinstance(kernels, str):
            lines += [f"- {title}: {kernels}"]
            continue
        for kernel in kernels:
            shown = [f"{name} {kernel['metrics'][name]}" for name in _SHOWN if name in kernel["metrics"]]
            lines += [f"- {title}, {kernel['kernel'][:100]}: {'; '.join(shown)}"]
    return lines


def clock_lines(found: dict[str, Any]) -> list[str]:
    """Clocks, power and temperature, by step."""
    if not found:
        return []
    if "problem" in found:
        return ["", f"The clocks were not logged: {found['problem']}."]
    names = [name for name in found if name not in ("samples", "steps")]
    rows = []
    for title, one in {**found["steps"], "all": found}.items():
        cells = [one.get(name) for name in names]
        shown = ["" if c is None else f"{c['least']:.0f} / {c['median']:.0f} / {c['most']:.0f}" for c in cells]
        rows.append([title, str(one["samples"]), *shown])
    return ["", "## Clocks: least / median / most", "", *table(("", "samples", *names), rows)]
