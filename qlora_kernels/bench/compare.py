"""What became slower between two runs, and what is only noise."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from .common import OURS
from .limits import find_contender, sizes
from .points import POINT_KEYS
from .table import align, machine_line, ms

#: A difference below this is never called one: medians of two runs of one commit on a quiet machine differ so much.
LEAST = 0.03


@dataclass(frozen=True)
class Change:
    """This package in one case of two runs.

    Attributes:
        where: title and sizes.
        before, after: medians, ms.
        ratio: after over before, of this package.
        drift: the same of the contenders whose code is not this package's (median over them); None without any.
        verdict: "slower", "faster", or "within the noise".
    """

    where: str
    before: float
    after: float
    ratio: float
    drift: float | None
    verdict: str

    @property
    def own(self) -> float:
        """The ratio, less what happened to the others meanwhile."""
        return self.ratio / (self.drift or 1.0)


def compare(a: dict[str, Any], b: dict[str, Any]) -> tuple[list[Change], list[str]]:
    """Cases that both runs measured, the one that became slowest first; and what cannot be compared.

    A difference counts when three things hold: the ranges from the 20% to the 80% quantile lie apart; it is more than
    LEAST; and what is left of it after the drift of the machine is, too. The drift is how the other contenders of the
    case, whose code is the same in both runs, changed. Where their versions differ, it is not taken out.
    """
    keyed = {_key(case): case for case in a["cases"]}
    same = all(a["versions"][name] == b["versions"][name] for name in ("torch", "bitsandbytes", "peft"))
    changes, left_out = [], []
    for case in b["cases"]:
        earlier = keyed.pop(_key(case), None)
        where = ", ".join(part for part in (case["title"], sizes(case)) if part)
        ours = find_contender(case, OURS)
        if ours is None:
            continue
        if earlier is None:
            left_out.append(f"{where}: only in the second run")
            continue
        before = find_contender(earlier, OURS)
        failed = [f"in the {n} run: {c['failed']}" for n, c in (("first", before), ("second", ours)) if "failed" in c]
        if failed:
            left_out.append(f"{where}: {'; '.join(failed)}")
            continue
        changes.append(_change(where, earlier, case, before, ours, same))
    left_out += [
        f"{', '.join(part for part in (case['title'], sizes(case)) if part)}: only in the first run"
        for case in keyed.values()
        if find_contender(case, OURS)
    ]
    return sorted(changes, key=lambda change: -change.own), left_out


def _key(case: dict[str, Any]) -> tuple:
    return tuple(case.get(key) for key in POINT_KEYS)


def _change(where: str, earlier: dict, case: dict, before: dict, ours: dict, same: bool) -> Change:
    ratio = ours["median_ms"] / before["median_ms"]
    others = []
    for other in case["contenders"]:
        first = find_contender(earlier, other["name"])
        # Those that call this package's kernels are no judges of the machine.
        if not same or first is None or other["name"].startswith((OURS, "dequantize")):
            continue
        if "failed" not in other and "failed" not in first:
            others.append(other["median_ms"] / first["median_ms"])
    drift = statistics.median(others) if others else None
    apart = ours["q20_ms"] > before["q80_ms"] or ours["q80_ms"] < before["q20_ms"]
    own = ratio / (drift or 1.0)
    verdict = "within the noise"
    if apart and min(ratio, own) > 1 + LEAST:
        verdict = "slower"
    elif apart and max(ratio, own) < 1 / (1 + LEAST):
        verdict = "faster"
    return Change(where, before["median_ms"], ours["median_ms"], ratio, drift, verdict)


def terminal(a: dict[str, Any], b: dict[str, Any]) -> str:
    """The comparison as text; a warning first where the runs differ in more than the commit."""
    changes, left_out = compare(a, b)
    lines = [f"first:  {machine_line(a)}", f"second: {machine_line(b)}"]
    lines += [f"Careful: {text}" for text in _differences(a, b)]
    rows = [("this package", "first, ms", "second, ms", "ratio", "others'", "")]
    for c in changes:
        drift = "" if c.drift is None else f"{c.drift:.2f}"
        rows.append((c.where, ms(c.before), ms(c.after), f"{c.ratio:.2f}", drift, c.verdict))
    lines += ["", *align(rows)]
    count = {word: sum(c.verdict == word for c in changes) for word in ("slower", "faster", "within the noise")}
    lines += ["", f"{', '.join(f'{n} {word}' for word, n in count.items())}, of {len(changes)} cases."]
    lines.append("others': how the contenders whose code is the same differ between the runs: the machine's drift.")
    if left_out:
        lines += ["", "Not compared:", *(f"  {text}" for text in left_out)]
    return "\n".join(lines)


def _differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    found = []
    for what, key in (("processors", "cpu"), ("instruction sets", "isa_in_use"), ("cards", "gpu")):
        if a["machine"].get(key) != b["machine"].get(key):
            found.append(f"the runs' {what} differ: {a['machine'].get(key)} and {b['machine'].get(key)}")
    for key in ("device", "threads"):
        if a["settings"][key] != b["settings"][key]:
            found.append(f"the runs' {key} differ: {a['settings'][key]} and {b['settings'][key]}")
    for name in ("torch", "bitsandbytes", "peft"):
        if a["versions"][name] != b["versions"][name]:
            found.append(f"the versions of {name} differ: {a['versions'][name]} and {b['versions'][name]}")
    return found
