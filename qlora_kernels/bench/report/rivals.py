"""What ``bench --rivals`` shows: a line for each number of rows, as soon as it is measured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..case import OURS, QUIET
from ..contenders.names import DENSE, DENSE_F32, GGML, INT4
from ..timing.machine import isa_in_use
from .ratios import find_contender, ratio_to_ours
from .table import ms

_COLUMNS = {DENSE: "dense", DENSE_F32: "float32", INT4: "int4", GGML: "ggml"}
_WIDTH = 16


def show(cases: Iterable[dict[str, Any]], dtypes: Iterable[str] = ("bfloat16",)) -> int:
    """Prints the dtypes of the cases, and every case; returns 1 when this package failed in one, or else 0."""
    print(f"median ms, in brackets times ours; {', '.join(dtypes)}; kernels for {isa_in_use()}")
    print("".join(f"{word:>{_WIDTH}}" for word in ("M", "ours", *_COLUMNS.values())), flush=True)
    failed = False
    for case in cases:
        if case["operation"] == "limits":
            continue
        ours = find_contender(case, OURS)
        cells = [str(case["m"]), _figure(case, ours), *(_figure(case, find_contender(case, c)) for c in _COLUMNS)]
        others = case["other_processes"] or 0
        note = f"   others took {others:.0%} of the machine" if others > QUIET else ""
        print("".join(f"{cell:>{_WIDTH}}" for cell in cells) + note, flush=True)
        for one in case["contenders"]:
            if "failed" in one:
                print(f"  {one['name']}: {one['failed']}", flush=True)
        if "failed" in case:
            print(f"  {case['failed']}", flush=True)
        failed = failed or ours is None or "failed" in ours
    return int(failed)


def _figure(case: dict[str, Any], contender: dict[str, Any] | None) -> str:
    if contender is None or "failed" in contender:
        return "-"
    ratio = ratio_to_ours(case, contender)
    with_ratio = ratio is not None and contender["name"] != OURS
    return ms(contender["median_ms"]) + (f" ({ratio:.2f})" if with_ratio else "")
