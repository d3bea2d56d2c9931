"""The small cases of bench/card/kernels.py, with a line in a file for each: python -m bench.card.cases --report FILE

One process runs the cases of a family. It appends a line when a case begins and when it has ended, so that whoever
started it knows which case was at work when it crashed or hung. After a fault that the card does not recover from it
ends, and the next process begins with the case after that one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.card import kernels

#: The families: each takes the cases whose kernel and name begin so.
FAMILIES = ("quantize", "dequantize", "linear bfloat16", "linear float", "linear_grouped", "optimizer")
#: The exit code after a fault that the card does not recover from.
LOST = 3


def family_of(case: kernels.Case) -> str:
    """
    Raises:
        ValueError: when it is of none, or of several.
    """
    (family,) = (one for one in FAMILIES if title(case).startswith(one))
    return family


def title(case: kernels.Case) -> str:
    return f"{case.kernel} {case.name}"


def chosen(only: str) -> list[kernels.Case]:
    return [case for case in kernels.cases() if title(case).startswith(only)]


def fault(device: str) -> str | None:
    """Why the card answers no more, or None when it does."""
    if device != "cuda":
        return None
    try:
        torch.cuda.synchronize()
    except Exception as problem:
        return (str(problem).strip().splitlines() or [type(problem).__name__])[0]
    return None


def run(
    of: Sequence[kernels.Case],
    begin: int,
    note: Callable[..., None],
    device: str,
    answers: Callable[[str], Any] = fault,
) -> bool:
    """Runs cases from the one with this number on; returns whether the end was reached."""
    for number, case in enumerate(of):
        if number < begin:
            continue
        note(case=number, name=title(case), state="begun")
        try:
            problem = kernels.check(case, device)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"[:500]
        lost = answers(device) if problem is not None else None
        state = "right" if problem is None else "wrong"
        note(case=number, state=state, **({} if problem is None else {"problem": problem}))
        if lost:
            note(case=number, state="lost", problem=lost)
            return False
    return True


def main(argv: Sequence[str] | None = None, device: str = "cuda") -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.card.cases", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--report", type=Path, required=True, metavar="FILE", help="lines of JSON are appended to it")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose kernel and name begin so")
    parser.add_argument("--begin", type=int, default=0, metavar="N", help="of these, from this one on")
    arguments = parser.parse_args(argv)
    if device == "cuda" and not torch.cuda.is_available():
        print(f"no CUDA device is seen by torch {torch.__version__}: nothing to check", file=sys.stderr)
        return 2
    with open(arguments.report, "a", encoding="utf-8") as file:

        def note(**line: object) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        whole = run(chosen(arguments.only), arguments.begin, note, device)
    if not whole:
        sys.stdout.flush()
        os._exit(LOST)  # an orderly end would wait for the card
    return 0


# ---------------------------------------------------------------------------------------------------- what it wrote


def outcome(lines: str, names: Sequence[str]) -> dict[str, Any]:
    """Right, wrong and not run, from a report.

    Args:
        lines: the report, whose last line may be cut off. Whoever started the process adds, when it has ended, a line
            for the case that was at work.
        names: of all cases.

    Returns:
        ``cases``, ``right`` and ``not_run`` (counts), ``wrong``: a list of (name, problem), ``next``: the first case
        that no process has begun, and ``at_work``: the case that was begun and has not ended, or None.
    """
    wrong: dict[int, str] = {}
    right: set[int] = set()
    begun: set[int] = set()
    for text in lines.splitlines():
        try:
            line = json.loads(text)
            number, state = int(line["case"]), line["state"]
        except (ValueError, KeyError, TypeError):
            continue  # cut off
        if not 0 <= number < len(names):
            continue
        begun.add(number)
        if state == "right":
            right.add(number)
        elif state != "begun":
            wrong.setdefault(number, str(line.get("problem", "")))
    at_work = max(begun - right - wrong.keys(), default=None)
    return {
        "cases": len(names),
        "right": len(right - wrong.keys()),
        "wrong": [[names[number], wrong[number]] for number in sorted(wrong)],
        "not_run": len(names) - len(right | wrong.keys()),
        "next": max(begun, default=-1) + 1,
        "at_work": at_work,
    }


if __name__ == "__main__":
    sys.exit(main())
