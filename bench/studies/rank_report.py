"""The rank study's table and plot, from its result alone: see :mod:`bench.studies.ranks`."""

from __future__ import annotations

import os
import statistics
from dataclasses import dataclass
from typing import Any

from qlora_kernels.storage.atomic_file import write_atomically


@dataclass(frozen=True)
class Point:
    """One rank on one set of layers, over the seeds that were run.

    Attributes:
        loss: mean held-out loss, nats per byte.
        spread: sample standard deviation of it; None for one seed.
        trainable: parameters.
    """

    targets: str
    rank: int
    loss: float
    spread: float | None
    trainable: int


def label(targets: str) -> str:
    """Target modules as people say them."""
    return "all linear layers" if targets == "all-linear" else " and ".join(targets.split(","))


def with_shares(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cells with ``share``: of the largest reduction of the held-out loss among the cells with the same seed."""
    result = []
    for cell in cells:
        largest = max(c["loss_before"] - c["loss"] for c in cells if c["seed"] == cell["seed"])
        share = (cell["loss_before"] - cell["loss"]) / largest if largest > 0 else None
        result.append({**cell, "share": share})
    return result


def points(result: dict[str, Any]) -> dict[str, list[Point]]:
    """For each set of layers that has cells, its ranks in ascending order."""
    found: dict[str, list[Point]] = {}
    for targets in result["settings"]["targets"]:
        for rank in result["settings"]["ranks"]:
            cells = [c for c in result["cells"] if (c["targets"], c["rank"]) == (targets, rank)]
            if cells:
                losses = [c["loss"] for c in cells]
                spread = statistics.stdev(losses) if len(losses) > 1 else None
                point = Point(targets, rank, statistics.fmean(losses), spread, cells[0]["trainable"])
                found.setdefault(targets, []).append(point)
    return found


def markdown(result: dict[str, Any], source: str) -> str:
    """A table of held-out losses, what it was measured with, and what it says.

    Args:
        result: of a study, perhaps an unfinished one.
        source: where the result is, for the reader.
    """
    s, base, rows = result["settings"], result["base"], points(result)
    seeds = "One seed" if s["seeds"] == 1 else f"Means of {s['seeds']} seeds, ± their sample standard deviation"
    lines = [
        f"{_machine_line(result)} ([raw figures]({source})).",
        f"Held-out loss in nats per byte after {s['steps']} steps; in brackets the trainable parameters. {seeds}; "
        f"learning rate {s['lr']:g} and {_scaling(s)} for all.",
    ]
    if base:
        lines.append(f"The NF4 base has {base['loss']:.4f}, its 16-bit weights {base['loss_16bit']:.4f}.")
    ranks = s["ranks"]
    lines += ["", "| adapters on | " + " | ".join(f"r = {rank}" for rank in ranks) + " |"]
    lines.append("|---" * (len(ranks) + 1) + "|")
    every = [point for row in rows.values() for point in row]
    best = min(every, key=lambda point: point.loss, default=None)
    for targets in s["targets"]:
        by_rank = {point.rank: point for point in rows.get(targets, [])}
        lines.append(f"| {label(targets)} | " + " | ".join(_cell(by_rank.get(rank), best) for rank in ranks) + " |")
    return "\n".join([*lines, "", _finding(result, rows, best)])


def _scaling(settings: dict[str, Any]) -> str:
    return f"scaling alpha / {'sqrt(r)' if settings['rslora'] else 'r'} with alpha = {settings['alpha']:g}"


def _machine_line(result: dict[str, Any]) -> str:
    m, v = result["machine"], result["versions"]
    commit = (result["commit"] or "unknown")[:10] + (" with changes" if result["modified"] else "")
    virtual = "virtual machine, " if m["virtual"] else ""
    return (
        f"{m['cpu']} ({virtual}{m['usable_cores']} cores, kernels for {m['isa_in_use']}), "
        f"{result['settings']['threads']} threads, torch {v['torch']}, {v['compiler']}, commit {commit}, "
        f"{result['date'][:10]}"
    )


def _cell(point: Point | None, best: Point | None) -> str:
    if point is None:
        return ""
    text = f"{point.loss:.4f}" + (f" ± {point.spread:.4f}" if point.spread is not None else "")
    return (f"**{text}**" if point is best else text) + f" ({point.trainable:,})"


def _finding(result: dict[str, Any], rows: dict[str, list[Point]], best: Point | None) -> str:
    """What the table says of the smallest and the largest rank; of half a table nothing is said."""
    s, cells = result["settings"], result["cells"]
    if not result["complete"] or best is None:
        count = len(s["targets"]) * len(s["ranks"]) * s["seeds"]
        return f"Unfinished: {len(cells)} of {count} cells."
    before = result["base"]["loss"]
    gain = before - best.loss
    if gain <= 0:
        return "No adapter lowers the held-out loss of the NF4 base."
    text = f"The lowest loss is that of {label(best.targets)} with r = {best.rank}, {gain:.4f} below the NF4 base"
    for number, rank in enumerate(dict.fromkeys((s["ranks"][0], s["ranks"][-1]))):
        shares = []
        for targets, row in rows.items():
            [point] = [point for point in row if point.rank == rank]
            place = "" if number else f" on {label(targets)}"
            shares.append(f"{100 * (before - point.loss) / gain:.1f}%{place}")
        of = "" if number else "of that reduction "
        text += f"; {of}r = {rank} reaches {', '.join(shares)}"
    seconds, speeds = ([cell[key] for cell in cells] for key in ("seconds", "tokens_per_second"))
    return (
        f"{text}.\nTraining took {min(seconds):.1f} to {max(seconds):.1f} s a cell, at {min(speeds):,.0f} to "
        f"{max(speeds):,.0f} tokens/s."
    )


def plot(result: dict[str, Any], path: str | os.PathLike, source: str) -> None:
    """Held-out loss over rank, a line for each set of layers; the PNG's metadata name its source."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for (targets, row), marker in zip(points(result).items(), "osv"):
        spread = [point.spread for point in row if point.spread is not None]
        error = spread if len(spread) == len(row) else None
        x, y = [point.rank for point in row], [point.loss for point in row]
        axes.errorbar(x, y, error, marker=marker, capsize=3, label=label(targets))
    s = result["settings"]
    if result["base"]:
        loss = result["base"]["loss"]
        axes.axhline(loss, color="0.4", linestyle="--", linewidth=1, label=f"NF4 base, {loss:.3f}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(s["ranks"], [str(rank) for rank in s["ranks"]])
    axes.minorticks_off()
    axes.set(xlabel="r, rank of the adapters", ylabel="held-out loss, nats per byte")
    axes.set_title(f"{s['steps']} steps over the NF4 base, {_scaling(s)}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9, loc="upper right", bbox_to_anchor=(1, 0.95))  # below the dashed line
    FigureCanvasAgg(figure)
    metadata = {"Source": f"{source} {result['date']}"}
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", metadata=metadata))
