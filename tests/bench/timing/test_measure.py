"""How a case is measured: everyone is verified first, takes turns, and is reported; nothing is invented."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import replace

import pytest
import torch
from bench_runs.cases import POINT, TINY, fake, measured_case

from qlora_kernels.bench.case import (
    OURS,
    Case,
    Contender,
    Ready,
    Settings,
    largest_error,
    quantiles_of,
)
from qlora_kernels.bench.contenders.names import (
    BNB,
)
from qlora_kernels.bench.contenders.weights import Lab
from qlora_kernels.bench.points import Point
from qlora_kernels.bench.report import results, table
from qlora_kernels.bench.timing import peak
from qlora_kernels.bench.timing.measure import Measurement, failed_ours
from qlora_kernels.bench.timing.peak import peak_allocated


def test_missing_contender_is_reported_not_invented():
    def prepare():
        raise ModuleNotFoundError("No module named 'bitsandbytes'", name="bitsandbytes")

    case = measured_case(fake(prepare))
    assert case["contenders"][1] == {"name": BNB, "failed": "not installed (bitsandbytes)"}
    assert case["contenders"][0]["samples"] > 0
    text = table.terminal({**results.begin(TINY, "usual"), "cases": [case]})
    assert text.count("not installed (bitsandbytes)") == 2, "in the figures and in the ratios"


def test_a_rival_that_takes_for_ever_is_called_once(monkeypatch):
    """The call that is verified is its figure; it does not decide how many rounds the others get."""
    monkeypatch.setattr(Measurement, "ENDLESS", 0.05)
    calls: list[int] = []

    def prepare():
        def call(index):
            calls.append(index)
            time.sleep(0.06)
            return torch.tensor(2.0)

        return Ready(call, lambda y: abs(y.item() - 2), 0.1, bytes=8, copies=4)

    case = measured_case(fake(prepare))
    ours, other = case["contenders"]
    assert calls == [0]
    assert other["samples"] == 1
    assert other["error"] == 0
    assert 60 <= other["median_ms"] == other["q20_ms"] < 1000
    assert ours["samples"] > 1


def test_failing_contender_is_reported_with_its_reason():
    def prepare():
        raise RuntimeError("no kernel\nfor this processor")

    failed = measured_case(fake(prepare))["contenders"][1]
    assert failed == {"name": BNB, "failed": "RuntimeError: no kernel for this processor"}


def test_who_fails_in_a_timed_call_leaves_the_others_their_figures():
    """And is dropped from then on, with the reason."""
    calls = itertools.count()

    def call(index):
        if next(calls) > 12:
            raise MemoryError("no more")
        return torch.tensor(2.0)

    other = Ready(call, lambda y: abs(y.item() - 2), 0.1, bytes=8)
    announced = []
    measurement = Measurement(fake(lambda: other), replace(TINY, min_rounds=6), POINT, announce=announced.append)
    assert announced == [OURS, "", BNB, ""]
    assert all(measurement.round() > 0 for _ in range(6))
    ours, bnb = measurement.result()["contenders"]
    assert bnb == {"name": BNB, "failed": "MemoryError: no more"}
    assert ours["samples"] == 6 * Measurement.CALLS
    assert announced[-2:] == [OURS, ""]
    assert next(calls) == 14


def test_a_reason_that_cannot_be_told_is_a_reason():
    class Mute(Exception):
        def __str__(self):
            raise ValueError

    def prepare():
        raise Mute

    assert measured_case(fake(prepare))["contenders"][1]["failed"] == "Mute: (its message cannot be told)"


def test_where_this_package_fails_in_a_timed_call_others_are_measured():
    case = fake(lambda: Ready(lambda i: torch.tensor(2.0), lambda y: 0.0, 0.1, bytes=8))
    measurement = Measurement(case, TINY, POINT)
    measurement.runners[0].ready = replace(measurement.runners[0].ready, call=lambda i: 1 / 0)
    assert math.isnan(measurement.round())
    result = measurement.result()
    assert failed_ours(result) == "ZeroDivisionError: division by zero"
    assert result["contenders"][1]["samples"] == Measurement.CALLS


def test_where_everybody_fails_each_reason_is_told():
    def absent():
        raise ModuleNotFoundError("No module named 'bitsandbytes'", name="bitsandbytes")

    case = fake(absent)
    case.contenders[0] = replace(case.contenders[0], prepare=lambda: 1 / 0)
    measurement = Measurement(case, TINY, POINT)
    assert measurement.rounds == 0
    assert math.isnan(measurement.round())
    assert [one["failed"] for one in measurement.result()["contenders"]] == [
        "ZeroDivisionError: division by zero",
        "not installed (bitsandbytes)",
    ]


@pytest.mark.parametrize("value", [3.0, float("nan")])
@pytest.mark.parametrize("who", [OURS, BNB])
def test_wrong_result_is_not_timed(value, who):
    wrong = Ready(lambda i: torch.tensor(value), lambda y: abs(y.item() - 2), 0.1, bytes=8)
    right = replace(wrong, call=lambda i: torch.tensor(2.0))
    ready = {OURS: right, BNB: right, who: wrong}
    case = measured_case(Case("forward", 2, [Contender(name, lambda name=name: ready[name]) for name in (OURS, BNB)]))
    failed = next(c for c in case["contenders"] if c["name"] == who)
    assert failed["failed"].startswith("wrong result: error")
    assert "median_ms" not in failed
    assert (failed_ours(case) is not None) == (who == OURS)


def test_every_check_counts():
    """A result that is right only the first time is wrong."""
    answers = iter([2.0, 2.0, 5.0])
    ready = Ready(lambda i: torch.tensor(next(answers)), lambda y: abs(y.item() - 2), 0.1, bytes=8, checks=3)
    assert "wrong result: error 3" in measured_case(fake(lambda: ready))["contenders"][1]["failed"]


def test_every_result_counts():
    """NaN in any of several, and too few of them, are errors."""
    right = [torch.ones(3), torch.ones(2)]
    exact = [one.double() for one in right]
    assert largest_error(right, exact) == 0
    assert largest_error([torch.ones(3), torch.full((2,), 1.5)], exact) == 0.5
    for i in range(2):
        wrong = [one.clone() for one in right]
        wrong[i][0] = math.nan
        assert math.isnan(largest_error(wrong, exact))
    with pytest.raises(ValueError, match="zip"):
        largest_error(right[:1], exact)


def test_contenders_alternate_and_copies_rotate():
    calls = []

    def ready(name):
        return Ready(lambda i: calls.append((name, i)), lambda _: 0.0, 0.1, bytes=8, copies=3)

    contenders = [Contender(OURS, lambda: ready("a")), Contender(BNB, lambda: ready("b"))]
    measurement = Measurement(Case("forward", 2, contenders), TINY, POINT)
    assert {name: {i for other, i in calls if other == name} for name in "ab"} == {"a": {0, 1, 2}, "b": {0, 1, 2}}
    calls.clear()
    measurement.round()
    measurement.round()
    order = [name for name, _ in calls]
    changes = [name for i, name in enumerate(order) if i == 0 or name != order[i - 1]]
    assert changes == ["a", "b", "a"], "the second round starts with the other one"
    for name in "ab":
        indices = [i for other, i in calls if other == name]
        assert all((i + 1) % 3 == j for i, j in itertools.pairwise(indices))


def test_first_and_last_copy_are_verified():
    seen = []
    ready = Ready(lambda i: seen.append(i), lambda _: 0.0, 0.1, bytes=8, copies=7)
    begun = Measurement(Case("forward", 2, [Contender(OURS, lambda: ready)]), TINY, POINT)
    assert seen[:2] == [0, 6]
    assert begun.runners[0].error == 0.0


def test_copies_exceed_the_cache():
    settings = Settings(cache_bytes=1000)
    assert settings.copies(100) == 13
    assert settings.copies(10**9) == 3
    assert settings.copies(1) == settings.most_copies
    lab = Lab(TINY, Point("dequantize", n=64, k=256))
    for copies in (lab.ours, lab.dense):
        assert len(copies) == TINY.copies(copies[0].nbytes)
    assert len({w.packed.data_ptr() for w in lab.ours}) == len(lab.ours)
    assert all(torch.equal(w.packed, lab.ours[0].packed) for w in lab.ours)


def test_quantiles():
    assert quantiles_of([4.0, 1.0, 2.0, 3.0, 5.0, 6.0]) == {0: 1.0, 20: 2.0, 50: 3.5, 80: 5.0, 100: 6.0}


def test_peak_memory_counts_what_lives_at_one_time():
    """Two of three temporaries at a time, and the result; what is there before counts for nothing."""
    there = torch.ones(100_000)

    def call():
        a = there + 1
        b = a + 1
        del a
        return b + 1

    assert 800_000 <= peak_allocated(call) < 810_000
    assert peak_allocated(lambda: there.add_(1)) < 1000


def test_peak_memory_that_nobody_records_is_unknown(monkeypatch):
    """And not nothing."""

    class Silent:
        def __init__(self, **options):
            self.profiler = self.kineto_results = self

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def events(self):
            return []

    monkeypatch.setattr("torch.profiler.profile", Silent)
    peak._recorded.cache_clear()
    assert peak_allocated(lambda: torch.ones(100_000)) is None
    peak._recorded.cache_clear()
