"""The tables and plots in README and docs/, written from result files: no figure there is typed by hand.

python -m bench.readme.tables        # from the newest result of each kind in bench/results/
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.host import call
from bench.readme import headlines, ranks
from bench.readme.cells import (
    HEADINGS,
    bar_rows,
    escaped,
    format_notes,
    grid,
    introduction,
    three_digits,
)
from qlora_kernels.bench.case import OURS
from qlora_kernels.bench.contenders.names import (
    COPY,
    EQUAL_COPY,
)
from qlora_kernels.bench.operations.finetune import RESULTS as TRAININGS
from qlora_kernels.bench.operations.gpt2_forward import ADAPTER_H, ADAPTER_L, BASE, MERGED, NO_LORA, UNMERGED
from qlora_kernels.bench.points import OPTIMIZER, K, N
from qlora_kernels.bench.report import plots, results
from qlora_kernels.bench.report.bars import OPTIMIZER_BARS, layer_bars
from qlora_kernels.bench.report.ratios import find_contender, gb_per_s, gflop_per_s, limits_of
from qlora_kernels.bench.report.table import machine_line
from qlora_kernels.bench.timing.machine import ROOT
from qlora_kernels.storage.atomic_file import write_atomically
from qlora_kernels.storage.formats import load_json

FOLDER = ROOT / "bench" / "results"


def documents() -> list[Path]:
    """The files that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


_BEGIN, _END = "<!-- table: ", "<!-- /table -->"


def newest(pattern: str = "cpu-*.jsonl", folder: str | Path = FOLDER) -> Path:
    """The result file with the latest date inside, among complete runs of an unmodified commit.

    A run that was limited to an instruction set, or that measured only the cases with bars, is for the table of those.

    Raises:
        FileNotFoundError: when there is none, saying what makes one.
    """
    runs = [(PAGES[pattern].load(path), path) for path in Path(folder).glob(pattern)]
    runs = [(run, path) for run, path in runs if not _of_one_set(run)]
    dates = [(run["date"], path.name, path) for run, path in runs if run["complete"] and run["modified"] is False]
    if not dates:
        which = f"no complete run of an unmodified commit among the {pattern}" if runs else f"no {pattern}"
        raise FileNotFoundError(f"{which} in {folder}; run: {PAGES[pattern].made_by}")
    return max(dates)[-1]


def _of_one_set(run: dict[str, Any]) -> bool:
    return run.get("sweep") == "bars" or bool((run.get("machine", {}).get("limited") or {}).get("forced"))


def of_every_set(folder: str | Path = FOLDER) -> list[Path]:
    """Of each processor and instruction set the newest complete run of an unmodified commit; by their names."""
    latest: dict[tuple, tuple[str, Path]] = {}
    for path in sorted(Path(folder).glob("cpu-*.jsonl")):
        run = results.load(path)
        if run["complete"] and run["modified"] is False:
            key = (run["machine"]["cpu"], run["machine"]["isa_in_use"], run["settings"]["threads"])
            latest[key] = max(latest.get(key, ("", path)), (run["date"], path))
    return sorted(path for _, path in latest.values())


# --------------------------------------------------------------------------------------------------------- tables


def layer_table(result: dict[str, Any], source: str) -> str:
    """The weight that the bars are for: times, rates, bars.

    Args:
        result: what was measured.
        source: the file's name, for the reader.

    Raises:
        ValueError: when a bar's case is missing.
    """
    cases = [
        c for c in result["cases"] if (c["n"], c["k"]) == (N, K) and (c["operation"], c["rank"]) != ("linear_step", 0)
    ]
    cases = [c for c in cases if c["operation"] != "linear_step" or c["rank"] == 16]
    shown = [{**case, "n": None, "k": None} for case in cases]
    lines = [*introduction(result, source, f"N = {N}, K = {K}. "), "", *grid(shown), "", _layer_notes(result, cases)]
    lines += [line for note in format_notes(cases) for line in ("", note)]
    return "\n".join([*lines, "", *bar_rows(result, layer_bars(result))])


