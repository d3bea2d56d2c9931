"""Pictures of a result: speed over rows against the roofline, memory by part, cost and loss of adapters by rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...storage.atomic_file import write_atomically
from ..case import OURS
from ..contenders.names import BNB, BNB_EVAL, DENSE, DENSE_F32, DEQUANTIZED, GGML, INT4, PEFT
from ..points import K, N
from .losses import scaling, study_of
from .ratios import find_contender, limits_of

HEADINGS = {OURS: "this package"}
_COLORS = {OURS: "C0", DENSE: "C1", BNB: "C2", PEFT: "C2", DEQUANTIZED: "C4", BNB_EVAL: "C3"}
_COLORS |= {DENSE_F32: "C8", INT4: "C9", GGML: "C5"}
_MARKERS = {OURS: "o", DENSE: "s", BNB: "v", PEFT: "v", DEQUANTIZED: "d", BNB_EVAL: "^"}
_MARKERS |= {DENSE_F32: "D", INT4: "P", GGML: "X"}
#: How titles name them. Where several have as many cases, the first is shown.
_DTYPES = {"bfloat16": "bf16", "float32": "float32", "float16": "fp16"}


def label(name: str) -> str:
    return HEADINGS.get(name, name)


def _where(results: dict[str, Any]) -> str:
    s, m = results["settings"], results["machine"]
    return m["gpu"]["name"] if s["device"] != "cpu" and m.get("gpu") else f"CPU, {s['threads']} threads"


def speed_cases(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Forward without adapter of the weight that the bars are for, by rows."""
    cases = _in_one_dtype(results, "linear_forward")
    return sorted((case for case in cases if case["rank"] == 0), key=lambda case: case["m"])


def _in_one_dtype(results: dict[str, Any], operation: str) -> list[dict[str, Any]]:
    """The cases of an operation on the weight that the bars are for, in the dtype of which there are most."""
    cases = [c for c in results["cases"] if c["operation"] == operation and (c["n"], c["k"]) == (N, K)]
    return max(([c for c in cases if c["dtype"] == dtype] for dtype in _DTYPES), key=len)


def _series(cases: list[dict[str, Any]], name: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [(case, c) for case in cases if (c := find_contender(case, name)) and "failed" not in c]


def speed(results: dict[str, Any], axes: Any) -> bool:
    """TFLOP/s over M, both logarithmic, under the rooflines of 4-bit and dense weights."""
    cases = speed_cases(results)
    if len(cases) < 2:
        return False
    for name in (OURS, DENSE, DENSE_F32, DEQUANTIZED, BNB, BNB_EVAL, INT4, GGML):
        series = _series(cases, name)
        if not series:
            continue
        rows = [case["m"] for case, _ in series]
        rate = lambda key, series=series: [case["flops"] / c[key] / 1e9 for case, c in series]  # noqa: E731
        zorder = 3 if name == OURS else 2
        (line,) = axes.plot(
            rows, rate("median_ms"), marker=_MARKERS[name], color=_COLORS[name], label=label(name), zorder=zorder
        )
        axes.fill_between(rows, rate("q80_ms"), rate("q20_ms"), color=line.get_color(), alpha=0.15, linewidth=0)
    limits = limits_of(results)
    for name, style in ((OURS, "--"), (DENSE, ":")):
        least = [(case, limits.seconds(case, c)) for case, c in _series(cases, name)]
        roof = [(case["m"], case["flops"] / seconds / 1e12) for case, seconds in least if seconds]
        if roof:
            bits = 4 if name == OURS else 32 if cases[0]["dtype"] == "float32" else 16
            title = f"limit, {bits}-bit weights"
            axes.plot(*zip(*roof), linestyle=style, color="black", linewidth=1, label=title, zorder=1)
    axes.set(xscale="log", yscale="log", xlabel="M, rows of x", ylabel="TFLOP/s")
    axes.set_title(f"forward, N = {N}, K = {K}, {_DTYPES[cases[0]['dtype']]}; {_where(results)}", fontsize=10)
    axes.set_xticks([case["m"] for case in cases], [str(case["m"]) for case in cases])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return True


def memory(results: dict[str, Any], axes: Any) -> bool:
    """Bytes of a block's training step, stacked by what they are for."""
    bars = [
        (f"{case['model']}\nM = {case['m']}\n{label(c['name'])}", c)
        for case in results["cases"]
        if case["operation"] == "block_step"
        for c in case["contenders"]
        if "failed" not in c and c.get("parts")
    ]
    if not bars:
        return False
    names = list(bars[0][1]["parts"])
    values = {name: [c["parts"][name] / 1e6 for _, c in bars] for name in names}
    # The gradients are allocated within the step. Of a long one the peak is not known, and so only the parts are shown.
    known = [c.get("peak_allocated") is not None for _, c in bars]
    if any(known):
        values["activations and temporaries"] = [
            max(c["peak_allocated"] - c["parts"]["gradients"], 0) / 1e6 if peak else 0.0
            for (_, c), peak in zip(bars, known)
        ]
    bottom = [0.0] * len(bars)
    for name, heights in values.items():
        axes.bar(range(len(bars)), heights, bottom=bottom, label=name, width=0.7)
        bottom = [low + height for low, height in zip(bottom, heights)]
    for i, total in enumerate(bottom):
        axes.text(i, total, f"{total:.0f}" if known[i] else f"> {total:.0f}", ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(bars)), [text for text, _ in bars], fontsize=7)
    axes.set(ylabel="MB")
    dtypes = {_DTYPES[case["dtype"]] for case in results["cases"] if case["operation"] == "block_step"}
    axes.set_title(f"memory of a training step of one Llama block, {', '.join(sorted(dtypes))}", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.3, axis="y")
    return True


