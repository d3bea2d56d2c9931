"""Fifteen minutes on a rented card, prepared: python -m bench.card.visit

    --prepare               on an ordinary machine: makes the folder that is brought, and prints the two commands
    --first  --carried DIR  on the card, 295 seconds: right or wrong for each kernel, and speeds
    --second --carried DIR  on the card, 345 seconds: all tests, sanitizers, what else can be compared
    --read DIR              anywhere: tables, files for bench/results/, and the next command

What is brought is compiled before, so that no minute on the card is spent on that, and nothing is downloaded there. A
command does what is worth most first, and writes what it knows as soon as it is known: `visit-first.json`, the same as
Markdown, and `visit-first-logs.tar.gz`. Faults stay with their cause: a program has a process of its own and a time
limit, and one that stays stuck in the driver is left behind. Exit code 0: all steps passed; 1: not all, or --read found
nothing to keep; 2: nothing was done.

--stand-in rehearses a command without a card: the emulator executes the kernels, and times are made up.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.card.commands import CARRIED, ROOT, SECONDS, command_line


def prepare(arguments: argparse.Namespace) -> int:
    from bench.card import prepare as making

    folder = Path(arguments.out or ROOT / f"{CARRIED}{'-stand-in' * arguments.stand_in}").resolve()
    archs = () if arguments.stand_in else tuple(arguments.archs.split(","))
    try:
        python = making.python_of(arguments.python)
        manifest = making.prepare(
            folder, python, archs, arguments.extension, arguments.bitsandbytes, arguments.peer, arguments.stand_in
        )
    except making.Problem as problem:
        print(f"bench.card.visit --prepare: {problem}", file=sys.stderr)
        return 2
    size = sum(one["bytes"] for one in manifest["files"].values())
    print(f"{folder}: {size / 2**20:.1f} MiB in {len(manifest['files'])} files, for {manifest['python']}")
    for sentence in manifest["left_out"]:
        print(f"- {sentence}")
    inside = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    print("\nOn the card, in the tree, one after the other; read the first one's results before the second:\n")
    for command in SECONDS:
        line = command_line(command, str(inside), arguments.results, stand_in=arguments.stand_in)
        if len(line) >= making.MOST_CHARACTERS:
            print(f"bench.card.visit --prepare: a command has {len(line)} characters", file=sys.stderr)
            return 2
        print(line)
    return 0


def carried_by(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The list of what was brought, and what is wrong with it; variables are set, for this process and others.

    The extension is found by one of them, so they are set before anything needs it.
    """
    from bench.card.prepare import MANIFEST, environment_of, other_sources, problems_of

    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        wrong = problems_of(folder, manifest)
        environment = environment_of(folder, manifest, list(wrong))
        problems = [*wrong.values(), *other_sources(manifest), *manifest["left_out"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        return {}, [f"{folder} has no list of what was brought: {problem}"]
    paths = [environment.pop("PYTHONPATH", ""), str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ.update(environment, PYTHONPATH=os.pathsep.join(filter(None, paths)))
    return manifest, problems


def visit(command: str, arguments: argparse.Namespace) -> int:
    """One of the two commands on the card."""
    manifest, problems = carried_by(Path(arguments.carried))
    here = sysconfig.get_config_var("SOABI")
    if manifest and manifest["python"] != here:
        problems = [f"what was brought is for {manifest['python']}, and this Python is {here}: prepare for this one"]
        manifest = {}
    if not manifest:
        print(f"bench.card.visit: {problems[0]}", file=sys.stderr)
        return 2
    from bench.card import check, programs, report
    from bench.card.clocks import Watch
    from bench.card.profiled import point_of
    from bench.card.visit_steps import steps_of

    stand_in = bool(arguments.stand_in or manifest["stand_in"])
    if stand_in:
        from bench.card import stand_in as rehearsal

        os.environ[programs.THROUGH] = "bench.card.stand_in"
        rehearsal.enter()
    steps = steps_of(command, [point_of(words.split()) for words in arguments.profile])
    chosen = arguments.steps.split(",") if arguments.steps else None
    unknown = set(chosen or ()) - {step.name for step in steps}
    if unknown:
        print(f"bench.card.visit: no step {', '.join(sorted(unknown))} in --{command}", file=sys.stderr)
        return 2
    out = Path(arguments.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which also ends the step that is running
    about = {"visit": command, "stand_in": stand_in, "problems": problems}
    about["carried"] = {key: value for key, value in manifest.items() if key != "files"}
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="visit-", ignore_cleanup_errors=True) as scratch:
        files = check.Files(out, f"visit-{command}", f"visit-{command}-logs.tar.gz", Path(scratch, "logs"))
        with Watch(Path(scratch, "dmon.log")) as watch:

            def more() -> dict[str, Any]:
                return {**about, "clocks": watch.found(results.get("steps", ()))}

            check.check(files, steps, arguments.budget or SECONDS[command], chosen, more, results)
        files.logs.mkdir(parents=True, exist_ok=True)
        if watch.log.exists():
            watch.log.rename(files.logs / watch.log.name)
        check.pack(files)
    print(report.markdown(results))
    for step in results["steps"]:  # last, where the end of the output is all that is seen
        print(f"{step['name']}: {step['status']}", *filter(None, [step.get("reason")]), sep=", ")
    return 0 if results["passed"] else 1


def parser_of() -> argparse.ArgumentParser:
    description = (__doc__ or "").split(": python")[0] + "."
    parser = argparse.ArgumentParser(prog="python -m bench.card.visit", description=description)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prepare", action="store_true", help="make the folder that is brought")
    what.add_argument("--first", action="store_true", help="on the card: right or wrong, and speeds")
    what.add_argument("--second", action="store_true", help="on the card: tests, sanitizers, comparisons")
    what.add_argument("--read", metavar="DIR", help="tables of what came back, and files for bench/results/")
    parser.add_argument("--out", metavar="DIR", help=f"what is prepared ({CARRIED}), or the results on the card")
    parser.add_argument("--stand-in", action="store_true", help="a rehearsal without a card")
    to_prepare = parser.add_argument_group("with --prepare")
    to_prepare.add_argument("--python", default="3.12", metavar="X", help="a version or interpreter (default 3.12)")
    to_prepare.add_argument("--archs", default="90a", metavar="LIST", help="the card's architectures (default 90a)")
    to_prepare.add_argument("--extension", type=Path, metavar="FILE", help="bring this _C instead of building one")
    to_prepare.add_argument("--bitsandbytes", type=Path, metavar="FILE", help="its wheel, instead of a download")
    to_prepare.add_argument("--no-bitsandbytes", dest="peer", action="store_false", help="go without it")
    to_prepare.add_argument("--results", default="visit-results", metavar="DIR", help="in the commands, for results")
    there = parser.add_argument_group("on the card")
    there.add_argument("--carried", default=str(CARRIED), metavar="DIR", help="what was brought")
    there.add_argument("--budget", type=float, metavar="SECONDS", help=f"default {SECONDS}")
    there.add_argument("--steps", metavar="NAMES", help="only these, with commas between")
    there.add_argument("--profile", action="append", default=[], metavar="'OPERATION N K M RANK'", help="look into it")
    to_read = parser.add_argument_group("with --read")
    to_read.add_argument("--keep", type=Path, metavar="DIR", help="for the files to keep (default bench/results)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of()
    arguments = parser.parse_args(argv)
    if arguments.prepare:
        return prepare(arguments)
    if arguments.read:
        from bench.card import reading

        return reading.read(Path(arguments.read), arguments.keep or ROOT / "bench" / "results", arguments.carried)
    if arguments.out is None:
        parser.error("--out DIR is needed for the results")
    return visit("first" if arguments.first else "second", arguments)


if __name__ == "__main__":
    sys.exit(main())