def sets_table(results_of: Sequence[tuple[dict[str, Any], str]]) -> str:
    """Forward on each processor and instruction set that was measured, beside what else could compute it there.

    Args:
        results_of: results, each with its file's name for the reader.
    """
    lines = []
    for result, source in results_of:
        cases = plots.speed_cases(result)
        limited = (result["machine"].get("limited") or {}).get("forced")
        how = f"Limited to {limited}, this package and torch alike. " if limited else ""
        shown = [{**case, "n": None, "k": None} for case in cases]
        lines += [*introduction(result, source, f"{how}N = {N}, K = {K}. "), "", *grid(shown), ""]
        lines += [line for note in format_notes(cases) for line in (note, "")]
        lines += [*bar_rows(result, layer_bars(result)), ""] if result.get("bars") else []
    return "\n".join(lines).rstrip()


def optimizer_table(result: dict[str, Any], source: str) -> str:
    """The optimizers' steps."""
    cases = [case for case in result["cases"] if case["operation"] in OPTIMIZER]
    shown = [{**case, "model": None, "rank": None, "dtype": "bfloat16"} for case in cases]
    notes = []
    ours = next((find_contender(c, OURS) for c in cases if c["operation"] == "adamw_step"), None)
    if ours and "failed" not in ours:
        notes.append(f"A step of AdamW moves {gb_per_s(ours):.0f} GB/s (28 bytes a parameter)")
    equal = next((c for case in cases if (c := find_contender(case, EQUAL_COPY)) and "failed" not in c), None)
    if equal:
        notes.append(f"a copy of as many bytes {gb_per_s(equal):.0f} GB/s")
    text = "; ".join(notes) + "." if notes else ""
    return "\n".join([*introduction(result, source), "", *grid(shown), "", text, "", *bar_rows(result, OPTIMIZER_BARS)])


def other_table(result: dict[str, Any], source: str) -> str:
    """Other shapes, whole blocks, whole runs."""
    cases = [
        case
        for case in result["cases"]
        if case["operation"] not in ("limits", *OPTIMIZER, "finetune", "gpt2_forward", "linear_busy")
        and (case["n"], case["k"]) != (N, K)
    ]
    lines = [*introduction(result, source), "", *grid(cases)]
    run = next((case for case in result["cases"] if case["operation"] == "finetune"), None)
    if run is not None and all("failed" not in c for c in run["contenders"]):
        parts = [
            f"{HEADINGS.get(name, name)} {c['tokens_per_second']:.0f} tokens/s, {c['peak'] / 1e6:.0f} MB"
            for name in TRAININGS
            if (c := find_contender(run, name))
        ]
        chosen = f", in {run['activations'].removeprefix('torch.')}" if run.get("activations") else ""
        lines += [
            "",
            f"Fine-tuning the tiny model{chosen}, with peak memory beyond the libraries': {'; '.join(parts)}.",
        ]
    return "\n".join(lines)


def _layer_notes(result: dict[str, Any], cases: list[dict[str, Any]]) -> str:
    """Rates that say how near the limits are."""
    limits, notes = limits_of(result), []
    forward = [
        (case, ours)
        for case in plots.speed_cases({**result, "cases": cases})
        if (ours := find_contender(case, OURS)) and "failed" not in ours
    ]
    if forward:
        (few, ours), (many, ours_of_many) = forward[0], forward[-1]
        notes.append(f"At M = {few['m']} this package moves {gb_per_s(ours):.1f} GB/s")
        rate = gflop_per_s(many, ours_of_many)
        assert rate is not None, "a layer's forward has its flops"
        notes.append(f"at M = {many['m']} it multiplies at {rate / 1e3:.2f} TFLOP/s")
    if limits.read_per_s:
        notes.append(f"memory is read at {limits.read_per_s / 1e9:.1f} GB/s")
    if limits.bytes_per_s:
        notes.append(f"memory moves {limits.bytes_per_s / 1e9:.1f} GB/s (read and write)")
    if "bfloat16" in limits.flops:
        notes.append(f"the fastest product reaches {limits.flops['bfloat16'] / 1e12:.2f} TFLOP/s")
    copy = next((c for case in cases if (c := find_contender(case, COPY)) and "failed" not in c), None)
    if copy:
        notes.append(f"a copy into a new tensor moves {gb_per_s(copy):.1f} GB/s")
    return "; ".join(notes) + "." if notes else ""


def _draw(name: str, result: dict[str, Any], path: Path, source: str) -> None:
    """Draws a plot.

    Raises:
        ValueError: when the result lacks what the plot shows: a page must not go on showing an older one.
    """
    if not plots.draw(result, name, path, f"{source} {result['date']}"):
        raise ValueError(f"{source} lacks what the plot '{name}' shows")


