"""Checks this package on the card that is there: python -m bench.card.check --out DIR

Builds for the card, runs the tests that need one, compute-sanitizer over small cases of each kernel, and the
benchmarks, in under nine minutes. Each step has a time limit; one that fails is recorded and the others go on. DIR gets
gpu_check.json and gpu_check.md, whole or not at all after every step, and logs.tar.gz with what the steps so far have
printed. Exit code 0: all steps passed. 1: not all. 2: no CUDA device, and nothing was done. A bar that is missed is
shown, and fails nothing.

The 530 seconds: 10 for facts; 165 to build, with the emulator and the conformance kernels beside the extension; 120 for
the tests, three files at a time; 92 for the sanitizer's four tools, all at once; 8 for the rate of tensor cores; 135
for `qlora-kernels bench --card`, alone on the machine. What a step leaves over, the next ones may use.
"""

from __future__ import annotations

import argparse
import datetime
import io
import shutil
import signal
import sys
import tarfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SCHEMA = 3
#: Of DIR: where a step's files lie until it has ended, and what holds those of all steps that have.
LOGS, PACKED = "gpu_check_logs", "logs.tar.gz"


@dataclass(frozen=True)
class Files:
    """What a check writes.

    Attributes:
        folder: where.
        name: of its JSON and Markdown files.
        packed: what holds the logs of the steps that have ended.
        loose: where the logs of the one under way are; they are no part of the results.
    """

    folder: Path
    name: str = "gpu_check"
    packed: str = PACKED
    loose: Path | None = None

    @property
    def json(self) -> Path:
        return self.folder / f"{self.name}.json"

    @property
    def markdown(self) -> Path:
        return self.folder / f"{self.name}.md"

    @property
    def archive(self) -> Path:
        return self.folder / self.packed

    @property
    def logs(self) -> Path:
        return self.loose or self.folder / LOGS


