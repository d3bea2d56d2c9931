"""Tables for people: Markdown that also reads well on a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """A Markdown table whose columns also line up on a terminal.

    Args:
        head: the columns' names.
        rows: the cells.
        left: so many columns are aligned to the left, the others to the right.
    """
    clean = [[cell.replace("|", "/").replace("\n", " ") for cell in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in clean) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))]
        return f"| {' | '.join(cells)} |"

    rule = [("-" * w) if i < left else ("-" * (w - 1) + ":") for i, w in enumerate(widths)]
    return [line(clean[0]), f"| {' | '.join(rule)} |", *map(line, clean[1:])]


def number(value: float | None, spec: str) -> str:
    """A number in a table's cell; nothing for None."""
    return "" if value is None else format(value, spec)
