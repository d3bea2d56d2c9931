"""The adapter's part of the layer's products on tensor cores: on the emulator, kernel by kernel."""

from __future__ import annotations

import pytest
import torch
from contract import assert_within_contract, make_weight
from emulated import counters, emulated, instances, module
from engines import ORDERS, on_the_cpu
from torch.nn import functional as F

from qlora_kernels import ops, quantize

FORCED = "QLORA_KERNELS_CUDA_KERNEL"
#: Kernels of y with rows of x that each takes, and of dx.
FORWARD = {"few": 3, "middle8": 7, "middle16": 16, "middle32": 20}
TILES = {"tiles16": 13, "tiles32": 30, "tiles64": 60, "tiles128": 129, "tiles128x3": 70, "tiles128wide": 129}
DTYPES = (torch.bfloat16, torch.float16)
#: Ranks: copied 16 bytes at a time, with and without a part of 16; odd; more than one step of 64; the largest.
RANKS = (8, 16, 17, 72, 256)


def layer(m, n, k, r, dtype, dropout=0.0):
    """Operands whose adapter's part is as large as the rest."""
    x, dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
    A, B = (torch.randn(r, k) / k**0.5).to(dtype), (torch.randn(n, r) / r**0.5).to(dtype)
    return x, dy, A, B, torch.tensor([11])


def forward(x, weight, n, bias, A, B, dropout=0.0, seed=None):
    return ops.linear_forward(x, *weight.pieces, n, bias, A, B, 0.5, dropout, seed)


def backward(dy, weight, k, x, u, A, B, dropout=0.0, seed=None):
    return ops.linear_backward(dy, *weight.pieces, k, x, u, A, B, 0.5, dropout, seed, True, True, True)


@pytest.mark.share(5)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("kernel", [*FORWARD, *TILES])
def test_y_with_an_adapter_has_the_error_of_one_dense_product(monkeypatch, kernel, r, dtype):
    """That of [x, u] by [W, B], which rounds once."""
    m, n, k = (FORWARD | TILES)[kernel], 72, 192
    weight = make_weight(n, k)
    x, _, A, B, _ = layer(m, n, k, r, dtype)
    monkeypatch.setenv(FORCED, kernel)
    with emulated(ORDERS[r % 3], seed=r):
        y, u = forward(x, weight, n, None, A, B)
    both = torch.cat([x, u], 1), torch.cat([weight.dequantize(dtype), B], 1)
    exact = both[0].double() @ torch.cat([weight.dequantize(torch.float32), B.float()], 1).double().T
    assert_within_contract(y, F.linear(*both), exact, f"{kernel}, r = {r}, {dtype}")


@pytest.mark.share(5)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("kernel", TILES)
def test_dx_with_an_adapter_has_the_error_of_one_dense_product(monkeypatch, kernel, r, dtype):
    m, n, k = TILES[kernel], 77, 192
    weight = make_weight(n, k)
    x, dy, A, B, _ = layer(m, n, k, r, dtype)
    monkeypatch.setenv(FORCED, kernel)
    with emulated(ORDERS[r % 3], seed=r):
        dx = backward(dy, weight, k, x, torch.zeros(m, r, dtype=dtype), A, B)[0]
    v = (0.5 * (dy.double() @ B.double())).to(dtype)  # as the kernel rounds it, up to a few last bits
    both = torch.cat([dy, v], 1), torch.cat([weight.dequantize(dtype), A], 0)
    exact = both[0].double() @ both[1].double()
    assert_within_contract(dx, both[0] @ both[1], exact, f"{kernel}, r = {r}, {dtype}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", TILES)
