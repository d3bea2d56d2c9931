"""How calls on a card are timed, with a clock that moves by what calls cost."""

from __future__ import annotations

import itertools

import pytest
from bench_runs.steady_card import FakeCard, SteadyCard

from qlora_kernels.bench.timing import cuda_timing


def test_times_are_those_of_one_call():
    card = FakeCard()
    order = []

    def costing(name, microseconds):
        def call(i):
            order.append((name, i))
            card.now += microseconds
            return object()

        return call

    contenders = [
        cuda_timing.Timed("a", costing("a", 10.0), 4, 1000),
        cuda_timing.Timed("b", costing("b", 30.0), 3, 3000),
        cuda_timing.Timed("c", costing("c", 8.0), 3, 1000, waits=True),
    ]
    a, b, c = cuda_timing.measure(card, contenders, 0.0)
    assert [one["graph_us"] and one["graph_us"]["median"] for one in (a, b, c)] == [5.0, 15.0, None]
    assert [one["event_us"]["median"] for one in (a, b, c)] == [10.0, 30.0, 8.0]
    assert (a["us"], c["us"]) == (5.0, 8.0)
    assert a["gb_per_s"] == pytest.approx(1000 / 5e-6 / 1e9)
    assert c["no_graph"] == "the call waits for the device"
    assert (a["graph_calls"] * 10.0, b["graph_calls"] * 30.0) >= (cuda_timing.SAMPLE_US, cuda_timing.SAMPLE_US)
    assert a["event_us"]["samples"] == 4 * cuda_timing.MIN_ROUNDS
    assert a["graph_us"]["samples"] == cuda_timing.MIN_ROUNDS
    assert all(one["host_us"]["median"] > 0 for one in (a, b, c))
    # The copies take turns, and so do the contenders.
    for name, copies in (("a", 4), ("b", 3), ("c", 3)):
        used = [i for other, i in order if other == name]
        assert all((i + 1) % copies == j for i, j in itertools.pairwise(used))
    names = [name for name, _ in order]
    blocks = "".join(name for i, name in enumerate(names) if i == 0 or names[i - 1] != name)
    # Set up one after the other, then rounds that begin with a, b, c, a, ...
    assert blocks.startswith("abc" + "abc" + "bca" + "cab" + "abc"), blocks


def test_results_stay_until_their_turn_comes_again():
    # What is kept cannot be written over: memory comes back only after as many calls as there are copies.
    numbers = iter(range(100))
    runner = cuda_timing._Runner(cuda_timing.Timed("a", lambda i: (i, next(numbers)), 3, 1))
    for _ in range(5):
        runner.once()
    assert runner.kept == [(0, 3), (1, 4), (2, 2)]


def test_a_call_that_cannot_be_captured_is_timed_by_events():
    class Refusing(SteadyCard):
        def capture(self, function):
            function()
            raise RuntimeError("operation not permitted\nwhen stream is capturing")

    timing = cuda_timing.measure(Refusing(), [cuda_timing.Timed("a", lambda i: None, 3, 1000)], 0.0)[0]
    assert timing["no_graph"] == "not captured: RuntimeError: operation not permitted when stream is capturing"
    assert timing["graph_us"] is None
    assert timing["us"] == timing["event_us"]["median"] == 1.0


def test_copies_exceed_the_cache_several_times():
    for size in (10, 100, 30_000, 10**6):
        assert cuda_timing.copies_for(size, 50_000) * size >= cuda_timing.TIMES_L2 * 50_000
    assert cuda_timing.copies_for(10**9, 50_000) == 3
