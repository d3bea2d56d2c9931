"""Tensors to raw pointers: one backend for each kind of device. What arrives here has been checked by ops.py."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from . import reference

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.lru_cache(maxsize=1)
def native() -> ModuleType:
    """The extension. torch is imported before it, so that both share torch's OpenMP runtime.

    Raises:
        ImportError: when it has not been built.
    """
    try:
        return importlib.import_module("qlora_kernels._C")
    except ImportError as error:
        raise ImportError(
            f"the native extension qlora_kernels._C could not be loaded ({error}); build it with 'pip install -e .' "
            "in the source folder"
        ) from error


def of(tensor: Tensor):
    """The backend that serves a tensor: by its device, and float64 by the reference in plain torch.

    Raises:
        RuntimeError: for a device that this build has no kernels for.
    """
    if tensor.is_cuda:
        raise RuntimeError(
            f"this build of qlora_kernels has no CUDA kernels, but a tensor is on {tensor.device}; "
            "move the model to the CPU, or build with nvcc installed and QLORA_KERNELS_CUDA_ARCHS=native"
        )
    return reference if tensor.dtype == torch.float64 else CPU


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _weight(pieces: tuple[Tensor | None, ...], n: int, k: int) -> tuple:
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
    return None if tensor is None else tensor.to(dtype).contiguous()


def _seed(seed: Tensor | None, dropout: float) -> int:
    return seed.item() & 0xFFFFFFFFFFFFFFFF if dropout > 0.0 else 0


class CPU:
    """The C++ kernels."""

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
            _DTYPES[weight.dtype],
            torch.get_num_threads(),
        )
        if bad >= 0:
            index = tuple(divmod(bad, weight.shape[1]))
            raise ValueError(
                f"{name} holds {weight[index].item()} at index {index}; only finite weights can be quantized"
            )
        return packed, absmax

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
            _weight(pieces, n, k), out.data_ptr(), row_begin, row_end, _DTYPES[out.dtype], torch.get_num_threads()
        )

    @staticmethod
    def linear_forward(x, pieces, n, bias, lora_A, lora_B, scaling, dropout, seed):
        m, k = x.shape
        r = 0 if lora_A is None else lora_A.shape[0]
        y = torch.empty((m, n), dtype=x.dtype)
        u = torch.empty((m, r), dtype=x.dtype)
        if m == 0:
            return y, u
        lora_A, lora_B, bias = _as(lora_A, x.dtype), _as(lora_B, x.dtype), _as(bias, torch.float32)
        native().linear_forward(
            _weight(pieces, n, k),
            x.data_ptr(),
            _pointer(lora_A),
            _pointer(lora_B),
            _pointer(bias),
            y.data_ptr(),
            u.data_ptr(),
            m,
            r,
            scaling,
            dropout,
            _seed(seed, dropout),
            _DTYPES[x.dtype],
            torch.get_num_threads(),
        )
        return y, u

    @staticmethod
    def linear_backward(dy, pieces, k, x, u, lora_A, lora_B, scaling, dropout, seed, need_dx, need_dA, need_dB):
        m, n = dy.shape
        r = 0 if lora_A is None else lora_A.shape[0]
        dx = torch.empty((m, k) if need_dx else (0,), dtype=dy.dtype)
        dA = torch.empty((r, k) if need_dA else (0,), dtype=torch.float32)
        dB = torch.empty((n, r) if need_dB else (0,), dtype=torch.float32)
        A, B = _as(lora_A, dy.dtype), _as(lora_B, dy.dtype)
        if m == 0:
            dA.zero_()
            dB.zero_()
        else:
            native().linear_backward(
                _weight(pieces, n, k),
                dy.data_ptr(),
                _pointer(x) if need_dA else 0,
                _pointer(u) if need_dB else 0,
                _pointer(A),
                _pointer(B),
                dx.data_ptr() if need_dx else 0,
                dA.data_ptr() if need_dA else 0,
                dB.data_ptr() if need_dB else 0,
                m,
                r,
                scaling,
                dropout,
                _seed(seed, dropout),
                _DTYPES[dy.dtype],
                torch.get_num_threads(),
            )
        return dx, dA.to(lora_A.dtype) if need_dA else _like(dy), dB.to(lora_B.dtype) if need_dB else _like(dy)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=tensor.dtype)