def test_the_mask_of_dx_is_that_of_the_cpu(monkeypatch, kernel, dtype):
    """Checks every element: with a weight of zeros, dx is zero exactly where the adapter's part is dropped."""
    m, n, k, r = TILES[kernel], 24, 320, 72
    weight = quantize(torch.zeros(n, k))
    x, dy, A, B, seed = layer(m, n, k, r, dtype)
    u = torch.zeros(m, r, dtype=dtype)
    monkeypatch.setenv(FORCED, kernel)
    with emulated("random", seed=3):
        dx = backward(dy, weight, k, x, u, A, B, 0.4, seed)[0]
        with on_the_cpu():
            expected = backward(dy, weight, k, x, u, A, B, 0.4, seed)[0]
    assert torch.equal(dx == 0, expected == 0)
    assert 0.35 < (dx == 0).float().mean() < 0.45


@pytest.mark.parametrize("kernel", [*FORWARD, *TILES])
def test_an_adapter_not_aligned_to_16_bytes_gives_the_same_bits(monkeypatch, kernel):
    m, n, k, r = (FORWARD | TILES)[kernel], 72, 192, 24
    weight = make_weight(n, k)
    x, dy, A, B, _ = layer(m, n, k, r, torch.bfloat16)

    def shifted(t):
        return torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape)

    monkeypatch.setenv(FORCED, kernel)
    with emulated():
        for one in (A, B):
            assert one.data_ptr() % 16 == 0
            assert shifted(one).data_ptr() % 16 != 0
        y = forward(x, weight, n, None, A, B)[0]
        assert torch.equal(y, forward(x, weight, n, None, A, shifted(B))[0])
        if kernel in TILES:
            u = torch.zeros(m, r, dtype=x.dtype)
            dx = backward(dy, weight, k, x, u, A, B)[0]
            assert torch.equal(dx, backward(dy, weight, k, x, u, shifted(A), B)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kernel", "k"), [*((name, 192) for name in (*FORWARD, *TILES)), ("floats", 100)])
def test_a_16_bit_bias_gives_the_bits_of_its_float32_copy(monkeypatch, kernel, k, dtype):
    m, n = (FORWARD | TILES | {"floats": 9})[kernel], 72
    weight, x = make_weight(n, k), torch.randn(m, k).to(dtype)
    bias = torch.randn(n).to(dtype)
    monkeypatch.setenv(FORCED, kernel)
    with emulated():
        y, without_bias = (forward(x, weight, n, b, None, None)[0] for b in (bias, None))
        assert torch.equal(y, forward(x, weight, n, bias.float(), None, None)[0])
    assert not torch.equal(y, without_bias)


@pytest.mark.parametrize("kernel", ["tiles32", "tiles128", "tiles128wide"])
def test_operands_of_the_adapter_move_whole_sectors_without_bank_conflicts(monkeypatch, kernel):
    m, n, k, r = 128, 256, 256, 16
    weight = make_weight(n, k)
    x, dy, A, B, _ = layer(m, n, k, r, torch.bfloat16)
    monkeypatch.setenv(FORCED, kernel)

    def traffic(call):
        module().reset_counters()
        with emulated():
            call()
        counts = counters()
        return [{p: t for p, t in counts[s].items() if p.startswith("tiles")} for s in ("shared", "global")]

    def calls(A, B):
        u = torch.zeros(m, r, dtype=x.dtype)
        return (
            lambda: forward(x, weight, n, None, A, B),
            lambda: ops.linear_backward(*(dy, *weight.pieces, k, None, u, A, B, 0.5, 0.0, None), True, False, False),
        )

    for with_adapter, without in zip(calls(A, B), calls(None, None), strict=True):
        shared, memory = traffic(with_adapter)
        for place, t in shared.items():
            assert t["actual"] == t["minimum"], f"bank conflicts: {place} {t}"
        wide = {place: t for place, t in memory.items() if t["bytes"] > 8 * t["requests"] * 32}
        assert all(t["actual"] == t["minimum"] for t in wide.values()), wide
        # Each block reads the rows of both that its tile has.
        rows, columns = min(int(kernel[5:].removesuffix("wide")), 128), 256 if kernel.endswith("wide") else 128
        tiles = (m // rows) * (256 // columns)
        before = sum(t["bytes"] for t in traffic(without)[1].values())
        assert sum(t["bytes"] for t in memory.values()) - before == tiles * (rows + columns) * r * 2


# ------------------------------------------------------------------------------------------------------ early launches


@pytest.mark.share(2)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("m", "k", "product"),
    [
        (1, 192, "few_kernel"),
        (20, 192, "warpgroup_kernel"),
        (50, 1088, "warpgroup_kernel"),
        (129, 192, "warpgroup_kernel"),
        (70, 192, "gemm_kernel"),
    ],
)
def test_the_product_begins_before_what_makes_u_or_v_has_ended(m, k, product, order, monkeypatch):
    if product == "gemm_kernel":
        monkeypatch.setenv("QLORA_KERNELS_CUDA_KERNEL", "tiles128")
    n, r = 72, 16
    weight = make_weight(n, k)
    x, dy, A, B, seed = layer(m, n, k, r, torch.bfloat16)

    def results(**options):
        module().reset_counters()
        with emulated(order, seed=4, **options):
            y, u = forward(x, weight, n, None, A, B, 0.3, seed)
            outputs = [y, u, *backward(dy, weight, k, x, u, A, B, 0.3, seed)]
            carveouts = {(instances()[at][0], percent) for at, percent in module().carveouts().items()}
        return outputs, counters()["early"], carveouts

    in_order, count, carveouts = results(early_launches=False)
    assert count == 0
    assert not carveouts
    early, count, carveouts = results()
    assert count == 2
    # What makes u, the sum that makes v, and both products: a multiprocessor is divided in the same way for all.
    overlapping = {"adapter_down_kernel", "adapter_sum_kernel", product, "gemm_kernel"}
    assert carveouts == {(name, 100) for name in overlapping}
    assert all(torch.equal(a, b) for a, b in zip(early, in_order, strict=True))
    monkeypatch.setenv("QLORA_KERNELS_CUDA_EARLY", "0")
    forbidden, count, carveouts = results()
    assert not carveouts
    assert count == 0
    assert all(torch.equal(a, b) for a, b in zip(forbidden, in_order, strict=True))


@pytest.mark.parametrize(
    ("dtype", "architecture", "k", "r"),
    [
        (torch.bfloat16, 89, 192, 16),  # whose kernels cannot wait
        (torch.float32, 90, 192, 16),  # on the float32 units
        (torch.bfloat16, 90, 100, 16),  # the product, too
        (torch.bfloat16, 90, 192, 0),  # nothing to wait for
    ],
)
def test_nothing_else_begins_early(dtype, architecture, k, r):
    weight = make_weight(72, k)
    x, dy, A, B, _ = layer(20, 72, k, max(r, 1), dtype)
    A, B = (A, B) if r else (None, None)
    module().reset_counters()
    with emulated(architecture=architecture):
        y, u = forward(x, weight, 72, None, A, B)
        backward_of = ops.linear_backward
        backward_of(dy, *weight.pieces, k, x if r else None, u if r else None, A, B, 0.5, 0.0, None, True, r > 0, r > 0)
    assert torch.isfinite(y).all()
    assert counters()["launches"] >= 2
    assert counters()["early"] == 0


@pytest.mark.parametrize("wanted", [(True, False, False), (True, True, False), (True, False, True)])
def test_dx_with_some_of_the_other_gradients(wanted):
    """The launch before it differs, and whether that computes v."""
    m, n, k, r = 60, 72, 192, 16
    weight = make_weight(n, k)
    x, dy, A, B, _ = layer(m, n, k, r, torch.bfloat16)
    u = torch.randn(m, r).bfloat16()

    def dx(*which):
        return ops.linear_backward(dy, *weight.pieces, k, x, u, A, B, 0.5, 0.0, None, *which)[0]

    for order in ORDERS:
        with emulated(order, seed=2):
            assert torch.equal(dx(*wanted), dx(True, True, True))
