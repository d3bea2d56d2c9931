"""bench/bench_cuda_optimizer.py on the emulator, at small sizes, by a clock of its own: contenders, bars, tables."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import pytest
import torch

if not (Path(__file__).resolve().parent.parent.parent / "bench" / "bench_cuda_optimizer.py").is_file():
    pytest.skip("the bench comes with the source tree only", allow_module_level=True)

from emulated import emulated, paging
from steady_card import SteadyCard

from bench import bench_cuda_optimizer as bench_optimizer
from bench import predict
from qlora_kernels import PagedAdamW
from qlora_kernels.bench.common import OURS
from qlora_kernels.ops import backends
from qlora_kernels.optim.arena import layout, schedule

#: 80,000 parameters; with pages of 4096 bytes, most of a budget of 95% stays.
SHAPES = bench_optimizer.llama_adapters(layers=1, hidden=480, inner=512, rank=10)
PAGE = 4096


def small(patch) -> bench_optimizer.OptimizerBench:
    patch.setattr(layout, "PAGE", PAGE)
    patch.setattr(schedule, "LEAST_STRETCH", 1 << 14)
    for name, few in (("LOOP", 1), ("MIN_ROUNDS", 2)):
        patch.setattr(bench_optimizer, name, few)
    return bench_optimizer.OptimizerBench(SteadyCard(l2_bytes=0), "cpu", SHAPES, share=0.95)


@functools.cache
def measured(bitsandbytes: bool) -> dict:
    saved = []
    with pytest.MonkeyPatch.context() as patch, emulated(page_bytes=PAGE, forbid_faults=True):
        if not bitsandbytes:
            for name in ("bitsandbytes", "bitsandbytes.optim"):
                patch.setitem(sys.modules, name, None)
        bench = small(patch)
        result = bench_optimizer.run(bench, 0.0, lambda r: saved.append(json.loads(json.dumps(r))), {"device": "none"})
    assert [len(one["cases"]) for one in saved] == [0, 1, 2, 3, 3]
    assert [one["complete"] for one in saved] == [False] * 4 + [True]
    return result


def test_the_adapters_are_those_of_a_llama_2_7b():
    shapes = bench_optimizer.llama_adapters()
    assert len(shapes) == 448
    assert sum(n * k for n, k in shapes) == 39_976_960


def test_all_take_the_same_steps():
    pytest.importorskip("bitsandbytes")
    result = measured(True)
    assert [case["operation"] for case in result["cases"]] == ["resident", "paged out", "budget of a quarter"]
    assert [len(case["contenders"]) for case in result["cases"]] == [5, 2, 1]
    for case in result["cases"]:
        assert "failed" not in case, case
        for contender in case["contenders"]:
            assert "failed" not in contender, contender
            assert contender["wall_us"]["median"] >= contender["host_us"]["median"] > 0
            assert contender["event_us"]["median"] == 1.0  # SteadyCard's time from one event to the next


def test_what_crosses_the_link_is_what_is_paged():
    resident, out, budget = measured(False)["cases"]
    states = 8 * sum(n * k for n, k in SHAPES)
    assert [one.get("moved") for one in resident["contenders"][:4]] == [0] * 4
    wide, narrow = (one["moved"] for one in out["contenders"])
    assert states <= wide <= states + 256 * 2 * len(SHAPES) + PAGE
    assert states / 4 <= narrow <= states / 4 + 256 * 2 * len(SHAPES) + PAGE
    with pytest.MonkeyPatch.context() as patch, emulated(page_bytes=PAGE, forbid_faults=True):
        running = small(patch).budgeted()
        native = running.step.__self__._engine.arena.native
        native.wait()
        before = paging()["to_device"]
        running.step()
        native.wait()
        assert (paging()["to_device"] - before) * PAGE == running.moved == budget["contenders"][0]["moved"]
    assert 0.1 * states < running.moved < 0.7 * states


def test_missing_bitsandbytes_says_so():
    result = measured(False)
    assert result["cases"][0]["contenders"][-1] == {
        "name": bench_optimizer.BNB,
        "failed": "not installed (bitsandbytes)",
    }
    text = bench_optimizer.markdown(result, predict.CARDS["h200"])
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert cells[2] == [
        f"resident: {bench_optimizer.BNB}", "not measured", "", "10.00", "not installed (bitsandbytes)"
    ]  # fmt: skip
    assert ["resident", bench_optimizer.BNB, *[""] * 6, "not installed (bitsandbytes)"] in cells


@pytest.mark.parametrize("name", [OURS, bench_optimizer.FUSED])
def test_a_wrong_result_is_not_timed(monkeypatch, name):
    kind = PagedAdamW if name == OURS else torch.optim.AdamW
    right = kind.step

    def wrong(self, *arguments):
        right(self, *arguments)
        p = self.param_groups[0]["params"][-1]
        if (
            name == bench_optimizer.FUSED or backends.forced_backend() is not None
        ):  # not in the CPU's result, which is the truth
            with torch.no_grad():
                p.view(-1)[-1] += 1.0

    monkeypatch.setattr(kind, "step", wrong)
    with emulated(page_bytes=PAGE):
        bench = small(monkeypatch)
        case = bench.run_case(*next(bench.cases()), 0.0)
    if name == OURS:
        assert case["failed"] == f"wrong result: {OURS} differs from the CPU's"
        assert case["contenders"] == []
    else:
        assert "wrong result: error" in case["contenders"][3]["failed"]


def test_a_full_card_is_left_alone(monkeypatch):
    with emulated(page_bytes=PAGE):
        bench = small(monkeypatch)
        monkeypatch.setattr(bench, "free", lambda: 10_000)
        for operation, makers in bench.cases():
            assert "too little of the card" in bench.run_case(operation, makers, 0.0)["failed"]


def contender(name: str, us: float, moved: int = 0) -> dict:
    return {"name": name, "moved": moved, **{kind: {"median": us} for kind in ("wall_us", "event_us", "host_us")}}


def test_bars_worst_first_and_predictions():
    resident = [contender(OURS, 400.0), contender(bench_optimizer.FUSED, 380.0), contender(bench_optimizer.BNB, 6000.0)]
    paged = [contender(OURS, 8000.0, 320_000_000)]
    result = {
        "link": {"gb_per_s": 50.0},
        "cases": [
            {"operation": "resident", "parameters": 40_000_000, "contenders": resident},
            {"operation": "paged out", "parameters": 40_000_000, "contenders": paged},
        ],
    }
    found = bench_optimizer.judged(result)
    assert [(what, bar, round(reached, 3)) for what, bar, reached, _ in found] == [
        (f"resident: {bench_optimizer.FUSED}", 1.0, 0.95),
        ("paged out: host link", 0.8, 0.8),
        (f"resident: {bench_optimizer.BNB}", 10.0, 15.0),
    ]
    h200 = predict.CARDS["h200"]
    on_card = 28 * 40e6 / 4.3e12 * 1e6 + 5
    first, second = result["cases"]
    assert bench_optimizer.predicted_us(result, first, resident[0], h200) == pytest.approx(on_card)
    assert bench_optimizer.predicted_us(result, second, paged[0], h200) == pytest.approx(on_card + 6400)
    text = bench_optimizer.markdown(result, h200)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert [f"resident: {bench_optimizer.FUSED}", "missed", "0.95", "1.00", ""] in cells
    assert ["paged out", OURS, "8000", "8000", "8000", f"{on_card + 6400:.0f}", "1.00", "80%", ""] in cells
    nothing = bench_optimizer.judged({"cases": []})
    assert [(reached, why) for _, _, reached, why in nothing] == [(None, "the case was not run")] * 3


def test_every_bar_has_its_case(monkeypatch):
    with emulated(page_bytes=PAGE):
        cases = dict(small(monkeypatch).cases())
    for operation, name, _ in bench_optimizer.BARS:
        assert name == bench_optimizer.LINK or name in dict(cases[operation])
        assert OURS in dict(cases[operation])


def test_without_a_card_one_sentence(capsys, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    assert bench_optimizer.main(["--out", str(tmp_path / "x.json")]) == 2
    assert "no CUDA device is seen" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
