"""The backend of the CUDA kernels."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ...native.extension import DTYPE_CODES
from .pointers import pointer, view_of


def capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured on the tensor's device, where nothing can be read back."""
    if not tensor.is_cuda:
        return False
    with torch.cuda.device(tensor.device):
        return torch.cuda.is_current_stream_capturing()


class _Exposed:
    """Device memory as torch.as_tensor takes it (__cuda_array_interface__, version 3)."""

    def __init__(self, owner, address: int, count: int, dtype: torch.dtype):
        kind = {torch.float32: "<f4", torch.uint8: "|u1", torch.int64: "<i8"}[dtype]
        self._owner = owner
        self.__cuda_array_interface__ = {"shape": (count,), "typestr": kind, "data": (address, False), "version": 3}


#: The address of a device's current stream, by its ordinal: what torch.cuda.current_stream() wraps in an object, which
#: takes longer than a launch. Builds of torch without CUDA lack it.
_stream_of = getattr(torch._C, "_cuda_getCurrentRawStream", None)


class CUDA:
    """The CUDA kernels, on the tensors' device and the caller's current stream there. Nothing waits for the device."""

    # To know of a bad weight, the host would have to wait: its blocks get constants that are NaN.
    refuses_non_finite = False

    def __init__(self, kernels: ModuleType):
        self._kernels = self.kernels = kernels

    # What a paged optimizer needs (cuda_engine.py).

    def queue(self, device: torch.device) -> tuple[int, int]:
        """The device's ordinal and the address of the caller's stream there."""
        return self._queue(device)

    def capturing(self, device: torch.device) -> bool:
        """Whether the caller's stream is being captured into a CUDA graph."""
        with torch.cuda.device(device):
            return torch.cuda.is_current_stream_capturing()

    def pin(self, table: Tensor) -> Tensor:
        """A copy in memory that the device can read by itself."""
        return table.pin_memory()

    def send(self, pinned: Tensor, device: torch.device) -> Tensor:
        """A copy on the device that the host does not wait for."""
        return pinned.to(device, non_blocking=True)

    def wait(self, device: torch.device) -> None:
        """Waits for all that the device has been given to do."""
        torch.cuda.synchronize(device)

    def expose(self, owner, address: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Device memory as a tensor that keeps its owner alive."""
        return torch.as_tensor(_Exposed(owner, address, count, dtype), device=device)

    @staticmethod
    def _empty(shape, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    @staticmethod
    def _queue(device: torch.device) -> tuple[int, int]:
        if _stream_of is None:
            return device.index, torch.cuda.current_stream(device).cuda_stream
        return device.index, _stream_of(device.index)

    def _quantize(self, weight: Tensor, sums: Tensor | None):
        count, device = weight.numel(), weight.device
        packed = self._empty((count + 1) // 2, torch.uint8, device)
        absmax = self._empty((count + 63) // 64, torch.float32, device)
        self._kernels.quantize(
            weight.data_ptr(),
            packed.data_ptr(),
            absmax.data_ptr(),
            pointer(sums),
            count,
            DTYPE_CODES[weight.dtype],
            *self._queue(device),
        )
        return packed, absmax

    def _quantize_absmax(self, absmax: Tensor, nested_table: Tensor, sums: Tensor, summed: bool):
        count, device = absmax.numel(), absmax.device
        code = self._empty(count, torch.uint8, device)
        nested_absmax = self._empty((count + 255) // 256, torch.float32, device)
        offset = self._empty(1, torch.float32, device)
        if count == 0:
            return code, nested_absmax, offset.zero_()
        self._kernels.quantize_absmax(
            absmax.data_ptr(),
            nested_table.data_ptr(),
            code.data_ptr(),
            nested_absmax.data_ptr(),
            offset.data_ptr(),
            count,
            sums.data_ptr(),
            summed,
            *self._queue(device),
        )
        return code, nested_absmax, offset

    def _sums(self, blocks: int, device: torch.device) -> Tensor:
        """Scratch for the sum of each 256 constants."""
        return self._empty((blocks + 255) // 256, torch.float64, device)

    #: Where the layer's tensors come from: (a tensor of the same type and device, the sizes).
    _like = staticmethod(Tensor.new_empty)

    def _scratch(self, x: Tensor, size: int) -> Tensor | None:
        """So many bytes that the layer's kernels need for a while; what is in them does not matter."""
        return self._like(x, -(-size // x.element_size())) if size else None

    def quantize(self, weight: Tensor, name: str):
        return self._quantize(weight, None)

    def quantize_absmax(self, absmax: Tensor, nested_table: Tensor):
        return self._quantize_absmax(absmax, nested_table, self._sums(absmax.numel(), absmax.device), False)

    def quantize_nested(self, weight: Tensor, nested_table: Tensor, name: str):
        # Two launches: the first leaves the sums that the second needs.
        sums = self._sums((weight.numel() + 63) // 64, weight.device)
        packed, absmax = self._quantize(weight, sums)
        return packed, *self._quantize_absmax(absmax, nested_table, sums, True)

    def dequantize(self, pieces, n: int, k: int, dtype: torch.dtype, row_begin: int, row_end: int) -> Tensor:
        out = self._empty((row_end - row_begin, k), dtype, pieces[0].device)
        self.dequantize_out(pieces, n, k, row_begin, row_end, out)
        return out

    def dequantize_out(self, pieces, n: int, k: int, row_begin: int, row_end: int, out: Tensor) -> None:
        if out.dtype == torch.float64:
            out.copy_(self.dequantize(pieces, n, k, torch.float32, row_begin, row_end))
            return
        self._kernels.dequantize(
            view_of(pieces, n, k), out.data_ptr(), row_begin, row_end, DTYPE_CODES[out.dtype], *self._queue(out.device)
        )

    def linear_forward(self, x, view, r, bias, lora_A, lora_B, scaling, dropout, seed, keep_u):
        n, k = view[6:]
        m = x.numel() // k
        y = self._like(x, m, n) if x.dim() == 2 else self._like(x, *x.shape[:-1], n)
        u = self._like(x, m, r) if r and (keep_u or m == 0) else None
        if m == 0:
            return y, u
        code, queue = DTYPE_CODES[x.dtype], self._queue(x.device)
        wide = _wide(lora_A, lora_B) if r else 0
        size = self._kernels.linear_scratch(m, n, k, r, code, wide, False, queue[0])
        # A u that nobody keeps lies behind the scratch: an allocation less.
        behind = (size + 15) // 16 * 16 if r and u is None else 0
        scratch = self._scratch(x, behind + m * r * x.element_size() if r and u is None else size)
        room = pointer(scratch)
        # The kernels read a bias as it is, in float32 or in x's dtype.
        bias = bias if bias is None or bias.is_contiguous() else bias.contiguous()
        narrow = bias is not None and bias.dtype != torch.float32
        if r:
            lora_A, lora_B = lora_A.contiguous(), lora_B.contiguous()
        seed = _seed_on(x.device, seed, dropout)
        self._kernels.linear_forward(
            view,
            x.data_ptr(),
            pointer(lora_A),
            pointer(lora_B),
            0 if narrow else pointer(bias),
            pointer(bias) if narrow else 0,
            y.data_ptr(),
            room + behind if r and u is None else pointer(u),
            m,
            r,
            scaling,
            dropout,
            pointer(seed),
            room,
            code,
            wide,
            *queue,
        )
        return y, u

    def linear_backward(self, dy, view, r, x, u, lora_A, lora_B, scaling, dropout, seed, need_dx, need_dA, need_dB):
        n, k = view[6:]
        m = dy.numel() // n
        dx = None
        if need_dx:
            dx = self._like(dy, m, k) if dy.dim() == 2 else self._like(dy, *dy.shape[:-1], k)
        # In the adapters' types: the kernels round what they have summed in float32.
        dA = self._like(lora_A, r, k) if need_dA else None
        dB = self._like(lora_B, n, r) if need_dB else None
        if m == 0:
            return dx, dA.zero_() if need_dA else None, dB.zero_() if need_dB else None
        code, queue = DTYPE_CODES[dy.dtype], self._queue(dy.device)
        wide = _wide(lora_A, lora_B) if r else 0
        size = self._kernels.linear_scratch(m, n, k, r, code, wide, True, queue[0])
        # v lies behind the scratch.
        need_v = r > 0 and (need_dx or need_dA)
        behind = (size + 15) // 16 * 16
        scratch = self._scratch(dy, behind + m * r * dy.element_size() if need_v else size)
        room = pointer(scratch)
        if r:
            lora_A, lora_B = lora_A.contiguous(), lora_B.contiguous()
        seed = _seed_on(dy.device, seed, dropout)
        self._kernels.linear_backward(
            view,
            dy.data_ptr(),
            x.data_ptr() if need_dA else 0,
            u.data_ptr() if need_dB else 0,
            pointer(lora_A),
            pointer(lora_B),
            pointer(dx),
            pointer(dA),
            pointer(dB),
            room + behind if need_v else 0,
            m,
            r,
            scaling,
            dropout,
            pointer(seed),
            room,
            code,
            wide,
            *queue,
        )
        return dx, dA, dB


def _wide(lora_A: Tensor, lora_B: Tensor) -> int:
    """Which of the adapters are float32, as the CUDA kernels are told: bits 0 and 1."""
    return (lora_A.dtype is torch.float32) | (lora_B.dtype is torch.float32) << 1


def _seed_on(device: torch.device, seed: Tensor | None, dropout: float) -> Tensor | None:
    """The seed where the kernels read it; nothing without dropout."""
    return seed.to(device, non_blocking=True) if dropout > 0.0 and seed is not None else None
