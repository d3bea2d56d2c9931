"""Quantization: schema, checks and fake implementation together."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import require
from . import backends, dispatcher
from .library import define, fake


def _check_quantize(weight: Tensor) -> None:
    require(weight.dim() == 2, ValueError, f"weight should be [N, K], found shape {list(weight.shape)}")
    require(
        weight.dtype in (torch.float32, torch.bfloat16, torch.float16),
        TypeError,
        f"weight should be float32, bfloat16 or float16, found {weight.dtype}",
    )
    require(weight.is_contiguous(), ValueError, "weight should be contiguous")


def _quantize(weight: Tensor, name: str = "weight") -> tuple[Tensor, Tensor]:
    _check_quantize(weight)
    dispatcher.require_memory(name, weight)
    return backends.backend_for(weight).quantize(weight, name)


quantize = define(
    "quantize(Tensor weight, str name='weight') -> (Tensor packed, Tensor absmax)",
    _quantize,
)


@fake("quantize")
def _quantize_fake(weight: Tensor, name: str = "weight") -> tuple[Tensor, Tensor]:
    _check_quantize(weight)
    count = weight.numel()
    return (
        weight.new_empty((count + 1) // 2, dtype=torch.uint8),
        weight.new_empty((count + 63) // 64, dtype=torch.float32),
    )


def check_finite(weight: Tensor, constants: Tensor, name: str) -> None:
    """Refuses a weight that has just been quantized and was not finite, where the kernels have not done so.

    On a CUDA device this waits for the launches; while a graph is captured nothing can be waited for, and a weight
    that is not finite decodes to NaN.

    Args:
        weight: what was quantized.
        constants: float32, any number of them that are NaN when a block was not finite.
        name: what to call the weight.
    """
    backend = backends.backend_for(constants)
    if backend.refuses_non_finite or backend.capturing(constants.device):
        return
    if not constants.isfinite().all():
        bad = (~weight.isfinite()).nonzero()
        require(len(bad) > 0, ValueError, f"{name} is too near the largest float32 for its constants to be averaged")
        raise backends.non_finite(weight, tuple(int(index) for index in bad[0]), name)


def _check_quantize_absmax(absmax: Tensor, nested_table: Tensor) -> None:
    for name, tensor in (("absmax", absmax), ("nested_table", nested_table)):
        require(tensor.dtype == torch.float32, TypeError, f"{name} should be float32, found {tensor.dtype}")
        require(tensor.dim() == 1, ValueError, f"{name} should have one dimension, found {list(tensor.shape)}")
        require(tensor.is_contiguous(), ValueError, f"{name} should be contiguous")
    require(
        nested_table.numel() == 256, ValueError, f"nested_table should have 256 entries, found {nested_table.numel()}"
    )
    require(
        absmax.device == nested_table.device,
        ValueError,
        f"absmax is on {absmax.device}, but nested_table on {nested_table.device}",
    )


def _quantize_absmax(absmax: Tensor, nested_table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check_quantize_absmax(absmax, nested_table)
    dispatcher.require_memory("absmax", absmax)
    dispatcher.require_memory("nested_table", nested_table)
    return backends.backend_for(absmax).quantize_absmax(absmax, nested_table)


quantize_absmax = define(
    "quantize_absmax(Tensor absmax, Tensor nested_table) -> (Tensor code, Tensor nested_absmax, Tensor nested_offset)",
    _quantize_absmax,
)


@fake("quantize_absmax")
def _quantize_absmax_fake(absmax: Tensor, nested_table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check_quantize_absmax(absmax, nested_table)
    count = absmax.numel()
    return (
        absmax.new_empty(count, dtype=torch.uint8),
        absmax.new_empty((count + 255) // 256),
        absmax.new_empty(1),
    )


def _check_quantize_nested(weight: Tensor, nested_table: Tensor) -> None:
    _check_quantize(weight)
    _check_quantize_absmax(weight.new_empty(0, dtype=torch.float32), nested_table)


def _quantize_nested(
    weight: Tensor, nested_table: Tensor, name: str = "weight"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_quantize_nested(weight, nested_table)
    dispatcher.require_memory(name, weight)
    dispatcher.require_memory("nested_table", nested_table)
    return backends.backend_for(weight).quantize_nested(weight, nested_table, name)


quantize_nested = define(
    "quantize_nested(Tensor weight, Tensor nested_table, str name='weight')"
    " -> (Tensor packed, Tensor code, Tensor nested_absmax, Tensor nested_offset)",
    _quantize_nested,
)


@fake("quantize_nested")
def _quantize_nested_fake(
    weight: Tensor, nested_table: Tensor, name: str = "weight"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_quantize_nested(weight, nested_table)
    packed, absmax = _quantize_fake(weight, name)
    return packed, *_quantize_absmax_fake(absmax, nested_table)
