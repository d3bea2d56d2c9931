"""Fuzzes everything that reads files.

    python tests/fuzz [--seconds S] [--target T ...] [--seed N] [--keep]
    python tests/fuzz --case KEY
    python tests/fuzz --review

Cases are valid files with a few mutations; a seed and a number decide each. What falls is made small and printed with
the key that repeats it, and ``--keep`` adds it to the corpus in tests/fuzz/corpus. The exit code is 1 after findings.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import time
import warnings
from pathlib import Path

# Before torch is imported: children are forked, and would wait for threads that they lack.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).resolve().parents[2]
sys.path[:1] = [str(ROOT / "tests" / "support"), str(ROOT)]

from fuzzing.campaign import Finding, built, campaign, keep, outcome_of, review, split_time, unmended  # noqa: E402
from fuzzing.child import SECONDS  # noqa: E402
from fuzzing.targets import TARGETS  # noqa: E402


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python tests/fuzz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120, help="for all targets together (default: %(default)s)")
    parser.add_argument("--target", choices=TARGETS, action="append", help="only this one; may be given again")
    parser.add_argument("--seed", type=int, help="of the cases (default: a new one, which is printed)")
    parser.add_argument("--limit", type=float, default=SECONDS, help="seconds for one case (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="add what falls to the corpus")
    parser.add_argument("--known", action="store_true", help="also report what is known and not mended")
    parser.add_argument("--case", metavar="KEY", help="run one case again, as a finding names it")
    parser.add_argument("--review", action="store_true", help="run the corpus and rewrite corpus/unmended.txt")
    return parser.parse_args()


def repeat(key: str) -> int:
    seed, files, notes = built(key)
    target = TARGETS[key.split(":")[1]]
    outcome = outcome_of(target, files)
    print(Finding(target.name, key, outcome, [note for note in notes if note], seed, files))
    return 0 if outcome.good else 1


def main() -> int:
    given = arguments()
    warnings.simplefilter("ignore")  # torch's, about the tensors that the mutations make
    if given.case:
        return repeat(given.case)
    if given.review:
        stand, fall = review(seconds=given.limit)
        print(
            "\n".join([*(f"stands now: {name}" for name in stand), *(f"falls: {name}" for name in fall)]) or "no change"
        )
        return 1 if fall else 0
    seed = secrets.randbelow(10**9) if given.seed is None else given.seed
    targets = given.target or list(TARGETS)
    print(f"seed {seed}, {given.seconds:g} seconds for {', '.join(targets)}", flush=True)
    known = frozenset() if given.known else frozenset(signature for signature, _ in unmended().values())

    def tell(finding: Finding) -> None:
        print(f"\nFINDING {finding}", flush=True)
        if given.keep:
            print(f"  kept in {keep(finding)}", flush=True)

    found = 0
    for name, until in split_time(targets, time.monotonic() + given.seconds):
        tally = campaign(TARGETS[name], seed, until=until, known=known, seconds=given.limit, tell=tell)
        print(f"{name}: {tally}", flush=True)
        found += len(tally.findings)
    print(f"{found} findings; --seed {seed} repeats these cases" if found else "nothing fell")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
