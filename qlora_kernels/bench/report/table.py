"""What the terminal shows of a result: every figure, losses, and ratios, the worst first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..case import OURS, QUIET
from ..contenders.names import PRODUCT, PRODUCT_F32, ROOFS
from .losses import study_of
from .ratios import find_contender, gb_per_s, gflop_per_s, limits_of, ratio_to_ours, sizes, times


def terminal(results: dict[str, Any]) -> str:
    """Machine and limits; every figure; how many times as long as this package the others take, its worst first."""
    lines = [machine_line(results)]
    lines += limit_lines(results)
    for section in (_every_figure, _losses, _ratios):
        if shown := section(results):
            lines += ["", *shown]
    if not results["complete"]:
        lines += ["", "The run was not completed: some cases are missing."]
    return "\n".join(lines)


def limit_lines(results: dict[str, Any]) -> list[str]:
    """The limits in words, and that 16 bits are slow where they are: what is measured in them is not their fault."""
    limits = limits_of(results)
    rates = [f"memory is read at {limits.read_per_s / 1e9:.1f} GB/s"] if limits.read_per_s else []
    rates += [f"memory moves {limits.bytes_per_s / 1e9:.1f} GB/s (read and write)"] if limits.bytes_per_s else []
    rates += [f"products reach {rate / 1e12:.3g} TFLOP/s in {name}" for name, rate in limits.flops.items()]
    lines = [f"Limits, the best rates in this run: {', '.join(rates)}."] if rates else []
    slow = results.get("machine", {}).get("slow_bfloat16")  # older results have none
    if slow:
        line = slow_line(slow)
        lines.append(f"{line[0].upper()}{line[1:]}.")
    for case in results["cases"]:
        half, whole = find_contender(case, PRODUCT), find_contender(case, PRODUCT_F32)
        if half and whole and "failed" not in half and "failed" not in whole:
            slower = half["median_ms"] / whole["median_ms"]
            if slower > 1:
                lines.append(
                    f"torch's {case['dtype']} product takes {slower:.1f} times as long as its float32 one here: "
                    "compare with its figures in float32."
                )
    return lines


def slow_line(why: str) -> str:
    """That cases are in float32, and how to have another dtype: a sentence for the user."""
    return f"measuring in float32, which is faster here than bfloat16: {why}; --dtypes bfloat16 overrides that"


def _losses(results: dict[str, Any]) -> list[str]:
    """A line for each set of layers, a column for each rank."""
    try:
        study = study_of(results)
    except ValueError as problem:
        return [f"No table of losses: {problem}."]
    if study is None:
        return []
    base, steps = study.base, study.training["steps"]
    rows = [(f"held-out loss after {steps} steps, nats per byte", *(f"r = {rank}" for rank in study.ranks))]
    for name, row in study.rows.items():
        rows.append((f"  adapters on {name}", *("failed" if one is None else f"{one['loss']:.4f}" for one in row)))
    lines = align(rows)
    return [*lines, f"The NF4 base has {base['loss']:.4f}, its 16-bit weights {base['loss_16bit']:.4f}."]


def _ratios(results: dict[str, Any]) -> list[str]:
    """One line for each rival in each case."""
    rows, without = [], []
    for case in results["cases"]:
        ours = find_contender(case, OURS)
        for rival in case["contenders"]:
            alone = ours is None and "failed" not in rival  # this package takes no part, or is all there is
            if rival["name"] in ROOFS or rival is ours or alone:
                continue
            where = (case["title"], sizes(case), rival["name"])
            ratio = ratio_to_ours(case, rival)
            if ours is None or ratio is None:
                why = rival.get("failed") or (ours or {})["failed"]
                without.append((*where, why, "", ""))
            else:
                rows.append((ratio, (*where, f"{ratio:.2f}", *map(ms, times(ours, rival)))))
    if not rows and not without:
        return []
    head = ("how many times as long as this package, the worst first", "", "", "ratio", "ours, ms", "theirs, ms")
    return align([head, *(row for _, row in sorted(rows, key=lambda row: row[0])), *without], left=3)


def _every_figure(results: dict[str, Any]) -> list[str]:
    """All contenders of all cases; what a card's figure was taken by stands behind it."""
    limits = limits_of(results)
    card = any(c.get("by") for case in results["cases"] for c in case["contenders"])
    head = ("", "median ms", "20%", "80%", "mean", "x ours", "GB/s", "GFLOP/s", "of the limit", "allocated", "error")
    head = (*head, "format's")
    rows: list[tuple[str, ...]] = [(*head, "by") if card else head]
    for case in results["cases"]:
        others = case["other_processes"] or 0
        notes = [f"others took {others:.0%} of the machine"] if others > QUIET else []
        notes += [case["failed"]] if "failed" in case else []
        notes += [f"chose {case['activations'].removeprefix('torch.')}"] if case.get("activations") else []
        about = sizes(case)
        rows.append((f"{case['title']}{', ' + about if about else ''}{': ' if notes else ''}{'; '.join(notes)}",))
        for c in case["contenders"]:
            if "failed" in c:
                rows.append((f"  {c['name']}: {c['failed']}",))
                continue
            ratio, share = ratio_to_ours(case, c), limits.share(case, c)
            roof, multiplies = c["name"] in ROOFS, c["name"] in (PRODUCT, PRODUCT_F32)
            speed, rate = gb_per_s(c), None if roof and not multiplies else gflop_per_s(case, c)
            rows.append(
                (
                    "  " + c["name"],
                    ms(c["median_ms"]),
                    ms(c["q20_ms"]),
                    ms(c["q80_ms"]),
                    "" if c.get("mean_ms") is None else ms(c["mean_ms"]),
                    "" if ratio is None else f"{ratio:.2f}",
                    "" if speed is None else f"{speed:.1f}",
                    "" if rate is None else f"{rate:.0f}",
                    "" if share is None or roof else f"{share:.0%}",
                    size(c.get("peak_allocated") if c.get("peak") is None else c["peak"]),
                    "" if c["error"] is None else f"{c['error']:.1e}",
                    "" if c.get("format_error") is None else f"{c['format_error']:.1e}",
                    *([c.get("by") or ""] if card else []),
                )
            )
            if c.get("by") == "events" and c.get("no_graph"):
                rows.append((f"    no graph: {c['no_graph']}",))
    return align(rows)


