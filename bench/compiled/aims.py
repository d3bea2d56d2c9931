"""What the project aims at, and what is predicted for it on each card."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench import text
from bench.compiled import model, rivals
from bench.compiled.cards import CARDS, Card
from bench.compiled.terms import LABEL

#: Rank of the adapter in a training step.
RANK = 16


@dataclass(frozen=True)
class Aim:
    """A figure.

    Attributes:
        name: what it is.
        value: computes it; None where it doesn't exist on a card.
        aim: on an H100 or H200; None where there is none.
        form: how it is printed.
    """

    name: str
    value: Callable[[Card], float | None]
    aim: float | None = None
    form: str = ".2f"


def _of_copy(m: int, n: int, k: int) -> Callable[[Card], float]:
    return lambda card: model.predict(card, m, n, k)["of_copy"]


def _dense(m: int, n: int, k: int, backward: bool = False) -> Callable[[Card], float]:
    return lambda card: model.predict(card, m, n, k, backward)["dense_over_ours"]


def _bitsandbytes(m: int, n: int, k: int) -> Callable[[Card], float]:
    return lambda card: rivals.bitsandbytes_us(card, m, n, k) / model.predict(card, m, n, k)["us"]


def _training(m: int, n: int, k: int) -> Callable[[Card], float]:
    return lambda card: rivals.separate_us(card, m, n, k, RANK) / rivals.ours_us(card, m, n, k, RANK)


def _faster_mma(m: int, n: int, k: int) -> Callable[[Card], float | None]:
    """On Hopper, with the rate of mma.sync that others state; backward, where the tiles run."""

    def value(card: Card) -> float | None:
        return _dense(m, n, k, True)(replace(card, mma_sync=0.75)) if card.architecture == 90 else None

    return value


def tile_clocks(card: Card, columns: int, backward: bool = False) -> float | None:
    """Clocks of a step of 128 x 256 outputs by 64: one of the wide tile, or two of tiles of 128 columns. None where the
    wide tile does not fit."""
    names = ["tiles128wide"] if columns == 256 else ["tiles128", "tiles128x3"]
    for name in names:
        try:
            found = model.predict(card, 4096, 4096, 4096, backward, kernel=name)
        except RuntimeError:
            continue
        return found["step_clocks"] * (256 // columns)
    return None


def wide_over_two(m: int, n: int, k: int) -> Callable[[Card], float | None]:
    """The time of the product by tiles of 128 columns over that by wide ones; above 1 the wide ones are faster."""

    def value(card: Card) -> float | None:
        try:
            wide = model.predict(card, m, n, k, kernel="tiles128wide")["us"]
        except RuntimeError:
            return None
        return model.predict(card, m, n, k, kernel="tiles128")["us"] / wide

    return value


def _aims() -> Iterator[Aim]:
    yield Aim("M = 1, 4096 x 4096: of copy bandwidth", _of_copy(1, 4096, 4096), 0.60, ".0%")
    yield Aim("M = 1, 14336 x 4096: of copy bandwidth", _of_copy(1, 14336, 4096), 0.80, ".0%")
    for m, aim in ((16, 2.2), (64, 1.7)):
        for n in (4096, 14336):
            yield Aim(f"M = {m}, {n} x 4096: cuBLAS / ours", _dense(m, n, 4096), aim)
    for m in (512, 1024, 4096):
        for backward in (False, True):
            way = ", backward" if backward else ""
            yield Aim(f"M = {m}, 4096 x 4096{way}: cuBLAS / ours", _dense(m, 4096, 4096, backward), 0.65)
    yield Aim("M = 4096, 4096 x 4096, backward, mma.sync at 75%: cuBLAS / ours", _faster_mma(4096, 4096, 4096), 0.65)
    for m in (512, 2048, 8192):
        yield Aim(f"M = {m}, 4096 x 4096, forward + backward, r = {RANK}: separate / ours", _training(m, 4096, 4096))
    for m in (1, 16, 64, 512, 4096):
        yield Aim(f"M = {m}, 4096 x 4096: bitsandbytes / ours", _bitsandbytes(m, 4096, 4096))
    yield Aim("clocks of a step: 128 x 256", lambda card: tile_clocks(card, 256), None, ".0f")
    yield Aim("clocks of two steps: 128 x 128", lambda card: tile_clocks(card, 128), None, ".0f")
    for m in (1024, 2048, 4096):
        yield Aim(f"M = {m}, 14336 x 4096: time of 128 x 128 / 128 x 256", wide_over_two(m, 14336, 4096))


AIMS = tuple(_aims())


def found(cards: Sequence[Card]) -> Iterator[dict[str, Any]]:
    """A row for each aim: what is predicted, by card."""
    for aim in AIMS:
        values = {card.name: aim.value(card) for card in cards}
        rounded = {name: None if value is None else round(value, 4) for name, value in values.items()}
        yield {"name": aim.name, "aim": aim.aim, "form": aim.form, "predicted": rounded}


def _cells(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows; cards are columns."""
    arch = {card.name: card.arch for card in CARDS.values()}
    cells = [
        [
            row["name"],
            text.number(row["aim"], row["form"]) or "-",
            *(text.number(value, row["form"]) or "-" for value in row["predicted"].values()),
        ]
        for row in rows
    ]
    return ["figure", "aim (sm_90a)", *(f"{name}, {arch[name]}" for name in rows[0]["predicted"])], cells


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The aims beside the predictions, to read."""
    head, cells = _cells(rows)
    return "\n".join([f"Aims and what is predicted ({LABEL}):", "", *text.table(head, cells), ""])


def to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """The same for a page."""
    out = io.StringIO()
    head, cells = _cells(rows)
    csv.writer(out, lineterminator="\n").writerows([head, *cells])
    return out.getvalue()
