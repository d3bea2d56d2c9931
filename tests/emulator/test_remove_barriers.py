"""Which statements remove_barriers.py removes on a day."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parent / "remove_barriers.py"
    spec = importlib.util.spec_from_file_location("remove_barriers", path)
    module = importlib.util.module_from_spec(spec)
    before, sys.modules["remove_barriers"] = list(sys.path), module
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before
    del sys.modules["remove_barriers"]


def test_days_in_succession_see_all_of_them(script):
    every = script.places([Path("csrc/device_guard.h"), Path("csrc/cuda/optimizer/arena.cu")])
    assert len(every) > 5
    days = [script.chosen(every, 3, day, set()) for day in (700, 701, 702)]
    assert sorted(str(place) for some in days for place in some) == sorted(map(str, every))
    assert all(len(some) < len(every) for some in days)


def test_new_files_are_seen_every_day(script):
    every = script.places([Path("csrc/device_guard.h"), Path("csrc/cuda/optimizer/arena.cu")])
    new = {"csrc/device_guard.h"}
    for day in (700, 701):
        some = script.chosen(every, 1000, day, new)
        assert {place for place in every if str(place.path) in new} <= set(some)
        assert len(some) < len(every)
