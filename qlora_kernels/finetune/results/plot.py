"""The loss curve."""

from __future__ import annotations

from typing import Any

from ...storage.atomic_file import write_atomically
from .report import TITLES

_COLOURS = {"base16": "0.35", "nf4": "0.6", "qlora": "C0", "lora16": "C1", "full": "C2"}


def plot_losses(results: dict[str, Any], path: str, title: str) -> None:
    """Writes a PNG: training loss by step, raw and smoothed, and held-out losses as horizontal lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for key, label in TITLES.items():
        if key not in results:
            continue
        result, colour = results[key], _COLOURS[key]
        losses = result.get("losses")
        if losses:
            steps = range(1, len(losses) + 1)
            axes.plot(steps, losses, color=colour, alpha=0.2, linewidth=0.8)
            # 16-bit LoRA is so close to NF4 + LoRA that only a wider line behind it shows.
            width, order = (4.0, 2.0) if key == "lora16" else (1.4, 3.0)
            axes.plot(steps, _smooth(losses), color=colour, linewidth=width, zorder=order, label=f"{label}, training")
        axes.axhline(
            result["loss"], color=colour, linestyle="--", linewidth=1, label=f"{label}, held-out {result['loss']:.3f}"
        )
    axes.set_title(title)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    FigureCanvasAgg(figure)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))


def _smooth(losses: list[float]) -> list[float]:
    """An exponential moving average without a bias towards the start."""
    average, weight, result = 0.0, 0.0, []
    for loss in losses:
        average, weight = 0.95 * average + 0.05 * loss, 0.95 * weight + 0.05
        result.append(average / weight)
    return result
