"""Which backend serves a tensor: by its device, its dtype, or by force."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from ...native import architectures
from ...native.extension import native
from . import reference
from .cpu import CPU
from .cuda import CUDA
from .protocol import Backend

_CPU: Backend = CPU()
_REFERENCE: Backend = reference
_forced: Backend | None = None


@contextlib.contextmanager
def forced(backend: Backend | None) -> Generator[None, None, None]:
    """Within it one backend serves all tensors but float64 ones, whatever their device; None lets the device decide.

    Tests put the emulator here.
    """
    global _forced
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


def forced_backend() -> Any:
    """The backend that :func:`forced` has put in force, or None."""
    return _forced


def backend_for(tensor: Tensor) -> Backend:
    """The backend that serves a tensor: by its device, and float64 by the reference in plain torch.

    Raises:
        RuntimeError: for a device that this build has no kernels for.
    """
    if tensor.dtype == torch.float64:
        return _REFERENCE
    if _forced is not None:
        return _forced
    return cuda(tensor.device) if tensor.is_cuda else _CPU


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
