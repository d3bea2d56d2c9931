"""Dequantization: schema, checks and fake implementation together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends, dispatcher
from .library import LINEAR_DTYPES, WEIGHT, define, fake
from .weight import Operand, check_weight


def _check_dequantize(weight: Operand, dtype: torch.dtype, row_begin: int, row_end: int) -> None:
    """Checks everything but the weight."""
    if dtype not in LINEAR_DTYPES:
        raise TypeError(f"a weight dequantizes to float32, bfloat16, float16 or float64, not to {dtype}")
    if not 0 <= row_begin <= row_end <= weight.n:
        raise ValueError(f"rows [{row_begin}, {row_end}) are not within a weight of {weight.n} rows")


def _dequantize(*arguments: Any) -> Tensor:
    *pieces, n, k, dtype, row_begin, row_end = arguments
    weight = Operand(tuple(pieces), n, k)
    weight.check()
    _check_dequantize(weight, dtype, row_begin, row_end)
    return backends.backend_for(pieces[0]).dequantize(weight, dtype, row_begin, row_end)


dequantize = define(
    f"dequantize({WEIGHT}, SymInt n, SymInt k, ScalarType dtype, SymInt row_begin, SymInt row_end) -> Tensor",
    _dequantize,
)


@fake("dequantize")
def _dequantize_fake(*arguments: Any) -> Tensor:
    *pieces, n, k, dtype, row_begin, row_end = arguments
    weight = Operand(tuple(pieces), n, k)
    check_weight(*weight.pieces, n, k)
    _check_dequantize(weight, dtype, row_begin, row_end)
    return pieces[0].new_empty((row_end - row_begin, k), dtype=dtype)


def _check_dequantize_out(weight: Operand, row_begin: int, row_end: int, out: Tensor) -> None:
    """Checks everything but the weight."""
    _check_dequantize(weight, out.dtype, row_begin, row_end)
    shape = (row_end - row_begin, weight.k)
    if out.shape != shape:
        raise ValueError(f"out should be {list(shape)}, found {list(out.shape)}")
    if out.device != weight.device:
        raise ValueError(f"out is on {out.device}, but the weight on {weight.device}")
    if not out.is_contiguous():
        raise ValueError("out should be contiguous")
    if out.requires_grad:
        raise RuntimeError(
            "out asks for a gradient, which a dequantized weight does not have; pass out.detach() instead"
        )


def _address_range(tensor: Tensor) -> tuple[int, int]:
    """First address, and one past the last, of a contiguous tensor."""
    begin = tensor.data_ptr()
    return begin, begin + tensor.numel() * tensor.element_size()


def _dequantize_out(*arguments: Any) -> None:
    *pieces, n, k, row_begin, row_end, out = arguments
    weight = Operand(tuple(pieces), n, k)
    weight.check()
    _check_dequantize_out(weight, row_begin, row_end, out)
    dispatcher.require_memory("out", out)
    begin, end = _address_range(out)
    for piece in pieces:
        if piece is not None:
            first, last = _address_range(piece)
            if first < end and begin < last:
                raise ValueError("out shares memory with the weight that it is to hold")
    backends.backend_for(pieces[0]).dequantize_out(weight, row_begin, row_end, out)
    # What torch's own operations do: backward then refuses a tensor that it saved and that has changed since.
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)


dequantize_out = define(
    f"dequantize_out({WEIGHT}, SymInt n, SymInt k, SymInt row_begin, SymInt row_end, Tensor(a!) out) -> ()",
    _dequantize_out,
)


@fake("dequantize_out")
def _dequantize_out_fake(*arguments: Any) -> None:
    *pieces, n, k, row_begin, row_end, out = arguments
    weight = Operand(tuple(pieces), n, k)
    check_weight(*weight.pieces, n, k)
    _check_dequantize_out(weight, row_begin, row_end, out)
