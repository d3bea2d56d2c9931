"""The backend of the CUDA kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...native.extension import DTYPE_CODES
from .. import dispatcher
from ..lora import NO_LORA, LoraTerm
from ..weight import Operand
from . import loop, params
from .pointers import pointer


class _Exposed:
    """Device memory as torch.as_tensor takes it (__cuda_array_interface__, version 3)."""

    def __init__(self, owner: object, address: int, count: int, dtype: torch.dtype):
        kind = {torch.float32: "<f4", torch.uint8: "|u1", torch.int64: "<i8"}[dtype]
        self._owner = owner
        self.__cuda_array_interface__ = {"shape": (count,), "typestr": kind, "data": (address, False), "version": 3}


class CUDA:
    """The CUDA kernels, on the tensors' device and the caller's current stream there. Nothing waits for the device.

    Attributes:
        kernels: the module of the operations that take device pointers.
    """

    # The host would have to wait to learn of a bad weight. Instead, the constants of its bad blocks become NaN.
    refuses_non_finite = False
    is_host = False

    def __init__(self, kernels: Any):
        self.kernels = kernels

    def capturing(self, device: torch.device) -> bool:
        with torch.cuda.device(device):
            return torch.cuda.is_current_stream_capturing()

    @staticmethod
    def queue(device: torch.device) -> tuple[int, int]:
        """The device's ordinal and the address of the caller's stream there."""
        # What torch.cuda.current_stream() wraps in an object, which takes longer than a launch.
        if dispatcher.raw_stream_of is None:
            return device.index, torch.cuda.current_stream(device).cuda_stream
        return device.index, dispatcher.raw_stream_of(device.index)

    # ------------------------------------------------------------------------------------- for a paged optimizer

    def pin(self, table: Tensor) -> Tensor:
        """A copy in pinned memory."""
        return table.pin_memory()

    def send(self, pinned: Tensor, device: torch.device) -> Tensor:
        """A copy on the device, without waiting for it."""
        return pinned.to(device, non_blocking=True)

    def wait(self, device: torch.device) -> None:
        """Waits until the device has finished all queued work."""
        torch.cuda.synchronize(device)

    def expose(self, owner: object, address: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Device memory as a tensor that keeps its owner alive."""
        return torch.as_tensor(_Exposed(owner, address, count, dtype), device=device)

    # ------------------------------------------------------------------------------------- new tensors

    @staticmethod
    def _empty(shape: int | Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    #: Where the layer's tensors come from: (a tensor of the same type and device, the sizes).
    _like: Callable[..., Tensor] = staticmethod(Tensor.new_empty)

    def _scratch(self, x: Tensor, size: int) -> Tensor | None:
        """Uninitialized scratch memory of this many bytes for a layer's kernels."""
        return self._like(x, -(-size // x.element_size())) if size else None

    def _sums(self, blocks: int, device: torch.device) -> Tensor:
        """Scratch for the sum of each 256 constants."""
        return self._empty((blocks + 255) // 256, torch.float64, device)

    # ------------------------------------------------------------------------------------- quantization

    def _quantize(self, weight: Tensor, sums: Tensor | None) -> tuple[Tensor, Tensor]:
        count, device = weight.numel(), weight.device
        packed = self._empty((count + 1) // 2, torch.uint8, device)
        absmax = self._empty((count + 63) // 64, torch.float32, device)
        ordinal, stream = self.queue(device)
        self.kernels.quantize(
            {
                **params.quantize(weight, packed, absmax),
                "sums": pointer(sums),
                "device": ordinal,
                "stream": stream,
            }
        )
        return packed, absmax

    def _quantize_absmax(
        self, absmax: Tensor, nested_table: Tensor, sums: Tensor, summed: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        count, device = absmax.numel(), absmax.device
        code = self._empty(count, torch.uint8, device)
        nested_absmax = self._empty((count + 255) // 256, torch.float32, device)
        offset = self._empty(1, torch.float32, device)
        if count == 0:
            return code, nested_absmax, offset.zero_()
        ordinal, stream = self.queue(device)
        self.kernels.quantize_absmax(
            {
                **params.quantize_absmax(absmax, nested_table, code, nested_absmax, offset),
                "sums": sums.data_ptr(),
                "summed": summed,
                "device": ordinal,
                "stream": stream,
            }
        )
        return code, nested_absmax, offset

    def quantize(self, weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
        return self._quantize(weight, None)

    def quantize_absmax(self, absmax: Tensor, nested_table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._quantize_absmax(absmax, nested_table, self._sums(absmax.numel(), absmax.device), False)

    def quantize_nested(self, weight: Tensor, nested_table: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # Two launches: the first leaves the sums that the second needs.
        sums = self._sums((weight.numel() + 63) // 64, weight.device)
        packed, absmax = self._quantize(weight, sums)
        return packed, *self._quantize_absmax(absmax, nested_table, sums, True)

    def dequantize(self, weight: Operand, dtype: torch.dtype, row_begin: int, row_end: int) -> Tensor:
        out = self._empty((row_end - row_begin, weight.k), dtype, weight.device)
        self.dequantize_out(weight, row_begin, row_end, out)
        return out

    def dequantize_out(self, weight: Operand, row_begin: int, row_end: int, out: Tensor) -> None:
        if out.dtype == torch.float64:
            out.copy_(self.dequantize(weight, torch.float32, row_begin, row_end))
            return
        ordinal, stream = self.queue(out.device)
        self.kernels.dequantize(
            {
                **params.dequantize(weight.native(self.kernels.Weight), row_begin, row_end, out),
                "device": ordinal,
                "stream": stream,
            }
        )

    # ------------------------------------------------------------------------------------- the product

    def linear_forward(
        self, x: Tensor, weight: Operand, bias: Tensor | None, lora: LoraTerm | None, keep_u: bool
    ) -> tuple[Tensor, Tensor | None]:
        n, k = weight.n, weight.k
        m = x.numel() // k
        y = self._like(x, m, n) if x.dim() == 2 else self._like(x, *x.shape[:-1], n)
        code = DTYPE_CODES[x.dtype]
        # Not a function of its own: packing and unpacking its results would cost as much as the rest of it.
        lora_A, lora_B, scaling, dropout, seed = NO_LORA if lora is None else lora
        if lora_A is None or lora_B is None:
            r, wide_a, wide_b = 0, code == 0, code == 0
        else:
            r, lora_A, lora_B = lora_A.shape[0], lora_A.contiguous(), lora_B.contiguous()
            wide_a, wide_b = lora_A.dtype is torch.float32, lora_B.dtype is torch.float32
        if seed is not None:
            seed = seed.to(x.device, non_blocking=True) if r and dropout > 0.0 else None
        u = self._like(x, m, r) if r and (keep_u or m == 0) else None
        if m == 0:
            return y, u
        ordinal, stream = self.queue(x.device)
        size = self.kernels.linear_scratch(m, n, k, r, code, wide_a, wide_b, False, ordinal)
        # A u that nothing keeps lies behind the scratch, which saves an allocation.
        u_behind = r > 0 and u is None
        behind = (size + 15) // 16 * 16 if u_behind else 0
        scratch = self._scratch(x, behind + m * r * x.element_size() if u_behind else size)
        base = pointer(scratch)
        # The kernels read a bias in either type, float32 or x's.
        bias = bias if bias is None or bias.is_contiguous() else bias.contiguous()
        narrow = bias is not None and bias.dtype != torch.float32
        bias_address, u_address = pointer(bias), base + behind if u_behind else pointer(u)
        struct, wide_bias = weight.native(self.kernels.Weight), 0 if narrow else bias_address
        fields = params.linear_forward(struct, x, lora_A, lora_B, wide_bias, y, u_address, m, r, scaling, dropout)
        fields["dtype"] = code
        fields["narrow_bias"] = bias_address if narrow else 0
        fields["wide_a"] = wide_a
        fields["wide_b"] = wide_b
        fields["seed"] = pointer(seed)
        fields["scratch"] = base
        fields["device"] = ordinal
        fields["stream"] = stream
        self.kernels.linear_forward(fields)
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
        m = dy.numel() // n
        dx = None
        if need_dx:
            dx = self._like(dy, m, k) if dy.dim() == 2 else self._like(dy, *dy.shape[:-1], k)
        code = DTYPE_CODES[dy.dtype]
        # Not a function of its own: packing and unpacking its results would cost as much as the rest of it.
        lora_A, lora_B, scaling, dropout, seed = NO_LORA if lora is None else lora
        if lora_A is None or lora_B is None:
            r, wide_a, wide_b = 0, code == 0, code == 0
        else:
            r, lora_A, lora_B = lora_A.shape[0], lora_A.contiguous(), lora_B.contiguous()
            wide_a, wide_b = lora_A.dtype is torch.float32, lora_B.dtype is torch.float32
        if seed is not None:
            seed = seed.to(dy.device, non_blocking=True) if r and dropout > 0.0 else None
        # In the adapters' types: the kernels round what they have summed in float32.
        dA = self._like(lora_A, r, k) if need_dA else None
        dB = self._like(lora_B, n, r) if need_dB else None
        if m == 0:
            return dx, None if dA is None else dA.zero_(), None if dB is None else dB.zero_()
        ordinal, stream = self.queue(dy.device)
        size = self.kernels.linear_scratch(m, n, k, r, code, wide_a, wide_b, True, ordinal)
        # v lies behind the scratch.
        need_v = r > 0 and (need_dx or need_dA)
        behind = (size + 15) // 16 * 16
        scratch = self._scratch(dy, behind + m * r * dy.element_size() if need_v else size)
        base, dA_address, dB_address = pointer(scratch), pointer(dA), pointer(dB)
        struct, x, u = weight.native(self.kernels.Weight), x if need_dA else None, u if need_dB else None
        wide_dA, wide_dB = dA_address if wide_a else 0, dB_address if wide_b else 0
        fields = params.linear_backward(struct, dy, x, u, lora_A, lora_B, dx, wide_dA, wide_dB, m, r, scaling, dropout)
        fields["dtype"] = code
        fields["wide_a"] = wide_a
        fields["wide_b"] = wide_b
        fields["narrow_da"] = 0 if wide_a else dA_address
        fields["narrow_db"] = 0 if wide_b else dB_address
        fields["seed"] = pointer(seed)
        fields["v"] = base + behind if need_v else 0
        fields["scratch"] = base
        fields["device"] = ordinal
        fields["stream"] = stream
        self.kernels.linear_backward(fields)
        return dx, dA, dB

    # ------------------------------------------------------------------------------------- a mixture's experts

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
        return loop.forward(self.linear_forward, x, weight, offsets, bias, A, B, scaling)

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
        return loop.backward(self.linear_backward, dy, weight, offsets, x, u, A, B, scaling, needs)
