"""Tiles whose depth several thread blocks share (csrc/cuda/common/splits.cuh): by a cluster's shared memory from sm_90
on, by scratch and tickets before, or where tiles are cut anywhere."""

from __future__ import annotations

import pytest
import torch
from contract import assert_within_contract, make_weight, relative_error
from emulated import ROOT, counted, counters, emulated, module
from engines import ORDERS

from qlora_kernels import ops
from qlora_kernels.native import extension

FORCED = "QLORA_KERNELS_CUDA_KERNEL"
#: M, N, K, multiprocessors, how many blocks share a tile, some with a step more than others, and the kernel. All
#: kernels and tiles that share; where the outputs cannot be dealt out evenly; the most blocks that a cluster has.
SHARED = (
    (20, 136, 832, 8, 2, "middle32"),
    (64, 128, 1344, 6, 3, "middle32"),
    (100, 136, 1600, 6, 3, "tiles128"),
    (5, 20, 4096, 8, 8, "middle8"),
    (12, 130, 2560, 12, 5, "middle16"),
    (12, 130, 2560, 12, 5, "warpgroup16"),
    (20, 136, 4096, 8, 4, "warpgroup32"),
    (64, 128, 1344, 3, 3, "warpgroup64"),
    (100, 136, 1600, 6, 3, "warpgroup128"),
)
#: The same for dx, whose depth is N.
SHARED_BACKWARD = ((10, 1344, 128, 3, 2), (30, 1344, 64, 4, 2), (60, 1600, 136 // 64 * 64, 3, 3), (70, 1100, 128, 2, 2))


def dispatch(m, n, k, backward, architecture, multiprocessors):
    return extension.native().dispatch(m, n, k, 1, backward, architecture, multiprocessors, 227 * 1024)


@pytest.mark.share(2)
@pytest.mark.parametrize("case", SHARED)
def test_blocks_that_share_a_tile_add_up_in_one_order(case, monkeypatch):
    m, n, k, multiprocessors, blocks, kernel = case
    monkeypatch.setenv(FORCED, kernel)
    weight = make_weight(n, k)
    dense, unrounded = weight.dequantize(torch.bfloat16), weight.dequantize(torch.float32).double()
    x, A, B = torch.randn(m, k).bfloat16(), torch.randn(8, k).bfloat16(), torch.randn(n, 8).bfloat16()
    bias, results = torch.randn(n), []
    for architecture in (90,) if kernel.startswith("warpgroup") else (80, 90):
        plan = dispatch(m, n, k, False, architecture, multiprocessors)
        assert (plan["splits"], plan["cluster"], plan["scratch"] == 0) == (blocks, *[architecture == 90] * 2)
        for order, landing, resident in zip(ORDERS, ("latest", "random", "earliest"), (1, 5, 2)):
            options = {"architecture": architecture, "multiprocessors": multiprocessors, "resident_blocks": resident}
            with emulated(order, landing, seed=11, **options):
                module().reset_counters()
                y, _ = ops.linear_forward(x, *weight.pieces, n, None, None, None, 1.0, 0.0, None)
                used = counters()["instructions"]
                assert ("barrier.cluster" in used) == (architecture == 90)
                if not kernel.startswith("warpgroup"):  # whose mbarriers have fences, too
                    assert (used.get("fence", 0) > 0) == (architecture == 80)
                results.append((y, *ops.linear_forward(x, *weight.pieces, n, bias, A, B, 1.0, 0.0, None)))
    y, with_low_rank, u = results[0]
    exact = x.double() @ unrounded.T
    assert_within_contract(y, x @ dense.T, exact, f"{case}")
    assert relative_error(with_low_rank, exact + bias.double() + u.double() @ B.double().T) < 4e-3
    # Whoever adds the sums, the order is the same.
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.share(2)
@pytest.mark.parametrize("case", SHARED_BACKWARD)
def test_blocks_that_share_a_tile_of_dx(case):
    m, n, k, multiprocessors, blocks = case
    weight = make_weight(n, k)
    dense, dy = weight.dequantize(torch.bfloat16), torch.randn(m, n).bfloat16()
    x, u = torch.randn(m, k).bfloat16(), torch.randn(m, 8).bfloat16()
    A, B, seed = torch.randn(8, k).bfloat16(), torch.randn(n, 8).bfloat16(), torch.tensor([5])
    results = []
    for architecture, order in ((80, "random"), (90, "forward"), (90, "reverse"), (90, "random")):
        plan = dispatch(m, n, k, True, architecture, multiprocessors)
        assert (plan["splits"], plan["cluster"]) == (blocks, architecture == 90)
        with emulated(order, seed=2, architecture=architecture, multiprocessors=multiprocessors, resident_blocks=5):
            dx, _, _ = ops.linear_backward(
                dy, *weight.pieces, k, None, None, None, None, 1.0, 0.0, None, True, False, False
            )
            both = ops.linear_backward(dy, *weight.pieces, k, x, u, A, B, 1.0, 0.5, seed, True, False, False)
        results.append((dx, both[0]))
    assert_within_contract(results[0][0], dy @ dense, dy.double() @ dense.double(), f"{case}")
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("kernel", "n"), [("tiles128", 136), ("tiles128wide", 264), ("warpgroup128", 136)])
def test_a_tile_that_follows_whole_ones_is_shared_by_tickets(kernel, n, monkeypatch):
    monkeypatch.setenv(FORCED, kernel)
    m, k, multiprocessors = 130, 1088, 3  # four tiles; blocks that have one alone are in no cluster
    plan = dispatch(m, n, k, False, 90, multiprocessors)
    assert (plan["splits"], plan["cluster"], plan["whole_tiles"]) == (2, False, 3)
    weight, x = make_weight(n, k), torch.randn(m, k).bfloat16()
    dense, results = weight.dequantize(torch.bfloat16), []
    for order, resident in zip(ORDERS, (1, 5, 2)):
        with emulated(order, seed=11, multiprocessors=multiprocessors, resident_blocks=resident):
            results.append(ops.linear_forward(x, *weight.pieces, n, None, None, None, 1.0, 0.0, None)[0])
    exact = x.double() @ weight.dequantize(torch.float32).double().T
    assert_within_contract(results[0], x @ dense.T, exact, "whole tiles first")
    assert all(torch.equal(results[0], other) for other in results[1:])


#: M, N, K, multiprocessors, architecture, and where the steps of all tiles are cut. Up to 64 rows: at 10, 20 and 30 of
#: 5 times 8; at 15 of 3 times 10, so that a block has a tile and a half; at 10 and 21 of 2 times 16; at 12, 25, 38 and
#: 51 of 2 times 32, up to three blocks to a tile.
CUT_ANYWHERE = (
    (16, 520, 2048, 4, 90, "middle16"),
    (32, 260, 2560, 2, 90, "middle32"),
    (31, 136, 4096, 3, 80, "middle32"),
    (5, 136, 8192, 5, 80, "middle8"),
    (16, 520, 4096, 4, 90, "warpgroup16"),
    (32, 260, 5120, 2, 90, "warpgroup32"),
    (64, 260, 5120, 2, 90, "warpgroup64"),
)


#: The same with tiles of 128 rows, cut at 24 and 48 of 2 times 36 steps; before the second case's, three whole tiles.
CUT_TILES = (
    (100, 136, 2304, 3, 80, "tiles128"),
    pytest.param((600, 40, 2304, 3, 90, "tiles128"), marks=pytest.mark.slow),
    pytest.param((600, 40, 6144, 3, 90, "warpgroup128"), marks=pytest.mark.slow),
)


@pytest.mark.share(2)
@pytest.mark.parametrize("case", [*CUT_ANYWHERE, *CUT_TILES])
def test_tiles_that_are_cut_anywhere(case, monkeypatch):
    m, n, k, multiprocessors, architecture, kernel = case
    monkeypatch.setenv(FORCED, kernel)
    plan = dispatch(m, n, k, False, architecture, multiprocessors)
    assert (plan["splits"], plan["cluster"]) == (multiprocessors, False)
    assert (plan["shared_tiles"], plan["whole_tiles"]) == ((2, 3) if m == 600 else (-(-n // 128), 0))
    weight = make_weight(n, k)
    dense, unrounded = weight.dequantize(torch.bfloat16), weight.dequantize(torch.float32).double()
    x, A, B = torch.randn(m, k).bfloat16(), torch.randn(8, k).bfloat16(), torch.randn(n, 8).bfloat16()
    bias, results = torch.randn(n), []
    for order, landing, resident in zip(ORDERS, ("latest", "random", "earliest"), (1, 5, 2)):
        options = {"architecture": architecture, "multiprocessors": multiprocessors, "resident_blocks": resident}
        with emulated(order, landing, seed=5, **options):
            module().reset_counters()
            y, _ = ops.linear_forward(x, *weight.pieces, n, None, None, None, 1.0, 0.0, None)
            assert counters()["instructions"]["fence"] > 0
            results.append((y, *ops.linear_forward(x, *weight.pieces, n, bias, A, B, 1.0, 0.0, None)))
    y, with_low_rank, u = results[0]
    exact = x.double() @ unrounded.T
    assert_within_contract(y, x @ dense.T, exact, f"{case}")
    assert relative_error(with_low_rank, exact + bias.double() + u.double() @ B.double().T) < 4e-3
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_tiles_of_dx_that_are_cut_anywhere():
    m, n, k, multiprocessors = 100, 2304, 192, 3
    plan = dispatch(m, n, k, True, 80, multiprocessors)
    assert (plan["splits"], plan["shared_tiles"], plan["whole_tiles"]) == (3, 2, 0)
    weight, dy, seed = make_weight(n, k), torch.randn(m, n).bfloat16(), torch.tensor([5])
    x, u, A, B = (torch.randn(*s).bfloat16() for s in ((m, k), (m, 8), (8, k), (n, 8)))
    results = []
    for order in ("forward", "random"):
        with emulated(order, seed=2, architecture=80, multiprocessors=multiprocessors, resident_blocks=3):
            dx, _, _ = ops.linear_backward(
                dy, *weight.pieces, k, None, None, None, None, 1.0, 0.0, None, True, False, False
            )
            both = ops.linear_backward(dy, *weight.pieces, k, x, u, A, B, 1.0, 0.5, seed, True, False, False)
        results.append((dx, both[0]))
    dense = weight.dequantize(torch.bfloat16)
    assert_within_contract(results[0][0], dy @ dense, dy.double() @ dense.double(), "dx")
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("m", "n", "k", "multiprocessors", "kernel"),
    [
        (32, 128, 1344, 2, "middle32"),
        (128, 128, 1344, 2, "tiles128"),
        (16, 128, 2048, 2, "warpgroup16"),
        (64, 128, 1344, 2, "warpgroup64"),
        (128, 128, 1344, 2, "warpgroup128"),
    ],
)
def test_a_clusters_sums_have_no_bank_conflicts_and_leave_in_whole_sectors(
    m, n, k, multiprocessors, kernel, monkeypatch
):
    monkeypatch.setenv(FORCED, kernel)
    assert dispatch(m, n, k, False, 90, multiprocessors)["cluster"]
    weight, x = make_weight(n, k), torch.randn(m, k).bfloat16()
    counts = counted(
        lambda: ops.linear_forward(x, *weight.pieces, n, None, None, None, 1.0, 0.0, None),
        multiprocessors=multiprocessors,
    )
    places = {
        place: t
        for place, t in counts["shared"].items()
        if place.startswith(("splits", "tiles", "rows64", "warpgroups"))
    }
    assert any(place.startswith("splits") for place in places)
    sources = {path.name: path.read_text().splitlines() for path in (ROOT / "csrc" / "cuda").rglob("*.cuh")}
    for place, t in places.items():
        file, line = place.split()[0].split(":")
        if "constants + " in sources[file][int(line) - 1] or "nested_table + " in sources[file][int(line) - 1]:
            continue  # with random codes, lanes meet in the table of constants
        assert t["actual"] == t["minimum"], f"bank conflicts: {place} {t}"
    # Each sum is read once, by one block, and each result written once.
    assert sum(t["bytes"] for place, t in places.items() if place.startswith("splits")) == m * n * 4 * multiprocessors
    stores = [t for place, t in counts["global"].items() if place.endswith("store")]
    assert sum(t["bytes"] for t in stores) == m * n * 2
    assert all(t["actual"] == t["minimum"] for t in stores)
