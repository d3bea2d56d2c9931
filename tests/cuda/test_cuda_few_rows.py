"""The products of up to 8 and up to 64 rows (csrc/cuda/linear/mma/rows8.cuh, rows64.cuh): results, blocks that share
a tile, memory traffic."""

from __future__ import annotations

import pytest
import torch
from contract import assert_within_contract, make_weight, references, relative_error
from emulated import counted, emulated, lines
from engines import ORDERS

from qlora_kernels import ops, quantize

FORCED = "QLORA_KERNELS_CUDA_KERNEL"


def middle_for(m: int) -> str:
    """The kernel for so many rows where there is no wgmma."""
    return f"middle{next(rows for rows in (8, 16, 32) if m <= rows or rows == 32)}"


@pytest.mark.share(2)
@pytest.mark.parametrize(
    ("n", "dtype", "double_quant"),
    [
        (8, torch.bfloat16, True),
        (8, torch.float16, False),
        (77, torch.bfloat16, False),
        (77, torch.float16, True),
        (256, torch.bfloat16, True),
    ],
)
def test_few_rows(cuda_engine, monkeypatch, n, dtype, double_quant):
    monkeypatch.setenv(FORCED, "few")  # more rows than the table would give it
    # Groups of 4, 2 and 1 tiles of 8 rows of W; chunks of which a warp has none, one and several; x that lies on no 16
    # bytes; a rank that is no multiple of 4.
    for k, m, r, shift in (
        (64, 1, 0, 0),
        (192, 3, 16, 1),
        (640, 8, 6, 0),
        (2368, 2, 0, 3),
        (4224, 5, 20, 0),
        (320, 7, 5, 1),
    ):
        assert_layers(n, k, m, r, shift, dtype, double_quant)


def assert_layers(n: int, k: int, m: int, r: int, shift: int, dtype: torch.dtype, double_quant: bool) -> None:
    """The forward product is within the contract. shift: elements by which x lies off 16 bytes."""
    results = []
    # Of a few dozen outputs the errors are a matter of luck, so several of such products are compared together.
    for _ in range(1 if m * n > 128 else 4):
        weight = make_weight(n, k, dtype=dtype, double_quant=double_quant)
        x = torch.randn(m * k + shift).to(dtype)[shift:].view(m, k)
        A, B = (torch.randn(r, k).to(dtype), torch.randn(n, r).to(dtype)) if r else (None, None)
        bias = torch.randn(n)
        y, u = ops.linear_forward(x, *weight.pieces, n, bias, A, B, 0.5 if r else 1.0, 0.0, None)
        dense, exact = references(weight, x, dtype)
        exact += bias.double()
        if r:
            assert relative_error(y, exact + u.double() @ B.double().T) < (4e-3 if dtype == torch.bfloat16 else 5e-4)
        results.append((y, (x.float() @ dense.float().T + bias).to(dtype), exact))
    if not r:
        assert_within_contract(*map(torch.cat, zip(*results)), f"N={n} K={k} M={m} {dtype}")


#: N, K, M, rank, and elements by which x lies off 16 bytes. Columns: less than a tile, odd, several tiles. Of K, four
#: warps take 64 each: some have none, or none in the last step. Rows: one tile of 8, 16, 32, 64, all of it and less.
MIDDLE = (
    (8, 64, 9, 0, 0),
    (40, 576, 5, 0, 0),
    (136, 320, 8, 9, 0),
    (77, 192, 16, 17, 0),
    (130, 320, 17, 8, 3),
    (128, 512, 32, 0, 0),
    (72, 832, 33, 70, 0),
    (201, 576, 64, 5, 0),
    (264, 256, 40, 16, 1),
)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("case", MIDDLE)
def test_middle_rows(cuda_engine, monkeypatch, case, double_quant):
    n, k, m, r, shift = case
    if not shift:  # otherwise no such kernel takes it
        monkeypatch.setenv(FORCED, middle_for(m))
    for dtype in (torch.bfloat16, torch.float16):
        assert_layers(n, k, m, r, shift, dtype, double_quant)


@pytest.mark.parametrize("kernel", ["middle8", "middle16", "middle32"])
def test_middle_rows_in_several_tiles(cuda_engine, monkeypatch, kernel):
    # More rows than the table would give it; two tiles across, of which the second has one column.
    monkeypatch.setenv(FORCED, kernel)
    n, k, m = 129, 448, 70
    weight = make_weight(n, k)
    x = torch.randn(m, k).bfloat16()
    dense, exact = references(weight, x, torch.bfloat16)
    y, _ = ops.linear_forward(x, *weight.pieces, n, None, None, None, 1.0, 0.0, None)
    assert_within_contract(y, x @ dense.T, exact, kernel)


def test_middle_rows_whenever_copies_land(monkeypatch):
    n, k = 136, 1088
    weight = make_weight(n, k)
    exact = weight.dequantize(torch.bfloat16).double()
    for m in (7, 12, 30, 64):
        x, results = torch.randn(m, k).bfloat16(), []
        monkeypatch.setenv(FORCED, middle_for(m))
        for order, landing in zip(ORDERS, ("earliest", "latest", "random")):
            with emulated(order, landing, seed=3, multiprocessors=4):
                results.append(ops.linear_forward(x, *weight.pieces, n, None, None, None, 1.0, 0.0, None)[0])
        assert relative_error(results[0], x.double() @ exact.T) < 4e-3
        assert all(torch.equal(results[0], y) for y in results[1:])


