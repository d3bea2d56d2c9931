"""What trainings reach: held-out losses of adapters by their rank and the layers that they sit on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .ratios import find_contender


@dataclass(frozen=True)
class Study:
    """The trainings of a result, all from one base.

    Attributes:
        base, training: of a case; all have the same base and settings.
        ranks: ascending.
        rows: for each set of layers, what was reached with each rank; None where that failed.
    """

    base: dict[str, Any]
    training: dict[str, Any]
    ranks: list[int]
    rows: dict[str, list[dict[str, Any] | None]]

    @property
    def best(self) -> dict[str, Any]:
        """The contender with the lowest loss."""
        return min((one for row in self.rows.values() for one in row if one), key=lambda one: one["loss"])


def study_of(results: dict[str, Any]) -> Study | None:
    """From the cases that have losses; None where there are none.

    Raises:
        ValueError: when they are not of one base, or trained otherwise: their losses cannot be compared.
    """
    measured = [case for case in results["cases"] if any("loss" in c for c in case["contenders"])]
    if not measured:
        return None
    cases = sorted(measured, key=lambda case: case["rank"])
    first = cases[0]
    if any(c["base"]["digest"] != first["base"]["digest"] or c["training"] != first["training"] for c in cases):
        raise ValueError("the trainings differ in more than their adapters: another base, or other settings")
    names = dict.fromkeys(c["name"] for case in cases for c in case["contenders"])
    rows: dict[str, list[dict[str, Any] | None]] = {}
    for name in names:
        by_rank = [find_contender(case, name) for case in cases]
        rows[name] = [one if one and "loss" in one else None for one in by_rank]
    return Study(first["base"], first["training"], [case["rank"] for case in cases], rows)


def scaling(training: dict[str, Any]) -> str:
    """How the low-rank term is scaled."""
    return f"scaling alpha / {'sqrt(r)' if training['rslora'] else 'r'} with alpha = {training['alpha']:g}"
