"""Runs a paged optimizer's steps on one kind of device: tables to raw pointers, and pages to and fro."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

from .arena import HostArena, Layout
from .errors import require
from .native import extension
from .ops import backends

NORM, SKIPPED = 8, 24  # offsets in OptimizerControl, csrc/optimizer.h


class Engine(Protocol):
    """What an optimizer needs of its device."""

    device: torch.device
    layout: Layout
    arena: Any
    broken: str  # what failed midway, after which only other states can follow; empty: nothing

    @property
    def foreign(self) -> bool: ...  # whether its states are another process's
    def step(self, addresses: np.ndarray, groups: np.ndarray, grad_scale, found_inf) -> None: ...
    def refresh(self, groups: np.ndarray) -> None: ...
    def found(self) -> tuple[float, int]: ...
    def set_found(self, norm: float, skipped: int) -> None: ...
    def page_out(self) -> None: ...
    def page_in(self) -> None: ...
    def resident_bytes(self) -> int: ...


def of(parameter: torch.Tensor, layout: Layout, algorithm: int, settings: dict[str, Any]) -> Engine:
    """The engine for parameters like this one, its arena filled with zeros.

    Raises:
        MemoryError: when there is no memory for the arena.
        ValueError: when the page budget is too small for any step.
    """
    backend = backends.backend_for(parameter)
    if backend is backends.CPU:
        return HostEngine(layout, algorithm, settings)
    from .cuda_engine import CudaEngine

    return CudaEngine(backend, parameter.device, layout, algorithm, settings)


def refuse_in_capture(parameter: torch.Tensor) -> None:
    """Raises while a CUDA graph is being captured: no memory can be had then, and nothing read from the device."""
    backend = backends.backend_for(parameter)
    require(
        backend is backends.CPU or not backend.capturing(parameter.device),
        RuntimeError,
        "a CUDA graph can capture a step only when all states are on the device and stay there, and there are none "
        "yet, or not for these parameters: take a step before",
    )


def refuse_sums_of_shards(parameter: torch.Tensor) -> None:
    """Raises where nothing can be sent between the norm and the step, which are launched together there."""
    require(
        backends.backend_for(parameter) is backends.CPU,
        NotImplementedError,
        "max_grad_norm and skip_nonfinite of parameters that are shards work on the CPU only; on a CUDA device leave "
        "them out, and call torch.nn.utils.clip_grad_norm_ before the step",
    )


def operands(layout: Layout, algorithm: int, settings: dict[str, Any], where: dict[str, int]) -> tuple:
    """OptimizerParams for the extension; ``where`` has the addresses."""
    base = where["arena"]
    return (
        algorithm,
        settings["state_bits"],
        where["chunks"],
        layout.chunk_count,
        where["tensors"],
        len(layout.slots),
        where["groups"],
        base + layout.control,
        base + layout.steps,
        base + layout.partial,
        base,
        where.get("states", base),
        where["grad_scale"],
        where["found_inf"],
        settings["max_grad_norm"] or 0.0,
        settings["skip_nonfinite"],
    )


class HostEngine:
    """The CPU, with states in memory or in a file."""

    device = torch.device("cpu")

    def __init__(self, layout: Layout, algorithm: int, settings: dict[str, Any]):
        self.layout = layout
        self.arena = HostArena(layout.nbytes, settings["page_file"], layout.state_bits)
        self.broken = ""
        self._process = os.getpid()
        self._algorithm, self._settings = algorithm, settings
        self._norm = self.arena.view(layout.control + NORM, 1, torch.float32)
        self._skipped = self.arena.view(layout.control + SKIPPED, 1, torch.int64)

    @property
    def foreign(self) -> bool:
        """In a forked child: what it wrote to a file's pages, its parent would find there."""
        return self._settings["page_file"] is not None and os.getpid() != self._process

    def step(
        self,
        addresses: np.ndarray,
        groups: np.ndarray,
        grad_scale,
        found_inf,
        total: Callable[[np.ndarray], float] | None = None,
    ) -> None:
        """``total``: where other processes have gradients too, makes the sum of all squares of those of the chunks."""
        scale, inf = (None if t is None else t.detach().reshape(-1).float().cpu() for t in (grad_scale, found_inf))
        where = {
            "arena": self.arena.address,
            "chunks": self.layout.chunks.ctypes.data,
            "tensors": addresses.ctypes.data,
            "groups": groups.ctypes.data,
            "grad_scale": 0 if scale is None else scale.data_ptr(),
            "found_inf": 0 if inf is None else inf.data_ptr(),
        }
        native, threads = extension.native(), torch.get_num_threads()
        arguments, sums = operands(self.layout, self._algorithm, self._settings, where), None
        if total is not None:
            native.optimizer_sums(arguments, threads)
            found = self.arena.view(self.layout.partial, self.layout.chunk_count, torch.float64)
            sums = np.array([total(found.numpy())])
        native.optimizer_step(arguments, threads, 0 if sums is None else sums.ctypes.data)

    def refresh(self, groups: np.ndarray) -> None:
        """There are no graphs here."""

    def found(self) -> tuple[float, int]:
        return self._norm.item(), int(self._skipped.item())

    def set_found(self, norm: float, skipped: int) -> None:
        self._norm.fill_(norm)
        self._skipped.fill_(skipped)

    def page_out(self) -> None:
        self.arena.page_out()

    def page_in(self) -> None:
        self.arena.page_in()

    def resident_bytes(self) -> int:
        return self.arena.resident_bytes()
