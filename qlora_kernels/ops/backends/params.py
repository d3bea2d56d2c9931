"""The first fields of each params struct, which are the same on every device, in the order of csrc/kernels.h.

A backend appends its own: threads on the CPU; scratch, the device's ordinal and a stream on a CUDA device. The
extension reads the fields in this order.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...native.extension import DTYPE_CODES


def quantize(weight: Tensor, packed: Tensor, absmax: Tensor) -> dict[str, Any]:
    return {
        "weight": weight.data_ptr(),
        "packed": packed.data_ptr(),
        "absmax": absmax.data_ptr(),
        "count": weight.numel(),
        "dtype": DTYPE_CODES[weight.dtype],
    }


def quantize_absmax(
    absmax: Tensor, nested_table: Tensor, code: Tensor, nested_absmax: Tensor, offset: Tensor
) -> dict[str, Any]:
    return {
        "absmax": absmax.data_ptr(),
        "table": nested_table.data_ptr(),
        "code": code.data_ptr(),
        "nested_absmax": nested_absmax.data_ptr(),
        "offset": offset.data_ptr(),
        "count": absmax.numel(),
    }


def dequantize(weight: Any, row_begin: int, row_end: int, out: Tensor) -> dict[str, Any]:
    """``weight`` comes from :meth:`Operand.native`, in the functions below too."""
    return {
        "weight": weight,
        "out": out.data_ptr(),
        "row_begin": row_begin,
        "row_end": row_end,
        "dtype": DTYPE_CODES[out.dtype],
    }


# No calls of pointer() below: five or six of them would show in the host's time for a product.


def linear_forward(
    weight: Any,
    x: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    bias: int,
    y: Tensor,
    u: int,
    m: int,
    r: int,
    scaling: float,
    dropout: float,
) -> dict[str, Any]:
    """``bias`` and ``u`` are addresses, 0 for none."""
    return {
        "weight": weight,
        "x": x.data_ptr(),
        "lora_a": 0 if A is None else A.data_ptr(),
        "lora_b": 0 if B is None else B.data_ptr(),
        "bias": bias,
        "y": y.data_ptr(),
        "u": u,
        "m": m,
        "r": r,
        "scaling": scaling,
        "dropout": dropout,
    }


def linear_backward(
    weight: Any,
    dy: Tensor,
    x: Tensor | None,
    u: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    dx: Tensor | None,
    dA: int,
    dB: int,
    m: int,
    r: int,
    scaling: float,
    dropout: float,
) -> dict[str, Any]:
    """``x`` and ``u`` are None where the gradient that needs them is not wanted; ``dA`` and ``dB`` are addresses."""
    return {
        "weight": weight,
        "dy": dy.data_ptr(),
        "x": 0 if x is None else x.data_ptr(),
        "u": 0 if u is None else u.data_ptr(),
        "lora_a": 0 if A is None else A.data_ptr(),
        "lora_b": 0 if B is None else B.data_ptr(),
        "dx": 0 if dx is None else dx.data_ptr(),
        "da": dA,
        "db": dB,
        "m": m,
        "r": r,
        "scaling": scaling,
        "dropout": dropout,
    }
