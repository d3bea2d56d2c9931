"""The tables of a check on a card: bars, times beside predictions, steps."""

from __future__ import annotations

import pytest
from bench_runs.cases import contender, limits_case

from bench.card import predictions, report
from bench.compiled import model
from bench.compiled.cards import CARDS
from qlora_kernels.bench.case import OURS
from qlora_kernels.bench.contenders.names import BNB, DENSE, EQUAL_COPY, LINK
from qlora_kernels.bench.points import Point
from qlora_kernels.bench.report.bars import CARD_BARS


def finished(bench: dict, device: str = "NVIDIA H200") -> dict:
    """A result with this benchmark."""
    counts = {"passed": 3, "failed": 1, "skipped": 1, "failures": [["t::a", "why"]], "skips": [["t::b", "one card"]]}
    outcome = {
        "facts": {"device": device, "nvidia_smi": "unknown"},
        "tests": counts,
        "sanitizers": {"memcheck": {"errors": 0, "cases": 154}, "initcheck": {"seconds": 9.0}},
        "bench": bench,
    }
    steps = [{"name": n, "status": "passed", "seconds": 3.0, "limit_s": 9.0, "found": f} for n, f in outcome.items()]
    steps[1].update(status="failed", reason="1 tests failed", tail="the end")
    return {"schema": 3, "date": "2026-01-02T03:04:05+00:00", "complete": True, "passed": False, "steps": steps}


def on_card(name: str, us: float, nbytes: int = 0, graph: bool = True) -> dict:
    clocks = {"by": "graph" if graph else "events", "event_ms": us / 500, "host_ms": 0.007, "wall_ms": us / 250}
    why = None if graph else "not captured: RuntimeError: no"
    return contender(name, us / 1000, **clocks, no_graph=why, **({"bytes": nbytes} if nbytes else {}))


def case_at(point: Point, *contenders: dict, **more) -> dict:
    about = {"title": point.operation, "flops": None, "rounds": 1, "other_processes": 0.0}
    return {**point.as_dict(), **about, "contenders": list(contenders), **more}


FORWARD = Point("linear_forward", n=4096, k=4096, m=1, rank=0)


def sample() -> dict:
    missing = {"name": BNB, "failed": "not installed (bitsandbytes)"}
    big = Point("dequantize", n=8192, k=8192)
    return {
        "complete": True,
        "cases": [
            limits_case(gb_per_s=4000.0),
            case_at(big, on_card(OURS, 50.0, 190_000_000), missing, on_card(EQUAL_COPY, 49.0, 190_000_000)),
            case_at(FORWARD, on_card(OURS, 4.0), on_card(DENSE, 9.6), on_card(BNB, 60.0, graph=False)),
            case_at(Point("dequantize", "float32", 4096, 4096), failed="its process hangs"),
        ],
    }


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def test_bars_stand_first_with_what_was_not_measured_before_all():
    rows = rows_of(report.markdown(finished(sample())))
    bars = rows[2 : 2 + len(CARD_BARS)]
    words = [row[1] for row in bars]
    assert words == ["not measured"] * words.count("not measured") + ["pass"] * words.count("pass")
    assert words.count("pass") == 4
    assert [f"{FORWARD}: torch dense", "pass", "2.40", "2.20", "1.09", ""] in bars
    assert ["dequantize, 8192 x 8192: plain copy, share of its bandwidth", "pass", "0.95", "0.90", "1.06", ""] in bars
    assert [
        "dequantize, 4096 x 4096, float32: bitsandbytes",
        "not measured",
        "",
        "2.00",
        "",
        "its process hangs",
    ] in bars
    assert len(rows_of(report.markdown({**finished({}), "steps": []}))) >= len(CARD_BARS)


def test_the_tables():
    text = report.markdown(finished(sample()))
    rows = rows_of(text)
    ours = next(row for row in rows if row[:2] == ["dequantize, 8192 x 8192", OURS])
    h200 = CARDS["h200"]
    predicted = 190_000_000 / h200.copy_rate * 1e6
    assert ours[2:] == ["50.0", "49.5-50.5", "graph", "3800", "95%", "100.0", "7.0", "200.0", f"{predicted:.1f}", ""]
    dense = next(row for row in rows if row[1] == DENSE)
    rates = model.predict(h200, 1, 4096, 4096)
    assert (dense[10], dense[11]) == (f"{rates['dense_us']:.1f}", "2.40")
    forward = next(row for row in rows if row[:2] == ["linear_forward, 4096 x 4096, M = 1, r = 0", OURS])
    assert forward[10] == f"{rates['us']:.1f}"
    assert "- bitsandbytes: not installed (bitsandbytes) (dequantize, 8192 x 8192)" in text
    assert "- bitsandbytes: no time by graph: not captured: RuntimeError: no (linear_forward" in text
    assert "- its process hangs (dequantize, 4096 x 4096, float32)" in text
    assert "A copy of 1 GiB moves 4000 GB/s" in text
    assert "- t::a: why" in text
    assert "- t::b: one card" in text
    assert "    the end" in text
    assert ["sanitizers", "passed", "3.0", "9", "memcheck: 0 errors, 154 cases; initcheck: 9.0 seconds"] in rows
    # Columns stand under each other.
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({len(line) for line in lines}) <= 1


def test_many_skipped_tests_share_a_line_and_failed_ones_do_not():
    results = finished(sample())
    many = [[f"t::x{i}", "two cards are needed"] for i in range(9)]
    results["steps"][1]["found"] |= {"skips": many, "failures": [[name, "gone"] for name, _ in many], "not_run": 4}
    text = report.markdown(results)
    assert "- 9 tests, as t::x0: two cards are needed" in text
    assert all(f"- {name}: gone" in text for name, _ in many)
    results["steps"][1] = {**results["steps"][1], "reason": None}
    assert "3 passed, 1 skipped, 4 not run" in report.markdown(results)


def test_other_cards_have_no_predictions():
    assert predictions.card_named("NVIDIA H100 80GB HBM3") is CARDS["h100"]
    assert predictions.card_named("NVIDIA A100-SXM4-80GB") is CARDS["a100"]
    assert predictions.card_named("NVIDIA GeForce RTX 4090") is CARDS["4090"]
    assert predictions.card_named("NVIDIA L40S") is None
    rows = rows_of(report.markdown(finished(sample(), device="a card")))
    assert next(row for row in rows if row[:2] == ["dequantize, 8192 x 8192", OURS])[10] == ""


def test_a_paged_step_is_its_bytes_after_or_while_its_pages_come():
    h200 = CARDS["h200"]
    moved = 28 * 40_000_000
    on_device = moved / h200.copy_rate * 1e6 + predictions.LAUNCH_US
    ours, link = on_card(OURS, 8000.0, moved), {**on_card(LINK, 6400.0), "wall_ms": 6.4}
    for operation, expected in (
        ("adamw_step", on_device),
        ("adamw_paged_step", on_device + 6400),
        ("adamw_budget_step", max(on_device, 6400)),
    ):
        case = case_at(Point(operation, "float32"), ours, *([] if operation == "adamw_step" else [link]))
        assert predictions.predicted_us(case, ours, h200) == pytest.approx(expected)
    assert predictions.predicted_us(case_at(Point("decode"), ours), ours, h200) is None
