"""The engine of the C++ kernels."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ...native import extension
from ..arena.host import HostArena
from ..arena.layout import Layout
from .contract import NORM, SKIPPED, operands


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
