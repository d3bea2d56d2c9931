"""The products of sm_90a (csrc/cuda/linear/wgmma/warpgroups.cuh): results, blocks that share tiles, memory traffic."""

from __future__ import annotations

import pytest
import torch
from contract import assert_within_contract, make_weight, with_rounded_levels
from emulated import counters, emulated, module
from engines import ORDERS

from qlora_kernels import ops, quantize

FORCED = "QLORA_KERNELS_CUDA_KERNEL"

#: N, K, M, rank. Columns: less than a tile, odd, several tiles. Blocks of 64 along K: one, and ends of every kind in
#: the steps of eight or four. Rows: one tile of 16, 32, 64, 128, all of it and less, and two of them.
CASES = (
    (8, 64, 9, 0),
    (77, 576, 5, 9),
    (136, 320, 16, 0),
    (130, 192, 17, 8),
    (128, 512, 32, 0),
    (72, 832, 33, 70),
    (201, 1088, 64, 5),
    (264, 256, 65, 16),
    (129, 704, 128, 3),
    (140, 640, 150, 16),
)


@pytest.mark.share(2)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("order", "landing"), [*zip(ORDERS, ("earliest", "latest", "random"))])
def test_warpgroups(case, double_quant, order, landing):
    n, k, m, r = case
    for dtype in (torch.bfloat16, torch.float16):
        weight = make_weight(n, k, dtype=dtype, double_quant=double_quant)
        x, bias = torch.randn(m, k).to(dtype), torch.randn(n)
        A, B = (torch.randn(r, k).to(dtype), torch.randn(n, r).to(dtype)) if r else (None, None)
        with emulated(order, landing, seed=3, multiprocessors=2):
            module().reset_counters()
            y, u = ops.linear_forward(x, *weight.pieces, n, bias, A, B, 0.5 if r else 1.0, 0.0, None)
            assert counters()["instructions"]["wgmma"] > 0
        exact = x.double() @ with_rounded_levels(weight, dtype).T + bias.double()
        if r:
            exact += u.double() @ B.double().T
        assert_within_contract(y, exact.float().to(dtype), exact, f"{case} {dtype}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [8, 24, 64, 128])
def test_the_contract(m, dtype):
    """Against unrounded weights: levels rounded once to the type of x are closer than weights rounded to it."""
    n, k = 256, 1024
    weight = quantize(torch.randn(n, k))
    x = torch.randn(m, k).to(dtype)
    with emulated(multiprocessors=2):
        y, _ = ops.linear_forward(x, *weight.pieces, n, None, None, None, 1.0, 0.0, None)
    dense = x @ weight.dequantize(dtype).T
    assert_within_contract(y, dense, x.double() @ weight.dequantize(torch.float32).double().T, f"M = {m}")
