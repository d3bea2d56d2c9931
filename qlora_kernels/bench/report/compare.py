"""What became slower between two runs, and what is only noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..case import OURS
from ..points import POINT_KEYS
from ..timing.measure import failed_ours
from .ratios import find_contender, sizes, times
from .table import align, machine_line, ms

#: A difference below this is never called one: medians of two runs of one commit on a quiet machine differ so much.
LEAST = 0.03
#: Of fewer rounds than this the spread is not known well enough to judge by.
FEWEST = 5
TOO_FEW = "too few samples"
VERDICTS = ("slower", "faster", "within the noise", TOO_FEW)
#: What rivals run: where one of these differs, they are not the same code in both runs.
LIBRARIES = ("torch", "bitsandbytes", "peft", "transformers", "kernels")

_NORMAL = statistics.NormalDist()
# The standard error of the median of n normally distributed samples is this times their standard deviation / sqrt(n).
_OF_MEDIAN = math.sqrt(math.pi / 2)


@dataclass(frozen=True)
class Change:
    """This package in one case of two runs.

    Attributes:
        where: title and sizes.
        before, after: medians, ms.
        ratio: after over before, of this package.
        drift: the same of the contenders whose code is not this package's (median over them); None without any.
        verdict: one of VERDICTS.
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


@dataclass(frozen=True)
class _Term:
    """A share of a logarithm's variance, and the degrees of freedom that it was estimated with."""

    variance: float
    freedom: int


def compare(a: dict[str, Any], b: dict[str, Any]) -> tuple[list[Change], list[str]]:
    """Cases that both runs measured, the one that became slowest first; and what cannot be compared.

    A difference counts when three things hold of the ratio of the medians, and of what is left of it after the drift of
    the machine, too: it is more than LEAST, its 95% interval does not hold 1, and there are FEWEST rounds of either
    run. The drift is how the other contenders of the case, whose code is the same in both runs, changed. It is not
    taken out where their versions differ, nor for ``finetune``, whose others train with this package's optimizer.

    The interval comes from each median's standard error, in logarithms: 1.25 standard deviations over the square root
    of the number of samples, with the standard deviation from the distance between two quantiles, as in the notches of
    McGill, Tukey and Larsen, "Variations of box plots", The American Statistician 32 (1978). What came from one round
    counts as one sample, since calls in succession are not independent. Variances of both runs, and of the drift, add
    up, and Student's t has the degrees of freedom of Welch, "The generalization of 'Student's' problem when several
    different population variances are involved", Biometrika 34 (1947). It is an interval for each case by itself.
    """
    keyed, second = ({_key(case): case for case in run["cases"]} for run in (a, b))
    same = all(a["versions"].get(name) == b["versions"].get(name) for name in LIBRARIES)
    changes, left_out = [], []
    for key, case in second.items():
        earlier = keyed.pop(key, None)
        where = _where(case)
        if earlier is None:
            left_out += [f"{where}: only in the second run"] if _has_part(case) else []
            continue
        if not _has_part(earlier) and not _has_part(case):
            continue
        failed = [f"in the {n} run: {why}" for n, c in (("first", earlier), ("second", case)) if (why := _lacking(c))]
        if failed:
            left_out.append(f"{where}: {'; '.join(failed)}")
            continue
        changes.append(_change(where, earlier, case, same and case["operation"] != "finetune"))
    left_out += [f"{_where(case)}: only in the first run" for case in keyed.values() if _has_part(case)]
    return sorted(changes, key=lambda change: -change.own), left_out


def _has_part(case: dict[str, Any]) -> bool:
    """Whether this package takes part in a case, or would have in one that failed."""
    return "failed" in case or find_contender(case, OURS) is not None


def _lacking(case: dict[str, Any]) -> str | None:
    """Why there is no figure of this package."""
    return failed_ours(case) or (None if find_contender(case, OURS) else f"no {OURS}")


def _key(case: dict[str, Any]) -> tuple:
    return tuple(case.get(key) for key in POINT_KEYS)


def _where(case: dict[str, Any]) -> str:
    return ", ".join(word for word in (case["title"], sizes(case)) if word)


def _contender(case: dict, name: str) -> dict[str, Any]:
    """One that is known to be in a case."""
    contender = find_contender(case, name)
    assert contender is not None, name
    return contender


def _change(where: str, earlier: dict, case: dict, judges: bool) -> Change:
    first, second = _contender(earlier, OURS), _contender(case, OURS)
    before, after = times(first, second)
    if (before, after) != (first["median_ms"], second["median_ms"]):
        where += ", by events"
    ratio, terms = after / before, _terms(earlier, case, OURS)
    drift, drift_terms = _drift(earlier, case) if judges else (None, [])
    if terms is None:
        verdict = TOO_FEW
    else:
        of_ratio = _verdict(ratio, terms)
        verdict = of_ratio if of_ratio == _verdict(ratio / (drift or 1.0), [*terms, *drift_terms]) else VERDICTS[2]
    return Change(where, before, after, ratio, drift, verdict)


