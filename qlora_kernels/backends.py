"""Tensors to raw pointers: one backend for each kind of device. What arrives here has been checked by ops.py."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from . import reference
from .native import architectures
from .native.extension import DTYPE_CODES, native

#: A backend for all tensors but float64 ones, whatever their device: where the tests put the emulator.
forced = None


def of(tensor: Tensor):
    """The backend that serves a tensor: by its device, and float64 by the reference in plain torch.

    Raises:
        RuntimeError: for a device that this build has no kernels for.
    """
    if tensor.dtype == torch.float64:
        return reference
    if forced is not None:
        return forced
    return cuda(tensor.device) if tensor.is_cuda else CPU


@functools.cache
def cuda(device: torch.device) -> CUDA:
    """The CUDA backend, after a check that this build has kernels for the card.

    Raises:
        RuntimeError: when it has none; the sentence says which card, what the build has, and how to build for it.
    """
    built = native().build_info()["cuda_archs"]
    major, minor = torch.cuda.get_device_capability(device)
    problem = architectures.unserved(built, major, minor, torch.cuda.get_device_name(device))
    if problem:
        raise RuntimeError(problem)
    return CUDA(native().cuda)


def capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured on the tensor's device, where nothing can be read back."""
    if not tensor.is_cuda:
        return False
    with torch.cuda.device(tensor.device):
        return torch.cuda.is_current_stream_capturing()


def non_finite(weight: Tensor, index: tuple[int, ...], name: str) -> ValueError:
    """The error for a weight that cannot be quantized."""
    return ValueError(f"{name} holds {weight[index].item()} at index {index}; only finite weights can be quantized")


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def view_of(pieces: tuple[Tensor | None, ...], n: int, k: int) -> tuple:
    """A quantized weight as the extension takes it: addresses, then N and K."""
    packed, absmax, nested_absmax, nested_offset, nested_table = pieces
    if nested_absmax is None:
        return (packed.data_ptr(), absmax.data_ptr(), 0, 0, 0, 0, n, k)
    return (
        packed.data_ptr(),
        0,
        absmax.data_ptr(),
        nested_absmax.data_ptr(),
        nested_table.data_ptr(),
        nested_offset.data_ptr(),
        n,
        k,
    )


def _as(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if tensor is None or (tensor.dtype is dtype and tensor.is_contiguous()):
        return tensor
    return tensor.to(dtype).contiguous()


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
        lora_A, lora_B, bias = _as(lora_A, x.dtype), _as(lora_B, x.dtype), _as(bias, torch.float32)
        native().linear_forward(
            view,
            x.data_ptr(),
            _pointer(lora_A),
            _pointer(lora_B),
            _pointer(bias),
            y.data_ptr(),
            _pointer(u),
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
            return dx, _zeros(dA, lora_A), _zeros(dB, lora_B)
        A, B = _as(lora_A, dy.dtype), _as(lora_B, dy.dtype)
        native().linear_backward(
            view,
            dy.data_ptr(),
            x.data_ptr() if need_dA else 0,
            u.data_ptr() if need_dB else 0,
            _pointer(A),
            _pointer(B),
            _pointer(dx),
            _pointer(dA),
            _pointer(dB),
            m,
            r,
            scaling,
            dropout,
            _seed(seed, dropout),
            DTYPE_CODES[dy.dtype],
            torch.get_num_threads(),
        )
        return dx, dA.to(lora_A.dtype) if need_dA else None, dB.to(lora_B.dtype) if need_dB else None


def _zeros(gradient: Tensor | None, adapter: Tensor | None) -> Tensor | None:
    """A gradient of no rows, in the adapter's type."""
    return None if gradient is None else gradient.zero_().to(adapter.dtype)


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
            _pointer(sums),
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
        room = _pointer(scratch)
        # The kernels read a bias as it is, in float32 or in x's dtype.
        bias = bias if bias is None or bias.is_contiguous() else bias.contiguous()
        narrow = bias is not None and bias.dtype != torch.float32
        if r:
            lora_A, lora_B = lora_A.contiguous(), lora_B.contiguous()
        seed = _seed_on(x.device, seed, dropout)
        self._kernels.linear_forward(
            view,
            x.data_ptr(),
            _pointer(lora_A),
            _pointer(lora_B),
            0 if narrow else _pointer(bias),
            _pointer(bias) if narrow else 0,
            y.data_ptr(),
            room + behind if r and u is None else _pointer(u),
            m,
            r,
            scaling,
            dropout,
            _pointer(seed),
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
        room = _pointer(scratch)
        if r:
            lora_A, lora_B = lora_A.contiguous(), lora_B.contiguous()
        seed = _seed_on(dy.device, seed, dropout)
        self._kernels.linear_backward(
            view,
            dy.data_ptr(),
            x.data_ptr() if need_dA else 0,
            u.data_ptr() if need_dB else 0,
            _pointer(lora_A),
            _pointer(lora_B),
            _pointer(dx),
            _pointer(dA),
            _pointer(dB),
            room + behind if need_v else 0,
            m,
            r,
            scaling,
            dropout,
            _pointer(seed),
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
