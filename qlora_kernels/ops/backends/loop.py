"""A mixture's products as a loop over its experts, by the products of single weights. The host reads the offsets."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from ..lora import LoraTerm
from ..weight import Operand, expert_pieces


def _experts(weight: Operand, offsets: Tensor) -> Iterator[tuple[int, slice, Operand]]:
    """Each expert with rows: its number, its rows, its weight."""
    ends = cast(list[int], offsets.tolist())  # pyright: ignore[reportUnknownMemberType]
    for e, (begin, end) in enumerate(itertools.pairwise(ends)):
        if end > begin:
            yield e, slice(begin, end), Operand(expert_pieces(weight.pieces, weight.experts, e), weight.n, weight.k)


def forward(
    linear_forward: Any,
    x: Tensor,
    weight: Operand,
    offsets: Tensor,
    bias: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor | None]:
    y = x.new_zeros(x.shape[0], weight.n)
    u = None if A is None else x.new_zeros(x.shape[0], A.shape[1])
    for e, rows, one in _experts(weight, offsets):
        lora = None if A is None or B is None else LoraTerm(A[e], B[e], scaling)
        y[rows], part = linear_forward(x[rows], one, None if bias is None else bias[e], lora, True)
        if u is not None and part is not None:
            u[rows] = part
    return y, u


def backward(
    linear_backward: Any,
    dy: Tensor,
    weight: Operand,
    offsets: Tensor,
    x: Tensor | None,
    u: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    scaling: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dx = dy.new_zeros(dy.shape[0], weight.k) if needs[0] else None
    dA = torch.zeros_like(A) if needs[1] and A is not None else None
    dB = torch.zeros_like(B) if needs[2] and B is not None else None
    for e, rows, one in _experts(weight, offsets):
        lora = None if A is None or B is None else LoraTerm(A[e], B[e], scaling)
        saved = (None if x is None else x[rows], None if u is None else u[rows])
        for all_of_them, part in zip((dx, dA, dB), linear_backward(dy[rows], one, *saved, lora, needs), strict=True):
            if all_of_them is not None and part is not None:
                all_of_them[rows if all_of_them is dx else e] = part
    return dx, dA, dB