def latency_table(result: dict[str, Any], source: str) -> str:
    """The LoRA paper's table: a row for each contender, a column for each batch and length.

    Raises:
        ValueError: when no such case was measured.
    """
    cases = [case for case in result["cases"] if case["operation"] == "gpt2_forward"]
    if not cases:
        raise ValueError(f"{source} lacks gpt2_forward, which the table of latencies shows")
    heads = [f"batch {case['batch']}, length {case['m']}" for case in cases]
    lines = [
        f"{machine_line(result)} ([raw figures]({source})).",
        "Median milliseconds of a forward pass of GPT-2 medium; in brackets what it costs beyond the model without "
        f"adapters: dense, or in NF4. LoRA has rank {cases[0]['rank']}.",
        "",
        "| | " + " | ".join(heads) + " |",
        "|---" * (len(heads) + 1) + "|",
    ]
    for name in (BASE, MERGED, UNMERGED, ADAPTER_H, ADAPTER_L, NO_LORA, OURS):
        heading = {NO_LORA: "NF4, this package", OURS: "NF4 + LoRA, unmerged, this package"}.get(name, name)
        without = NO_LORA if name in (NO_LORA, OURS) else BASE
        cells = []
        for case in cases:
            one, base = find_contender(case, name), find_contender(case, without)
            # Of a case that failed as a whole there is this package alone, with the reason.
            absent = {"failed": case.get("failed", "not measured")}
            one, base = one or absent, base or absent
            if "failed" in one or "failed" in base:
                cells.append(escaped(one.get("failed") or base["failed"]))
                continue
            text = three_digits(one["median_ms"])
            more = "" if name == without else f" ({100 * (one['median_ms'] / base['median_ms'] - 1):+.1f}%)"
            cells.append(text + more)
        lines.append(f"| {heading} | " + " | ".join(cells) + " |")
    noise = " | ".join(map(_noise, cases))
    lines.append(f"| *half the range from the 20% to the 80% quantile, at most* | {noise} |")
    return "\n".join(lines)


def wheel_table(result: dict[str, Any], source: str) -> str:
    """What is in a wheel for each architecture (bench/compiled/wheel.py)."""
    machine = result["machine"]
    packed, unpacked = (result[key] / 2**20 for key in ("wheel_bytes", "extension_bytes"))
    virtual = "virtual machine, " if machine["virtual"] else ""
    heads = ("architecture", "kernels", "left out", "machine code, KiB", "most registers", "spills (LDL + STL)")
    lines = [
        f"`{result['wheel']}`: {packed:.1f} MiB, {unpacked:.1f} unpacked, "
        f"built in {result['build_cpu_seconds']:.0f} s of processor time, all cores together, on {machine['cpu']} "
        f"({virtual}{machine['usable_cores']} cores); nvcc {result['nvcc']}, "
        f"{result['compiler']}, commit {result['commit'][:10]}, {result['date'][:10]} ([raw figures]({source})).",
        "",
        f"| {' | '.join(heads)} |",
        "|---|" + "---:|" * (len(heads) - 1),
    ]
    for row in result["archs"]:
        cells = (row["kernels"], row["left_out"], f"{row['code_bytes'] / 1024:.0f}", row["registers"])
        lines.append(f"| {row['arch']} | {' | '.join(map(str, cells))} | {row['local_accesses']} |")
    return "\n".join(lines)


def _noise(case: dict[str, Any]) -> str:
    """The widest range of a case's contenders, as a share of the median: what is less than this says nothing."""
    widths = [(c["q80_ms"] - c["q20_ms"]) / 2 / c["median_ms"] for c in case["contenders"] if "failed" not in c]
    return f"*±{100 * max(widths):.1f}%*" if widths else ""


@dataclass(frozen=True)
class Page:
    """What README and docs/ show of one kind of result file.

    Attributes:
        made_by: the command that makes one.
        load: reads it.
        tables: from (result, source) to the text between the markers of a name.
        plots: from (result, path, source note) to PNG files in FOLDER, by name.
    """

    made_by: str
    load: Callable[[Path], dict[str, Any]]
    tables: dict[str, Callable[[dict[str, Any], str], str]]
    plots: dict[str, Callable[[dict[str, Any], Path, str], Any]]


