"""The report of a check on a card: bars and results, the worst first; times; steps; facts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.card import sections
from bench.card.predictions import card_named, predicted_us
from bench.text import number, table
from qlora_kernels.bench.case import OURS
from qlora_kernels.bench.contenders.names import COPY, ROOFS
from qlora_kernels.bench.points import POINT_KEYS
from qlora_kernels.bench.report.bars import CARD_BARS, judge
from qlora_kernels.bench.report.ratios import find_contender, gb_per_s, ratio_to_ours, sizes

#: More skipped tests than these with the same reason share a line.
MANY = 5
#: The steps whose cases compare this package with others.
BENCHES = ("bench", "linear", "quantization", "optimizer")


def step(results: dict[str, Any], name: str) -> dict[str, Any]:
    """A step's entry, or an empty one."""
    return next((one for one in results["steps"] if one["name"] == name), {})


def outcome_of(results: dict[str, Any], name: str) -> dict[str, Any]:
    """What a step measured."""
    return step(results, name).get("found") or {}


def _bar_lines(bench: dict[str, Any]) -> list[str]:
    rows = [
        [
            v.bar.title,
            v.word,
            number(v.ratio, ".2f"),
            f"{v.bar.at_least:.2f}",
            number(v.share or None, ".2f"),
            v.reason or "",
        ]
        for v in judge(bench, CARD_BARS)
    ]
    head = ("time of others over this package's", "", "reached", "bar", "reached / bar", "why")
    return ["## Bars", "", *table(head, rows, left=2)]


_HEAD = ("", "", "us", "20-80%", "by", "GB/s", "of copy", "event us", "host us", "wall us", "predicted us", "/ ours")
_LEGEND = (
    "us: on the device, in replays of a CUDA graph, or else between events; GB/s: what must be moved, over that. Of "
    "copy: of the bandwidth of a large copy on the same card, read and write. Event: between events around each call. "
    "Host: until a call returns. Wall: calls in a row with one wait at the end. Predicted: bench/compiled/predict.py."
)


def device_of(results: dict[str, Any]) -> str:
    """The card's name, by the facts or by what a step has measured; empty where none was found."""
    measured = (outcome_of(results, name).get("machine") or {} for name in (*BENCHES, "forced", "early"))
    names = [outcome_of(results, "facts").get("device"), *((one.get("gpu") or {}).get("name") for one in measured)]
    return next(filter(None, names), "")


def left_out(found: dict[str, Any]) -> int:
    """How many cases there was no time for."""
    cases = found.get("cases")
    return sum(bool(case.get("left_out")) for case in cases) if isinstance(cases, list) else 0


def cases_of(results: dict[str, Any]) -> dict[str, Any]:
    """All measured cases of steps that compare this package with others; what they have in common only once."""
    cases: dict[str, dict[str, Any]] = {}
    for name in BENCHES:
        for case in outcome_of(results, name).get("cases") or []:
            key = str([case[axis] for axis in POINT_KEYS if axis in case])
            if key not in cases or "failed" in cases[key]:
                cases[key] = case
    return {"cases": list(cases.values())}


def _time_lines(bench: dict[str, Any], device: str, stand_in: bool = False) -> list[str]:
    """Every contender of every case, and why others have no figure."""
    card, roof = card_named(device), _copy_rate(bench)
    lines = ["", f"## {sections.NO_TIMES if stand_in else 'Times'}", ""]
    if roof:
        lines += [f"A copy of 1 GiB moves {roof:.0f} GB/s, read and write.", ""]
    rows, reasons = [], {}
    for case in bench["cases"]:
        title = ", ".join(filter(None, (case["title"], sizes(case))))
        if "failed" in case:
            reasons.setdefault(case["failed"], []).append(title)
        for one in case["contenders"]:
            if "failed" in one:
                reasons.setdefault(f"{one['name']}: {one['failed']}", []).append(title)
                continue
            rows.append([title, one["name"], *_figures(case, one, roof, card)])
            if (one.get("no_graph") or "").startswith("not captured"):
                reasons.setdefault(f"{one['name']}: no time by graph: {one['no_graph']}", []).append(title)
    head = [word.replace("us", "stand-in us") for word in _HEAD] if stand_in else _HEAD
    lines += [*table(head, rows, left=2), "", _LEGEND, ""]
    for why, titles in reasons.items():
        lines.append(f"- {why} ({'all cases' if len(titles) == len(bench['cases']) else '; '.join(titles)})")
    return lines


