"""Runs a paged optimizer's steps on one kind of device: tables to raw pointers, and pages to and fro."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import require
from ...ops import backends
from ..arena.layout import Layout
from .contract import Engine
from .host import HostEngine


def of(parameter: torch.Tensor, layout: Layout, algorithm: int, settings: dict[str, Any]) -> Engine:
    """The engine for parameters like this one, its arena filled with zeros.

    Raises:
        MemoryError: when there is no memory for the arena.
        ValueError: when the page budget is too small for any step.
    """
    backend = backends.backend_for(parameter)
    if backend.is_host:
        return HostEngine(layout, algorithm, settings)
    from .cuda import CudaEngine

    return CudaEngine(backend, parameter.device, layout, algorithm, settings)


def refuse_in_capture(parameter: torch.Tensor) -> None:
    """Raises while a CUDA graph is being captured: no memory can be had then, and nothing read from the device."""
    require(
        not backends.backend_for(parameter).capturing(parameter.device),
        RuntimeError,
        "a CUDA graph can capture a step only when all states are on the device and stay there, and there are none "
        "yet, or not for these parameters: take a step before",
    )


def refuse_sums_of_shards(parameter: torch.Tensor) -> None:
    """Raises where nothing can be sent between the norm and the step, which are launched together there."""
    require(
        backends.backend_for(parameter).is_host,
        NotImplementedError,
        "max_grad_norm and skip_nonfinite of parameters that are shards work on the CPU only; on a CUDA device leave "
        "them out, and call torch.nn.utils.clip_grad_norm_ before the step",
    )
