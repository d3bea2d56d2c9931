"""Dequantization: schema, checks and fake implementation together."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import require
from . import backends, dispatcher
from .library import LINEAR_DTYPES, WEIGHT, define, fake
from .weight import Operand, check_weight


def _check_dequantize(weight: Operand, dtype: torch.dtype, row_begin: int, row_end: int) -> None:
    """Checks everything but the weight."""
    require(
        dtype in LINEAR_DTYPES,
        TypeError,
        f"a weight dequantizes to float32, bfloat16, float16 or float64, not to {dtype}",
    )
    require(
        0 <= row_begin <= row_end <= weight.n,
        ValueError,
        f"rows [{row_begin}, {row_end}) are not within a weight of {weight.n} rows",
    )


def _dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    nested_table: Tensor | None,
    n: int,
    k: int,
    dtype: torch.dtype,
    row_begin: int,
    row_end: int,
) -> Tensor:
    weight = Operand((packed, absmax, nested_absmax, nested_offset, nested_table), n, k)
    weight.check()
    _check_dequantize(weight, dtype, row_begin, row_end)
    return backends.backend_for(packed).dequantize(weight, dtype, row_begin, row_end)


dequantize = define(
    f"dequantize({WEIGHT}, SymInt n, SymInt k, ScalarType dtype, SymInt row_begin, SymInt row_end) -> Tensor",
    _dequantize,
)


@fake("dequantize")
def _dequantize_fake(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    nested_table: Tensor | None,
    n: int,
    k: int,
    dtype: torch.dtype,
    row_begin: int,
    row_end: int,
) -> Tensor:
    weight = Operand((packed, absmax, nested_absmax, nested_offset, nested_table), n, k)
    check_weight(*weight.pieces, n, k)
    _check_dequantize(weight, dtype, row_begin, row_end)
    return packed.new_empty((row_end - row_begin, k), dtype=dtype)


def _check_dequantize_out(weight: Operand, row_begin: int, row_end: int, out: Tensor) -> None:
    """Checks everything but the weight."""
    _check_dequantize(weight, out.dtype, row_begin, row_end)
    shape = [row_end - row_begin, weight.k]
    require(list(out.shape) == shape, ValueError, f"out should be {shape}, found {list(out.shape)}")
    require(out.device == weight.device, ValueError, f"out is on {out.device}, but the weight on {weight.device}")
    require(out.is_contiguous(), ValueError, "out should be contiguous")
    require(
        not out.requires_grad,
        RuntimeError,
        "out asks for a gradient, which a dequantized weight does not have; give out.detach()",
    )


def _address_range(tensor: Tensor) -> tuple[int, int]:
    """First address, and one past the last, of a contiguous tensor."""
    begin = tensor.data_ptr()
    return begin, begin + tensor.numel() * tensor.element_size()


def _dequantize_out(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    nested_table: Tensor | None,
    n: int,
    k: int,
    row_begin: int,
    row_end: int,
    out: Tensor,
) -> None:
    weight = Operand((packed, absmax, nested_absmax, nested_offset, nested_table), n, k)
    weight.check()
    _check_dequantize_out(weight, row_begin, row_end, out)
    dispatcher.require_memory("out", out)
    begin, end = _address_range(out)
    for piece in weight.pieces:
        if piece is not None:
            first, last = _address_range(piece)
            require(end <= first or last <= begin, ValueError, "out shares memory with the weight that it is to hold")
    backends.backend_for(packed).dequantize_out(weight, row_begin, row_end, out)
    # What torch's own operations do: backward then refuses a tensor that it saved and that has changed since.
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)


dequantize_out = define(
    f"dequantize_out({WEIGHT}, SymInt n, SymInt k, SymInt row_begin, SymInt row_end, Tensor(a!) out) -> ()",
    _dequantize_out,
)


@fake("dequantize_out")
def _dequantize_out_fake(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    nested_table: Tensor | None,
    n: int,
    k: int,
    row_begin: int,
    row_end: int,
    out: Tensor,
) -> None:
    weight = Operand((packed, absmax, nested_absmax, nested_offset, nested_table), n, k)
    check_weight(*weight.pieces, n, k)
    _check_dequantize_out(weight, row_begin, row_end, out)
