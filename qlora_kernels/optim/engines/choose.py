"""Which engine a parameter's device needs, and what no engine there can do."""

from __future__ import annotations

import torch

from ...errors import require
from ...ops import backends
from ..arena.layout import Layout
from ..options import Options
from .contract import Engine
from .cuda import CudaEngine
from .host import HostEngine


def engine_for(parameter: torch.Tensor, layout: Layout, algorithm: int, options: Options) -> Engine:
    """An engine for parameters like this one. Its arena holds zeros.

    Raises:
        MemoryError: if there is not enough memory for the arena.
        ValueError: if the page budget is too small for any step.
    """
    backend = backends.backend_for(parameter)
    if backend.is_host:
        return HostEngine(layout, algorithm, options)
    return CudaEngine(backend, parameter.device, layout, algorithm, options)


def refuse_in_capture(parameter: torch.Tensor) -> None:
    """Raises during a CUDA graph's capture, when memory cannot be allocated and the device cannot be read."""
    require(
        not backends.backend_for(parameter).capturing(parameter.device),
        RuntimeError,
        "a CUDA graph can capture a step only if all states are on the device and stay there, and states for these "
        "parameters have yet to be allocated: take a step before the capture",
    )


def refuse_sums_of_shards(parameter: torch.Tensor) -> None:
    """Raises on CUDA, which launches norm and step together, so that processes cannot add up norms between them."""
    require(
        backends.backend_for(parameter).is_host,
        NotImplementedError,
        "max_grad_norm and skip_nonfinite work for sharded parameters on the CPU only; on a CUDA device leave them "
        "out and call torch.nn.utils.clip_grad_norm_ before the step",
    )
