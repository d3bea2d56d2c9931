"""The factor of the table of level pairs (csrc/nf4.h), and what docs/design/notes-cuda.md says of
it."""

from __future__ import annotations

import re

import pytest
import torch
from contract import relative_error
from emulated import ROOT

from qlora_kernels import quantize
from qlora_kernels.ops.backends import reference


def factors() -> dict[torch.dtype, float]:
    source = (ROOT / "csrc/nf4.h").read_text()
    found = re.search(r"kBf16LevelScale = ([\d.]+)f, kFp16LevelScale = ([\d.]+)f;", source)
    assert found is not None
    return dict(zip((torch.bfloat16, torch.float16), map(float, found.groups())))


def rounded(levels: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The table's levels, divided by the factor again."""
    return (levels * factor).float().to(dtype).double() / factor


@pytest.mark.parametrize(
    ("dtype", "of_random", "of_weights", "of_product"),
    [(torch.bfloat16, 0.47, 0.48, 0.79), (torch.float16, 0.39, 0.39, 0.76)],
)
def test_levels_times_the_factor_round_well(dtype, of_random, of_weights, of_product):
    weight = quantize(torch.randn(512, 2048), double_quant=False)
    codes = torch.stack([weight.packed >> 4, weight.packed & 15], -1).view(512, 32, 64).long()
    levels, factor = reference.levels().double(), torch.tensor(factors()[dtype], dtype=torch.float64)
    share = torch.bincount(codes.flatten(), minlength=16).double() / codes.numel()

    def error(factor: torch.Tensor) -> torch.Tensor:
        """The mean square error of a level, for each factor."""
        return ((rounded(levels, factor.unsqueeze(-1), dtype) - levels).square() * share).sum(-1)

    all_factors = torch.linspace(1, 2, 20001, dtype=torch.float64)
    assert (error(factor) / error(all_factors).mean()).sqrt() == pytest.approx(of_random, abs=0.015)
    assert error(factor) <= 1.05 * error(all_factors).min()
    exact, dense = weight.dequantize(torch.float32).double(), weight.dequantize(dtype).double()
    ours = (rounded(levels, factor, dtype)[codes] * weight.absmax.double().view(512, 32, 1)).view(512, 2048)
    assert (ours - exact).norm() / (dense - exact).norm() == pytest.approx(of_weights, abs=0.03)
    x = torch.randn(32, 2048).to(dtype).double()
    of_ours, of_dense = (relative_error((x @ w.T).to(dtype), x @ exact.T) for w in (ours, dense))
    assert of_ours / of_dense == pytest.approx(of_product, abs=0.04)
