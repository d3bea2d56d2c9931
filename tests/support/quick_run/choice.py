"""Chooses the tests of a quick run: each case in one order of the emulator, on the best and the portable instruction
set of the CPU, and one case in n of a test marked ``share(n)``.

What is left out differs from day to day, so that a month of quick runs sees all of it.
"""

from __future__ import annotations

import datetime
import os
import re
import zlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from engines import ISAS, ORDERS

#: The day that decides the choice, as a number: for repeating a run of another day.
VARIABLE = "QLORA_KERNELS_TEST_DAY"


#: Divides the cases of every test once more: with 2 each has half of them, one at least. For a run that is slow.
DIVISOR = "QLORA_KERNELS_TEST_DIVISOR"


def day() -> int:
    return int(os.environ.get(VARIABLE) or datetime.date.today().toordinal())


class Case(NamedTuple):
    """One test as pytest collects it."""

    function: str
    """The test function, with its file."""
    values: str
    """Its parameters, except order and instruction set."""
    order: str | None = None
    isa: str | None = None
    share: int = 1


def case_of(item) -> Case:
    """The case of a pytest item."""
    function, order, isa = item.nodeid.partition("[")[0], None, None
    callspec = getattr(item, "callspec", None)
    values = callspec.id if callspec else ""
    for name, value in callspec.params.items() if callspec else ():
        if not isinstance(value, str):
            continue
        engine = value.removeprefix("emulated-")
        if engine in ORDERS and (engine != value or name == "order"):
            order, values = engine, _without(value, values)
        elif name in ("engine", "isa") and value in ISAS:
            isa, values = value, _without(value, values)
    marker = item.get_closest_marker("share")
    share = (marker.args[0] if marker else 1) * int(os.environ.get(DIVISOR) or 1)
    return Case(function, values, order, isa, share)


def _without(value: str, values: str) -> str:
    return re.sub(rf"(?:^|(?<=-)){re.escape(value)}(?=-|$)", "", values, count=1)


def left_out(cases: Sequence[Case], day: int, isas: Sequence[str] = ISAS) -> list[bool]:
    """Whether a quick run of that day leaves out each of the cases.

    Case i of a function runs on the days that i and its share choose, and in another order each time. So all orders of
    all cases are seen within three times the share.
    """
    listed: dict[str, dict[str, int]] = {}
    orders: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        places = listed.setdefault(case.function, {})
        places.setdefault(case.values, len(places))
        if case.order is not None:
            orders.setdefault((case.function, case.values), []).append(case.order)
    answers = []
    for case in cases:
        places = listed[case.function]
        share = min(case.share, len(places))
        turn = places[case.values] + day + _number(case.function)
        there = sorted(set(orders.get((case.function, case.values), ())))
        answers.append(
            turn % share != 0
            or (case.order is not None and case.order != there[turn // share % len(there)])
            or (case.isa is not None and case.isa not in (isas[0], "portable"))
        )
    return answers


def _number(text: str) -> int:
    """The same in every process, as hash() is not."""
    return zlib.crc32(text.encode())


def leave_out(items: Iterable, mark, day: int) -> None:
    """Marks the items that a quick run leaves out."""
    items = list(items)
    for item, out in zip(items, left_out([case_of(item) for item in items], day)):
        if out:
            item.add_marker(mark)
