"""Rows and cells of the documents' tables."""

from __future__ import annotations

from typing import Any

from qlora_kernels.bench.case import OURS
from qlora_kernels.bench.contenders.names import (
    BNB,
    BNB_EVAL,
    DENSE,
    DENSE_F32,
    DEQUANTIZED,
    FOREACH,
    FUSED,
    GGML,
    INT4,
    PEFT,
    PEFT_EVAL,
)
from qlora_kernels.bench.points import K, N
from qlora_kernels.bench.report.bars import BARS_THREADS, Bar, came_later, judge, require_cases
from qlora_kernels.bench.report.ratios import find_contender, ratio_to_ours, sizes
from qlora_kernels.bench.report.table import machine_line

COLUMNS = (OURS, DENSE, DENSE_F32, DEQUANTIZED, FUSED, FOREACH, BNB, BNB_EVAL, INT4, GGML, PEFT, PEFT_EVAL)

HEADINGS = {OURS: "this package", DENSE: "torch, dense", DENSE_F32: "torch, dense, float32", INT4: "torch, int4"}
#: Of formats that are not NF4, what their columns stand for.
FORMATS = {
    INT4: "torch's int4 has levels at equal distances, with a bf16 scale and zero for each 64 weights",
    GGML: "ggml's Q4_0 has them with a float16 scale for each 32, and rounds x to int8, 32 numbers at a time",
}


def introduction(result: dict[str, Any], source: str, more: str = "") -> list[str]:
    """What a table says before its rows: the machine, where the figures are, and what they are."""
    return [
        f"{machine_line(result)} ([raw figures]({source})).",
        f"{more}Median milliseconds; in brackets how many times as long as this package.",
    ]


def grid(cases: list[dict[str, Any]]) -> list[str]:
    """A row for each case, a column for each contender."""
    columns = [c for c in COLUMNS if any(find_contender(case, c) for case in cases)]
    lines = ["| | " + " | ".join(HEADINGS.get(c, c) for c in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for case in cases:
        cells = [cell(case, find_contender(case, column)) for column in columns]
        lines.append(f"| {title_of(case)} | " + " | ".join(cells) + " |")
    return lines


def title_of(case: dict[str, Any]) -> str:
    """A case in words, without a rank of 0 or a dtype that the title names."""
    shown = {**case, "rank": case["rank"] or None}
    if case["dtype"] in case["title"]:
        shown["dtype"] = "bfloat16"
    return ", ".join(words for words in (case["title"], sizes(shown)) if words)


def bar_rows(result: dict[str, Any], bars: tuple[Bar, ...]) -> list[str]:
    lines = ["Targets and results:", ""]
    if result["settings"]["threads"] != BARS_THREADS:
        lines = [f"Targets for {BARS_THREADS} threads, and results with another number:", ""]
    lines += ["| | against | at least | reached | |", "|---|---|---|---|---|"]
    require_cases(result, bars)
    verdicts = judge(result, bars)
    known = [v for v in verdicts if not came_later(result, v)]
    for v in known:
        square = {"n": None, "k": None} if (v.case["n"], v.case["k"]) == (N, K) else {}
        case = {**v.case, **square, "model": None}
        if v.bar.measure.startswith("share"):
            reached, wanted, against = (f"{v.ratio or 0:.0%}", f"{v.bar.at_least:.0%}", v.bar.measure)
        else:
            reached, wanted, against = (f"{v.ratio or 0:.2f}×", f"{v.bar.at_least:g}×", v.bar.contender)
        reached = escaped(v.reason or "") if v.ratio is None else reached
        lines.append(f"| {title_of(case)} | {against} | {wanted} | {reached} | {v.word} |")
    if len(known) < len(verdicts):
        lines += ["", f"{len(verdicts) - len(known)} more targets were set after this run."]
    return lines


def format_notes(cases: list[dict[str, Any]]) -> list[str]:
    """Of columns that are other formats: what they are, and their errors at the first case that has them."""
    for case in cases:
        others = [c for name in FORMATS if (c := find_contender(case, name)) and c.get("format_error")]
        ours = find_contender(case, OURS)
        if others and ours and ours.get("format_error"):
            told = "; ".join(FORMATS[c["name"]] for c in others)
            rows = [(HEADINGS.get(c["name"], c["name"]), c) for c in (ours, *others)]
            errors = ", ".join(f"{name} {c['format_error']:.3f} ({c['error']:.4f})" for name, c in rows)
            return [
                f"Other formats: {told}. Relative error of y against float64 and the weight before quantization, in "
                f"brackets against the weight as stored, M = {case['m']}: {errors}."
            ]
    return []


def cell(case: dict[str, Any], contender: dict[str, Any] | None) -> str:
    if contender is None:
        return ""
    if "failed" in contender:
        return escaped(contender["failed"])
    text = three_digits(contender["median_ms"])
    # Where cores are taken away now and then, the median may not tell of it.
    mean = f", mean {three_digits(contender['mean_ms'])}" if case.get("operation") == "linear_busy" else ""
    if contender["name"] == OURS:
        return f"**{text}**{mean}"
    ratio = ratio_to_ours(case, contender)
    return text + ("" if ratio is None else f" ({ratio:.2g}×)") + mean


def escaped(reason: str) -> str:
    """Words for a table's cell, which a | would end."""
    return reason.replace("|", "\\|")


def three_digits(value: float) -> str:
    """Three digits, two below 1."""
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{decimals}f}"
