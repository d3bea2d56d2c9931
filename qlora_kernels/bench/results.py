"""Result files: JSON lines, the first about the run, one for each case, the last saying whether it is whole."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import write_atomically
from .common import Settings
from .machine import describe_commit, describe_machine, describe_versions

FORMAT = 2


def begin(settings: Settings, sweep: str) -> dict[str, Any]:
    """A new result, without cases; made before the first one, so that the load it notes is not its own.

    Returns:
        ``format``, ``date``, ``sweep``, ``commit``, ``modified``, ``machine``, ``versions``, ``settings``, ``complete``
        (False) and ``cases``.
    """
    return {
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "sweep": sweep,
        **describe_commit(),
        "machine": describe_machine(settings.device),
        "versions": describe_versions(),
        "settings": asdict(settings),
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
        InputError: for a file that is no result, of another format, or cut off.
    """
    lines: list[dict[str, Any]] = []
    with open(path, "rb") as file, contextlib.suppress(ValueError, AttributeError):
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
    return {**run, "complete": lines[-1]["complete"], "cases": cases}
