"""bench/predict.py: units by hand, what must grow, what binds, and that it says what it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

if not (Path(__file__).resolve().parent.parent / "bench" / "predict.py").is_file():
    pytest.skip("the bench comes with the source tree only", allow_module_level=True)

from bench import predict

H200 = predict.CARDS["h200"]
TIMES = ("memory_us", "l2_us", "tensor_us", "issue_us", "latency_us")


def test_a_row_by_hand():
    found = predict.predict(H200, 1, 4096, 4096)
    # 2^24 weights of 4 bits, 8 for 64 and 32 for 16384 of them; x and y.
    assert found["bytes"] == 2**23 + 2**18 + 2**12 + 2 * 8192
    assert found["memory_us"] == pytest.approx(8671232 / 4.3e12 * 1e6, abs=1e-3)
    # 32 tiles, one each on 32 SMs; 64 steps of 16 x 128 x 64 multiplications.
    assert (found["tile"], found["tiles"], found["most_on_an_sm"]) == ("16 x 128", 32, 1)
    assert found["tensor_us"] == pytest.approx(64 * 2 * 16 * 128 * 64 / (0.6 * 790e12 / 132) * 1e6, abs=1e-3)
    # Of each: 16 rows of 64 16-bit numbers, and 128 blocks of weights.
    assert found["l2_us"] == pytest.approx(32 * 64 * (2048 + 128 * 64 * 4.126953125 / 8) / 5120 / 1830, abs=1e-3)
    # Two copies ahead: every second step waits for one.
    assert found["latency_us"] == pytest.approx((64 / 2 + 1) * 479 / 1830, abs=1e-3)
    # 33.6 MB at 4.3 TB/s.
    assert found["dense_us"] == pytest.approx((2 * 4096 * 4096 + 2 * 8192) / 4.3e12 * 1e6, abs=1e-3)


def test_issue_slots_come_from_the_static_table(monkeypatch):
    before = predict.predict(H200, 1, 4096, 4096)
    rows = dict(predict._static())
    key = before["kernel"], H200.arch
    issued = predict.issued(rows[key])
    # Each of 8 warps issues them in 64 steps; a scheduler has 2 of the warps, and issues one a clock.
    assert before["issue_us"] == pytest.approx(64 * issued * 2 / 1830, abs=1e-3)
    rows[key] = {**rows[key], "step_decode": rows[key]["step_decode"] + issued}
    monkeypatch.setattr(predict, "_static", lambda: rows)
    assert predict.predict(H200, 1, 4096, 4096)["issue_us"] == pytest.approx(2 * before["issue_us"], abs=2e-3)


def test_a_large_dense_product_runs_at_the_rate_that_was_reached():
    found = predict.predict(H200, 4096, 14336, 4096)
    assert found["dense_us"] == pytest.approx(2 * 4096 * 14336 * 4096 / 790e12 * 1e6, abs=1e-2)


@pytest.mark.parametrize("card", predict.CARDS.values(), ids=predict.CARDS)
@pytest.mark.parametrize("backward", [False, True])
def test_every_prediction_is_the_largest_of_its_bounds(card, backward):
    for row in predict.every([card], predict.SHAPES, [backward]):
        assert row["us"] == max(row[key] for key in TIMES)
        assert row[f"{row['binds'].lower()}_us"] == row["us"]
        assert 0 < row["of_copy"] <= 1
        assert row["dense_over_ours"] == pytest.approx(row["dense_us"] / row["us"], rel=1e-2)


@pytest.mark.parametrize("card", predict.CARDS.values(), ids=predict.CARDS)
def test_more_work_takes_no_less_time(card):
    def of(m, n, k):
        return predict.predict(card, m, n, k)

    for few, many in zip(predict.ROWS, predict.ROWS[1:]):
        assert of(few, 4096, 4096)["us"] <= of(many, 4096, 4096)["us"]
        assert of(few, 4096, 4096)["bytes"] < of(many, 4096, 4096)["bytes"]
    for m in predict.ROWS:
        for key in TIMES:
            assert of(m, 4096, 4096)[key] <= of(m, 8192, 4096)[key], (m, key)
            assert of(m, 4096, 4096)[key] < of(m, 4096, 8192)[key], (m, key)


def test_one_tile_more_than_sms_takes_a_second_wave():
    full, more = (predict.predict(H200, 128, 128 * tiles, 4096) for tiles in (132, 133))
    assert (full["most_on_an_sm"], more["most_on_an_sm"]) == (1, 2)
    assert more["tensor_us"] == pytest.approx(2 * full["tensor_us"], abs=2e-3)


def test_a_faster_memory_moves_the_bound():
    slow = replace(H200, memory=0.1)
    assert predict.predict(slow, 1, 4096, 4096)["binds"] == "memory"
    assert predict.predict(slow, 1, 4096, 4096)["of_copy"] == 1
    assert predict.predict(H200, 1, 4096, 4096)["binds"] != "memory"


def test_a_card_with_little_shared_memory_gets_three_stages():
    assert predict.launch_of(predict.CARDS["4090"], 128, False).stages == 3
    assert predict.launch_of(predict.CARDS["4090"], 64, False).stages == 4
    assert predict.launch_of(H200, 128, False).stages == 4


def test_it_says_what_it_is(capsys, tmp_path):
    out = tmp_path / "p.json"
    assert predict.main(["--card", "a100", "--shape", "256", "512", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "A100 80 GB, forward, N = 256, K = 512: prediction, no card has shown this" in printed
    found = json.loads(out.read_text())
    assert found["label"] == predict.LABEL == "prediction, no card has shown this"
    assert len(found["rows"]) == len(predict.CARDS) * 2 * len(predict.ROWS)


def test_the_committed_file_is_of_the_committed_table():
    rows = list(predict.every(list(predict.CARDS.values()), predict.SHAPES, [False, True]))
    assert predict.OUT.read_text() == predict.to_json(rows), "python -m bench.predict"
