"""What fuzzing found once, and a few new cases of each parser; ``python tests/fuzz`` tries many more."""

from __future__ import annotations

import pytest
from fuzzing import campaign as fuzz
from fuzzing.child import run
from fuzzing.targets import TARGETS

pytest.importorskip("transformers")

UNMENDED = fuzz.unmended()
CASES = [(target, folder) for target, folder in fuzz.corpus_cases()]


def _marked(target, folder):
    name = f"{target}/{folder.name}"
    marks = [pytest.mark.xfail(reason=UNMENDED[name][1], strict=True)] if name in UNMENDED else []
    return pytest.param(target, folder, id=name, marks=marks)


@pytest.mark.parametrize(("target", "folder"), [_marked(*case) for case in CASES])
def test_what_fell_once_stands(target, folder):
    outcome = fuzz.outcome_of(TARGETS[target], fuzz.corpus_case(target, folder), seconds=5)
    assert outcome.good, f"{outcome.signature}: {outcome.message}\n{outcome.trace}"


@pytest.mark.parametrize("name", TARGETS)
def test_the_first_cases_of_a_fixed_seed(name):
    """Few enough for a quick run."""
    known = frozenset(signature for signature, _ in UNMENDED.values())
    tally = fuzz.campaign(TARGETS[name], seed=0, count=40, known=known)
    assert tally.cases == 40
    assert len(tally.refusals) > 3, "the cases do not reach far into the parser"
    assert not tally.findings, "\n\n".join(map(str, tally.findings.values()))


@pytest.mark.parametrize("name", TARGETS)
def test_valid_files_are_accepted(name):
    seeds = TARGETS[name].seeds()
    for _, outcome in run(TARGETS[name], lambda number: seeds[number], count=len(seeds)):
        assert outcome.kind == "accepted", outcome


def test_every_known_fault_has_its_case():
    names = {f"{target}/{folder.name}" for target, folder in CASES}
    assert set(UNMENDED) <= names
    assert sum(path.stat().st_size for path in fuzz.CORPUS.rglob("*") if path.is_file()) < 1 << 20
