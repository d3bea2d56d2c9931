"""The short tables: what training and serving take, in README, and beside bitsandbytes alone."""

from __future__ import annotations

from typing import Any

from bench.readme.cells import cell, introduction, title_of
from qlora_kernels.bench.case import OURS
from qlora_kernels.bench.contenders.names import BNB, BNB_EVAL, DENSE, FUSED, PEFT
from qlora_kernels.bench.points import OPTIMIZER, K, N, Point, point_of
from qlora_kernels.bench.report.ratios import find_contender

#: The rows. Where another contender is faster, that row stays.
HEADLINE = (
    *(Point("linear_forward", n=N, k=K, m=m, rank=0) for m in (1, 16, 512, 2048)),
    *(Point("linear_step", n=N, k=K, m=m, rank=16) for m in (16, 512)),
    Point("block_step", m=512, rank=16, model="llama-2-7b"),
    Point("quantize", "float32", n=N, k=K),
    Point("adamw_step", "float32", rank=16, model="llama-2-7b"),
)


#: A heading, and whichever of these a case has.
COLUMNS = {
    "this package": (OURS,),
    "torch: dense layer, fused AdamW": (DENSE, FUSED),
    "bitsandbytes, with PEFT where r = 16": (BNB, PEFT),
    "bitsandbytes, eval-mode layer": (BNB_EVAL,),
}
#: Of those, what a user of bitsandbytes has today.
PEER_COLUMNS = {name: which for name, which in COLUMNS.items() if OURS in which or BNB in which or BNB_EVAL in which}


def table(result: dict[str, Any], source: str) -> str:
    """README's own: a few rows from training and serving.

    Raises:
        ValueError: when a case is missing.
    """
    return _rows(result, source, COLUMNS)


def peer_table(result: dict[str, Any], source: str) -> str:
    """The same beside bitsandbytes alone.

    Raises:
        ValueError: when a case is missing.
    """
    return _rows(result, source, PEER_COLUMNS)


def _rows(result: dict[str, Any], source: str, columns: dict[str, tuple[str, ...]]) -> str:
    known = {point_of(case): case for case in result["cases"]}
    if lacking := [str(point) for point in HEADLINE if point not in known]:
        raise ValueError(f"{source} lacks what a table shows: {'; '.join(lacking)}")
    lines = [*introduction(result, source, f"Layers have N = K = {N}. "), ""]
    lines += ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for point in HEADLINE:
        case = known[point]
        shown = {**case, "n": None, "k": None}
        if point.operation in OPTIMIZER:
            shown |= {"rank": None, "dtype": "bfloat16"}
        contenders = [
            next(filter(None, (find_contender(case, name) for name in names)), None) for names in columns.values()
        ]
        lines.append(f"| {title_of(shown)} | " + " | ".join(cell(case, c) for c in contenders) + " |")
    return "\n".join(lines)
