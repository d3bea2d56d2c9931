"""The backend of the C++ kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ...native.extension import DTYPE_CODES, native
from .pointers import as_dtype, non_finite, pointer, view_of, zero_gradient


def _seed(seed: Tensor | None, dropout: float) -> int:
    # Without adapters there is nothing to drop, and need be no seed.
    return seed.item() & 0xFFFFFFFFFFFFFFFF if dropout > 0.0 and seed is not None else 0


class CPU:
    """The C++ kernels."""

    #: Whether quantize() itself refuses weights that are not finite.
    refuses_non_finite = True

    @staticmethod
    def quantize(weight: Tensor, name: str):
        count = weight.numel()
        packed = torch.empty((count + 1) // 2, dtype=torch.uint8)
        absmax = torch.empty((count + 63) // 64, dtype=torch.float32)
        bad = native().quantize(
            weight.data_ptr(),
            packed.data_ptr(),
            absmax.data_ptr(),
            count,
            DTYPE_CODES[weight.dtype],
            torch.get_num_threads(),
        )
        if bad >= 0:
            raise non_finite(weight, divmod(bad, weight.shape[1]), name)
        return packed, absmax

    @staticmethod
    def quantize_nested(weight: Tensor, nested_table: Tensor, name: str):
        packed, absmax = CPU.quantize(weight, name)
        return packed, *CPU.quantize_absmax(absmax, nested_table)

    @staticmethod
    def quantize_absmax(absmax: Tensor, nested_table: Tensor):
        count = absmax.numel()
        code = torch.empty(count, dtype=torch.uint8)
        nested_absmax = torch.empty((count + 255) // 256, dtype=torch.float32)
        offset = torch.empty(1, dtype=torch.float32)
        native().quantize_absmax(
            absmax.data_ptr(),
            nested_table.data_ptr(),
            code.data_ptr(),
            nested_absmax.data_ptr(),
            offset.data_ptr(),
            count,
            torch.get_num_threads(),
        )
        return code, nested_absmax, offset

    @staticmethod
    def dequantize(pieces, n: int, k: int, dtype: torch.dtype, row_begin: int, row_end: int) -> Tensor:
        out = torch.empty((row_end - row_begin, k), dtype=dtype)
        CPU.dequantize_out(pieces, n, k, row_begin, row_end, out)
        return out

    @staticmethod
    def dequantize_out(pieces, n: int, k: int, row_begin: int, row_end: int, out: Tensor) -> None:
        if out.dtype == torch.float64:
            out.copy_(CPU.dequantize(pieces, n, k, torch.float32, row_begin, row_end))
            return
        native().dequantize(
            view_of(pieces, n, k), out.data_ptr(), row_begin, row_end, DTYPE_CODES[out.dtype], torch.get_num_threads()
        )

    @staticmethod
    def quantize_states(values: Tensor, is_signed: bool) -> tuple[Tensor, Tensor]:
        """An optimizer's states, float32 [count], to codes uint8 [count] and constants float32 [blocks of 256]."""
        count = values.numel()
        code = torch.empty(count, dtype=torch.uint8, device="cpu")
        absmax = torch.empty(-(-count // 256), dtype=torch.float32, device="cpu")
        native().quantize_states(values.data_ptr(), code.data_ptr(), absmax.data_ptr(), count, is_signed)
        return code, absmax

    # x [..., K] and dy [..., N] are contiguous; r is the adapters' rank, 0 without.

    @staticmethod
    def linear_forward(x, view, r, bias, lora_A, lora_B, scaling, dropout, seed, keep_u):
        n, k = view[6:]
        m = x.numel() // k
        y = x.new_empty(*x.shape[:-1], n)
        u = x.new_empty(m, r) if r else None
        if m == 0:
            return y, u
        lora_A, lora_B, bias = as_dtype(lora_A, x.dtype), as_dtype(lora_B, x.dtype), as_dtype(bias, torch.float32)
        native().linear_forward(
            view,
            x.data_ptr(),
            pointer(lora_A),
            pointer(lora_B),
            pointer(bias),
            y.data_ptr(),
            pointer(u),
            m,
            r,
            scaling,
            dropout,
            _seed(seed, dropout),
            DTYPE_CODES[x.dtype],
            torch.get_num_threads(),
        )
        return y, u

    @staticmethod
    def linear_backward(dy, view, r, x, u, lora_A, lora_B, scaling, dropout, seed, need_dx, need_dA, need_dB):
        n, k = view[6:]
        m = dy.numel() // n
        dx = dy.new_empty(*dy.shape[:-1], k) if need_dx else None
        dA = dy.new_empty(r, k, dtype=torch.float32) if need_dA else None
        dB = dy.new_empty(n, r, dtype=torch.float32) if need_dB else None
        if m == 0:
            return dx, zero_gradient(dA, lora_A), zero_gradient(dB, lora_B)
        A, B = as_dtype(lora_A, dy.dtype), as_dtype(lora_B, dy.dtype)
        native().linear_backward(
            view,
            dy.data_ptr(),
            x.data_ptr() if need_dA else 0,
            u.data_ptr() if need_dB else 0,
            pointer(A),
            pointer(B),
            pointer(dx),
            pointer(dA),
            pointer(dB),
            m,
            r,
            scaling,
            dropout,
            _seed(seed, dropout),
            DTYPE_CODES[dy.dtype],
            torch.get_num_threads(),
        )
        return dx, dA.to(lora_A.dtype) if need_dA else None, dB.to(lora_B.dtype) if need_dB else None
