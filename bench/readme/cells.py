"""Rows and cells of the documents' tables."""

from __future__ import annotations

from typing import Any

from qlora_kernels.bench.case import OURS
from qlora_kernels.bench.contenders.names import BNB, BNB_EVAL, DENSE, DEQUANTIZED, FOREACH, FUSED, PEFT, PEFT_EVAL
from qlora_kernels.bench.report.bars import BARS_THREADS, Bar, judge, require_cases
from qlora_kernels.bench.report.ratios import find_contender, ratio_to_ours, sizes

COLUMNS = (OURS, DENSE, DEQUANTIZED, FUSED, FOREACH, BNB, BNB_EVAL, PEFT, PEFT_EVAL)

HEADINGS = {OURS: "this package", DENSE: "torch, dense"}


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
    for v in judge(result, bars):
        case = {**v.case, "n": None, "k": None, "model": None}
        reached = escaped(v.reason or "") if v.ratio is None else f"{v.ratio:.2f}×"
        lines.append(f"| {title_of(case)} | {v.bar.contender} | {v.bar.at_least:g}× | {reached} | {v.word} |")
    return lines


def cell(case: dict[str, Any], contender: dict[str, Any] | None) -> str:
    if contender is None:
        return ""
    if "failed" in contender:
        return escaped(contender["failed"])
    text = three_digits(contender["median_ms"])
    if contender["name"] == OURS:
        return f"**{text}**"
    ratio = ratio_to_ours(case, contender)
    return text if ratio is None else f"{text} ({ratio:.2g}×)"


def escaped(reason: str) -> str:
    """Words for a table's cell, which a | would end."""
    return reason.replace("|", "\\|")


def three_digits(value: float) -> str:
    """Three digits, two below 1."""
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{decimals}f}"