def machine_line(results: dict[str, Any]) -> str:
    """Where and with what a result was measured, in a sentence."""
    m, v, s = results["machine"], results["versions"], results["settings"]
    commit = (results["commit"] or "unknown")[:10] + (" with changes" if results["modified"] else "")
    virtual = "virtual machine, " if m["virtual"] else ""
    others = max((case["other_processes"] or 0 for case in results["cases"]), default=0)
    busy = f"; other processes took up to {others:.0%} of the machine meanwhile" if others > QUIET else ""
    gpu = m.get("gpu")
    card = f"{gpu['name']} (driver {gpu['driver']}), " if gpu and s["device"] != "cpu" else ""
    return (
        f"{card}{m['cpu']} ({virtual}{m['usable_cores']} cores, kernels for {m['isa_in_use']}), "
        f"{s['threads']} threads, "
        f"torch {v['torch']}, bitsandbytes {v['bitsandbytes']}, PEFT {v['peft']}, "
        f"{v['compiler']}, commit {commit}, {results['date'][:10]}{busy}"
    )


def align(rows: Sequence[tuple[str, ...]], left: int = 1) -> list[str]:
    """Columns under each other; a row of one cell, or the text in the last filled one, may stick out."""
    count = max(len(row) for row in rows)
    full = [(*row, *[""] * (count - len(row))) for row in rows]
    widths = [max((len(r[i]) for r in full if any(r[i + 1 :])), default=0) for i in range(count)]
    widths[-1] = max(len(r[-1]) for r in full)
    lines = []
    for row in full:
        cells = [cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    return lines


def ms(value: float) -> str:
    """Milliseconds in four digits or so."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}" if value >= 1 else f"{value:.4f}"


def size(count: int | None) -> str:
    """Bytes as people read them."""
    if count is None:
        return ""
    shown: float = count
    for unit in ("B", "KB", "MB"):
        if shown < 1000:
            return f"{shown:.3g} {unit}"
        shown /= 1000
    return f"{shown:.3g} GB"
