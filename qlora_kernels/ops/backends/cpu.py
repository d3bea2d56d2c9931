"""The backend of the C++ kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...native.extension import DTYPE_CODES, native
from ..lora import LoraTerm
from ..weight import Operand
from . import kept, params
from .pointers import as_dtype, non_finite, pointer


class CPU:
    """The C++ kernels, on as many threads as torch has."""

    refuses_non_finite = True
    is_host = True

    def capturing(self, device: torch.device) -> bool:
        return False

    # ------------------------------------------------------------------------------------------------- quantization

    def quantize(self, weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
        count = weight.numel()
        packed = torch.empty((count + 1) // 2, dtype=torch.uint8)
        absmax = torch.empty((count + 63) // 64, dtype=torch.float32)
        fields = params.quantize(weight, packed, absmax)
        fields["threads"] = torch.get_num_threads()
        first_bad = native().quantize(fields)
        if first_bad >= 0:
            raise non_finite(weight, divmod(first_bad, weight.shape[1]), name)
        return packed, absmax

    def quantize_nested(self, weight: Tensor, nested_table: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        packed, absmax = self.quantize(weight, name)
        return packed, *self.quantize_absmax(absmax, nested_table)

    def quantize_absmax(self, absmax: Tensor, nested_table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count = absmax.numel()
        code = torch.empty(count, dtype=torch.uint8)
        nested_absmax = torch.empty((count + 255) // 256, dtype=torch.float32)
        offset = torch.empty(1, dtype=torch.float32)
        fields = params.quantize_absmax(absmax, nested_table, code, nested_absmax, offset)
        fields["threads"] = torch.get_num_threads()
        native().quantize_absmax(fields)
        return code, nested_absmax, offset

    def dequantize(self, weight: Operand, dtype: torch.dtype, row_begin: int, row_end: int) -> Tensor:
        out = kept.empty((row_end - row_begin, weight.k), dtype)
        self.dequantize_out(weight, row_begin, row_end, out)
        return out

    def dequantize_out(self, weight: Operand, row_begin: int, row_end: int, out: Tensor) -> None:
        if out.dtype == torch.float64:
            out.copy_(self.dequantize(weight, torch.float32, row_begin, row_end))
            return
        extension = native()
        fields = params.dequantize(weight.native(extension.Weight), row_begin, row_end, out)
        fields["threads"] = torch.get_num_threads()
        extension.dequantize(fields)

    @staticmethod
    def quantize_states(values: Tensor, is_signed: bool) -> tuple[Tensor, Tensor]:
        """An optimizer's states, float32 [count], to codes uint8 [count] and constants float32 [blocks of 256]."""
        count = values.numel()
        code = torch.empty(count, dtype=torch.uint8, device="cpu")
        absmax = torch.empty(-(-count // 256), dtype=torch.float32, device="cpu")
        native().quantize_states(values.data_ptr(), code.data_ptr(), absmax.data_ptr(), count, is_signed)
        return code, absmax

    # ------------------------------------------------------------------------------------------------- the product

    def linear_forward(
        self, x: Tensor, weight: Operand, bias: Tensor | None, lora: LoraTerm | None, keep_u: bool
    ) -> tuple[Tensor, Tensor | None]:
        n, k = weight.n, weight.k
        m, r = x.numel() // k, 0 if lora is None else lora.A.shape[0]
        y = x.new_empty(m, n) if x.dim() == 2 else x.new_empty(*x.shape[:-1], n)
        u = x.new_empty(m, r) if r else None
        if m == 0:
            return y, u
        A, B, scaling, dropout, seed = _low_rank(lora, x.dtype)
        bias = as_dtype(bias, torch.float32)
        extension = native()
        struct = weight.native(extension.Weight)
        fields = params.linear_forward(struct, x, A, B, pointer(bias), y, pointer(u), m, r, scaling, dropout)
        fields["seed"] = seed
        fields["dtype"] = DTYPE_CODES[x.dtype]
        fields["threads"] = torch.get_num_threads()
        extension.linear_forward(fields)
        return y, u

    def linear_backward(
        self,
        dy: Tensor,
        weight: Operand,
        x: Tensor | None,
        u: Tensor | None,
        lora: LoraTerm | None,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        need_dx, need_dA, need_dB = needs
        n, k = weight.n, weight.k
        m, r = dy.numel() // n, 0 if lora is None else lora.A.shape[0]
        dx = None
        if need_dx:
            dx = dy.new_empty(m, k) if dy.dim() == 2 else dy.new_empty(*dy.shape[:-1], k)
        dA = dy.new_empty(r, k, dtype=torch.float32) if need_dA else None
        dB = dy.new_empty(n, r, dtype=torch.float32) if need_dB else None
        if m > 0:
            A, B, scaling, dropout, seed = _low_rank(lora, dy.dtype)
            x, u = x if need_dA else None, u if need_dB else None
            extension = native()
            struct = weight.native(extension.Weight)
            fields = params.linear_backward(
                struct, dy, x, u, A, B, dx, pointer(dA), pointer(dB), m, r, scaling, dropout
            )
            fields["seed"] = seed
            fields["dtype"] = DTYPE_CODES[dy.dtype]
            fields["threads"] = torch.get_num_threads()
            extension.linear_backward(fields)
        else:
            for gradient in (dA, dB):
                if gradient is not None:
                    gradient.zero_()
        if lora is None:
            return dx, None, None
        return dx, None if dA is None else dA.to(lora.A.dtype), None if dB is None else dB.to(lora.B.dtype)

    def linear_grouped_forward(
        self,
        x: Tensor,
        weight: Operand,
        offsets: Tensor,
        bias: Tensor | None,
        A: Tensor | None,
        B: Tensor | None,
        scaling: float,
    ) -> tuple[Tensor, Tensor | None]:
        m, r = x.shape[0], 0 if A is None else A.shape[1]
        y = x.new_empty(m, weight.n)
        u = x.new_empty(m, r) if r else None
        if m == 0:
            return y, u
        # Named, so that copies live until the kernels have run.
        narrow_A, narrow_B, wide_bias = as_dtype(A, x.dtype), as_dtype(B, x.dtype), as_dtype(bias, torch.float32)
        extension = native()
        struct = weight.native(extension.Weight)
        fields = params.linear_forward(
            struct, x, narrow_A, narrow_B, pointer(wide_bias), y, pointer(u), m, r, scaling, 0.0
        )
        _finish_grouped(fields, x, offsets)
        extension.linear_grouped_forward(fields)
        return y, u

    def linear_grouped_backward(
        self,
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
        need_dx, need_dA, need_dB = needs
        m, r = dy.shape[0], 0 if A is None else A.shape[1]
        dx = dy.new_empty(m, weight.k) if need_dx else None
        dA = None if A is None or not need_dA else torch.empty_like(A, dtype=torch.float32).contiguous()
        dB = None if B is None or not need_dB else torch.empty_like(B, dtype=torch.float32).contiguous()
        narrow_A, narrow_B = as_dtype(A, dy.dtype), as_dtype(B, dy.dtype)
        x, u = x if need_dA else None, u if need_dB else None
        extension = native()
        struct = weight.native(extension.Weight)
        fields = params.linear_backward(
            struct, dy, x, u, narrow_A, narrow_B, dx, pointer(dA), pointer(dB), m, r, scaling, 0.0
        )
        _finish_grouped(fields, dy, offsets)
        extension.linear_grouped_backward(fields)
        dA = None if dA is None or A is None else dA.to(A.dtype)
        return dx, dA, None if dB is None or B is None else dB.to(B.dtype)


def _finish_grouped(fields: dict[str, Any], x: Tensor, offsets: Tensor) -> None:
    """Appends the CPU's own fields, and the stack's."""
    fields["seed"] = 0
    fields["dtype"] = DTYPE_CODES[x.dtype]
    fields["threads"] = torch.get_num_threads()
    fields["offsets"] = offsets.data_ptr()
    fields["experts"] = offsets.shape[0] - 1


def _low_rank(lora: LoraTerm | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None, float, float, int]:
    """A and B in the dtype of the product, scaling, dropout, and the seed as a number."""
    if lora is None:
        return None, None, 1.0, 0.0, 0
    A, B, scaling, dropout, seed = lora
    key = 0 if seed is None or dropout == 0.0 else int(seed.item())
    return as_dtype(A, dtype), as_dtype(B, dtype), scaling, dropout, key
