"""Cases from a seed, findings made small, and the corpus that keeps them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from . import mutations
from .child import SECONDS, Outcome, run
from .files import Files, store, stored
from .targets import TARGETS, Target

CORPUS = Path(__file__).resolve().parents[2] / "fuzz" / "corpus"
#: Cases that fall and are not mended: "TARGET/NAME", the signature, and why, with tabs between them.
UNMENDED = CORPUS / "unmended.txt"


@dataclass
class Finding:
    """A case that fell.

    Attributes:
        target: its parser.
        key: builds the case again: ``python tests/fuzz --case KEY``.
        outcome: how it ended.
        notes: the mutations it needs.
        seed, files: the valid case, and the one that fell.
    """

    target: str
    key: str
    outcome: Outcome
    notes: list[str]
    seed: Files
    files: Files

    def __str__(self) -> str:
        lines = [f"{self.target}: {self.outcome.signature}", f"  case {self.key}"]
        lines += [f"  {note}" for note in self.notes]
        lines.append(f"  -> {self.outcome.message[:400]}")
        lines += [f"  | {line}" for line in self.outcome.trace.splitlines()[-14:]]
        return "\n".join(lines)


@dataclass
class Tally:
    """What a campaign has done.

    Attributes:
        cases, accepted: how many.
        refusals: how many different ones, numbers and quoted words aside.
        findings: one for each signature.
    """

    cases: int = 0
    accepted: int = 0
    refusals: set[str] = field(default_factory=set)
    findings: dict[str, Finding] = field(default_factory=dict)
    repeated: int = 0

    def __str__(self) -> str:
        return (
            f"{self.cases} cases, {self.accepted} accepted, refused for {len(self.refusals)} reasons, "
            f"{len(self.findings)} findings"
        )


def key_of(seed: int, target: str, number: int) -> str:
    return f"{seed}:{target}:{number}"


def built(key: str, keep: set[int] | None = None, target: Target | None = None) -> tuple[Files, Files, list[str]]:
    """The case of a key: seed, files, notes. The key names the target, unless another is given."""
    target = target or TARGETS[key.split(":")[1]]
    return mutations.build(target.seeds(), target.mutations, key, keep)


def campaign(
    target: Target,
    seed: int,
    *,
    count: int | None = None,
    until: float | None = None,
    known: frozenset[str] = frozenset(),
    seconds: float = SECONDS,
    tell: Callable[[Finding], object] = lambda finding: None,
) -> Tally:
    """Tries cases of one target and makes each new finding small.

    Args:
        target: what to try.
        seed: decides the cases, together with their numbers.
        count, until: how many cases, and the ``time.monotonic()`` to stop at.
        known: signatures of findings that are not new.
        seconds: for one case.
        tell: called with each new finding.
    """
    tally = Tally()
    outcomes = run(
        target,
        lambda n: built(key_of(seed, target.name, n), None, target)[1],
        count=count,
        until=until,
        seconds=seconds,
    )
    for number, outcome in outcomes:
        tally.cases += 1
        tally.accepted += outcome.kind == "accepted"
        if outcome.kind == "refused":
            tally.refusals.add(_reason(outcome))
        if outcome.good or outcome.signature in known:
            continue
        if outcome.signature in tally.findings:
            tally.repeated += 1
            continue
        finding = _smaller(target, key_of(seed, target.name, number), outcome, seconds)
        tally.findings[outcome.signature] = finding
        tell(finding)
    return tally


def _reason(outcome: Outcome) -> str:
    return re.sub(r"'[^']*'|\"[^\"]*\"|/\S+|[\d.e+-]+|\[.*?\]", "_", outcome.message)[:80] + outcome.where


def _smaller(target: Target, key: str, outcome: Outcome, seconds: float) -> Finding:
    """The case with as few of its mutations, and as few changed files, as still give the same signature."""
    seed, files, notes = built(key, None, target)
    keep = {number for number, note in enumerate(notes) if note}
    for number in sorted(keep) if len(keep) > 1 else ():
        fewer = built(key, keep - {number}, target)[1]
        if outcome_of(target, fewer, seconds).signature == outcome.signature:
            keep.discard(number)
    seed, files, notes = built(key, keep, target)
    for name in sorted(set(files) | set(seed)):
        if files.get(name) != seed.get(name) and name in seed:
            restored = {**files, name: seed[name]}
            if outcome_of(target, restored, seconds).signature == outcome.signature:
                files = restored
    return Finding(target.name, key, outcome, [note for note in notes if note], seed, files)


def outcome_of(target: Target, files: Files, seconds: float = SECONDS) -> Outcome:
    """How one case ends, in a child of its own."""
    [(_, outcome)] = run(target, lambda _: files, count=1, seconds=seconds)
    return outcome


# --------------------------------------------------------------------------------------------------------- the corpus


def keep(finding: Finding, corpus: Path = CORPUS) -> Path:
    """Adds a finding to the corpus. The folder's name says what it is."""
    seeds = TARGETS[finding.target].seeds()
    words = "-".join(re.findall(r"[A-Za-z0-9_]+", finding.outcome.signature)).lower()[:60]
    number = 0
    while True:
        folder = corpus / finding.target / f"seed{seeds.index(finding.seed)}-{words}{f'-{number}' if number else ''}"
        if not folder.exists():
            break
        number += 1
    store(finding.files, finding.seed, folder)
    return folder


def corpus_cases(corpus: Path = CORPUS) -> Iterator[tuple[str, Path]]:
    """(target, folder) of each stored case."""
    for target in TARGETS:
        for folder in sorted((corpus / target).iterdir()) if (corpus / target).is_dir() else ():
            yield target, folder


def corpus_case(target: str, folder: Path) -> Files:
    """A stored case: its folder's name begins with the number of the seed that it changes."""
    number = int(folder.name.partition("-")[0].removeprefix("seed"))
    return stored(folder, TARGETS[target].seeds()[number])


def unmended(path: Path = UNMENDED) -> dict[str, tuple[str, str]]:
    """TARGET/NAME -> (signature, reason) of the cases that are known to fall."""
    if not path.exists():
        return {}
    rows = (line.split("\t") for line in path.read_text().splitlines() if line and not line.startswith("#"))
    return {name: (signature, reason) for name, signature, reason in rows}


def review(corpus: Path = CORPUS, path: Path = UNMENDED, seconds: float = SECONDS) -> tuple[list[str], list[str]]:
    """Runs the whole corpus and brings the list of what is not mended up to date.

    Returns:
        The names of the cases that stand now and left the list, and of those that fall and came to it.
    """
    before, rows = unmended(path), {}
    for target, folder in corpus_cases(corpus):
        outcome = outcome_of(TARGETS[target], corpus_case(target, folder), seconds)
        name = f"{target}/{folder.name}"
        if not outcome.good:
            reason = before.get(
                name, ("", "not mended yet: " + " ".join((outcome.message or outcome.kind).split())[:120])
            )[1]
            rows[name] = (outcome.signature, reason)
    head = "# What falls and is not mended: name, signature, reason. `python tests/fuzz --review` writes this.\n"
    path.write_text(head + "".join(f"{name}\t{signature}\t{why}\n" for name, (signature, why) in rows.items()))
    return sorted(set(before) - set(rows)), sorted(set(rows) - set(before))


def split_time(targets: list[str], until: float) -> Iterator[tuple[str, float]]:
    """Each target with the time at which its turn ends: equal shares of what is left when it begins."""
    for number, name in enumerate(targets):
        now = time.monotonic()
        yield name, now + (until - now) / (len(targets) - number)