@pytest.mark.parametrize("m", [8, 16, 32, 64])
def test_middle_rows_read_the_weight_once_in_whole_sectors(m, monkeypatch):
    monkeypatch.setenv(FORCED, middle_for(m))
    n, k = 256, 1024
    weight = make_weight(n, k)
    x = torch.randn(m, k).bfloat16()
    counts = counted(
        lambda: ops.linear_forward(x, *weight.pieces, n, None, None, None, 1.0, 0.0, None), multiprocessors=2
    )
    assert counts["launches"] == 1
    assert counts["instructions"]["mma"] == m * n * k // (16 * 8 * 16) * 32
    weights = n * k * (2 if m > 32 else 1)  # 64 rows are two tiles, and each decodes all of W
    memory = {place: t for place, t in counts["global"].items() if place.startswith("rows64")}
    loads = lines(counts["global"], "rows64.cuh", "load").values()
    assert sum(t["bytes"] for t in loads if t["bytes"] == 256 * t["requests"]) == weights // 2, "codes, once"
    # 32 bytes from each of eight rows; x, 512 bytes of a row; 16 steps' constants of 32 rows, which here lie together;
    # results, 256 bytes of a row.
    for t in memory.values():
        if t["bytes"] >= 256 * t["requests"]:
            assert t["actual"] == t["minimum"], "sectors"
    # A float32 for each warp and row; for each block the constants' table and their mean.
    rest = sum(t["bytes"] for t in memory.values() if t["bytes"] < 256 * t["requests"])
    assert rest == weights // k // 128 * 8 * 64 * 4 + counts["blocks"] * (256 * 4 + 4)
    pairs = sum(t["requests"] for t in lines(counts["shared"], "pairs.cuh", "load").values())
    assert pairs == weights // 2 // 32
    shared = {p: t for p, t in counts["shared"].items() if p.startswith(("rows64", "pairs.cuh"))}
    conflicts = {place: t for place, t in shared.items() if t["actual"] != t["minimum"]}
    # With random codes: where lanes look up constants in their table.
    (constants,) = conflicts.values()
    assert constants["requests"] == weights // 64 // 32


def test_few_rows_read_the_weight_once_in_whole_sectors(monkeypatch):
    monkeypatch.setenv(FORCED, "few")
    n, k, m = 256, 2048, 8
    weight = make_weight(n, k)
    x = torch.randn(m, k).bfloat16()
    counts = counted(lambda: ops.linear_forward(x, *weight.pieces, n, None, None, None, 1.0, 0.0, None))
    assert counts["launches"] == 1
    loads = lines(counts["global"], "rows8.cuh", "load").values()
    codes = [t for t in loads if t["bytes"] == 256 * t["requests"]]
    assert sum(t["bytes"] for t in codes) == n * k // 2, "codes, once"
    (x_load,) = [t for t in loads if t["bytes"] == 512 * t["requests"]]
    assert all(t["actual"] == t["minimum"] for t in (*codes, x_load)), "sectors"
    pairs = sum(t["requests"] for t in lines(counts["shared"], "pairs.cuh", "load").values())
    assert pairs == n * k // 2 // 32
    shared = {p: t for p, t in counts["shared"].items() if p.startswith(("rows8.cuh", "pairs.cuh"))}
    # With random codes: 16 of the 256 entries for each request, where lanes look up constants in their table.
    (constants,) = [t for t in shared.values() if t["actual"] != t["minimum"]]
    assert constants["requests"] == n * k // 64 // 32
    assert constants["actual"] < 1.5 * constants["minimum"]


@pytest.mark.parametrize("kernel", ["few", "middle8", "middle16", "middle32"])
def test_infinities_and_nans_go_where_a_dense_product_has_them(monkeypatch, kernel):
    """And blocks of zeros, whose constants may be anything, give exact zeros."""
    monkeypatch.setenv("QLORA_KERNELS_CUDA_KERNEL", kernel)
    weight = torch.randn(40, 320)
    weight[:, :64] = 0
    weight[3] = 0
    for dtype, double_quant in ((torch.bfloat16, True), (torch.float16, False)):
        quantized, x = quantize(weight, double_quant), torch.randn(5, 320).to(dtype)
        x[1, 70], x[2, 3], x[4, 200] = float("inf"), float("nan"), -float("inf")
        with emulated():
            y, _ = ops.linear_forward(x, *quantized.pieces, 40, None, None, None, 1.0, 0.0, None)
        dense = x.float() @ quantized.dequantize(dtype).float().T
        assert torch.equal(y.isnan(), dense.isnan())
        for infinity in (float("inf"), -float("inf")):
            assert torch.equal(y == infinity, dense == infinity)
        assert (y[0, 3], y[3, 3]) == (0, 0)
