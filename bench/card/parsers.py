"""Parses what other programs print: compute-sanitizer, pytest (junit xml), nvidia-smi, nvcc, ncu."""

from __future__ import annotations

import csv
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from typing import Any

_ERRORS = re.compile(r"^=+ ERROR SUMMARY: (\d+) errors?\b", re.MULTILINE)
_HAZARDS = re.compile(
    r"^=+ RACECHECK SUMMARY: (\d+) hazards? displayed \((\d+) errors?, (\d+) warnings?\)", re.MULTILINE
)
# Printed when the tool could not do its work. A summary may follow even then.
_BROKEN = re.compile(
    r"^=+ ((?:Internal Sanitizer )?Error: .*|Target application terminated before .*|No attachable process found.*)",
    re.MULTILINE,
)


def sanitizer_findings(text: str, tool: str) -> dict[str, int]:
    """What compute-sanitizer found in all processes it watched.

    Args:
        text: its output.
        tool: memcheck, racecheck, synccheck or initcheck.

    Returns:
        ``errors``; for racecheck also ``hazards`` and ``warnings``.

    Raises:
        ValueError: when there is no summary, or the tool could not do its work: neither is a clean result.
    """
    broken = _BROKEN.search(text)
    if broken:
        raise ValueError(f"compute-sanitizer says: {broken.group(1).strip()}")
    if tool == "racecheck":
        summaries = _HAZARDS.findall(text)
        if not summaries:
            raise ValueError("no RACECHECK SUMMARY in the output of compute-sanitizer")
        hazards, errors, warnings = (sum(int(one[i]) for one in summaries) for i in range(3))
        return {"errors": errors, "hazards": hazards, "warnings": warnings}
    summaries = _ERRORS.findall(text)
    if not summaries:
        raise ValueError("no ERROR SUMMARY in the output of compute-sanitizer")
    return {"errors": sum(map(int, summaries))}


def junit_counts(text: str | bytes) -> dict[str, Any]:
    """Counts and names from pytest's junit xml.

    Returns:
        ``passed``, ``failed`` (errors in setup and teardown included), ``skipped``; ``failures`` and ``skips``,
        each a list of (name, first line of the reason).

    Raises:
        ValueError: when the text is not junit xml.
    """
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(f"the junit file cannot be read: {error}") from None
    # A test is listed twice when its teardown fails as well.
    failures: dict[str, str] = {}
    skips: dict[str, str] = {}
    passed: set[str] = set()
    for case in root.iter("testcase"):
        name = "::".join(word for word in (case.get("classname", ""), case.get("name", "")) if word)
        bad = next((child for child in case if child.tag in ("failure", "error")), None)
        skip = case.find("skipped")
        if bad is not None:
            failures.setdefault(name, _reason(bad))
        elif skip is not None:
            skips[name] = _reason(skip)
        else:
            passed.add(name)
    passed -= failures.keys() | skips.keys()
    return {
        "passed": len(passed),
        "failed": len(failures),
        "skipped": len(skips),
        "failures": [list(item) for item in failures.items()],
        "skips": [list(item) for item in skips.items()],
    }


def tests_of(output: str) -> tuple[list[str], int]:
    """From what ``pytest -v`` prints: the tests that have ended, and how many there are.

    A test that was under way when the process ended is not among the first.
    """
    done = re.findall(r"^(\S+?\.py::.+?) (?:PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", output, re.MULTILINE)
    many = re.search(r"^collected (\d+) items?(?:[^\n]*?(\d+) selected)?", output, re.MULTILINE)
    return list(dict.fromkeys(done)), int(many[2] or many[1]) if many else 0


def _reason(element: ElementTree.Element) -> str:
    text = (element.get("message") or element.text or "").strip()
    return text.splitlines()[0][:300] if text else "no reason given"


def smi_rows(text: str, fields: Sequence[str]) -> list[dict[str, str]]:
    """Parses ``nvidia-smi --query-gpu=FIELDS --format=csv,noheader`` into a dictionary for each card.

    Raises:
        ValueError: when a line has another number of columns.
    """
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]
    if not rows or any(len(row) != len(fields) for row in rows):
        raise ValueError(f"nvidia-smi did not print {len(fields)} columns: {text.strip()[:200]!r}")
    return [dict(zip(fields, row)) for row in rows]


def nvcc_release(text: str) -> str:
    """The release in the output of ``nvcc --version``, such as "13.0.48", or "unknown"."""
    match = re.search(r"release (\d+\.\d+)(?:, V([\d.]+))?", text)
    return "unknown" if match is None else match.group(2) or match.group(1)


def profile_of(text: str) -> list[dict[str, Any]]:
    """From what ``ncu --page details --csv`` writes: for each launch its ``kernel``, ``grid``, ``block`` and
    ``metrics``, numbers with their units by name."""
    rows = list(csv.reader(line for line in text.splitlines() if line.startswith('"')))
    head = next((row for row in rows if "Metric Name" in row), None)
    if head is None:
        return []
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if len(row) != len(head) or row == head:
            continue
        cells = dict(zip(head, row, strict=True))
        about = {"kernel": cells["Kernel Name"], "grid": cells.get("Grid Size"), "block": cells.get("Block Size")}
        launch = found.setdefault(cells.get("ID", ""), {**about, "metrics": {}})
        if cells["Metric Name"]:
            launch["metrics"][cells["Metric Name"]] = f"{cells['Metric Value']} {cells['Metric Unit']}".strip()
    return list(found.values())
