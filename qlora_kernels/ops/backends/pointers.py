"""Tensors as the extension takes them: addresses, contiguous and of the right dtype."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor


def non_finite(weight: Tensor, index: tuple[int, ...], name: str) -> ValueError:
    """The error for a weight that cannot be quantized."""
    return ValueError(f"{name} holds {weight[index].item()} at index {index}; only finite weights can be quantized")


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@overload
def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor: ...
@overload
def as_dtype(tensor: None, dtype: torch.dtype) -> None: ...
def as_dtype(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if tensor is None or (tensor.dtype is dtype and tensor.is_contiguous()):
        return tensor
    return tensor.to(dtype).contiguous()
