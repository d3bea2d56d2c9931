"""The picture of the fused product in docs/design/fused-kernel.md: python -m bench.readme.design_picture

It shows the kernel of tiles with four stages. Drawn, not measured: widths in the timeline mean nothing.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

PATH = Path(__file__).resolve().parent.parent / "results" / "design.png"
STAGES = 4
STEPS = 5  # in the timeline

_COPY, _DECODE, _MULTIPLY, _LOW, _STORE = "#a6cee3", "#fdbf6f", "#b2df8a", "#cab2d6", "#d9d9d9"
_EDGE = "#444444"


def source_note() -> str:
    """What the picture's metadata say: a digest of this file, by which a test knows an old picture."""
    return f"bench/readme/design_picture.py {hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]}"


def _box(axes: Any, x: float, y: float, width: float, height: float, text: str, color: str, size: float = 8) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor=_EDGE, linewidth=0.8))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, linespacing=1.25)


def _arrow(axes: Any, begin: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
    axes.annotate("", end, begin, arrowprops={"arrowstyle": "-|>", "color": _EDGE, "linewidth": 1.1, "shrinkA": 0})
    if text:
        middle = ((begin[0] + end[0]) / 2, (begin[1] + end[1]) / 2 + 0.9)
        axes.text(*middle, text, ha="center", va="bottom", fontsize=7.5, style="italic")


def _stages(axes: Any, x: float, y: float, text: str, color: str, count: int) -> None:
    """Buffers behind one another, the text on the first."""
    for i in reversed(range(count)):
        _box(axes, x + 0.9 * i, y + 1.1 * i, 17, 8, text if i == 0 else "", color)


def _dataflow(axes: Any) -> None:
    axes.set(xlim=(-0.5, 102), ylim=(-1, 43))
    _box(axes, 0, 30, 15, 9, "global memory:\nrows of x\n(backward: dy)", _COPY)
    _box(axes, 0, 14, 15, 9, "global memory:\npacked codes\nof W", _COPY)
    _box(axes, 0, 1, 15, 8, "global memory:\nconstants", _COPY)
    _stages(axes, 25, 30, f"shared memory,\n{STAGES} stages: rows x 64", _COPY, STAGES)
    _stages(axes, 25, 14, f"shared, {STAGES} stages:\n128 blocks of 64", _COPY, STAGES)
    _arrow(axes, (15, 34.5), (25, 34.5), "cp.async")
    _arrow(axes, (15, 18.5), (25, 18.5), "cp.async")
    _box(axes, 51, 12, 15, 13, "decode\n8 warps, between\nproducts, half a\nblock a thread", _DECODE)
    _arrow(axes, (45, 18.5), (51, 18.5))
    _arrow(axes, (15, 5), (51, 13.5))
    axes.text(
        39,
        6.5,
        "to registers,\ntwo steps ahead,\nforward 16 at a time",
        fontsize=7.5,
        style="italic",
        ha="center",
        va="center",
    )
    _stages(axes, 73, 14, "shared: 2 tiles of\nweights, 128 x 64", _DECODE, 2)
    _arrow(axes, (66, 18.5), (73, 18.5))
    _box(axes, 73, 30, 17.9, 11, "mma.sync\n8 warps; sums in\nfloat32 registers", _MULTIPLY)
    _arrow(axes, (45, 35.5), (73, 35.5), "ldmatrix")
    _arrow(axes, (82, 23.2), (82, 30))
    axes.text(83, 26.4, "ldmatrix,\nbackward .trans", fontsize=7.5, style="italic", va="center", linespacing=1.1)
    _box(axes, 73, 0.5, 17.9, 8, "shared: results,\n16 bytes a store", _STORE)
    axes.annotate(
        "", (90.9, 4.5), (90.9, 35.5),
        arrowprops={"arrowstyle": "-|>", "color": _EDGE, "linewidth": 1.1, "connectionstyle": "bar,fraction=-0.17"},
    )  # fmt: skip
    axes.text(98.2, 20, "after the last step", fontsize=7.5, style="italic", va="center", ha="center", rotation=270)
    _arrow(axes, (73, 4.5), (66, 4.5))
    axes.text(65, 4.5, "y\n(backward: dx)", fontsize=8, va="center", ha="right")


def _timeline(axes: Any) -> None:
    axes.set(xlim=(-4.2, 39.5), ylim=(-1.3, 4.9))
    rows = {"copies sent": 3.0, "decoding": 1.5, "products": 0.0}
    for name, y in rows.items():
        axes.text(-0.3, y + 0.5, name, ha="right", va="center", fontsize=8.5)
    _box(axes, 0, rows["products"], 3.1, 1, "low-rank\nmma", _LOW, 7.5)
    _box(axes, 3.4, rows["copies sent"], 3.2, 1, "0  1  2", _COPY)
    _box(axes, 4.4, rows["decoding"], 2.2, 1, "decode\n0", _DECODE, 7)
    first, width, after = 7.0, 5.4, 0.8
    for step in range(STEPS):
        x = first + step * width
        axes.axvline(x - 0.18, color=_EDGE, linestyle=":", linewidth=1, ymin=0.14, ymax=0.93)
        axes.text(x + width / 2 - 0.2, 4.5, f"step {step}", ha="center", va="center", fontsize=8.5)
        _box(axes, x + after, rows["copies sent"], 1.0, 1, str(step + STAGES - 1), _COPY)
        _box(axes, x + after + 0.8, rows["decoding"], 3.4, 1, f"decode {step + 1}", _DECODE, 8)
        # The last of a step's products come after the barrier.
        begin = x + (after if step else 0.0)
        _box(axes, begin, rows["products"], x + width + after - begin, 1, f"mma {step}", _MULTIPLY, 8)
    end = first + STEPS * width
    axes.axvline(end - 0.18, color=_EDGE, linestyle=":", linewidth=1, ymin=0.14, ymax=0.93)
    for y in rows.values():
        axes.text(end + after + 0.6, y + 0.5, "...", ha="center", va="center", fontsize=11)
    _box(axes, end + after + 1.5, rows["products"], 2.6, 1, "stage,\nstore", _STORE, 7.5)
    axes.text(
        first - 0.18, -0.85,
        "dotted: one barrier a step; behind it copies have landed, decoded weights can be read, read buffers reused",
        fontsize=7.5, style="italic", va="center",
    )  # fmt: skip
    axes.text(3.3, 4.5, "before the loop", ha="center", va="center", fontsize=8.5)


def draw(path: Path) -> None:
    """Writes the picture as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(9, 6.6), height_ratios=(1.45, 1), layout="constrained", gridspec_kw={"hspace": 0.04}
    )
    _dataflow(top)
    _timeline(bottom)
    top.set_title("A thread block's data: one tile of results", fontsize=10)
    bottom.set_title("What each of its eight warps does over time (widths are not measured)", fontsize=10)
    for axes in (top, bottom):
        axes.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Source": source_note()})
    plt.close(figure)


def main() -> int:
    draw(PATH)
    print(PATH)
    return 0


if __name__ == "__main__":
    sys.exit(main())