def _figures(case: dict[str, Any], one: dict[str, Any], roof: float | None, card: Any) -> list[str]:
    rate = gb_per_s(one)
    times = (one.get(key) for key in ("event_ms", "host_ms", "wall_ms"))
    return [
        f"{one['median_ms'] * 1e3:.1f}",
        f"{one['q20_ms'] * 1e3:.1f}-{one['q80_ms'] * 1e3:.1f}",
        one.get("by") or "",
        number(rate, ".0f"),
        "" if one["name"] in ROOFS or not rate or not roof else f"{rate / roof:.0%}",
        *(number(None if ms is None else ms * 1e3, ".1f") for ms in times),
        "" if card is None else _predicted(case, one, card),
        "" if one["name"] == OURS else number(ratio_to_ours(case, one), ".2f"),
    ]


def _predicted(case: dict[str, Any], one: dict[str, Any], card: Any) -> str:
    try:
        return number(predicted_us(case, one, card), ".1f")
    except Exception:  # a table of compiled code that lacks a kernel is no reason to show no times
        return "?"


def _copy_rate(bench: dict[str, Any]) -> float | None:
    """GB/s of the large copy."""
    copies = (find_contender(case, COPY) for case in bench["cases"] if case["operation"] == "limits")
    return next((gb_per_s(one) for one in copies if one and "failed" not in one), None)


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
        not_run = f", {what['not_run']} not run" if what.get("not_run") else ""
        return f"{what['passed']} passed, {what['skipped']} skipped{not_run}"
    if entry["name"] == "kernels" and "cases" in what:
        return f"{what['right']} of {what['cases']} right, {what['not_run']} not run"
    if isinstance(what.get("cases"), list):
        return f"{len(what['cases'])} cases" + (f", {left_out(what)} not run" if left_out(what) else "")
    if entry["name"] == "sanitizers":
        return "; ".join(f"{tool}: {_listed(result)}" for tool, result in what.items())
    return ""


def _listed_by_reason(tests: Sequence[Sequence[str]], most: int) -> list[str]:
    """A line for each test; where more have the same reason than that, one for them all."""
    by_reason: dict[str, list[str]] = {}
    for name, why in tests:
        by_reason.setdefault(why, []).append(name)
    lines = []
    for why, names in by_reason.items():
        many = len(names) > most
        lines += [f"- {len(names)} tests, as {names[0]}: {why}"] if many else [f"- {name}: {why}" for name in names]
    return lines


def _listed(result: dict[str, Any]) -> str:
    return ", ".join(f"{count} {name}" for name, count in result.items())


def markdown(results: dict[str, Any]) -> str:
    """Everything, as Markdown that also reads well on a terminal."""
    known = outcome_of(results, "facts")
    outcome = "all steps passed" if results["passed"] else "not all steps passed"
    if not results["complete"]:
        outcome = "stopped before the end"
    stand_in = bool(results.get("stand_in"))
    what = {"first": "First command", "second": "Second command"}.get(results.get("visit", ""), "Check")
    lines = [f"# {what} on {device_of(results) or 'a card'}, {results['date'][:10]}: {outcome}", ""]
    if stand_in:
        lines += [sections.REHEARSAL, ""]
    lines += sections.kernel_lines(outcome_of(results, "kernels"))
    measured = cases_of(results)
    if not stand_in and ("visit" not in results or measured["cases"]):
        lines += _bar_lines(measured)
    if measured["cases"]:
        lines += _time_lines(measured, device_of(results), stand_in)
    lines += sections.rate_lines(outcome_of(results, "rates"), card_named(device_of(results)))
    for name in ("forced", "early"):
        lines += sections.variant_lines(name, outcome_of(results, name), stand_in)
    lines += sections.profile_lines(outcome_of(results, "profile"))
    lines += sections.clock_lines(results.get("clocks") or {})
    lines += ["", "## Steps", ""]
    rows = [
        [s["name"], s["status"], number(s.get("seconds"), ".1f"), number(s.get("limit_s"), ".0f"), _note(s)]
        for s in results["steps"]
    ]
    lines += table(("", "", "s", "limit s", ""), rows, left=2)
    if results.get("problems"):
        lines += ["", *(f"- {sentence}" for sentence in results["problems"])]
    tests = outcome_of(results, "tests") or outcome_of(results, "launches")
    for title, key in (("Failed tests", "failures"), ("Skipped tests", "skips")):
        if tests.get(key):
            lines += [
                "",
                f"## {title}",
                "",
                *_listed_by_reason(tests[key], MANY if key == "skips" else len(tests[key])),
            ]
    tails = [(s["name"], s["tail"]) for s in results["steps"] if s.get("tail")]
    for name, tail in tails:
        lines += ["", f"## The end of what {name} printed", "", *("    " + line for line in tail.splitlines())]
    if known:
        lines += ["", "## Facts", ""]
        lines += table(
            ("", ""), [[k, str(v)] for k, v in known.items() if k not in ("nvidia_smi", "build_info")], left=2
        )
        smi = known["nvidia_smi"]
        if isinstance(smi, list):
            lines += ["", *(f"- nvidia-smi: {', '.join(f'{k} {v}' for k, v in card.items())}" for card in smi)]
    return "\n".join(lines) + "\n"
