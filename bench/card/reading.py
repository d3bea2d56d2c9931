"""What came back from a card: tables, files for bench/results/, and the next command."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bench.card import profiled
from bench.card.commands import SECONDS, command_line
from bench.card.predictions import card_named, furthest
from bench.card.report import cases_of, device_of, left_out, markdown, outcome_of
from bench.card.stand_in import DEVICE
from qlora_kernels.bench.report import results as result_files
from qlora_kernels.errors import InputError
from qlora_kernels.storage.atomic_file import write_atomically
from qlora_kernels.storage.formats import load_json

#: How many products the second command looks into.
PROFILES = 3
COMMANDS = tuple(SECONDS)


def load(folder: Path, command: str) -> dict[str, Any] | None:
    """A command's results; None where there are none. Of several runs, as where steps were left, the latest that got a
    step done counts for it.

    Raises:
        InputError: for a file that is damaged, or of something else.
    """
    found = [_loaded(path, command) for path in sorted(folder.rglob(f"visit-{command}.json"))]
    found.sort(key=lambda one: one["date"])
    if not found:
        return None
    merged = dict(found[-1])
    steps: dict[str, dict[str, Any]] = {}
    for one in found:
        for step in one["steps"]:
            if step["name"] not in steps or step["status"] in ("passed", "failed"):
                steps[step["name"]] = step
    merged["steps"] = list(steps.values())
    merged["complete"] = all(one["status"] in ("passed", "failed") for one in merged["steps"])
    merged["passed"] = all(one["status"] == "passed" for one in merged["steps"])
    merged["stand_in"] = any(one.get("stand_in") for one in found)
    return merged


def _loaded(path: Path, command: str) -> dict[str, Any]:
    try:
        value = load_json(path)
        markdown(value)
    except ValueError as problem:
        raise InputError(str(problem)) from None
    except (KeyError, TypeError, AttributeError):
        value = {}
    if value.get("visit") != command:
        raise InputError(f"{path} is no result of bench.card.visit --{command}")
    return value


def name_of(results: dict[str, Any]) -> str:
    """What files of a result begin with: card and date.

    Raises:
        InputError: where the card is not known, or there was none.
    """
    device = device_of(results)
    if results.get("stand_in") or DEVICE in device:
        raise InputError("these are times of a stand-in for a card, and no results: nothing is kept of them")
    words = re.findall(r"[a-z0-9]+", device.lower())
    if not words:
        raise InputError(f"the {results['visit']} command found no card: nothing is kept of it")
    card = next((word for word in words if card_named(word)), "-".join(words))
    return f"card-{card}-{results['date'][:10]}"


def missing_steps(results: dict[str, Any]) -> list[str]:
    """Steps that did not get to their end: waiting, running, out of time, or in part."""
    return [
        one["name"]
        for one in results["steps"]
        if one["status"] in ("waiting", "running", "not run")
        or "took longer than" in one.get("reason", "")
        or (one.get("found") or {}).get("not_run")
        or left_out(one.get("found") or {})
    ]


def next_commands(found: dict[str, dict[str, Any]], carried: str) -> list[str]:
    """What to run on the card: first the command that is due, then what others have left."""
    stand_in = any(one.get("stand_in") for one in found.values())
    first, out = found.get("first"), "visit-results"
    device = device_of(first) if first else ""
    if first is None or not device:
        return [command_line("first", carried, out, stand_in=stand_in)]
    commands = []
    if "second" not in found:
        card = card_named(device)
        points = furthest(cases_of(first)["cases"], card, PROFILES) if card else []
        words = [" ".join(profiled.words_of(point)) for point, _ in points]
        commands.append(command_line("second", carried, out, profile=words, stand_in=stand_in))
    for command, one in found.items():
        left = missing_steps(one)
        if left:
            steps = list(dict.fromkeys(["facts", *left]))
            commands.append(command_line(command, carried, out, steps=steps, stand_in=stand_in))
    return commands


def keep(results: dict[str, Any], folder: Path) -> list[Path]:
    """Writes what is worth keeping of a result: all of it as JSON and as Markdown, and its cases as a result of
    `qlora-kernels bench`, for --show and --compare. An earlier visit on the same day keeps its files.

    Raises:
        InputError: for a rehearsal, which measured nothing, and where no card was found.
    """
    base = f"{name_of(results)}-{results['visit']}"
    taken = 1
    while any(folder.glob(f"{base}{f'-{taken}' if taken > 1 else ''}.*")):
        taken += 1
    base += f"-{taken}" if taken > 1 else ""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {f"{base}.json": json.dumps(results, indent=1) + "\n", f"{base}.md": markdown(results)}
    written = []
    for name, text in texts.items():
        write_atomically(folder / name, lambda temporary, text=text: Path(temporary).write_text(text, encoding="utf-8"))
        written.append(folder / name)
    runs = [outcome_of(results, name) for name in ("linear", "quantization", "optimizer")]
    runs = [run for run in runs if run.get("cases")]
    if runs:
        path = folder / f"{base}.jsonl"
        whole = len(runs) == 3 and all(run.get("complete") for run in runs)
        run = {key: value for key, value in runs[0].items() if key != "nvidia_smi_after"}
        result_files.save({**run, "sweep": "card", "cases": cases_of(results)["cases"], "complete": whole}, path)
        written.append(path)
    return written


def read(folder: Path, results: Path, carried: str) -> int:
    """Prints tables and the next command, and writes files to keep; 1 where something cannot be read or kept."""
    found: dict[str, dict[str, Any]] = {}
    written: list[Path] = []
    problems = []
    for command in COMMANDS:
        try:
            one = load(folder, command)
            if one is None:
                continue
            print(markdown(one))
            found[command] = one
            written += keep(one, results)
        except (InputError, OSError) as problem:
            problems.append(f"bench.card.visit --read: {problem}")
    if not found and not problems:
        problems = [f"bench.card.visit --read: {folder} has no visit-first.json and no visit-second.json"]
    if written:
        print("To keep:", *(f"- {path}" for path in written), sep="\n")
    for sentence in problems:
        print(sentence)
    if found:
        commands = next_commands(found, carried) or ["nothing: both commands came to their end"]
        print(f"\nNext: {commands[0]}", *(f"Left over: {one}" for one in commands[1:]), sep="\n")
    return int(bool(problems))
