"""Result files: JSON lines, the first about the run, one for each case, the last saying whether it is whole."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...storage.atomic_file import write_atomically
from ..case import Settings
from ..timing.machine import describe_commit, describe_machine, describe_versions

FORMAT = 2
#: Raised when cases or contenders come to the bars: results from before need not have them.
BARS_SINCE = 3

_NAME, _TEXT, _WHOLE, _NUMBER = (str,), (str, type(None)), (int, type(None)), (int, float, type(None))
#: What the tables and the comparison take from the parts of a result, with the types that it may have.
_RUN = {
    "date": _NAME,
    "commit": _TEXT,
    "modified": (bool, type(None)),
    "machine": (dict,),
    "versions": (dict,),
    "settings": (dict,),
}
_WITHIN_RUN = {
    "machine": {"cpu": _NAME, "virtual": (bool,), "usable_cores": _WHOLE, "isa_in_use": _TEXT},
    "versions": {name: _NAME for name in ("torch", "bitsandbytes", "peft", "compiler")},
    "settings": {"device": _NAME, "threads": (int,)},
}
_GPU = {"name": _NAME, "driver": _NAME}
_CASE = {
    **{name: _NAME for name in ("operation", "dtype", "title")},
    **{name: _WHOLE for name in ("n", "k", "m", "rank")},
    "model": _TEXT,
    "rounds": (int,),
    "flops": _NUMBER,
    "other_processes": _NUMBER,
    "contenders": (list,),
}
_CASE_PERHAPS = {"batch": _WHOLE, "activations": _TEXT, "failed": _NAME, "base": (dict,), "training": (dict,)}
#: Of a case that has losses.
_WITHIN_CASE = {
    "base": {"digest": _NAME, "loss": (float,), "loss_16bit": (float,)},
    "training": {"steps": (int,), "lr": (float,), "alpha": (float,), "rslora": (bool,)},
}
_FIGURES = {"samples": (int,), "copies": (int,), "error": _NUMBER}
_TIMES = ("q20_ms", "median_ms", "q80_ms")
#: The mean; and on a card, by the clocks that are not the median's.
_OTHER_TIMES = ("mean_ms", "graph_ms", "event_ms", "event_q20_ms", "event_q80_ms", "host_ms", "wall_ms")
_FIGURES_PERHAPS = {
    **{name: _NUMBER for name in ("bytes", "peak", "peak_allocated", "format_error", *_OTHER_TIMES)},
    "loss": (float,),
    **{name: _WHOLE for name in ("event_samples", "trainable")},
    "by": _TEXT,
    "no_graph": _TEXT,
}
#: Limits of a time in milliseconds; a ratio of two times between them cannot overflow.
_SHORTEST, _LONGEST = 1e-9, 1e15


def begin(settings: Settings, sweep: str, machine: dict[str, Any] | None = None) -> dict[str, Any]:
    """A new result, without cases; made before the first one, so that the load it notes is not its own.

    Args:
        settings: how.
        sweep: what was asked for.
        machine: what is to be said of it besides: ``limited``, of
            :func:`qlora_kernels.bench.instruction_sets.limited_to`, and ``slow_bfloat16``, why cases are in float32.

    Returns:
        ``format``, ``bars``, ``date``, ``sweep``, ``commit``, ``modified``, ``machine``, ``versions``, ``settings``,
        ``complete`` (False) and ``cases``.
    """
    return {
        "format": FORMAT,
        "bars": BARS_SINCE,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "sweep": sweep,
        **describe_commit(),
        "machine": {**describe_machine(settings.device), "limited": None, "slow_bfloat16": None, **(machine or {})},
        "versions": describe_versions(),
        "settings": {**asdict(settings), "only": list(settings.only)},
        "complete": False,
        "cases": [],
    }


def save(results: dict[str, Any], path: str | os.PathLike) -> None:
    """Writes a result, whole or not at all.

    Raises:
        OSError: when it cannot be written.
    """
    run = {key: value for key, value in results.items() if key not in ("cases", "complete")}
    lines = [{"kind": "run", **run}, *({"kind": "case", **case} for case in results["cases"])]
    lines.append({"kind": "end", "complete": results["complete"], "cases": len(results["cases"])})
    text = "".join(json.dumps(line) + "\n" for line in lines)

    def write(temporary: str) -> None:
        Path(temporary).write_text(text)

    write_atomically(path, write)


def load(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a result file.

    Raises:
        OSError: when it cannot be read.
        InputError: for a file that is no result, of another format, or cut off; and for one without what every result
            has, or with times that are none.
    """
    lines: list[dict[str, Any]] = []
    with open(path, "rb") as file, contextlib.suppress(ValueError, AttributeError, RecursionError):
        for line in file:
            value = json.loads(line)
            value.get("kind")
            lines.append(value)
    kinds = [line.get("kind") for line in lines]
    if not kinds or kinds[0] != "run" or lines[0].get("format") != FORMAT:
        raise InputError(f"{os.fspath(path)} is no result of 'qlora-kernels bench' (JSON lines of format {FORMAT})")
    if kinds != ["run", *["case"] * (len(lines) - 2), "end"] or lines[-1].get("cases") != len(lines) - 2:
        raise InputError(f"{os.fspath(path)} is cut off or damaged: its cases and its last line do not agree")
    cases = [{key: value for key, value in line.items() if key != "kind"} for line in lines[1:-1]]
    run = {key: value for key, value in lines[0].items() if key != "kind"}
    problem = next(_problems(run, lines[-1], cases), None)
    if problem is not None:
        raise InputError(f"{os.fspath(path)} is damaged, or of something else: {problem}")
    return {**run, "complete": lines[-1]["complete"], "cases": cases}