def check(
    files: Files,
    steps: Sequence[Any],
    budget: float,
    chosen: Sequence[str] | None = None,
    more: Callable[[], dict[str, Any]] = dict,
    results: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Runs the steps, and writes what is known after each; while one runs, what it tells.

    Args:
        files: for the results and logs.
        steps: what to do, of :class:`bench.card.steps.Step`.
        budget: seconds for all of them, divided as their shares are. What one leaves, the next ones may use.
        chosen: names of the only ones to run; the others count as not passed.
        more: what else is known by now.
        results: a dictionary to fill, for ``more`` to look at.

    Returns:
        ``schema``, ``date``, ``budget_s``, ``complete`` (whether the end was reached), ``passed`` (whether each step
        passed), ``steps``: for each ``name``, ``status`` ("passed", "failed", "not run", "running", "waiting"),
        ``began`` and ``ended`` (by the clock on the wall), ``seconds``, ``limit_s``, ``reason``, ``tail`` (of its
        output, where it failed) and ``found``.
    """
    scale = budget / sum(step.share for step in steps)
    results = {} if results is None else results
    results |= _nothing_yet(steps, budget)
    files.archive.unlink(missing_ok=True)  # of another run, as gpu_check.json was
    known(results, files, more)
    begin, deadline = time.monotonic(), 0.0
    entries = {entry["name"]: entry for entry in results["steps"]}
    for number, step in enumerate(steps, 1):
        deadline += step.share * scale
        entry = entries[step.name]
        elapsed = time.monotonic() - begin
        if chosen is not None and step.name not in chosen:
            entry.update(status="not run", reason="left out by --steps")
        elif step.needs and entries[step.needs]["status"] == "failed":
            entry.update(status="not run", reason=f"{step.needs} failed")
        else:
            entry.update(status="running", began=f"{datetime.datetime.now():%H:%M:%S}")
            entry["limit_s"] = round(deadline - elapsed, 1)
            known(results, files, more)
            say(f"[{number}/{len(steps)}] {elapsed:5.0f} s  {step.name} (at most {deadline - elapsed:.0f} s)")
            try:
                run(step, files.logs, deadline - elapsed, entry, lambda: known(results, files, more))
            finally:  # also after a signal
                pack(files)
            entry["ended"] = f"{datetime.datetime.now():%H:%M:%S}"
        took = f" in {entry['seconds']:.1f} s" if "seconds" in entry else ""
        why = f": {entry['reason']}" if "reason" in entry else ""
        say(f"[{number}/{len(steps)}] {time.monotonic() - begin:5.0f} s  {step.name} {entry['status']}{took}{why}")
        known(results, files, more)
    results["complete"] = True
    results["passed"] = all(entry["status"] == "passed" for entry in results["steps"])
    known(results, files, more)
    return results


def _nothing_yet(steps: Sequence[Any], budget: float) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "budget_s": budget,
        "complete": False,
        "passed": False,
        "steps": [{"name": step.name, "status": "waiting"} for step in steps],
    }


def run(
    step: Any, folder: Path, seconds: float, entry: dict[str, Any], flush: Callable[[], object] = lambda: None
) -> None:
    """Runs one step and puts its outcome into its entry; ``flush`` writes what it has told so far."""
    from bench.card.steps import StepFailed

    begin = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)

    def tell(found: dict[str, Any]) -> None:
        entry["found"] = found
        flush()

    try:
        found = step.run(folder, seconds, tell) if getattr(step, "tells", False) else step.run(folder, seconds)
        entry.update(found=found, status="passed")
    except StepFailed as problem:
        entry.update(found=problem.outcome, status="failed", reason=str(problem), tail=problem.tail)
    except Exception as problem:
        text = f"{type(problem).__name__}: {problem}"
        # What it has told is kept.
        entry.update(found=entry.get("found", {}), status="failed", reason=text, tail=traceback.format_exc()[-4000:])
    entry["seconds"] = round(time.monotonic() - begin, 1)


def known(results: dict[str, Any], files: Files, more: Callable[[], dict[str, Any]]) -> None:
    """Writes what is known by now. A full disk is no reason to stop: the files keep what they had, and the next time
    there may be room."""
    results.update(more())
    try:
        write(results, files)
    except OSError as problem:
        say(f"{files.json} could not be written: {problem}")


def write(results: dict[str, Any], files: Files) -> None:
    """Writes both files, each whole or not at all."""
    from bench.card.report import markdown
    from qlora_kernels.storage.atomic_file import write_atomically
    from qlora_kernels.storage.formats import save_json

    save_json(results, files.json)
    try:
        text = markdown(results)
    except Exception:  # later steps still run; an error in the last table is raised
        text = traceback.format_exc()
    write_atomically(files.markdown, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def pack(files: Files) -> None:
    """Moves the files of a step into the archive, written aside and renamed: few files are easily sent home."""
    from qlora_kernels.storage.atomic_file import write_atomically

    packed, loose = files.archive, files.logs
    logs = sorted(path for path in loose.rglob("*") if path.is_file())
    if logs:
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w:gz") as archive:
            if packed.exists():
                with tarfile.open(packed) as before:
                    for member in before:
                        archive.addfile(member, before.extractfile(member))
            for path in logs:
                archive.add(path, path.relative_to(loose).as_posix())
        try:
            write_atomically(packed, lambda temporary: Path(temporary).write_bytes(content.getvalue()))
        except OSError as problem:
            say(f"{packed} could not be written: {problem}")
    shutil.rmtree(loose, ignore_errors=True)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.card.check",
        description=(__doc__ or "").split(": python")[0] + ".",
        epilog="Exit code 0: all steps passed; 1: not all; 2: no CUDA device.",
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="for gpu_check.json, gpu_check.md and logs.tar.gz")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="for all steps together (default 530)")
    parser.add_argument(
        "--steps", metavar="NAMES", help="only these, with commas between; then the check is not passed"
    )
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        say(f"bench.card.check needs a CUDA device, and torch {torch.__version__} sees none")
        return 2
    from bench.card import report
    from bench.card.steps import BUDGET, STEPS

    chosen = None if arguments.steps is None else arguments.steps.split(",")
    unknown = set(chosen or ()) - {step.name for step in STEPS}
    if unknown:
        parser.error(f"no step {', '.join(sorted(unknown))}; there are {', '.join(step.name for step in STEPS)}")
    folder = Path(arguments.out).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    # A signal also ends the step that is running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results = check(Files(folder), STEPS, arguments.budget or BUDGET, chosen)
    print(report.markdown(results))
    return 0 if results["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
