"""Tensors as the extension takes them: addresses, contiguous and of the right dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def non_finite(weight: Tensor, index: tuple[int, ...], name: str) -> ValueError:
    """The error for a weight that cannot be quantized."""
    return ValueError(f"{name} holds {weight[index].item()} at index {index}; only finite weights can be quantized")


def pointer(tensor: Tensor | None) -> int:
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


def as_dtype(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if tensor is None or (tensor.dtype is dtype and tensor.is_contiguous()):
        return tensor
    return tensor.to(dtype).contiguous()


def zero_gradient(gradient: Tensor | None, adapter: Tensor | None) -> Tensor | None:
    """A gradient of no rows, in the adapter's type."""
    return None if gradient is None else gradient.zero_().to(adapter.dtype)