def _problems(run: dict[str, Any], end: dict[str, Any], cases: list[dict[str, Any]]) -> Iterator[str]:
    """What is wrong with the values of a result, in words. Only the first counts: it may lead to others."""
    yield from _wrong(run, _RUN, "its run")
    for name, fields in _WITHIN_RUN.items():
        yield from _wrong(run[name], fields, f"its {name}")
    if run["machine"].get("gpu") is not None:
        yield from _wrong(run["machine"], {"gpu": (dict,)}, "its machine")
        yield from _wrong(run["machine"]["gpu"], _GPU, "its gpu")
    yield from _wrong(end, {"complete": (bool,)}, "its end")
    for number, case in enumerate(cases, 1):
        where = f"case {number}"
        yield from _wrong(case, _CASE, where)
        yield from _wrong(case, _CASE_PERHAPS, where, perhaps=True)
        if any("loss" in c for c in case["contenders"] if isinstance(c, dict)):
            for name, fields in _WITHIN_CASE.items():
                yield from _wrong(case, {name: (dict,)}, where)
                yield from _wrong(case[name], fields, f"{where}, its {name}")
        for contender in case["contenders"]:
            yield from _wrong_contender(contender, where)


def _wrong_contender(contender: Any, where: str) -> Iterator[str]:
    if not isinstance(contender, dict) or not isinstance(contender.get("name"), str):
        yield f"{where} has a contender without a name"
        return
    where = f"{where}, {contender['name']}"
    yield from _wrong(contender, {"failed": _NAME}, where, perhaps=True)
    if "failed" in contender:
        return
    yield from _wrong(contender, _FIGURES, where)
    yield from _wrong(contender, _FIGURES_PERHAPS, where, perhaps=True)
    if min(contender["samples"], contender["copies"]) < 1:
        yield f"{where}: no samples, or no copies"
    times: list[Any] = [contender.get(name) for name in _TIMES]
    # Not-a-number is less than nothing, and so refused.
    if not all(isinstance(value, (int, float)) and _SHORTEST <= value <= _LONGEST for value in times):
        yield f"{where}: {', '.join(_TIMES)} should be milliseconds, found {times}"
    elif times != sorted(times):
        yield f"{where}: {', '.join(_TIMES)} should ascend, found {times}"
    for name in _OTHER_TIMES:
        if contender.get(name) is not None and not _SHORTEST <= contender[name] <= _LONGEST:
            yield f"{where}: {name} should be milliseconds, found {contender[name]}"


def _wrong(
    values: dict[str, Any], fields: dict[str, tuple[type, ...]], where: str, perhaps: bool = False
) -> Iterator[str]:
    """What is missing (unless it is optional: ``perhaps``), of another type, or a number that is not finite."""
    for name, kinds in fields.items():
        if name not in values:
            if not perhaps:
                yield f"{where} has no '{name}'"
            continue
        value = values[name]
        if not isinstance(value, kinds):
            yield f"{where}: '{name}' should not be {json.dumps(value)[:40]}"
        elif isinstance(value, (int, float)) and not abs(value) <= sys.float_info.max:
            yield f"{where}: '{name}' is no number to count with"
