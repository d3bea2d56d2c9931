"""Tables and the plot, from a result file: no figure in README.md is typed by hand.

python -m bench.tables            # README's tables and the plot from the newest files in bench/results/
python -m bench.tables FILE       # only prints
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_kernels.bench.common import OURS, QUIET
from qlora_kernels.bench.contenders import BNB, BNB_EVAL, COPY, DENSE, EQUAL_COPY, FOREACH, FUSED, PEFT, PEFT_EVAL
from qlora_kernels.bench.machine import ROOT

from . import results as result_files
from .bars import BARS_SIZE, BARS_THREADS, bars_apply, find_contender, judge, ratio_to_ours, suite_of, title_of

README = ROOT / "README.md"
PLOT = result_files.FOLDER / "cpu.png"

_COLUMNS = (OURS, DENSE, FUSED, FOREACH, BNB, BNB_EVAL, PEFT, PEFT_EVAL)
_HEADINGS = {OURS: "this package", DENSE: "torch, dense bf16", BNB_EVAL: "bitsandbytes, eval-mode layer"}
#: What README says between the markers of a suite.
_BEGINS, _END = {"linear": "<!-- table: cpu -->", "optimizer": "<!-- table: optimizer -->"}, "<!-- /table -->"
NOT_MEASURED = "Speed: not measured yet."


def terminal(results: dict[str, Any]) -> str:
    """Everything that was measured, and each bar beside what was reached, the worst first."""
    lines = [_machine_line(results), ""]
    rows = [("", "median ms", "20%", "80%", "x ours", "GB/s", "GFLOP/s", "error")]
    for case in results["cases"]:
        others = case["other_processes"] or 0
        disturbed = f"(others took {others:.0%} of the machine)" if others > QUIET else ""
        rows.append((title_of(case), disturbed, *[""] * 6))
        for contender in case["contenders"]:
            rows.append(("  " + contender["name"], *_figures(case, contender)))
    lines += _align(rows)
    lines += ["", "bars, the worst first (reached: how many times as long as this package the other took)"]
    if not bars_apply(results):
        lines.append(f"(they are for N = K = {BARS_SIZE} and {BARS_THREADS} threads, and this run had others)")
    rows = [("", "against", "reached", "bar", "reached / bar", "")]
    for verdict in judge(results):
        reached = verdict.reason if verdict.ratio is None else f"{verdict.ratio:.2f}"
        share = "" if verdict.ratio is None else f"{verdict.share:.2f}"
        bar = f"{verdict.bar.at_least:g}"
        rows.append((verdict.title, verdict.bar.contender, reached, bar, share, verdict.word))
    return "\n".join(lines + _align(rows, left=2))


def _figures(case: dict[str, Any], contender: dict[str, Any]) -> tuple[str, ...]:
    if "failed" in contender:
        return (contender["failed"], *[""] * 6)
    flops = contender["gflop_per_s"]
    return (
        f"{contender['median_ms']:.3f}",
        f"{contender['q20_ms']:.3f}",
        f"{contender['q80_ms']:.3f}",
        f"{ratio_to_ours(case, contender):.2f}",
        f"{contender['gb_per_s']:.1f}",
        "" if flops is None else f"{flops:.0f}",
        f"{contender['error']:.1e}",
    )


def _align(rows: list[tuple[str, ...]], left: int = 1) -> list[str]:
    """Columns under each other; a reason for failure may stick out of its column."""
    widths = [max((len(r[i]) for r in rows if any(r[i + 1 :]) or i == 0), default=0) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    return lines


def _machine_line(results: dict[str, Any]) -> str:
    m, v, s = results["machine"], results["versions"], results["settings"]
    commit = (results["commit"] or "unknown")[:10] + (" with changes" if results["modified"] else "")
    virtual = "virtual machine, " if m["virtual"] else ""
    others = max((case["other_processes"] or 0 for case in results["cases"]), default=0)
    busy = f"; other processes took up to {others:.0%} of the machine meanwhile" if others > QUIET else ""
    size = f"N = {s['n']}, K = {s['k']}"
    if suite_of(results) == "optimizer":
        size = f"hidden size {s['n']}, r = {s['rank']}"
    return (
        f"{m['cpu']} ({virtual}{m['usable_cores']} cores, kernels for {m['isa_in_use']}), {s['threads']} threads, "
        f"{size}, torch {v['torch']}, bitsandbytes {v['bitsandbytes']}, PEFT {v['peft']}, "
        f"{v['compiler']}, commit {commit}, {results['date'][:10]}{busy}"
    )


def markdown(results: dict[str, Any], source: str) -> str:
    """The part of README between the markers: times, then bars.

    Args:
        results: a result.
        source: the file's name, for the reader.

    Raises:
        ValueError: when a bar's case is missing.
    """
    lines = [
        f"{_machine_line(results)} ([raw figures]({source})).",
        "Median milliseconds; in brackets how many times as long as this package.",
        "",
    ]
    columns = [c for c in _COLUMNS if any(find_contender(case, c) for case in results["cases"])]
    lines += ["| | " + " | ".join(_HEADINGS.get(c, c) for c in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for case in results["cases"]:
        cells = [_cell(case, find_contender(case, column)) for column in columns]
        lines.append(f"| {title_of(case)} | " + " | ".join(cells) + " |")
    ours = [(case, find_contender(case, OURS)) for case in results["cases"]]
    lines += ["", _notes(results, ours), "", "What was aimed at, and what was reached:", ""]
    lines += ["| | against | at least | reached | |", "|---|---|---|---|---|"]
    for v in judge(results):
        reached = v.reason if v.ratio is None else f"{v.ratio:.2f}×"
        lines.append(f"| {v.title} | {v.bar.contender} | {v.bar.at_least:g}× | {reached} | {v.word} |")
    return "\n".join(lines)


def _cell(case: dict[str, Any], contender: dict[str, Any] | None) -> str:
    if contender is None:
        return ""
    if "failed" in contender:
        return contender["failed"]
    text = _three_digits(contender["median_ms"])
    return f"**{text}**" if contender["name"] == OURS else f"{text} ({ratio_to_ours(case, contender):.2g}×)"


def _notes(results: dict[str, Any], ours: list[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    """Rates that say how near the limits are."""
    notes = []
    forward = [(c["m"], o) for c, o in ours if c["operation"] == "linear_forward"]
    if forward:
        (first, few), (last, many) = forward[0], forward[-1]
        notes.append(f"At M = {first} this package reads packed weights at {few['gb_per_s']:.0f} GB/s")
        notes.append(f"at M = {last} it multiplies at {many['gflop_per_s']:.0f} GFLOP/s")
    steps = [o for c, o in ours if c["operation"] == "adamw_step"]
    if steps:
        notes.append(f"A step of AdamW moves {steps[0]['gb_per_s']:.0f} GB/s (28 bytes a parameter)")
    equal = [c for case in results["cases"] if (c := find_contender(case, EQUAL_COPY)) and "failed" not in c]
    if equal:
        notes.append(f"a copy of as many bytes {equal[0]['gb_per_s']:.0f} GB/s")
    copies = [c for case in results["cases"] if (c := find_contender(case, COPY)) and "failed" not in c]
    if copies:
        notes.append(f"a plain copy into a new tensor moves {copies[0]['gb_per_s']:.0f} GB/s (read and write)")
    return "; ".join(notes) + "." if notes else ""


def _three_digits(value: float) -> str:
    """Three digits, two below 1."""
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{decimals}f}"


def plot(results: dict[str, Any], path: Path, source: str) -> None:
    """Time of forward over M for each contender, both axes logarithmic; the PNG's metadata name its source."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = [case for case in results["cases"] if case["operation"] == "linear_forward"]
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, marker in zip((OURS, DENSE, BNB, BNB_EVAL), "osv^"):
        found = [(c["m"], x) for c in cases if (x := find_contender(c, name)) and "failed" not in x]
        if not found:
            continue
        rows, times = [m for m, _ in found], [x["median_ms"] for _, x in found]
        low, high = [x["q20_ms"] for _, x in found], [x["q80_ms"] for _, x in found]
        (line,) = axes.plot(
            rows, times, marker=marker, label=_HEADINGS.get(name, name), zorder=3 if name == OURS else 2
        )
        axes.fill_between(rows, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    s = results["settings"]
    axes.set(xscale="log", yscale="log", xlabel="M, rows of x", ylabel="milliseconds")
    axes.set_title(f"forward, N = {s['n']}, K = {s['k']}, bf16, {s['threads']} threads", fontsize=10)
    axes.set_xticks([c["m"] for c in cases], [str(c["m"]) for c in cases])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Source": source_note(results, source)})
    plt.close(figure)


def source_note(results: dict[str, Any], source: str) -> str:
    return f"{source} {results['date']}"


def replace_table(text: str, table: str, suite: str = "linear") -> str:
    """README's text with the table between the markers of a suite.

    Raises:
        ValueError: when the markers are missing.
    """
    begin = _BEGINS[suite]
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(_END), re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"the text should hold the markers {begin} and {_END}")
    return pattern.sub(lambda _: f"{begin}\n{table}\n{_END}", text)


def filled(text: str) -> str:
    """README's text with the tables of the newest results.

    Raises:
        ValueError: when markers are missing.
        FileNotFoundError: when the layer was never measured; of optimizers the text says so.
    """
    for suite in _BEGINS:
        try:
            path = result_files.newest(suite=suite)
        except FileNotFoundError:
            if suite == "linear":
                raise
            text = replace_table(text, NOT_MEASURED, suite)
        else:
            text = replace_table(text, markdown(result_files.load(path), relative(path)), suite)
    return text


def relative(path: Path) -> str:
    """As README links to it."""
    return path.resolve().relative_to(ROOT).as_posix()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", help="print this result file and write nothing")
    arguments = parser.parse_args(argv)
    if arguments.file:
        print(terminal(result_files.load(arguments.file)))
        return 0
    path = result_files.newest()
    results = result_files.load(path)
    README.write_text(filled(README.read_text()))
    plot(results, PLOT, relative(path))
    print(f"README.md and {relative(PLOT)} from {relative(path)} and what there is of other suites")
    return 0


if __name__ == "__main__":
    sys.exit(main())
