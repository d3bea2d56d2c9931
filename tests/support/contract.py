"""The numerics contract, and weights to test it with."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch.nn import functional as F

from qlora_kernels import NF4Weight, quantize
from qlora_kernels.native import extension


def make_weight(n: int, k: int, double_quant: bool = True, dtype: torch.dtype = torch.float32):
    """A quantized weight [n, k] whose rows differ in scale."""
    weight = torch.randn(n, k) * torch.logspace(-2, 1, n).unsqueeze(1)
    return quantize(weight.to(dtype), double_quant)


def with_levels(weight: NF4Weight, levels: torch.Tensor) -> NF4Weight:
    """The same codes and constants, but codes that stand for other levels, float32 [16]."""
    levels = levels.to(weight.device)
    table = levels.clone() if weight.nested_table is None else torch.cat([weight.nested_table, levels])
    return replace(weight, nested_table=table)


def references(weight, x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight rounded to a type, and in float64 the product with the weight that is not rounded."""
    return weight.dequantize(dtype), x.double() @ weight.dequantize(torch.float32).double().T


def with_rounded_levels(weight, dtype: torch.dtype) -> torch.Tensor:
    """The weight as kernels multiply it that leave levels and constants apart (csrc/cuda/common/pairs.cuh): scaled
    levels rounded to `dtype`, constants not rounded. float64 [n, k]."""
    levels = torch.tensor(extension.native().nf4_levels(), dtype=torch.float64)
    scale = {torch.bfloat16: 1.43670654, torch.float16: 1.36619186}[dtype]
    codes = torch.stack([weight.pieces[0] >> 4, weight.pieces[0] & 15], -1).view(-1)[: weight.numel()]
    ratio = torch.where(levels == 0, 0.0, (levels * scale).float().to(dtype).double() / (levels * scale))
    return weight.dequantize(torch.float32).double() * ratio[codes.int()].view(weight.shape)


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative Frobenius error; NaN when anything is NaN."""
    return ((actual.double() - exact).norm() / exact.norm()).item()


def worst_tile_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error of any 64 x 64 tile, relative to the root mean square of the whole."""
    error = (actual.double() - exact).square()
    rows, columns = exact.shape
    padded = F.pad(error, (0, -columns % 64, 0, -rows % 64))
    sums = padded.view(padded.shape[0] // 64, 64, padded.shape[1] // 64, 64).sum((1, 3))

    def sizes(count: int) -> torch.Tensor:
        """The sizes of the tiles along one side: the last may be cut."""
        return error.new_tensor([min(64, count - begin) for begin in range(0, count, 64)])

    worst = (sums / torch.outer(sizes(rows), sizes(columns))).max()
    return worst.sqrt().item() / exact.square().mean().sqrt().item()


def assert_within_contract(actual: torch.Tensor, dense: torch.Tensor, exact: torch.Tensor, case: str) -> None:
    """At most 1.10 times the error of torch's dense layer, over all and in the worst tile (docs/design/numerics.md)."""
    assert actual.shape == exact.shape, case
    for metric in (relative_error, worst_tile_error):
        ours, theirs = metric(actual, exact), metric(dense, exact)
        # An ulp or two of float32 are always allowed, because torch may happen to round nothing; more for a handful of
        # outputs (all of them, or the smallest tile's), whose errors depend on the order of summation.
        few = math.prod(n if metric is relative_error else (n - 1) % 64 + 1 for n in exact.shape)
        slack = 1.5e-7 if few >= 64 else 1e-6
        # So is how much dense's weights happen to gain or lose by their rounding.
        most = 1.10 if few >= 64 else 2.0
        assert ours <= most * theirs + slack, f"{case}: {metric.__name__} {ours:.3e}, dense {theirs:.3e}"
