"""A case on a card whose events are the host's clock: one clock for all, and what failures leave."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import pytest
from bench_runs.cases import POINT, TINY

from qlora_kernels.bench.case import (
    OURS,
    Case,
    Contender,
    DeviceLost,
    Ready,
)
from qlora_kernels.bench.contenders.names import (
    BNB,
)
from qlora_kernels.bench.timing import cuda_timing
from qlora_kernels.bench.timing.measure import CudaMeasurement


class FakeCard(cuda_timing.Card):
    """A card whose events are the host's clock, whose graphs are the calls again, and which may be broken."""

    l2_bytes = 1 << 20

    def __init__(self) -> None:
        self.broken: Exception | None = None

    def event(self) -> float:
        return time.perf_counter()

    def microseconds(self, start: float, end: float) -> float:
        return (end - start) * 1e6

    def wait(self) -> None:
        if self.broken is not None:
            raise self.broken

    def occupy(self, microseconds: float) -> None:
        pass

    def capture(self, function):
        function()
        return function


def on_a_card(other: Ready, card: FakeCard | None = None, **more) -> CudaMeasurement:
    """A case on a card: this package sleeps for a tenth of a millisecond."""
    ours = Ready(lambda i: time.sleep(1e-4), lambda _: 0.0, 0.1, bytes=8, copies=3)
    case = Case("forward", 2, [Contender(OURS, lambda: ours), Contender(BNB, lambda: other)])
    return CudaMeasurement(case, TINY, POINT, card=card or FakeCard(), **more)


SLEEP = Ready(lambda i: time.sleep(2e-4), lambda _: 0.0, 0.1, bytes=8, copies=3)


@pytest.mark.parametrize("waits", [False, True])
def test_on_a_card_all_are_told_by_one_clock(waits):
    """By graphs that are replayed; or, where somebody's call cannot be captured, by events."""
    measurement = on_a_card(replace(SLEEP, waits=waits))
    assert measurement.rounds == 1
    assert 1e-4 <= measurement.round() < 2e-2
    ours, other = measurement.result()["contenders"]
    assert ours["by"] == other["by"] == ("events" if waits else "graph")
    assert other["no_graph"] == ("the call waits for the device" if waits else None)
    assert (other["graph_ms"] is None) == waits
    assert ours["graph_ms"] >= 0.1
    for one, least in ((ours, 0.1), (other, 0.2)):
        assert least <= one["q20_ms"] <= one["median_ms"] <= one["q80_ms"]
        assert least <= one["event_q20_ms"] <= one["event_ms"] <= one["event_q80_ms"]
        assert one["event_samples"] == 3 * cuda_timing.MIN_ROUNDS
        assert one["samples"] == (3 if waits else 1) * cuda_timing.MIN_ROUNDS
        assert one["copies"] == 3


def failing_after(calls: int) -> Ready:
    """A contender whose calls raise from a certain one on."""
    done = itertools.count()

    def call(index: int) -> None:
        if next(done) >= calls:
            raise RuntimeError("CUDA error: out of luck")

    return replace(SLEEP, call=call)


# Checks and timing before the case, then the warm-up, then samples.
@pytest.mark.parametrize("calls", [1, 10, 60])
def test_on_a_card_who_fails_later_leaves_the_others_their_figures(calls):
    announced = []
    measurement = on_a_card(failing_after(calls), announce=announced.append)
    assert measurement.round() > 0
    ours, other = measurement.result()["contenders"]
    assert other == {"name": BNB, "failed": "RuntimeError: CUDA error: out of luck"}
    assert ours["by"] == "graph"
    assert ours["samples"] == cuda_timing.MIN_ROUNDS
    assert set(announced) == {OURS, BNB, ""}


@pytest.mark.parametrize("calls", [1, 10, 60])
def test_a_card_that_answers_no_more_is_the_end_of_the_process(calls):
    """Whoever was at work did it; to go on would fail everybody else."""
    card, announced = FakeCard(), []
    ready = failing_after(calls)

    def call(index: int) -> None:
        try:
            ready.call(index)
        except RuntimeError as problem:
            card.broken = problem
            raise

    with pytest.raises(DeviceLost, match="out of luck"):
        on_a_card(replace(ready, call=call), card, announce=announced.append).round()
    assert announced[-1] == BNB


def test_on_a_card_on_which_everybody_fails_each_reason_is_told():
    measurement = on_a_card(failing_after(0), without={OURS: "ended its process"})
    assert measurement.rounds == 0
    assert [one["failed"] for one in measurement.result()["contenders"]] == [
        "ended its process",
        "RuntimeError: CUDA error: out of luck",
    ]
    assert [one.get("failed") for one in cuda_timing.measure(FakeCard(), [], 0.0)] == []
