"""bench/card/linear.py on the emulator, at small sizes, by a clock of its own: contenders, bars, tables."""

from __future__ import annotations

import functools
import json
import sys

import pytest
import torch
from emulated import emulated
from steady_card import SteadyCard

from bench.card import linear as bench_linear
from bench.compiled import predict
from qlora_kernels.bench.contenders.names import BNB, DENSE, EQUAL_COPY
from qlora_kernels.bench.timing import cuda_timing

SIZES = (((64, 128),), (1, 20), ((24, 64, 128),))


@functools.cache
def measured(bitsandbytes: bool = True) -> dict:
    saved = []
    with pytest.MonkeyPatch.context() as patch, emulated():
        for name, few in (("MOST_CALLS", 3), ("MIN_ROUNDS", 2)):
            patch.setattr(cuda_timing, name, few)
        if not bitsandbytes:
            patch.setitem(sys.modules, "bitsandbytes", None)
        bench = bench_linear.LinearBench(SteadyCard(l2_bytes=0), "cpu")
        cases = list(bench.cases(*SIZES))
        result = bench_linear.run(bench, 0.0, lambda r: saved.append(json.loads(json.dumps(r))), cases)
    assert [one["complete"] for one in saved] == [False] * 5 + [True]
    return result


def test_all_compute_the_same():
    pytest.importorskip("bitsandbytes")
    result = measured()
    assert [(case["operation"], case["m"]) for case in result["cases"]] == [
        ("forward", 1), ("forward", 20), ("forward, adapter", 24), ("backward, adapter", 24),
        ("training step", 24),
    ]  # fmt: skip
    for case in result["cases"]:
        assert "failed" not in case, case
        for contender in case["contenders"]:
            assert "failed" not in contender, contender
            assert contender["us"] > 0


def test_a_contender_that_is_missing_says_so():
    for case in measured(False)["cases"][:2]:
        assert case["contenders"][-1] == {"name": BNB, "failed": "not installed (bitsandbytes)"}
    assert "- bitsandbytes: not installed (bitsandbytes)" in bench_linear.markdown(measured(False))


def test_a_wrong_result_is_not_timed(monkeypatch):
    right = bench_linear.linear

    def wrong(*arguments, **more):
        y = right(*arguments, **more)
        return y * torch.where(torch.arange(y.shape[1]) < 2, 1.5, 1.0).to(y.dtype)

    def wrong_backward(*arguments):
        dx, *rest = right_backward(*arguments)
        return (dx * 1.5, *rest)

    right_backward = bench_linear.fused.backward
    monkeypatch.setattr(bench_linear, "linear", wrong)
    monkeypatch.setattr(bench_linear.fused, "backward", wrong_backward)
    with emulated():
        bench = bench_linear.LinearBench(SteadyCard(l2_bytes=0), "cpu")
        for about, makers in bench.cases(*SIZES):
            assert "wrong result" in bench.run_case(about, makers, 0.0)["failed"], about


def test_bars_worst_first_and_what_was_not_measured_before_all():
    def contender(name, us):
        return {
            "name": name,
            "graph_us": {"median": us},
            "event_us": {"median": us},
            "us": us,
            "host_us": {"median": 10.0},
        }

    case = bench_linear._about("forward", 1, 4096, 4096)
    case["contenders"] = [contender("qlora_kernels", 4.0), contender(EQUAL_COPY, 2.0), contender(DENSE, 9.6)]
    found = bench_linear.judged({"cases": [case]})
    assert len(found) == len(bench_linear.BARS)
    assert all(reached is None for _, _, reached in found[:-3])
    assert found[-3:] == [
        ("forward M = 1, 4096 x 4096: copy of as many bytes", 0.55, 0.5),
        ("forward M = 1, 4096 x 4096: torch dense", 2.2, 2.4),
        ("forward M = 1, 4096 x 4096: 15 us on the host", 1.0, 1.5),
    ]
    text = bench_linear.markdown({"cases": [case]}, predict.CARDS["h200"])
    cells = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    assert ["", "forward M = 1, 4096 x 4096: torch dense", "met", "2.40", "2.20", ""] in cells
    row = next(line for line in cells if line[1:4] == ["forward", "1", "4096 x 4096"])
    assert row[4:7] == ["4.0", f"{predict.predict(predict.CARDS['h200'], 1, 4096, 4096)['us']:.1f}", "10.0"]


def test_every_bar_has_its_case():
    with emulated():
        bench = bench_linear.LinearBench(SteadyCard(l2_bytes=0), "cpu")
        cases = {tuple(about[key] for key in ("operation", "m", "n", "k")): makers for about, makers in bench.cases()}
    for key, contender, _ in bench_linear.BARS:
        assert contender == bench_linear.HOST or contender in [name for name, _ in cases[key]], key


def test_without_a_card_one_sentence(capsys, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    assert bench_linear.main(["--out", str(tmp_path / "x.json")]) == 2
    assert "no CUDA device is seen" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
