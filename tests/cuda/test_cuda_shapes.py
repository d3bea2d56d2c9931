"""The layer on the emulator at shapes that break things, all of them in each dtype: rows around each kernel's tile, an
odd number of columns, the least depth, one that no step divides, one of 65 blocks, which every split cuts unevenly."""

from __future__ import annotations

import pytest
import torch
from contract import assert_within_contract, make_weight
from emulated import emulated
from engines import ORDERS
from torch.nn import functional as F

from qlora_kernels import ops

ROWS = (1, 7, 16, 17, 63, 64, 65, 129)
RANKS = {1: 1, 7: 8, 16: 16, 17: 17, 63: 64, 64: 16, 65: 1, 129: 17}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.share(8)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize(("n", "k"), [(33, 64), (77, 192), (19, 4160)])
def test_every_shape(n, k, m, dtype):
    """Compares each result with float64 on the same operands, with u and v as the kernels rounded them."""
    r = RANKS[m]
    order = ORDERS[(m + k // 64) % 3]
    weight = make_weight(n, k)
    dense, unrounded = weight.dequantize(dtype), weight.dequantize(torch.float32).double()
    x, dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
    A, B, bias = (torch.randn(r, k) / k**0.5).to(dtype), torch.randn(n, r).to(dtype), torch.randn(n).to(dtype)
    with emulated(order, seed=m):
        y, u = ops.linear_forward(x, *weight.pieces, n, bias, A, B, 0.5, 0.0, None)
        dx, dA, dB = ops.linear_backward(dy, *weight.pieces, k, x, u, A, B, 0.5, 0.0, None, True, True, True)
    case = f"M = {m}, N = {n}, K = {k}, r = {r}, {dtype}, {order}"
    assert_within_contract(u, 0.5 * F.linear(x, A), 0.5 * (x.double() @ A.double().T), case + ": u")
    left, right = torch.cat([x, u], 1), torch.cat([dense, B], 1)
    exact = left.double() @ torch.cat([unrounded, B.double()], 1).T + bias.double()
    assert_within_contract(y, F.linear(left, right, bias), exact, case + ": y")
    v = (0.5 * (dy.double() @ B.double())).to(dtype)
    left, right = torch.cat([dy, v], 1), torch.cat([dense, A], 0)
    exact = left.double() @ torch.cat([unrounded, A.double()], 0)
    assert_within_contract(dx, left @ right, exact, case + ": dx")
    # Sums over the rows, in float32, rounded once; v may have been rounded to the other side.
    eps = torch.finfo(dtype).eps
    for name, gradient, wanted in (
        ("dA", dA, v.double().T @ x.double()),
        ("dB", dB, dy.double().T @ u.double()),
    ):
        error = ((gradient.double() - wanted).norm() / wanted.norm()).item()
        assert error < eps + 1e-6, f"{case}: {name} {error:.1e}"
