"""Result files: what they hold, and which is the newest."""

from __future__ import annotations

import datetime
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlora_kernels.bench.common import Settings
from qlora_kernels.bench.machine import describe_commit, describe_machine, describe_versions

FOLDER = Path(__file__).resolve().parent / "results"
FORMAT = 1
#: How the names of result files begin, by suite.
PREFIXES = {"linear": "cpu-", "optimizer": "optimizer-"}


def begin(settings: Settings, suite: str = "linear") -> dict[str, Any]:
    """A new result, without cases; made before the first one, so that the load it notes is not its own."""
    return {
        "format": FORMAT,
        "suite": suite,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **describe_commit(),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "settings": asdict(settings),
        "cases": [],
    }


def save(results: dict[str, Any], path: str | Path) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def load(path: str | Path) -> dict[str, Any]:
    """Reads a result file.

    Raises:
        ValueError: for a file of another format.
    """
    results = json.loads(Path(path).read_text())
    if results.get("format") != FORMAT:
        raise ValueError(f"{path} should be a result file of format {FORMAT}, found {results.get('format')}")
    return results


def newest(folder: str | Path = FOLDER, suite: str = "linear") -> Path:
    """The result file with the latest date inside.

    Raises:
        FileNotFoundError: when there is none.
    """
    prefix = PREFIXES[suite]
    files = list(Path(folder).glob(f"{prefix}*.json"))
    if not files:
        raise FileNotFoundError(
            f"no {prefix}*.json in {folder}; run: python -m bench.run --suite {suite} "
            f"--out bench/results/{prefix}NAME.json"
        )
    return max(files, key=lambda path: (load(path)["date"], path.name))
