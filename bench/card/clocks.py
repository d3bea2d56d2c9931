"""The card's clocks, power and temperature while a visit runs, by `nvidia-smi dmon` in the background."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.card.facts import tool

#: Columns of dmon that are kept, and their names here.
COLUMNS = {"pclk": "sm_mhz", "mclk": "memory_mhz", "pwr": "watts", "gtemp": "celsius", "sm": "sm_percent"}
#: Seconds that dmon has to end in.
LEAVE = 3.0


def rows_of(text: str) -> list[dict[str, Any]]:
    """Samples from what dmon has printed so far: ``time``, and numbers by the names in COLUMNS.

    A line that is cut off, or has no number, is left out; so is what another version calls by another name.
    """
    names: list[str] = []
    rows = []
    for line in text.splitlines():
        words = line.split()
        if line.startswith("#"):
            words = words[1:] if words and words[0] == "#" else [line[1:].split()[0], *words[1:]] if words else []
            if any(word in COLUMNS for word in words):
                names = words
            continue
        if len(words) != len(names) or not names:
            continue
        row: dict[str, Any] = {"time": words[names.index("Time")] if "Time" in names else ""}
        for word, name in COLUMNS.items():
            with contextlib.suppress(ValueError):
                row[name] = float(words[names.index(word)])
        rows.append(row)
    return rows


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The least, the median and the most of each column, and how many samples there are."""
    found: dict[str, Any] = {"samples": len(rows)}
    for name in COLUMNS.values():
        values = [row[name] for row in rows if name in row]
        if values:
            found[name] = {"least": min(values), "median": statistics.median(values), "most": max(values)}
    return found


def by_step(rows: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A summary for each step that has ended, by the clock on the wall; steps across midnight have none."""
    return {
        step["name"]: summary([row for row in rows if step["began"] <= row["time"] <= step["ended"]])
        for step in steps
        if "began" in step and step.get("ended", "") >= step["began"]
    }


class Watch:
    """A context in which the clocks are logged. Where that cannot be, it says why, and nothing else happens."""

    def __init__(self, log: Path) -> None:
        self.log, self.problem = log, ""
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Watch:
        program = tool("nvidia-smi")
        if program is None:
            self.problem = "nvidia-smi was not found"
            return self
        command = [program, "dmon", "-s", "puc", "-d", "1", "-o", "T"]
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with open(self.log, "wb") as file:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
                )
        except OSError as problem:
            self.problem = str(problem)
        return self

    def __exit__(self, *_: object) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        for end in (process.terminate, process.kill):
            end()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LEAVE)
                return
        self.problem = "nvidia-smi dmon is still there after a kill"

    def found(self, steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What is known by now; ``problem`` where there is nothing."""
        try:
            text = self.log.read_text(errors="replace")
        except OSError:
            return {"problem": self.problem or "nothing was logged"}
        rows = rows_of(text)
        if not rows:
            return {"problem": self.problem or f"dmon printed no sample: {' '.join(text.split())[:200]}"}
        return {**summary(rows), "steps": by_step(rows, steps)}
