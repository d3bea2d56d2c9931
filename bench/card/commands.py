"""The two commands of a visit to a card, as they are written."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
#: Ignored by git, as all of build/ is.
CARRIED = Path("build") / "visit"
SECONDS = {"first": 295.0, "second": 345.0}


def command_line(
    command: str, carried: str, out: str, steps: Sequence[str] = (), profile: Sequence[str] = (), stand_in: bool = False
) -> str:
    """The command to run on the card.

    Args:
        command: "first" or "second".
        carried: the folder that was brought, from the tree.
        out: where results go, as the shell there reads it.
        steps: the only ones to run; none for all.
        profile: products to look into.
        stand_in: whether it is a rehearsal.
    """
    words = ["python3", "-m", "bench.card.visit", f"--{command}", "--carried", shlex.quote(carried)]
    words += ["--steps", ",".join(steps)] if steps else []
    for point in profile if command == "second" else ():
        words += ["--profile", shlex.quote(point)]
    words += ["--stand-in"] if stand_in else []
    return " ".join([*words, "--out", out])
