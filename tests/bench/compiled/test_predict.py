"""bench/compiled/predict.py: units by hand, what must grow, what binds, and that it says what it is."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from bench.compiled import predict

H200 = predict.CARDS["h200"]
TIMES = ("memory_us", "l2_us", "tensor_us", "shared_us", "issue_us", "latency_us")


@pytest.fixture(autouse=True)
def _no_forced_kernel(monkeypatch):
    monkeypatch.delenv("QLORA_KERNELS_CUDA_KERNEL", raising=False)


def of_weights(m):
    # 2^24 weights of 4 bits, 8 for 64 and 32 for 16384 of them; x and y.
    return 2**23 + 2**18 + 2**12 + m * 2 * 8192


def test_a_row_by_hand():
    result = predict.predict(H200, 32, 4096, 4096, backward=True)
    assert result["bytes"] == of_weights(32)
    assert result["memory_us"] == pytest.approx(9179136 / 4.3e12 * 1e6, abs=1e-3)
    # 32 tiles, each shared by 8 thread blocks of 8 steps: 256 on 132 SMs, so that an SM has two.
    assert (result["dispatch"], result["tile"], result["tiles"]) == ("tiles32", "32 x 128", 32)
    assert (result["splits"], result["most_on_an_sm"]) == (8, 2)
    # Steps of 32 x 128 x 64 multiplications.
    assert result["tensor_us"] == pytest.approx(2 * 8 * 2 * 32 * 128 * 64 / (0.629 * 989.4e12 / 132) * 1e6, abs=1e-3)
    # Of each of 64 steps, whichever block has it: 32 rows of 64 16-bit numbers, and 128 blocks of weights.
    assert result["l2_us"] == pytest.approx(32 * 64 * (4096 + 128 * 64 * 4.126953125 / 8) / 5120 / 1830, abs=1e-3)
    # Of each step: x comes, codes come and are read, weights are written; 8 warps read all rows and 16 columns each.
    moved = 32 * 128 + 2 * 128 * 32 + 128 * 128 + 8 * (32 + 16) * 128
    assert result["shared_us"] == pytest.approx(2 * 8 * moved / 128 / 1830, abs=1e-3)
    # Both blocks at once, two copies ahead: every second step waits for one.
    assert result["latency_us"] == pytest.approx((8 / 2 + 1) * 479 / 1830, abs=1e-3)
    # 33.6 MB at 4.3 TB/s and x and y.
    assert result["dense_us"] == pytest.approx((2 * 4096 * 4096 + 32 * 2 * 8192) / 4.3e12 * 1e6, abs=1e-3)


def test_a_row_of_the_few_rows_kernel_by_hand():
    result = predict.predict(H200, 1, 4096, 4096)
    assert result["bytes"] == of_weights(1)
    assert result["memory_us"] == pytest.approx(8671232 / 4.3e12 * 1e6, abs=1e-3)
    # 128 groups of 4 times 8 rows of W, one each on 128 SMs; four warps share 8 rows, 32 chunks of 128: 8 each.
    assert (result["dispatch"], result["kernel"]) == ("few", "few_kernel<bf16, true>")
    assert (result["tile"], result["tiles"], result["most_on_an_sm"]) == ("16 x 32", 128, 1)
    # Products have 16 rows, of which one is x.
    assert result["tensor_us"] == pytest.approx(2 * 16 * 32 * 4096 / (0.629 * 989.4e12 / 132) * 1e6, abs=1e-3)
    # All weights once, x once into each of 128 blocks.
    assert result["l2_us"] == pytest.approx((2**24 * 4.126953125 / 8 + 128 * 8192) / 5120 / 1830, abs=1e-3)
    # 8 bytes of the table for the two weights of a byte; each of 16 warps reads the 256 bytes of x of its 8 chunks.
    assert result["shared_us"] == pytest.approx((4 * 32 * 4096 + 16 * 8 * 256) / 128 / 1830, abs=1e-3)
    # Two turns of four chunks, each asked for one turn before.
    assert result["latency_us"] == pytest.approx((2 + 1) * 479 / 1830, abs=1e-3)
    assert result["dense_us"] == pytest.approx((2 * 4096 * 4096 + 2 * 8192) / 4.3e12 * 1e6, abs=1e-3)


def test_a_row_of_the_middle_rows_kernel_by_hand():
    result = predict.predict(H200, 16, 4096, 4096)
    # 32 tiles of 128 columns, four blocks share each, with 4 steps of 256.
    assert (result["dispatch"], result["kernel"]) == (
        "middle16",
        "middle_kernel<bf16, MiddleTraits<bf16, 16, true>>",
    )
    assert (result["tile"], result["tiles"], result["splits"], result["most_on_an_sm"]) == (
        "16 x 128",
        32,
        4,
        1,
    )
    assert result["tensor_us"] == pytest.approx(2 * 4 * 16 * 128 * 256 / (0.629 * 989.4e12 / 132) * 1e6, abs=1e-3)
    assert result["l2_us"] == pytest.approx((2**24 * 4.126953125 / 8 + 32 * 16 * 8192) / 5120 / 1830, abs=1e-3)
    # 8 bytes of the table for the two weights of a byte, of seven rows in eight; 8 KiB of x, once in and twice out; 512
    # constants.
    moved = 4 * 112 * 256 + 3 * 16 * 512 + 512 * 4 + 8 * 256
    assert result["shared_us"] == pytest.approx(4 * moved / 128 / 1830, abs=1e-3)
    # Four steps, each asked for one before.
    assert result["latency_us"] == pytest.approx((4 + 1) * 479 / 1830, abs=1e-3)


def test_tiles_whose_depths_are_cut_as_one():
    # 112 tiles of 16 steps, 1792 steps on 132 SMs: at most 14 each.
    result = predict.predict(H200, 16, 14336, 4096)
    assert (result["tiles"], result["splits"], result["shared_tiles"], result["most_on_an_sm"]) == (
        112,
        132,
        112,
        1,
    )
    assert result["tensor_us"] == pytest.approx(2 * 14 * 16 * 128 * 256 / (0.629 * 989.4e12 / 132) * 1e6, abs=1e-3)
    assert result["latency_us"] == pytest.approx((14 + 1) * 479 / 1830, abs=1e-3)


def test_the_last_round_of_tiles_is_shared():
    # 448 tiles on 132 SMs: three rounds of 64 steps, and 52 tiles that two blocks share each, 32 steps.
    result = predict.predict(H200, 512, 14336, 4096)
    assert (result["dispatch"], result["tiles"], result["whole_tiles"], result["splits"]) == (
        "tiles128",
        448,
        396,
        2,
    )
    assert result["most_on_an_sm"] == 4
    steps = 3 * 64 + 32
    assert result["tensor_us"] == pytest.approx(steps * 2 * 128 * 128 * 64 / (0.629 * 989.4e12 / 132) * 1e6, abs=1e-2)
    # One block at a time: each starts again, two copies ahead.
    assert result["latency_us"] == pytest.approx((3 * (64 / 2 + 1) + 32 / 2 + 1) * 479 / 1830, abs=1e-3)


def test_chunks_beyond_the_depth_are_no_work():
    # On A100's 108 SMs groups are of 8 rows, and 16 warps have 2 of 32 chunks each, half a turn; 5 groups of 512.
    result = predict.predict(predict.CARDS["a100"], 1, 4096, 4096)
    assert (result["tile"], result["tiles"], result["most_on_an_sm"]) == ("16 x 8", 512, 5)
    assert result["tensor_us"] == pytest.approx(5 * 2 * 16 * 8 * 4096 / (312e12 * 790 / 989.4 / 108) * 1e6, abs=1e-3)
    assert result["shared_us"] == pytest.approx(5 * (4 * 8 * 4096 + 16 * 2 * 256) / 128 / 1410, abs=1e-3)
    assert result["l2_us"] == pytest.approx((2**24 * 4.126953125 / 8 + 108 * 8192) / 5120 / 1410, abs=1e-3)
    # A turn is waited for all the same.
    assert result["latency_us"] == pytest.approx((5 + 1) * 466 / 1410, abs=1e-3)


def test_the_wide_tile_moves_less_through_shared_memory():
    wide, narrow = (predict.launch_of(H200, m, 4096, 4096, False) for m in (4096, 512))
    assert ((wide.name, wide.columns), (narrow.name, narrow.columns)) == (("tiles128wide", 256), ("tiles128", 128))
    # Warps of 64 x 64 outputs, there by all of a step's depth, here by half of it.
    assert wide.shared_bytes == 128 * 128 + 2 * 256 * 32 + 256 * 128 + 8 * (64 + 64) * 128 == 192 * 1024
    assert narrow.shared_bytes == 128 * 128 + 2 * 128 * 32 + 128 * 128 + 8 * (64 + 64) * 64 == 104 * 1024


@pytest.mark.parametrize(
    ("m", "steps", "warps"),
    # A block of 16 steps, 8 warps; two turns of one group, 16 warps.
    [(128, 16, 8), (1, 2, 16)],
    ids=["tiles128", "few"],
)
def test_issue_slots_come_from_the_static_table(monkeypatch, m, steps, warps):
    before = predict.predict(H200, m, 4096, 4096)
    rows = dict(predict._static())
    key = before["kernel"], H200.arch
    issued = predict.issued(rows[key])
    # Each warp issues them in each step; a scheduler has a quarter of the warps, and issues one a clock.
    assert before["issue_us"] == pytest.approx(steps * issued * (warps / 4) / 1830, abs=1e-3)
    rows[key] = {**rows[key], "step_decode": rows[key]["step_decode"] + issued}
    monkeypatch.setattr(predict, "_static", lambda: rows)
    assert predict.predict(H200, m, 4096, 4096)["issue_us"] == pytest.approx(2 * before["issue_us"], abs=2e-3)


def test_a_large_dense_product_runs_at_the_rate_that_was_reached():
    prediction = predict.predict(H200, 4096, 14336, 4096)
    assert prediction["dense_us"] == pytest.approx(2 * 4096 * 14336 * 4096 / 790e12 * 1e6, abs=1e-2)


@pytest.mark.parametrize("card", predict.CARDS.values(), ids=predict.CARDS)
@pytest.mark.parametrize("backward", [False, True])
def test_every_prediction_is_the_largest_of_its_bounds(card, backward):
    for row in predict.every([card], predict.SHAPES, [backward]):
        assert row["us"] == max(row[key] for key in TIMES)
        assert row[f"{row['binds'].lower()}_us"] == row["us"]
        assert 0 < row["of_copy"] <= 1
        assert row["dense_over_ours"] == pytest.approx(row["dense_us"] / row["us"], rel=1e-2)


def alike(one, other):
    """Whether two products run the same kernel, cut the same way: same tile, same number of blocks that share one."""
    return all(one[key] == other[key] for key in ("kernel", "tile", "splits", "shared_tiles"))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("card", predict.CARDS.values(), ids=predict.CARDS)
def test_more_work_takes_no_less_time(card, backward):
    """Where the kernel, its tile or the split changes, times may jump either way, so those pairs are not compared."""

    def predicted(m, n, k):
        return predict.predict(card, m, n, k, backward)

    compared = {"m": 0, "columns": 0, "depth": 0}
    for few, many in zip(predict.ROWS, predict.ROWS[1:]):
        less, more = predicted(few, 4096, 4096), predicted(many, 4096, 4096)
        assert less["bytes"] < more["bytes"]
        if alike(less, more):
            compared["m"] += 1
            for key in TIMES:
                assert less[key] <= more[key], (few, many, key)
    for m in predict.ROWS:
        less = predicted(m, 4096, 4096)
        wide, deep = ((8192, 4096), (4096, 8192)) if not backward else ((4096, 8192), (8192, 4096))
        if alike(less, more := predicted(m, *wide)):
            compared["columns"] += 1
            for key in TIMES:
                assert less[key] <= more[key], (m, key)
        if alike(less, more := predicted(m, *deep)):
            compared["depth"] += 1
            for key in TIMES:
                # A turn of the few-rows kernel that is half empty waits as long as a full one.
                if key == "latency_us" and less["dispatch"] == "few":
                    assert less[key] <= more[key], (m, key)
                else:
                    assert less[key] < more[key], (m, key)
    assert all(count >= 3 for count in compared.values()), compared


def test_one_tile_more_than_sms_is_shared_in_a_second_wave():
    full, more = (predict.predict(H200, 128, 128 * tiles, 4096) for tiles in (132, 133))
    assert (full["most_on_an_sm"], more["most_on_an_sm"]) == (1, 2)
    # By eight blocks, an eighth of 64 steps each.
    assert (full["splits"], more["whole_tiles"], more["splits"]) == (1, 132, 8)
    assert more["tensor_us"] == pytest.approx(72 / 64 * full["tensor_us"], abs=2e-3)


def test_a_faster_memory_moves_the_bound():
    slow = replace(H200, memory=0.1)
    assert predict.predict(slow, 1, 4096, 4096)["binds"] == "memory"
    assert predict.predict(slow, 1, 4096, 4096)["of_copy"] == 1
    assert predict.predict(H200, 1, 4096, 4096)["binds"] != "memory"


def test_a_card_with_little_shared_memory_gets_three_stages():
    assert predict.launch_of(predict.CARDS["4090"], 128, 4096, 4096, False).stages == 3
    assert predict.launch_of(predict.CARDS["4090"], 64, 4096, 4096, False).stages == 4
    assert predict.launch_of(H200, 128, 4096, 4096, False).stages == 4


def test_it_says_what_it_is(capsys, tmp_path):
    out = tmp_path / "p.json"
    assert predict.main(["--card", "a100", "--shape", "256", "512", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "A100 80 GB, forward, N = 256, K = 512: prediction, no card has shown this" in printed
    result = json.loads(out.read_text())
    assert result["label"] == predict.LABEL == "prediction, no card has shown this"
    assert len(result["rows"]) == len(predict.CARDS) * 2 * len(predict.ROWS)


def test_the_committed_file_is_of_the_committed_table():
    rows = list(predict.every(list(predict.CARDS.values()), predict.SHAPES, [False, True]))
    assert predict.OUT.read_text() == predict.to_json(rows), "python -m bench.compiled.predict"
