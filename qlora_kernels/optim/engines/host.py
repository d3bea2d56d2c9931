"""The engine on the CPU: the C++ kernels, and states in memory or in a file."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ...native import extension
from ..arena.host import HostArena
from ..arena.layout import Layout
from ..options import Options
from .contract import kernel_params


class HostEngine:
    """Takes a paged optimizer's steps on the CPU."""

    device = torch.device("cpu")

    def __init__(self, layout: Layout, algorithm: int, options: Options):
        self.layout = layout
        self.arena = HostArena(layout.nbytes, options.page_file, layout.state_bits)
        self.broken = ""
        self._process = os.getpid()
        self._algorithm, self._options = algorithm, options
        self._norm = self.arena.view(layout.norm, 1, torch.float32)
        self._skipped = self.arena.view(layout.skipped, 1, torch.int64)

    @property
    def shared_with_parent(self) -> bool:
        """Whether this is a forked child and the states are in a file, which it shares with its parent."""
        return self._options.page_file is not None and os.getpid() != self._process

    def step(
        self,
        tensors: np.ndarray,
        groups: np.ndarray,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        sum_over_processes: Callable[[np.ndarray], float] | None = None,
    ) -> None:
        scale, inf = (None if t is None else t.detach().reshape(-1).float().cpu() for t in (grad_scale, found_inf))
        addresses = {
            "arena": self.arena.address,
            "chunks": self.layout.chunks.ctypes.data,
            "tensors": tensors.ctypes.data,
            "groups": groups.ctypes.data,
            "grad_scale": 0 if scale is None else scale.data_ptr(),
            "found_inf": 0 if inf is None else inf.data_ptr(),
        }
        native, threads = extension.native(), torch.get_num_threads()
        params, total = kernel_params(self.layout, self._algorithm, self._options, addresses), None
        if sum_over_processes is not None:
            native.optimizer_sums(params, threads)
            sums = self.arena.view(self.layout.partial, self.layout.chunk_count, torch.float64)
            total = np.array([sum_over_processes(sums.numpy())])
        native.optimizer_step(params, threads, 0 if total is None else total.ctypes.data)

    def refresh(self, groups: np.ndarray) -> None:
        """Does nothing: the CPU has no graphs."""

    def read_control(self) -> tuple[float, int]:
        return self._norm.item(), int(self._skipped.item())

    def write_control(self, norm: float, skipped: int) -> None:
        self._norm.fill_(norm)
        self._skipped.fill_(skipped)

    def page_out(self) -> None:
        self.arena.page_out()

    def page_in(self) -> None:
        self.arena.page_in()

    def resident_bytes(self) -> int:
        return self.arena.resident_bytes()
