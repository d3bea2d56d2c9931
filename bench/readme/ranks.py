"""The rank study's table, and results from before it was an operation of ``qlora-kernels bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_kernels.bench.operations.rank_study import TARGETS, TITLE
from qlora_kernels.bench.points import Point
from qlora_kernels.bench.report import results
from qlora_kernels.bench.report.losses import Study, scaling, study_of
from qlora_kernels.bench.report.table import machine_line
from qlora_kernels.storage.formats import load_json


def load(path: Path) -> dict[str, Any]:
    """A result of ``qlora-kernels bench``, or an earlier one: a JSON file with a cell for each training.

    Raises:
        ValueError: for an earlier one of several seeds.
    """
    if path.suffix == ".jsonl":
        return results.load(path)
    earlier = load_json(path)
    settings = earlier["settings"]
    if settings["seeds"] != 1:
        raise ValueError(f"{path} has {settings['seeds']} seeds; the table shows one")
    training = {key: value for key, value in settings.items() if key not in ("ranks", "targets", "seeds", "threads")}
    names = {targets: name for name, targets in TARGETS.items()}
    cases = []
    for rank in settings["ranks"]:
        cells = {names[cell["targets"]]: cell for cell in earlier["cells"] if cell["rank"] == rank}
        cases.append(
            {
                **Point("rank_study", rank=rank).as_dict(),
                "title": TITLE,
                "other_processes": None,
                "training": training,
                "base": earlier["base"],
                "contenders": [{"name": name, **cells[name]} for name in TARGETS if name in cells],
            }
        )
    run = {key: earlier[key] for key in ("date", "commit", "modified", "machine", "versions", "complete")}
    return {**run, "settings": {"device": settings["device"], "threads": settings["threads"]}, "cases": cases}


def table(result: dict[str, Any], source: str) -> str:
    """Held-out losses by rank and layers, what they were measured with, and what they say.

    Args:
        result: of the rank study.
        source: where the result is, for the reader.

    Raises:
        ValueError: when no training was measured, or they cannot be compared.
    """
    study = study_of(result)
    if study is None:
        raise ValueError(f"{source} lacks rank_study, which the table of ranks shows")
    base, training, ranks = study.base, study.training, study.ranks
    lines = [
        f"{machine_line(result)} ([raw figures]({source})).",
        f"Held-out loss in nats per byte after {training['steps']} steps; in brackets the trainable parameters. "
        f"One seed; learning rate {training['lr']:g} and {scaling(training)} for all.",
        f"The NF4 base has {base['loss']:.4f}, its 16-bit weights {base['loss_16bit']:.4f}.",
        "",
        "| adapters on | " + " | ".join(f"r = {rank}" for rank in ranks) + " |",
        "|---" * (len(ranks) + 1) + "|",
    ]
    for name, row in study.rows.items():
        lines.append(f"| {name} | " + " | ".join(_cell(one, study.best) for one in row) + " |")
    return "\n".join([*lines, "", _finding(study)])


def _cell(trained: dict[str, Any] | None, best: dict[str, Any]) -> str:
    if trained is None:
        return "failed"
    loss = f"{trained['loss']:.4f}"
    return (f"**{loss}**" if trained is best else loss) + f" ({trained['trainable']:,})"


def _finding(study: Study) -> str:
    """What the table says of the smallest and the largest rank; half a table says nothing."""
    every = [one for row in study.rows.values() for one in row if one]
    if len(every) < len(study.rows) * len(study.ranks):
        return f"{len(every)} of {len(study.rows) * len(study.ranks)} trainings."
    before, best = study.base["loss"], study.best
    gain = before - best["loss"]
    if gain <= 0:
        return "No adapter lowers the held-out loss of the NF4 base."
    best_rank = next(rank for row in study.rows.values() for rank, one in zip(study.ranks, row) if one is best)
    text = f"The lowest loss is that of {best['name']} with r = {best_rank}, {gain:.4f} below the NF4 base"
    for number, index in enumerate(dict.fromkeys((0, len(study.ranks) - 1))):
        shares = []
        for name, row in study.rows.items():
            trained = row[index]
            assert trained is not None, "the table is whole"
            place = "" if number else f" on {name}"
            shares.append(f"{100 * (before - trained['loss']) / gain:.1f}%{place}")
        whole = "" if number else "of that reduction "
        text += f"; {whole}r = {study.ranks[index]} reaches {', '.join(shares)}"
    seconds, speeds = ([one[key] for one in every] for key in ("seconds", "tokens_per_second"))
    return (
        f"{text}.\nA training took {min(seconds):.1f} to {max(seconds):.1f} s, at {min(speeds):,.0f} to "
        f"{max(speeds):,.0f} tokens/s."
    )
