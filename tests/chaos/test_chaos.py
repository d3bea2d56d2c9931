"""Accidents while something is written: killed, signalled, out of room, in each other's way.

``python -m tests.chaos --minutes M`` goes on for longer.
"""

from __future__ import annotations

import errno
import random
import secrets
import signal
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from tests.chaos.events import Broken, Chaos
from tests.chaos.mischief import Mischief
from tests.chaos.targets import TARGETS, Target


@pytest.fixture(scope="module")
def chaos(tmp_path_factory):
    return Chaos(tmp_path_factory.mktemp("chaos"), seed=0)


@pytest.mark.parametrize(
    ("target", "several"),
    [
        ("adapter", [Mischief("signal at", signal.SIGKILL, 0.5), Mischief("two", at=0.3)]),
        ("weight", [Mischief("error at", errno.ENOSPC, 0.5), Mischief("file size", at=0.5)]),
        ("bench", [Mischief("signal at", signal.SIGTERM, 0.5), Mischief("two", at=0.5)]),
    ],
)
def test_a_few_accidents(chaos, target, several):
    chaos.event(target, several)


@pytest.mark.slow
def test_accidents_at_random(tmp_path):
    """As many as fit forty seconds, under a new seed each time, which a failure names."""
    seed = secrets.randbelow(10**9)
    print(f"python -m tests.chaos --seed {seed}")
    chaos = Chaos(tmp_path, seed)
    end, number = time.monotonic() + 40, 0
    while time.monotonic() < end:
        print(chaos.run(number))
        number += 1
    assert number


def write_carelessly(folder: str, given: str) -> int:
    """Leaves half a file if it is stopped, and a temporary one in any case."""
    try:
        Path(folder, ".leftover").write_text("")
        for name in ("weight.safetensors", "other"):
            Path(folder, name).write_text("half")
    except OSError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def write_without_a_net(folder: str, given: str) -> int:
    Path(folder, "weight.safetensors").write_text("x")
    return 0


@pytest.mark.parametrize(
    ("run", "mischief", "words"),
    [
        (write_carelessly, Mischief("none"), "left behind"),
        (write_without_a_net, Mischief("error at", errno.ENOSPC, 0.0), "ends with 1"),
    ],
)
def test_careless_writing_is_noticed(chaos, monkeypatch, run, mischief, words):
    monkeypatch.setitem(TARGETS, "careless", Target(run, lambda folder: None, lambda folder: 1))
    monkeypatch.setattr(chaos, "usual", {})
    with pytest.raises(Broken, match=words):
        chaos.event("careless", [mischief])


def test_a_seed_draws_the_same_events(chaos):
    def drawn():
        return [chaos.draw(number) for number in range(50)]

    first = drawn()
    random.seed(1)
    assert drawn() == first
    assert {target for target, _ in first} == set(TARGETS)
    assert len({mischief.kind for _, several in first for mischief in several}) == 6
