"""bench/compiled/predict.py: terms by hand, what an audit counted, what must grow, and that it says what it is."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest

from bench.compiled import aims, model, predict, rivals, terms
from bench.compiled.cards import CARDS
from bench.compiled.launches import KERNEL_VARIABLE, forced, launch_of

H200 = CARDS["h200"]
MMA_SYNC = 0.629 * 989.4e12 / 132  # FLOP a second of an SM
#: Terms that more work makes no smaller.
TIMES = ("memory_us", "l2_us", "tensor_us", "shared_us", "issue_us", "alu_us", "fma_us", "latency_us", "sm_us")


@pytest.fixture(autouse=True)
def _no_forced_kernel(monkeypatch):
    monkeypatch.delenv("QLORA_KERNELS_CUDA_KERNEL", raising=False)


def of_weights(m):
    # 2^24 weights of 4 bits, 8 for 64 and 32 for 16384 of them; x and y.
    return 2**23 + 2**18 + 2**12 + m * 2 * 8192


# ---------------------------------------------------------------------------------------------------- terms by hand


def test_a_row_by_hand():
    result = model.predict(H200, 32, 4096, 4096, backward=True, kernel="tiles32")
    assert result["bytes"] == of_weights(32)
    assert result["memory_us"] == pytest.approx(9179136 / 4.3e12 * 1e6, abs=1e-3)
    # 32 tiles, each shared by 8 thread blocks of 8 steps: 256 on 132 SMs, so that an SM has two.
    assert (result["dispatch"], result["tile"], result["tiles"]) == ("tiles32", "32 x 128", 32)
    assert (result["splits"], result["most_on_an_sm"], result["steps"]) == (8, 2, 16)
    # Steps of 32 x 128 x 64 multiplications.
    assert result["tensor_us"] == pytest.approx(2 * 8 * 2 * 32 * 128 * 64 / MMA_SYNC * 1e6, abs=1e-3)
    # Of each of 64 steps, whichever block has it: 32 rows of 64 16-bit numbers, and 128 blocks of weights.
    assert result["l2_us"] == pytest.approx(32 * 64 * (4096 + 128 * 64 * 4.126953125 / 8) / 5120 / 1830, abs=1e-3)
    # Of each step: x comes, codes come and are read, weights are written; 8 warps read all rows and 16 columns each.
    moved = 32 * 128 + 2 * 128 * 32 + 128 * 128 + 8 * (32 + 16) * 128
    assert result["shared_us"] == pytest.approx(2 * 8 * moved / 128 / 1830, abs=1e-3)
    # Both blocks at once, two copies ahead, latency doubled by the load.
    assert result["latency_us"] == pytest.approx(16 * 2 * 479 / 2 / 2 / 1830, abs=1e-3)
    # 33.6 MB at 4.3 TB/s and x and y.
    assert result["dense_us"] == pytest.approx((2 * 4096 * 4096 + 32 * 2 * 8192) / 4.3e12 * 1e6, abs=1e-3)


def test_a_row_of_the_few_rows_kernel_by_hand():
    result = model.predict(H200, 1, 4096, 4096, kernel="few")
    assert result["bytes"] == of_weights(1)
    assert result["memory_us"] == pytest.approx(8671232 / 4.3e12 * 1e6, abs=1e-3)
    # 128 groups of 2 times 16 rows of W, one each on 128 SMs; eight warps share 16 rows, 32 chunks of 128: 4 each.
    assert (result["dispatch"], result["kernel"]) == ("few", "few_kernel<bf16, true>")
    assert (result["tile"], result["tiles"], result["most_on_an_sm"]) == ("8 x 32", 128, 1)
    # Products have 8 rows of x, of which one is used.
    assert result["tensor_us"] == pytest.approx(2 * 8 * 32 * 4096 / MMA_SYNC * 1e6, abs=1e-3)
    # All weights once, x once into each of 128 blocks.
    assert result["l2_us"] == pytest.approx((2**24 * 4.126953125 / 8 + 128 * 8192) / 5120 / 1830, abs=1e-3)
    # 4 bytes of the table for the two weights of a byte; each of 16 warps loads x four times in each of its 4 chunks,
    # looks up a constant in two passes and shuffles it four times.
    assert result["shared_us"] == pytest.approx((2 * 32 * 4096 + 16 * 4 * (4 * 512 + 6 * 128)) / 128 / 1830, abs=1e-3)
    # Two turns of two chunks, each asked for one turn before.
    assert result["latency_us"] == pytest.approx(2 * 2 * 479 / 1830, abs=1e-3)
    # Without a barrier in the loop nothing is alone.
    assert result["alone_us"] == result["alone_clocks"] == 0
    # Each of 16 warps has 16 sums for a row, written and read; then the results are on their way.
    assert result["tail_us"] == pytest.approx((2 * 16 * 16 * 4 / 128 + 479) / 1830, abs=1e-3)
    assert result["dense_us"] == pytest.approx((2 * 4096 * 4096 + 2 * 8192) / 4.3e12 * 1e6, abs=1e-3)


def test_a_row_of_the_middle_rows_kernel_by_hand():
    result = model.predict(H200, 16, 4096, 4096, kernel="middle16")
    # 32 tiles of 128 columns, four blocks share each, with 4 steps of 256.
    assert result["kernel"] == "middle_kernel<bf16, MiddleTraits<bf16, 16, true>>"
    assert (result["tile"], result["tiles"], result["splits"], result["steps"]) == ("16 x 128", 32, 4, 4)
    assert result["most_on_an_sm"] == 1
    assert result["tensor_us"] == pytest.approx(2 * 4 * 16 * 128 * 256 / MMA_SYNC * 1e6, abs=1e-3)
    assert result["l2_us"] == pytest.approx((2**24 * 4.126953125 / 8 + 32 * 16 * 8192) / 5120 / 1830, abs=1e-3)
    # 4 bytes of the table for the two weights of a byte; 8 KiB of x, once in and twice out; of each warp 64 constants,
    # looked up in four passes for each 32, written, and read by four loads.
    moved = 2 * 128 * 256 + 3 * 16 * 512 + 8 * (2 * 512 + 256 + 512)
    assert result["shared_us"] == pytest.approx(4 * moved / 128 / 1830, abs=1e-3)
    # Four steps, each asked for two before.
    assert result["latency_us"] == pytest.approx(4 * 2 * 479 / 2 / 1830, abs=1e-3)


def test_tiles_whose_depths_are_cut_as_one():
    # 112 tiles of 16 steps, 1792 steps on 108 SMs: at most 17 each.
    card = CARDS["a100"]
    result = model.predict(card, 16, 14336, 4096, kernel="middle16")
    assert (result["tiles"], result["splits"], result["shared_tiles"]) == (112, 108, 112)
    assert (result["most_on_an_sm"], result["steps"]) == (1, 17)
    assert result["latency_us"] == pytest.approx(17 * 2 * 466 / 2 / 1410, abs=1e-3)
    # It may begin in one tile, have another, and end in a third.
    launch = launch_of(card, 16, 14336, 4096, False, "middle16")
    assert model._work(card, launch, 1, 16, 14336, 4096).starts == 3


def test_the_last_round_of_tiles_is_shared():
    # 448 tiles on 132 SMs: three rounds of 64 steps, and 52 tiles that two blocks share each, 32 steps.
    result = model.predict(H200, 512, 14336, 4096, kernel="tiles128")
    assert (result["tiles"], result["whole_tiles"], result["splits"]) == (448, 396, 2)
    assert (result["most_on_an_sm"], result["steps"]) == (4, 3 * 64 + 32)


def test_chunks_beyond_the_depth_are_no_work():
    # On A100's 108 SMs groups are of 16 rows, and 16 warps have 1 of 16 chunks each, half a turn; 3 groups of 256.
    result = model.predict(CARDS["a100"], 1, 4096, 2048, kernel="few")
    assert (result["tile"], result["tiles"], result["most_on_an_sm"]) == ("8 x 16", 256, 3)
    assert result["tensor_us"] == pytest.approx(3 * 2 * 8 * 16 * 2048 / (312e12 * 790 / 989.4 / 108) * 1e6, abs=1e-3)
    assert result["shared_us"] == pytest.approx(3 * (2 * 16 * 2048 + 16 * 22 * 128) / 128 / 1410, abs=1e-3)
    # A turn is waited for all the same.
    assert result["latency_us"] == pytest.approx(3 * 2 * 466 / 1410, abs=1e-3)


def test_the_wide_tile_moves_less_through_shared_memory():
    wide, narrow = (launch_of(H200, 4096, 4096, 4096, False, name) for name in ("tiles128wide", "tiles128"))
    assert (wide.columns, narrow.columns) == (256, 128)
    # Warps of 64 x 64 outputs, there by all of a step's depth, here by half of it.
    assert wide.shared_bytes == 128 * 128 + 2 * 256 * 32 + 256 * 128 + 8 * (64 + 64) * 128 == 192 * 1024
    assert narrow.shared_bytes == 128 * 128 + 2 * 128 * 32 + 128 * 128 + 8 * (64 + 64) * 64 == 104 * 1024


# ------------------------------------------------------------------------------------------------------------ a step

#: What a warp issued in a step when the audit counted clocks (sm_90a, nvcc 13.0.88). With 128 columns two teams of
#: warps then took turns at decoding.
_PARTS = ("alone_issue", "alone_alu", "alone_fma", "beside_issue", "beside_alu", "beside_fma")
_PARTS += ("decode_issue", "decode_alu", "decode_fma", "decode_beside")
AUDITED = {
    "tiles128wide": dict(zip(_PARTS, (216.0, 73.0, 27.0, 149.0, 0.0, 0.0, 184.0, 180.0, 4.0, 0.0))),
    "tiles128": dict(zip(_PARTS, (117.0, 33.5, 5.5, 69.0, 0.0, 0.0, 135.5, 104.0, 12.0, 0.0))),
}


def audited(name: str, **changed) -> model.Step:
    launch = launch_of(H200, 4096, 4096, 4096, False, name)
    launch = replace(launch, teams=256 // launch.columns)
    return model.step_of(H200, launch, {**AUDITED[name], **changed})


def test_a_step_takes_what_the_audit_counted():
    """By hand, from compiled code: 2260 to 2740 clocks for 128 x 256, and 1030 to 1150 for 128 x 128."""
    assert 2260 <= audited("tiles128wide").clocks <= 2740
    assert 1030 <= audited("tiles128").clocks <= 1150
    # Of a dense product's time, 0.45 to 0.55.
    dense = 2 * 128 * 256 * 64 / (790e12 / 132) * 1.83e9
    assert 0.45 <= dense / audited("tiles128wide").clocks <= 0.55


def test_a_step_by_hand():
    step = audited("tiles128wide")
    # Two warps for each scheduler; two clocks for an integer instruction.
    assert step.alone == (73 + 180) * 2 * 2 + terms.BARRIER_CLOCKS
    assert (step.binds, step.together) == ("tensor", pytest.approx(2 * 128 * 256 * 64 / MMA_SYNC * 1.83e9))
    step = audited("tiles128")
    # Issue slots: without decoding, which the other team's products hide.
    assert step.alone == 117 * 2 + terms.BARRIER_CLOCKS
    tensor = 2 * 128 * 128 * 64 / MMA_SYNC * 1.83e9
    # A team decodes, then has half of the products; 104 KiB pass through shared memory meanwhile.
    assert step.together == max(tensor, 832, 104 * 2 * 2 + tensor / 2)


def test_integer_instructions_count_twice_and_float_ones_once():
    before = audited("tiles128wide").alone
    assert audited("tiles128wide", decode_alu=190.0).alone == before + 10 * 2 * 2
    # Other instructions fit into free issue slots.
    assert audited("tiles128wide", decode_issue=194.0).alone == before
    assert audited("tiles128wide", decode_fma=14.0).alone == before
    a100 = CARDS["a100"]
    few = launch_of(a100, 1, 4096, 4096, False, "few")
    row = dict.fromkeys(_PARTS, 0.0)
    # A100 has 64 float lanes.
    assert model.step_of(a100, few, {**row, "beside_fma": 9.0}).pipes["FMA"] == 9 * 4 * 2
    assert model.step_of(H200, few, {**row, "beside_fma": 9.0}).pipes["FMA"] == 9 * 4


def test_decoding_between_products_is_no_longer_alone():
    step = audited("tiles128wide", decode_beside=1.0)
    assert step.alone == 216 * 2 + terms.BARRIER_CLOCKS
    assert step.together == audited("tiles128wide").together
    assert step.pipes == audited("tiles128wide").pipes
    # Then the wide tile is faster than two of 128 columns, and before it is slower.
    assert step.clocks < 2 * audited("tiles128").clocks < audited("tiles128wide").clocks


def test_operands_that_wait_at_a_barrier_cost_no_time_after_it():
    step = audited("tiles128wide", decode_beside=1.0)
    assert step.alone - audited("tiles128wide", decode_beside=1.0, alone_ldsm=0.0).alone == terms.LDSM_CLOCKS == 30
    assert audited("tiles128wide", decode_beside=1.0, alone_ldsm=5.0) == step


# -------------------------------------------------------------------------------------------------------- the whole


@pytest.fixture
def rows(monkeypatch):
    """The static table, to be changed."""
    copies = {key: dict(row) for key, row in model._static().items()}
    monkeypatch.setattr(model, "_static", lambda: copies)
    return copies


def test_constants_by_lane_delay_the_beginning(rows):
    row = rows["few_kernel<bf16, true>", "sm_90a"]
    row["ldc_indexed"] = 0
    without = model.predict(H200, 1, 4096, 4096, kernel="few")
    # A load that no cache has, 32 KiB of the table, and x into each of 128 blocks.
    assert without["fill_us"] == pytest.approx((479 + 256 + 128 * 8192 / 5120) / 1830, abs=1e-3)
    row["ldc_indexed"] = 32
    result = model.predict(H200, 1, 4096, 4096, kernel="few")
    # 16 warps, 32 loads: 4352 passes.
    assert result["us"] - without["us"] == pytest.approx(4352 / 1830, abs=2e-3)


#: The sums of a tile of 16 x 128, at 64 bytes a clock.
PART = 16 * 128 * 4 / 64
#: Card, N, fences that are sequentially consistent, and what a shared tile's end takes.
TAILS = {
    "a cluster": ("h200", 4096, 0, 0.6 + PART / 1830),
    "a cluster, whatever fences there are": ("h200", 4096, 2, 0.6 + PART / 1830),
    # Three blocks: each writes its part, the last reads all.
    "a ticket": ("a100", 4096, 0, (5 * 466 + (1 + 3) * PART) / 1410),
    "a ticket with fences that take long": ("a100", 4096, 2, 2.5 + (1 + 3) * PART / 1410),
    # Tiles of 16 steps, cut every 17: at most two parts. A block writes a part, writes another and reads two.
    "two tiles of a block": ("a100", 14336, 0, (3 * 466 + PART + 5 * 466 + (1 + 2) * PART) / 1410),
}


@pytest.mark.parametrize("case", TAILS)
def test_blocks_that_share_a_tile_pay_at_its_end(rows, case):
    name, n, membar_sc, us = TAILS[case]
    card = CARDS[name]
    rows["middle_kernel<bf16, MiddleTraits<bf16, 16, true>>", card.arch].update(membar_sc=membar_sc)
    result = model.predict(card, 16, n, 4096, kernel="middle16")
    # Four slices' sums, written and read, and the results.
    own = (2 * 4 * 16 * 128 * 4 / 128 + card.latency) / (card.clock * 1e3)
    assert result["cluster"] == ("cluster" in case)
    assert result["tail_us"] == pytest.approx(own + us, abs=1e-3)


def test_a_whole_tile_pays_no_tail(rows):
    rows["gemm_kernel<bf16, GemmTraits<bf16, false, 128, 128, 2, 4>>", "sm_90a"]["membar_sc"] = 2
    whole = model.predict(H200, 128, 128 * 132, 4096, kernel="tiles128")
    assert whole["splits"] == 1
    assert whole["tail_us"] == pytest.approx(((2 * 128 * 128 * 4 + 2 * 128 * 128 * 2) / 128 + 479) / 1830, abs=1e-3)


@pytest.mark.parametrize("lacking", ["alone_alu"])
def test_a_table_without_pipes_is_refused(rows, lacking):
    del rows["few_kernel<bf16, true>", "sm_90a"][lacking]
    with pytest.raises(KeyError, match=r"counts no pipes for few_kernel<bf16, true>: python -m bench.compiled.static"):
        model.predict(H200, 1, 4096, 4096, kernel="few")


def test_a_cards_own_code_is_preferred(rows):
    card = CARDS["4090"]
    assert model.predict(card, 1, 4096, 4096, kernel="few")["code"] == "sm_80"
    rows["few_kernel<bf16, true>", "sm_89"] = {**rows["few_kernel<bf16, true>", "sm_80"], "arch": "sm_89"}
    assert model.predict(card, 1, 4096, 4096, kernel="few")["code"] == "sm_89"


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
@pytest.mark.parametrize("backward", [False, True])
def test_every_prediction_is_the_sum_of_its_terms(card, backward):
    for row in model.every([card], model.SHAPES, [backward]):
        body = max(row["memory_us"], row["l2_us"], row["sm_us"])
        assert row["us"] == pytest.approx(row["fill_us"] + body + row["tail_us"], abs=3e-3)
        # Nothing can be faster than the busiest pipe.
        assert row["sm_us"] >= max(row[f"{pipe}_us"] for pipe in ("tensor", "shared", "issue", "alu", "fma")) - 1e-3
        assert row["sm_us"] >= row["latency_us"] - 1e-3
        assert 0 < row["of_copy"] < 1
        assert row["dense_over_ours"] == pytest.approx(row["dense_us"] / row["us"], rel=1e-2)


def alike(one, other):
    """Whether two products run the same kernel, cut the same way: same tile, same number of blocks that share one."""
    return all(one[key] == other[key] for key in ("kernel", "tile", "splits", "shared_tiles"))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_more_work_takes_no_less_time(card, backward):
    """Where the kernel, its tile or the split changes, times may jump either way, so those pairs are not compared."""

    def predicted(m, n, k):
        return model.predict(card, m, n, k, backward)

    compared = {"m": 0, "columns": 0, "depth": 0}
    for few, many in zip(model.ROWS, model.ROWS[1:]):
        less, more = predicted(few, 4096, 4096), predicted(many, 4096, 4096)
        assert less["bytes"] < more["bytes"]
        if alike(less, more):
            compared["m"] += 1
            for key in (*TIMES, "us"):
                assert less[key] <= more[key], (few, many, key)
    for m in model.ROWS:
        small, wide, wider, deep = (4096, 4096), (8192, 4096), (16384, 4096), (4096, 8192)
        for name, *shapes in (("columns", small, wide), ("columns", wide, wider), ("depth", small, deep)):
            less, more = (predicted(m, *(shape[::-1] if backward else shape)) for shape in shapes)
            if alike(less, more):
                compared[name] += 1
                for key in (*TIMES, "us"):
                    assert less[key] <= more[key], (m, name, key)
    # Twice the columns are nearly always cut another way.
    assert min(compared["m"], compared["depth"]) > 0, compared
    assert sum(compared.values()) >= 8, compared


def test_one_tile_more_than_sms_is_shared_in_a_second_wave():
    full, more = (model.predict(H200, 128, 128 * tiles, 4096, kernel="tiles128") for tiles in (132, 133))
    assert (full["most_on_an_sm"], more["most_on_an_sm"]) == (1, 2)
    # By eight blocks, an eighth of 64 steps each.
    assert (full["splits"], more["whole_tiles"], more["splits"]) == (1, 132, 8)
    assert more["tensor_us"] == pytest.approx(72 / 64 * full["tensor_us"], abs=2e-3)


def test_a_faster_memory_moves_the_bound():
    assert model.predict(H200, 1, 4096, 4096)["binds"] == "memory"
    assert model.predict(replace(H200, memory=48), 1, 4096, 4096)["binds"] != "memory"
    # A slow load binds where too little is under way.
    assert model.predict(replace(H200, latency=4790), 16, 14336, 4096)["binds"] == "latency"


def test_a_card_with_little_shared_memory_gets_three_stages():
    assert launch_of(CARDS["4090"], 128, 4096, 4096, False).ahead == 1
    assert launch_of(CARDS["4090"], 64, 4096, 4096, True).ahead == 2
    assert launch_of(H200, 128, 4096, 4096, False, "tiles128").ahead == 2


def test_a_kernel_is_forced_only_within(monkeypatch):
    monkeypatch.setenv(KERNEL_VARIABLE, "tiles32")
    with forced("tiles16"):
        assert os.environ[KERNEL_VARIABLE] == "tiles16"
    with forced(None):
        assert os.environ[KERNEL_VARIABLE] == "tiles32"
    with pytest.raises(RuntimeError), forced("few"):
        raise RuntimeError
    assert os.environ[KERNEL_VARIABLE] == "tiles32"
    monkeypatch.delenv(KERNEL_VARIABLE)
    with forced("few"):
        pass
    assert KERNEL_VARIABLE not in os.environ


# -------------------------------------------------------------------------------------------------------- the others


def test_a_large_dense_product_runs_at_the_rate_that_was_reached():
    assert model.dense_us(H200, 4096, 14336, 4096) == pytest.approx(2 * 4096 * 14336 * 4096 / 790e12 * 1e6, rel=1e-3)


def test_bitsandbytes_by_hand():
    blocks = 2**18
    # Constants to float32, their offset, weights to bf16; then cuBLAS. Three gaps.
    moved = blocks * 5 + blocks * 8 + 2**23 + blocks * 4 + 2**25
    expected = moved / 4.3e12 * 1e6 + model.dense_us(H200, 64, 4096, 4096) + 3 * terms.BETWEEN_US
    assert rivals.bitsandbytes_us(H200, 64, 4096, 4096) == pytest.approx(expected)
    # One row: no bf16 weights.
    moved = blocks * 5 + blocks * 8 + 2**23 + blocks * 4 + 2 * 8192
    assert rivals.bitsandbytes_us(H200, 1, 4096, 4096) == pytest.approx(moved / 4.3e12 * 1e6 + 2 * terms.BETWEEN_US)


def test_a_layer_of_separate_steps_by_hand():
    m, n, k, r = 512, 4096, 14336, 16
    weights = n * k * (4.126953125 / 8 + 2)
    own = 2 * (m * r + r * k)  # the smaller operands of each of six products
    reads = 2 * (m * k + 2 * m * n + 2 * m * n + 2 * m * k + m * k)
    expected = (2 * weights + reads + 6 * own) / 4.3e12 * 1e6 + 2 * model.dense_us(H200, m, n, k)
    assert rivals.separate_us(H200, m, n, k, r) == pytest.approx(expected + 8 * terms.BETWEEN_US)


def test_a_training_step_of_ours_is_more_than_its_products():
    products = sum(model.predict(H200, 2048, 4096, 4096, way)["us"] for way in (False, True))
    once, wide = (rivals.ours_us(H200, 2048, 4096, 4096, r) for r in (16, 128))
    assert products < once < wide


# ------------------------------------------------------------------------------------------------- what is printed


def test_the_aims_have_a_column_for_each_card():
    found = list(aims.found(list(CARDS.values())))
    by_name = {row["name"]: row for row in found}
    assert len(by_name) == len(found) == len(aims.AIMS)
    for row in found:
        assert list(row["predicted"]) == [card.name for card in CARDS.values()]
    head, *lines = aims.to_csv(found).splitlines()
    assert all(arch in head for arch in ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_120"))
    assert len(lines) == len(found)
    # The wide tile does not fit into 99 KiB.
    clocks = by_name["clocks of a step: 128 x 256"]["predicted"]
    assert clocks["RTX 4090"] is None
    assert clocks["H200"] > 0
    assert aims.wide_over_two(1024, 14336, 4096)(CARDS["5090"]) is None


def test_the_aims_name_the_faster_tile(rows):
    """Tiles of 128 columns would be faster from M = 1024 on if only they decoded between products."""
    for name, columns, beside in (("tiles128wide", 256, 0.0), ("tiles128", 128, 1.0)):
        row = rows[f"gemm_kernel<bf16, GemmTraits<bf16, false, 128, {columns}, 2, 4>>", "sm_90a"]
        row.update(AUDITED[name], decode_beside=beside)
    for m in (1024, 2048, 4096):
        ratio = aims.wide_over_two(m, 14336, 4096)(H200)
        assert ratio is not None
        assert ratio < 1
    wide, two = (aims.tile_clocks(H200, columns) for columns in (256, 128))
    assert wide is not None
    assert two is not None
    assert wide > two


def test_it_says_what_it_is(capsys, tmp_path):
    out = tmp_path / "p.json"
    assert predict.main(["--card", "a100", "--shape", "256", "512", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "A100 80 GB, forward, N = 256, K = 512: prediction, no card has shown this" in printed
    for term, (source, words) in terms.TERMS.items():
        assert f"  {source:9}  {term}: {words}" in printed
    assert {source for source, _ in terms.TERMS.values()} == {"counted", "published", "assumed"}
    result = json.loads(out.read_text())
    assert result["label"] == terms.LABEL == "prediction, no card has shown this"
    assert result["terms"]["fill"]["source"] == "assumed"
    assert len(result["rows"]) == len(CARDS) * 2 * len(model.ROWS)


def test_other_code_is_named(capsys):
    assert predict.main(["--card", "4090", "--shape", "256", "512"]) == 0
    assert "RTX 4090 (code of sm_80), forward" in capsys.readouterr().out


def test_columns_that_rest_on_an_assumption_are_marked():
    head = predict.table([model.predict(H200, 1, 4096, 4096)]).splitlines()[2]
    for name in ("L2", "latency", "alone", "together", "fill", "tail", "predicted us", "dense us"):
        assert f" {name}* " in head
    for name in ("memory", "tensor", "shared", "issue", "ALU", "FMA"):
        assert f" {name} " in head


def test_the_committed_files_are_of_the_committed_table():
    cards = list(CARDS.values())
    found = list(aims.found(cards))
    rows = list(model.every(cards, model.SHAPES, [False, True]))
    assert predict.OUT.read_text() == predict.to_json(rows, found), "python -m bench.compiled.predict"
    assert predict.AIMS_CSV.read_text() == aims.to_csv(found), "python -m bench.compiled.predict"
