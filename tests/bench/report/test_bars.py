"""What a card's results are held against: every kind of bar, the worst first, and why one has no figure."""

from __future__ import annotations

import pytest
from bench_runs.cases import contender, limits_case

from qlora_kernels.bench.case import OURS
from qlora_kernels.bench.contenders.names import (
    BEST_DENSE,
    BNB,
    COPY,
    DENSE,
    DENSE_F32,
    EQUAL_COPY,
    GGML,
    LINK,
    READ_SUM,
)
from qlora_kernels.bench.points import SWEEPS, Point
from qlora_kernels.bench.report.bars import (
    BARS_SINCE,
    CARD_BARS,
    CPU_LAYER_BARS,
    OPTIMIZER_BARS,
    Bar,
    bars_of,
    came_later,
    judge,
    require_cases,
)


def case_at(point: Point, *contenders: dict) -> dict:
    return {**point.as_dict(), "title": point.operation, "flops": None, "rounds": 1, "contenders": list(contenders)}


def on_card(name: str, ms: float, host_ms: float = 0.01, wall_ms: float | None = None, **more) -> dict:
    clocks = {"by": "graph", "event_ms": 2 * ms, "host_ms": host_ms, "wall_ms": 3 * ms if wall_ms is None else wall_ms}
    return contender(name, ms, **{**clocks, **more})


def test_every_bar_of_a_card_has_its_case():
    assert {bar.point for bar in CARD_BARS} <= set(SWEEPS["card"]())
    assert len({(bar.point, bar.contender, bar.measure) for bar in CARD_BARS}) == len(CARD_BARS)


def test_every_bar_of_a_cpu_has_its_case():
    """In the sweep of the bars, and in the one that the documents are made of."""
    for isa, bars in CPU_LAYER_BARS.items():
        points = {bar.point for bar in (*bars, *OPTIMIZER_BARS)}
        assert points == {p for p in SWEEPS["bars"]() if p.operation != "limits"}, isa
        assert points <= set(SWEEPS["usual"]())
        assert len({(bar.point, bar.contender, bar.measure) for bar in bars}) == len(bars)


@pytest.mark.parametrize(("isa", "of"), [("avx2", "avx2"), ("avx512", "avx2"), ("portable", "avx2"), (None, "avx2")])
def test_sets_without_bars_of_their_own_have_those_of_avx2(isa, of):
    results = {"settings": {"device": "cpu"}, "machine": {"isa_in_use": isa}}
    assert bars_of(results) == (*CPU_LAYER_BARS[of], *OPTIMIZER_BARS)
    assert bars_of({**results, "machine": {"isa_in_use": "amx"}})[0] is CPU_LAYER_BARS["amx"][0]
    assert bars_of({**results, "settings": {"device": "cuda"}}) == CARD_BARS


def test_a_bar_against_the_better_of_two_is_against_the_faster():
    """Of those that have a figure."""
    point = Point("linear_forward", n=4096, k=4096, m=16, rank=0)
    bar = Bar(point, BEST_DENSE, 1.3)

    def ratio(*others: dict) -> float | None:
        [verdict] = judge({"cases": [case_at(point, contender(OURS, 1.0), *others)]}, (bar,))
        return verdict.ratio

    assert ratio(contender(DENSE, 4.0), contender(DENSE_F32, 2.0)) == pytest.approx(2.0)
    assert ratio(contender(DENSE, 3.0), contender(DENSE_F32, 9.0)) == pytest.approx(3.0)
    assert ratio({"name": DENSE, "failed": "why"}, contender(DENSE_F32, 9.0)) == pytest.approx(9.0)
    assert ratio({"name": DENSE, "failed": "why"}, {"name": DENSE_F32, "failed": "why"}) is None
    assert ratio() is None


def test_share_of_the_speed_of_reading():
    """Of the most that anything read in the run, however that did it."""
    point = Point("linear_forward", n=4096, k=4096, m=1, rank=0)
    case = case_at(point, contender(OURS, 1.0, bytes=8_000_000), contender(DENSE, 3.0, bytes=33_000_000))
    limits = limits_case(gb_per_s=40.0)
    bar = Bar(point, OURS, 0.6, "share of the speed of reading")
    assert bar.title == "linear_forward, 4096 x 4096, M = 1, r = 0: share of the speed of reading"
    [verdict] = judge({"cases": [limits, case]}, (bar,))
    assert (verdict.ratio, verdict.reason) == (None, "how fast memory is read was not measured")
    for nbytes, share in ((20_000_000, 0.4), (5_000_000, 8 / 11)):  # the dense product reads 11 GB/s
        with_read = {**limits, "contenders": [*limits["contenders"], contender(READ_SUM, 1.0, bytes=nbytes)]}
        [verdict] = judge({"cases": [with_read, case]}, (bar,))
        assert verdict.ratio == pytest.approx(share)


