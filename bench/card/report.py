"""A check on a card as tables for people: the bars and what was reached, the worst first; times; facts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_kernels.bench.case import OURS
from qlora_kernels.bench.contenders.names import BNB, CHECKED, EQUAL_COPY
from qlora_kernels.bench.report.ratios import find_contender

#: dequantize at this size should reach this share of a copy's bandwidth,
COPY_BAR = ((8192, 8192), 0.90)
#: and at this one be so many times as fast as bitsandbytes.
BNB_BAR = ((4096, 4096), 2.0)
DTYPES = ("bfloat16", "float16", "float32")
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Verdict:
    """A bar: what was asked for and what was reached, or why nothing was."""

    title: str
    needed: float
    reached: float | None
    reason: str = ""

    @property
    def share(self) -> float:
        """What was reached of what was asked for; 0 where nothing was measured, so that this stands first."""
        return 0.0 if self.reached is None else self.reached / self.needed

    @property
    def word(self) -> str:
        if self.reached is None:
            return NOT_MEASURED
        return "met" if self.share >= 1.0 else "missed"


def step(results: dict[str, Any], name: str) -> dict[str, Any]:
    """A step's entry; an empty one where there is none."""
    return next((one for one in results["steps"] if one["name"] == name), {})


def found(results: dict[str, Any], name: str) -> dict[str, Any]:
    """What a step found."""
    return step(results, name).get("found") or {}


def share_of_copy(case: dict[str, Any], roof: dict[str, Any] | None) -> float | None:
    """This package's bandwidth in a case, of the large copy's; None where either was not measured."""
    ours = find_contender(case, OURS)
    return None if roof is None or ours is None or "failed" in ours else ours["gb_per_s"] / roof["gb_per_s"]


def times_ours(case: dict[str, Any], name: str) -> float | None:
    """How many times as long as this package a contender took; both by graph, or else both by events."""
    ours, other = find_contender(case, OURS), find_contender(case, name)
    if ours is None or other is None or "failed" in ours or "failed" in other:
        return None
    kind = "graph_us" if ours["graph_us"] and other["graph_us"] else "event_us"
    return other[kind]["median"] / ours[kind]["median"]


def verdicts(results: dict[str, Any]) -> list[Verdict]:
    """Every bar, the worst first. One whose case is missing is there, as not measured."""
    bench = found(results, "bench")
    roof = bench.get("roof")
    cases = {(c["operation"], c["n"], c["k"], c["dtype"]): c for c in bench.get("cases", [])}
    judged = []
    for dtype in DTYPES:
        (n, k), needed = COPY_BAR
        case = cases.get(("dequantize", n, k, dtype))
        title = f"dequantize {n} x {k} to {dtype}, of a copy's bandwidth"
        reached = None if case is None else share_of_copy(case, roof)
        judged.append(Verdict(title, needed, reached, "" if reached is not None else _why_not(case, OURS)))
        (n, k), needed = BNB_BAR
        case = cases.get(("dequantize", n, k, dtype))
        title = f"dequantize {n} x {k} to {dtype}, bitsandbytes' time over this package's"
        reached = None if case is None else times_ours(case, BNB)
        judged.append(Verdict(title, needed, reached, "" if reached is not None else _why_not(case, BNB)))
    return sorted(judged, key=lambda one: one.share)


def _why_not(case: dict[str, Any] | None, name: str) -> str:
    if case is None:
        return "the case was not run"
    if "failed" in case:
        return case["failed"]
    return (find_contender(case, name) or {}).get("failed", "no copy to compare with")


# ------------------------------------------------------------------------------------------------------------ tables


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """A Markdown table whose columns also stand under each other on a terminal.

    Args:
        head: the columns' names.
        rows: the cells.
        left: so many columns are aligned to the left, the others to the right.
    """
    clean = [[cell.replace("|", "/").replace("\n", " ") for cell in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in clean) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))]
        return f"| {' | '.join(cells)} |"

    rule = [("-" * w) if i < left else ("-" * (w - 1) + ":") for i, w in enumerate(widths)]
    return [line(clean[0]), f"| {' | '.join(rule)} |", *map(line, clean[1:])]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _median(contender: dict[str, Any] | None, kind: str) -> float | None:
    """The median of one kind of time; None where there is none."""
    times = (contender or {}).get(kind)
    return None if not times else times["median"]


def _spread(contender: dict[str, Any]) -> str:
    times = contender["graph_us"] or contender["event_us"]
    return f"{times['q20']:.1f}-{times['q80']:.1f}"


def _case_row(case: dict[str, Any], roof: dict[str, Any] | None) -> list[str]:
    title = [case["operation"], f"{case['n']} x {case['k']}", case["dtype"]]
    ours, bnb = find_contender(case, OURS), find_contender(case, BNB)
    if ours is None or "failed" in ours:
        return [*title, *[""] * 11]
    bnb_us = None if bnb is None or "failed" in bnb else bnb["us"]
    checked = find_contender(case, CHECKED)
    return [
        *title,
        f"{ours['us']:.1f}",
        _spread(ours),
        f"{ours['gb_per_s']:.0f}",
        _number(share_of_copy(case, roof), ".0%"),
        _number(times_ours(case, EQUAL_COPY), ".0%"),
        _number(bnb_us, ".1f"),
        _number(times_ours(case, BNB), ".2f"),
        _number(_median(ours, "event_us"), ".1f"),
        _number(_median(ours, "host_us"), ".1f"),
        _number(_median(checked, "host_us"), ".1f"),
        _number(_median(bnb, "host_us"), ".1f"),
    ]