#: By the pattern of the files' names.
PAGES = {
    "cpu-*.jsonl": Page(
        "qlora-kernels bench --out bench/results/cpu-NAME.jsonl",
        results.load,
        {
            "headline": headlines.table,
            "bitsandbytes": headlines.peer_table,
            "cpu": layer_table,
            "cpu-other": other_table,
            "optimizer": optimizer_table,
        },
        {f"cpu-{name}.png": functools.partial(_draw, name) for name in ("speed", "memory", "rank")},
    ),
    "second-cpu-*.jsonl": Page(
        "qlora-kernels bench --out bench/results/second-cpu-NAME.jsonl",
        results.load,
        {"cpu-second": layer_table},
        {},
    ),
    "latency-*.jsonl": Page(
        "qlora-kernels bench --operations gpt2_forward --out bench/results/latency-NAME.jsonl",
        results.load,
        {"latency": latency_table},
        {},
    ),
    "wheel-*.json": Page("python -m bench.compiled.wheel", load_json, {"wheel": wheel_table}, {}),
    "ranks-*.json*": Page(
        "qlora-kernels bench --operations rank_study --out bench/results/ranks-NAME.jsonl",
        ranks.load,
        {"ranks": ranks.table},
        {"ranks.png": functools.partial(_draw, "loss")},
    ),
    "host-*.json": Page(
        "python -m bench.host.call --out bench/results/host-NAME.json",
        load_json,
        {"host": call.markdown},
        {},
    ),
}

# ---------------------------------------------------------------------------------------------------------- pages


def replace_table(text: str, table: str, name: str) -> str:
    """A page's text with the table between the markers of that name.

    Raises:
        ValueError: when the markers are missing, or another table begins between them.
    """
    begin = f"{_BEGIN}{name} -->"
    pattern = re.compile(f"{re.escape(begin)}(?:(?!{re.escape(_BEGIN)}).)*?{re.escape(_END)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"the text should hold the markers {begin} and {_END}, and no other table between them")
    return pattern.sub(lambda _: f"{begin}\n{table}\n{_END}", text)


def page_of(name: str, texts: dict[Path, str]) -> Path:
    """The one document that holds a table.

    Raises:
        ValueError: when none does, or several do.
    """
    holding = [path for path, text in texts.items() if f"{_BEGIN}{name} -->" in text]
    if len(holding) != 1:
        where = ", ".join(map(relative, holding)) or "none"
        raise ValueError(f"one document should hold the markers {_BEGIN}{name} --> and {_END}, found {where}")
    return holding[0]


def filled(texts: dict[Path, str]) -> dict[Path, str]:
    """The documents with the tables of the newest results.

    Args:
        texts: the documents' text.

    Raises:
        ValueError: when markers are missing, or the case of a bar is.
        FileNotFoundError: when there is no result of a kind.
    """
    texts = dict(texts)
    for pattern, page in PAGES.items():
        path = newest(pattern)
        result = page.load(path)
        for name, table in page.tables.items():
            document = page_of(name, texts)
            texts[document] = replace_table(texts[document], table(result, link(path, document)), name)
    document = page_of("cpu-sets", texts)
    every = [(results.load(path), link(path, document)) for path in of_every_set(FOLDER)]
    texts[document] = replace_table(texts[document], sets_table(every), "cpu-sets")
    return texts


def read_documents() -> dict[Path, str]:
    return {path: path.read_text(encoding="utf-8") for path in documents()}


def link(path: Path, document: Path) -> str:
    """How a document links to a file."""
    return Path(os.path.relpath(path, document.parent)).as_posix()


def relative(path: Path) -> str:
    return path.resolve().relative_to(ROOT).as_posix()


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(
        prog="python -m bench.readme.tables", description=(__doc__ or "").split("\n")[0]
    ).parse_args(argv)
    before = read_documents()
    made = {
        path: (text.encode(), "the newest results") for path, text in filled(before).items() if text != before[path]
    }
    with tempfile.TemporaryDirectory() as folder:
        for pattern, page in PAGES.items():
            path = newest(pattern)
            for name, plot in page.plots.items():
                drawn = Path(folder, name)
                plot(page.load(path), drawn, relative(path))
                made[FOLDER / name] = (drawn.read_bytes(), relative(path))
    # Nothing can fail from here on, so only now is anything replaced.
    for path, (content, source) in made.items():
        write_atomically(path, lambda temporary, content=content: Path(temporary).write_bytes(content))
        print(f"{relative(path)} from {source}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
