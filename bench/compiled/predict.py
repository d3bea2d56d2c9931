"""Predicted times of the layer's products on cards that none has been timed on: bytes, multiplications and compiled
instructions against a card's rates.

    python -m bench.compiled.predict [--card h200 --shape N K [--backward]]

Without options it prints the project's aims beside the predictions for each card, and writes all predictions to
bench/results/predicted.json; with a card or a shape, a table of every term. docs/design/predictions.md explains the
model. In short:

- parts of a step of the main loop that a barrier keeps apart add up (`alone`, `together`); within a part, the slowest
  of its pipes counts; integer and logic operations pass at 64 lanes a clock and SM;
- a step takes no less than its copies;
- starting (`fill`) and ending (`tail`) a kernel are added to the largest of memory's, L2's and the SM's time;
- every term is from compiled code, published, or assumed, and terms.py says which.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import text
from bench.compiled import aims
from bench.compiled.cards import CARDS, COPY_SHARE, DENSE_SHARE, HOPPER_MMA_SYNC
from bench.compiled.model import FOLDER, SHAPES, STATIC, every
from bench.compiled.terms import LABEL, TERMS, sources

OUT = FOLDER / "predicted.json"
#: The table of aims, for docs/design/predictions.md.
AIMS_CSV = FOLDER.parent.parent / "docs" / "design" / "predicted-aims.csv"

_BOUNDS = ("memory", "L2", "tensor", "shared", "issue", "ALU", "FMA", "latency", "alone", "together", "fill", "tail")
#: Columns that rest on an assumption.
_ASSUMED = frozenset(["L2", "latency", "alone", "together", "fill", "tail"])
_HEAD = ("M", "kernel", "tiles", "split", "step clk", *(name + "*" * (name in _ASSUMED) for name in _BOUNDS))
_HEAD += ("predicted us*", "binds", "of copy", "dense us*", "dense / ours")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Predictions of one card, direction and shape, to read."""
    one = rows[0]
    cells = [
        [
            str(row["m"]),
            row["dispatch"],
            str(row["tiles"]),
            str(row["splits"]) + (f":{row['shared_tiles']}" if row["shared_tiles"] > 1 else ""),
            f"{row['step_clocks']:.0f}",
            *(f"{row[name.lower() + '_us']:.1f}" for name in _BOUNDS),
            f"{row['us']:.1f}",
            row["binds"],
            f"{row['of_copy']:.0%}",
            f"{row['dense_us']:.1f}",
            f"{row['dense_over_ours']:.2f}",
        ]
        for row in rows
    ]
    arch = next(card.arch for card in CARDS.values() if card.name == one["card"])
    code = "" if one["code"] == arch else f" (code of {one['code']})"
    title = f"{one['card']}{code}, {one['direction']}, N = {one['n']}, K = {one['k']}: {LABEL}"
    return "\n".join([title, "", *text.table(_HEAD, cells, left=2), ""])


def to_json(rows: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]]) -> str:
    """A file of predictions, a line for each; `found`: those beside the aims."""
    head = {
        "label": LABEL,
        "model": "python -m bench.compiled.predict",
        "static": STATIC.name,
        "shares": {"copy": COPY_SHARE, "dense": DENSE_SHARE, "mma.sync on Hopper": HOPPER_MMA_SYNC},
        "terms": {term: {"source": source, "words": words} for term, (source, words) in TERMS.items()},
        "cards": {name: asdict(card) for name, card in CARDS.items()},
    }

    def lines(of: Sequence[dict[str, Any]]) -> str:
        return ",\n".join("  " + json.dumps(row) for row in of)

    parts = f',\n "aims": [\n{lines(found)}\n ],\n "rows": [\n{lines(rows)}\n ]\n}}\n'
    return json.dumps(head, indent=1)[:-2] + parts


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compiled.predict", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--card", choices=CARDS, help="every term on this card; default, with --shape: h200")
    parser.add_argument("--shape", type=int, nargs=2, action="append", metavar=("N", "K"))
    parser.add_argument("--backward", action="store_true", help="the gradient of x")
    parser.add_argument("--out", type=Path, help=f"the file for all cards, directions and shapes; default {OUT.name}")
    arguments = parser.parse_args(argv)
    shapes: list[tuple[int, int]] = [(n, k) for n, k in arguments.shape or SHAPES]
    for n, k in shapes:
        if n < 1 or k < 1 or k % 64:
            parser.error(f"N = {n}, K = {k}: there are predictions for the tensor cores' kernels, K a multiple of 64")
    found = list(aims.found(list(CARDS.values())))
    single = bool(arguments.card or arguments.shape or arguments.backward)
    if single:
        card = CARDS[arguments.card or "h200"]
        for shape in shapes:
            print(table(list(every([card], [shape], [arguments.backward]))))
    else:
        print(aims.table(found))
    print(sources())
    if not single or arguments.out:
        out = arguments.out or OUT
        out.write_text(to_json(list(every(list(CARDS.values()), shapes, [False, True])), found))
        print(f"all cards and both directions: {out}")
    if not single and not arguments.out:
        AIMS_CSV.write_text(aims.to_csv(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