_CASE_HEAD = ("", "N x K", "dtype", "us", "20-80%", "GB/s", "of copy", "of equal copy", "bnb us", "bnb / ours")
_CASE_HEAD += ("event us", "host us", "checked host us", "bnb host us")
_LEGEND = (
    "us: on the device, in replays of a CUDA graph; GB/s: what must be moved, over that. Of copy: of the bandwidth of "
    "a large copy on the same card, read and write; of equal copy: the time of a copy of as many bytes, over ours. "
    "Event: between events around each call. Host: until a call returns; checked: of quantize(), which waits for the "
    "device to look at its result. bnb: bitsandbytes, nested constants."
)


def _bench_lines(results: dict[str, Any]) -> list[str]:
    bench = found(results, "bench")
    if not bench.get("roof"):
        return []
    roof = bench["roof"]
    lines = ["", "## Times", "", f"A copy of 1 GiB moves {roof['gb_per_s']:.0f} GB/s, read and write.", ""]
    cases = sorted(bench["cases"], key=lambda case: share_of_copy(case, roof) or 0.0)
    lines += table(_CASE_HEAD, [_case_row(case, roof) for case in cases], left=3)
    lines += ["", _LEGEND, ""]
    reasons: dict[str, list[str]] = {}
    for case in cases:
        title = f"{case['operation']} {case['n']} x {case['k']} {case['dtype']}"
        failed = [(OURS, case["failed"])] if "failed" in case else []
        failed += [(c["name"], c["failed"]) for c in case["contenders"] if "failed" in c]
        failed += [
            (c["name"], f"no time by graph: {c['no_graph']}")
            for c in case["contenders"]
            if c.get("no_graph") and not c["waits"]
        ]
        for name, why in failed:
            reasons.setdefault(f"{name}: {why}", []).append(title)
    for why, titles in reasons.items():
        lines.append(f"- {why} ({'all cases' if len(titles) == len(cases) else ', '.join(titles)})")
    return lines


def _note(entry: dict[str, Any]) -> str:
    what = entry.get("found") or {}
    if entry.get("reason"):
        return entry["reason"]
    if entry["name"] == "build" and what:
        archs = what["build_info"].get("cuda_archs", "")
        archs = archs if isinstance(archs, str) else ";".join(archs)
        how = "from scratch" if what["from_scratch"] else "on top of an older one"
        return f"{what['build_seconds']} s, {how}, for {archs}"
    if "passed" in what:
        return f"{what['passed']} passed, {what['skipped']} skipped"
    if entry["name"] == "sanitizers":
        return "; ".join(f"{tool}: {_listed(result)}" for tool, result in what.items())
    return ""


def _listed(result: dict[str, Any]) -> str:
    return ", ".join(f"{count} {name}" for name, count in result.items())


def _more_benches(results: dict[str, Any]) -> list[str]:
    """The layer's and the optimizers' bars and times, as far as they were measured, in their own words."""
    from bench.card import linear, optimizer

    lines: list[str] = []
    for title, name, module in (
        ("The layer's products", "bench_linear", linear),
        ("Optimizers", "bench_optimizer", optimizer),
    ):
        measured = found(results, name)
        if measured.get("cases"):
            text = module.markdown(measured).strip()
            lines += ["", f"## {title}", "", *(("#" + x) if x.startswith("## ") else x for x in text.splitlines())]
    return lines


def markdown(results: dict[str, Any]) -> str:
    """Everything, as Markdown that also reads well on a terminal."""
    known = found(results, "facts")
    outcome = "all steps passed" if results["passed"] else "not all steps passed"
    if not results["complete"]:
        outcome = "stopped before the end"
    lines = [f"# Check on {known.get('device', 'a card')}, {results['date'][:10]}: {outcome}", ""]
    lines += ["## Bars", ""]
    rows = [
        [
            one.title,
            one.word,
            _number(one.reached, ".2f"),
            f"{one.needed:.2f}",
            "" if one.reached is None else f"{one.share:.2f}",
            one.reason,
        ]
        for one in verdicts(results)
    ]
    lines += table(("", "", "reached", "bar", "reached / bar", "why"), rows, left=2)
    lines += _bench_lines(results)
    lines += _more_benches(results)
    lines += ["", "## Steps", ""]
    rows = [
        [s["name"], s["status"], _number(s.get("seconds"), ".1f"), _number(s.get("limit_s"), ".0f"), _note(s)]
        for s in results["steps"]
    ]
    lines += table(("", "", "s", "limit s", ""), rows, left=2)
    tests = found(results, "tests")
    for title, key in (("Failed tests", "failures"), ("Skipped tests", "skips")):
        if tests.get(key):
            lines += ["", f"## {title}", "", *(f"- {name}: {why}" for name, why in tests[key])]
    tails = [(s["name"], s["tail"]) for s in results["steps"] if s.get("tail")]
    for name, tail in tails:
        lines += ["", f"## The end of what {name} printed", "", *("    " + line for line in tail.splitlines())]
    if known:
        lines += ["", "## Facts", ""]
        lines += table(("", ""), [[k, str(v)] for k, v in known.items() if k != "nvidia_smi"], left=2)
        smi = known["nvidia_smi"]
        if isinstance(smi, list):
            lines += ["", *(f"- nvidia-smi: {', '.join(f'{k} {v}' for k, v in card.items())}" for card in smi)]
    return "\n".join(lines) + "\n"