def rank_cases(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Training steps of one layer at the number of rows of which most ranks were measured, by rank."""
    cases = _in_one_dtype(results, "linear_step")
    rows = [case["m"] for case in cases]
    if not rows:
        return []
    most = max(sorted(set(rows)), key=rows.count)
    return sorted((case for case in cases if case["m"] == most), key=lambda case: case["rank"])


def rank_cost(results: dict[str, Any], axes: Any) -> bool:
    """Time of a training step over the rank; the lines without an adapter beside it."""
    cases = rank_cases(results)
    ranks = [case["rank"] for case in cases]
    if len(set(ranks) - {0}) < 2:
        return False
    for name in (OURS, DENSE, DEQUANTIZED, PEFT):
        series = _series([case for case in cases if case["rank"]], name)
        if not series:
            continue
        where = [case["rank"] for case, _ in series]
        axes.plot(
            where, [c["median_ms"] for _, c in series], marker=_MARKERS[name], color=_COLORS[name], label=label(name)
        )
        bare = _series([case for case in cases if not case["rank"]], BNB if name == PEFT else name)
        if bare:
            axes.axhline(bare[0][1]["median_ms"], color=_COLORS[name], linestyle=":", linewidth=1)
    axes.set(xscale="log", xlabel="r", ylabel="milliseconds", ylim=(0, None))
    axes.set_xticks([r for r in ranks if r], [str(r) for r in ranks if r])
    axes.minorticks_off()
    axes.set_title(
        f"forward + backward of a layer, M = {cases[0]['m']}, N = {N}, K = {K}, {_DTYPES[cases[0]['dtype']]}; "
        "dotted: no adapter",
        fontsize=10,
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return True


def losses(results: dict[str, Any], axes: Any) -> bool:
    """Held-out loss over the rank, a line for each set of layers."""
    study = study_of(results)
    if study is None:
        return False
    for (name, row), marker in zip(study.rows.items(), "osv", strict=True):
        series = [(rank, one["loss"]) for rank, one in zip(study.ranks, row, strict=True) if one]
        axes.plot(*zip(*series, strict=True), marker=marker, label=name)
    loss = study.base["loss"]
    axes.axhline(loss, color="0.4", linestyle="--", linewidth=1, label=f"NF4 base, {loss:.3f}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(study.ranks, [str(rank) for rank in study.ranks])
    axes.minorticks_off()
    axes.set(xlabel="r, rank of the adapters", ylabel="held-out loss, nats per byte")
    axes.set_title(f"{study.training['steps']} steps over the NF4 base, {scaling(study.training)}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9, loc="upper right", bbox_to_anchor=(1, 0.95))  # below the dashed line
    return True


PLOTS: dict[str, Callable[[dict[str, Any], Any], bool]] = {
    "speed": speed,
    "memory": memory,
    "rank": rank_cost,
    "loss": losses,
}


def draw(results: dict[str, Any], name: str, path: str | Path, source: str) -> bool:
    """Writes a picture as PNG, whose metadata name its source.

    Args:
        results: of a run.
        name: a key of PLOTS.
        path: the file.
        source: what the metadata say.

    Returns:
        Whether the result holds what the picture shows; if not, nothing is written.

    Raises:
        ImportError: without matplotlib.
        OSError: when it cannot be written; what was there before is left whole.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    try:
        if not PLOTS[name](results, axes):
            return False
        metadata = {"Source": source}
        write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120, metadata=metadata))
        return True
    finally:
        plt.close(figure)