def test_results_from_before_a_bar_need_not_have_it():
    """A failure of what there was stays one."""
    point = Point("linear_forward", n=4096, k=4096, m=1, rank=0)
    bar = Bar(point, GGML, 0.9)
    case = case_at(point, contender(OURS, 1.0), contender(DENSE, 3.0))
    failed = case_at(point, contender(OURS, 1.0), {"name": GGML, "failed": "not installed (ggml)"})
    for cases, later in (([case], True), ([], True), ([failed], False)):
        old, new = {"cases": cases}, {"cases": cases, "bars": BARS_SINCE}
        require_cases(old, (bar,))
        [verdict] = judge(old, (bar,))
        assert came_later(old, verdict) is later
        assert came_later(new, verdict) is False
        if later:
            with pytest.raises(ValueError, match="there is a bar against"):
                require_cases(new, (bar,))


def test_each_kind_of_bar_and_the_worst_first():
    forward, step = Point("linear_forward", n=4096, k=4096, m=1, rank=0), Point("adamw_step", "float32")
    big = Point("dequantize", n=8192, k=8192)
    results = {
        "cases": [
            limits_case(gb_per_s=4000.0),
            case_at(forward, on_card(OURS, 0.004), on_card(EQUAL_COPY, 0.002), on_card(DENSE, 0.0096)),
            case_at(big, on_card(OURS, 0.05, bytes=190_000_000)),
            case_at(step, on_card(OURS, 1.0, wall_ms=8.0), on_card(LINK, 1.0, wall_ms=6.0)),
        ]
    }
    bars = (
        Bar(forward, DENSE, 2.0),
        Bar(forward, EQUAL_COPY, 0.55),
        Bar(forward, OURS, 1.0, "time on the host"),
        Bar(big, COPY, 0.9, "share of its bandwidth"),
        Bar(step, LINK, 0.8, "time by the wall clock"),
        Bar(Point("quantize"), BNB, 2.0),
    )
    verdicts = judge(results, bars)
    assert [(v.bar, v.word, v.ratio and round(v.ratio, 3), v.reason) for v in verdicts] == [
        (bars[5], "not measured", None, "the case was not run"),
        (bars[1], "miss", 0.5, None),
        (bars[4], "miss", 0.75, None),
        (bars[3], "pass", 0.95, None),
        (bars[0], "pass", 2.4, None),
        (bars[2], "pass", 1.5, None),
    ]
    assert bars[2].title == "linear_forward, 4096 x 4096, M = 1, r = 0: 15 us on the host"
    assert bars[4].title == "adamw_step, float32: copy over the host link, time by the wall clock"


def test_times_are_compared_like_with_like():
    """By graph against by graph, or both by events."""
    point = Point("dequantize", n=4096, k=4096)
    other = on_card(BNB, 0.060, by="events", event_ms=0.100)
    [verdict] = judge({"cases": [case_at(point, on_card(OURS, 0.010), other)]}, (Bar(point, BNB, 2.0),))
    assert verdict.ratio == pytest.approx(5.0)


@pytest.mark.parametrize("measure", ["time", "time by the wall clock", "share of its bandwidth", "time on the host"])
def test_a_bar_without_a_figure_says_why(measure):
    point = Point("dequantize", n=4096, k=4096)
    bar = Bar(point, OURS if measure == "time on the host" else BNB, 2.0, measure)
    failed = {"name": OURS, "failed": "wrong result: error nan"}
    [verdict] = judge({"cases": [case_at(point, failed, on_card(BNB, 1.0))]}, (bar,))
    assert (verdict.ratio, verdict.share, verdict.reason) == (None, 0.0, "wrong result: error nan")
    [verdict] = judge({"cases": [{**case_at(point), "failed": "left out"}]}, (bar,))
    assert (verdict.word, verdict.reason) == ("not measured", "left out")
    assert [v.word for v in judge({"cases": []}, (bar,))] == ["not measured"]


def test_a_bar_does_not_vanish():
    point = Point("dequantize", n=4096, k=4096)
    bars = (Bar(point, BNB, 2.0),)
    with pytest.raises(ValueError, match="the results lack dequantize, 4096 x 4096"):
        require_cases({"cases": [], "bars": BARS_SINCE}, bars)
    with pytest.raises(ValueError, match="of dequantize, 4096 x 4096 lack bitsandbytes"):
        require_cases({"cases": [case_at(point, on_card(OURS, 1.0))], "bars": BARS_SINCE}, bars)
    require_cases({"bars": BARS_SINCE, "cases": [{**case_at(point), "failed": "out of memory"}]}, bars)
