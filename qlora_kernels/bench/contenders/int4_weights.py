"""torch's own 4-bit products on a CPU: level * scale + zero for each 64 weights of a row, both in bf16."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 64


@dataclass(frozen=True)
class Int4Weight:
    """A weight as ``_weight_int4pack_mm_for_cpu`` takes it.

    Attributes:
        packed: in an order that torch chooses by the processor.
        scales_and_zeros: [k / 64, n, 2], bf16; a level q stands for (q - 8) * scale + zero.
    """

    packed: Tensor
    scales_and_zeros: Tensor

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scales_and_zeros.nbytes

    def clone(self) -> Int4Weight:
        return Int4Weight(self.packed.clone(), self.scales_and_zeros.clone())

    def product(self, x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed, GROUP, self.scales_and_zeros)


def quantized(weight: Tensor) -> tuple[Int4Weight, Tensor]:
    """A weight [n, k], and what it stands for in float64; each group's levels reach from its least to its greatest.

    Raises:
        NotImplementedError: where torch has no such product.
        ValueError: where k is no multiple of 64.
    """
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        raise NotImplementedError(f"torch {torch.__version__} has no _weight_int4pack_mm_for_cpu")
    n, k = weight.shape
    if k % GROUP:
        raise ValueError(f"groups have {GROUP} weights, and k is {k}")
    groups = weight.float().view(n, k // GROUP, GROUP)
    least, greatest = groups.aminmax(dim=-1)
    # Rounded to bf16 first, so that the levels are chosen for what is stored.
    scales = ((greatest - least) / 15).clamp_min(1e-8).bfloat16()
    zeros = (least + 8 * scales.float()).bfloat16()
    levels = ((groups - zeros.float()[..., None]) / scales.float()[..., None]).round_().add_(8).clamp_(0, 15)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels.to(torch.int32).view(n, k), 1)
    decoded = (levels.double() - 8) * scales.double()[..., None] + zeros.double()[..., None]
    pairs = torch.stack([scales, zeros], -1).transpose(0, 1).contiguous()
    return Int4Weight(packed, pairs), decoded.view(n, k)