def _drift(earlier: dict, case: dict) -> tuple[float | None, list[_Term]]:
    """The median of the other contenders' ratios, and the terms of its variance; None without such contenders."""
    ratios, every = [], []
    for other in case["contenders"]:
        first = find_contender(earlier, other["name"])
        # Those that call this package's kernels are no judges of the machine.
        if first is None or "failed" in other or "failed" in first or other["name"].startswith((OURS, "dequantize")):
            continue
        before, after = times(first, other)
        terms = _terms(earlier, case, other["name"])
        if terms is not None:
            ratios.append(after / before)
            every += terms
    if not ratios:
        return None, []
    # One or two have their mean as median; of more, the variance of the median is larger than that of the mean.
    larger = 1.0 if len(ratios) < 3 else math.pi / 2
    share = larger / len(ratios) ** 2
    return statistics.median(ratios), [_Term(term.variance * share, term.freedom) for term in every]


def _terms(earlier: dict, case: dict, name: str) -> list[_Term] | None:
    """The terms of the variance of the logarithm of a contender's ratio; None where a run tells too little of it."""
    first, second = _contender(earlier, name), _contender(case, name)
    by_events = first.get("by") != second.get("by")
    terms = []
    for run, contender in ((earlier, first), (case, second)):
        low, high, rounds = _spread(run, contender, by_events)
        if rounds < FEWEST:
            return None
        deviation = math.log(high / low) / _range(rounds)
        terms.append(_Term((_OF_MEDIAN * deviation) ** 2 / rounds, rounds - 1))
    return terms


def _range(count: int) -> float:
    """How far apart the 20% and the 80% quantile of so many normally distributed samples lie, in standard deviations.

    That is nearer than those of the distribution: the k-th of n is expected at its quantile (k - 3/8) / (n + 1/4)
    (Blom, Statistical estimates and transformed beta-variables, 1958).
    """
    k = 1 + 0.2 * (count - 1)
    return -2 * _NORMAL.inv_cdf((k - 0.375) / (count + 0.25))


def _spread(case: dict[str, Any], contender: dict[str, Any], by_events: bool) -> tuple[float, float, int]:
    """The 20% and 80% quantiles of a contender, ms, and how many rounds they are from.

    On a card there is one sample by graph in each round, and by events one of each copy. Files from before quantiles by
    events were kept have none where the time by graph was told: no rounds.
    """
    low, high, count = "q20_ms", "q80_ms", contender["samples"]
    if by_events and contender.get("by") == "graph":
        low, high, count = "event_q20_ms", "event_q80_ms", contender.get("event_samples") or 0
        if not contender.get(low) or not contender.get(high):
            return 1.0, 1.0, 0
    if contender.get("by") is None:
        count = min(case["rounds"], count)
    elif by_events or contender["by"] == "events":
        count //= contender["copies"]
    return contender[low], contender[high], count


def _verdict(ratio: float, terms: Sequence[_Term]) -> str:
    variance = sum(term.variance for term in terms)
    width = 0.0
    if variance:
        freedom = variance**2 / sum(term.variance**2 / term.freedom for term in terms)
        width = _student(freedom) * math.sqrt(variance)
    if abs(math.log(ratio)) <= max(width, math.log1p(LEAST)):
        return VERDICTS[2]
    return "slower" if ratio > 1 else "faster"


def _student(freedom: float) -> float:
    """The 97.5% quantile of Student's t (Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5)."""
    z = _NORMAL.inv_cdf(0.975)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


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
    count = {word: sum(c.verdict == word for c in changes) for word in VERDICTS}
    lines += ["", f"{', '.join(f'{n} {word}' for word, n in count.items())}, of {len(changes)} cases."]
    lines.append("others': how the contenders whose code is the same differ between the runs: the machine's drift.")
    if left_out:
        lines += ["", "Not compared:", *(f"  {text}" for text in left_out)]
    return "\n".join(lines)


def _differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    differences = []
    for what, key in (("processors", "cpu"), ("instruction sets", "isa_in_use"), ("cards", "gpu")):
        if a["machine"].get(key) != b["machine"].get(key):
            differences.append(f"the runs' {what} differ: {a['machine'].get(key)} and {b['machine'].get(key)}")
    for key in ("device", "threads"):
        if a["settings"][key] != b["settings"][key]:
            differences.append(f"the runs' {key} differ: {a['settings'][key]} and {b['settings'][key]}")
    for name in LIBRARIES:
        if a["versions"].get(name) != b["versions"].get(name):
            differences.append(
                f"the versions of {name} differ: {a['versions'].get(name)} and {b['versions'].get(name)}"
            )
    return differences
