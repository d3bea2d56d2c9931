"""The engine on a CUDA device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import require
from ..arena.cuda import CudaArena
from ..arena.layout import Layout
from ..options import Options
from .contract import kernel_params

#: Pinned tables kept in reserve, because none can be allocated in a capture: the most steps that can be captured
#: without an eager one between them.
_SPARE = 8


class CudaEngine:
    """Takes a paged optimizer's steps on the caller's stream of a CUDA device, without waiting for the device."""

    def __init__(self, backend, device: torch.device, layout: Layout, algorithm: int, options: Options):
        self.device, self.layout = device, layout
        self._backend, self._algorithm, self._options = backend, algorithm, options
        self.arena = CudaArena(backend, device, layout, options.page_budget)
        self.broken = ""
        self._norm = self.arena.view(layout.norm, 1, torch.float32)
        self._skipped = self.arena.view(layout.skipped, 1, torch.int64)
        self._chunks = self._upload(self.arena.chunks)
        maps = backend.kernels.dynamic_maps() if options.state_bits == 8 else b""
        self._maps = self._upload(np.frombuffer(maps, dtype=np.uint8).copy()) if maps else None
        # For each table: the bytes last uploaded, the stream they were sent on, and the copy on the device.
        self._tables: dict[str, tuple[bytes, Any, Tensor]] = {}
        # Tables of captured graphs, which every replay copies: pinned memory, and the copy on the device.
        self._captured: dict[str, list[tuple[Tensor, Tensor]]] = {"tensors": [], "groups": []}
        # Pinned memory for the tables of the next capture.
        self._spare: dict[str, list[Tensor]] = {"tensors": [], "groups": []}

    #: CUDA does not work in a forked child anyway.
    shared_with_parent = False

    def _upload(self, table: np.ndarray) -> Tensor:
        return self._backend.send(self._backend.pin(torch.from_numpy(np.ascontiguousarray(table))), self.device)

    def _table(self, name: str, table: np.ndarray) -> Tensor:
        """The table on the device, uploaded again only if it has changed."""
        if self._backend.capturing(self.device):
            source, spare = torch.from_numpy(table), self._spare[name]
            pinned = spare.pop(0).copy_(source) if spare else self._backend.pin(source)
            on_device = self._backend.send(pinned, self.device)
            self._captured[name].append((pinned, on_device))
            return on_device
        while len(self._spare[name]) < _SPARE:
            self._spare[name].append(self._backend.pin(torch.from_numpy(table)))
        content, queue = table.tobytes(), self._backend.queue(self.device)
        last = self._tables.get(name)
        if last is not None and last[:2] == (content, queue):
            return last[2]
        on_device = self._upload(table)
        self._tables[name] = (content, queue, on_device)
        return on_device

    def step(
        self,
        tensors: np.ndarray,
        groups: np.ndarray,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        sum_over_processes: Callable[[np.ndarray], float] | None = None,
    ) -> None:
        # Norm and step are launched together, so other processes cannot add anything between them.
        alone = sum_over_processes is None
        require(alone, NotImplementedError, "norms over several processes are computed on the CPU only")
        scale, inf = (
            None if t is None else t.detach().reshape(-1).to(self.device, torch.float32, non_blocking=True)
            for t in (grad_scale, found_inf)
        )
        tensor_table, group_table = self._table("tensors", tensors), self._table("groups", groups)
        native = self.arena.native
        addresses = {
            "arena": native.header,
            "states": native.base,
            "chunks": self._chunks.data_ptr(),
            "tensors": tensor_table.data_ptr(),
            "groups": group_table.data_ptr(),
            "grad_scale": 0 if scale is None else scale.data_ptr(),
            "found_inf": 0 if inf is None else inf.data_ptr(),
        }
        measure = self._options.needs_norm or scale is not None or inf is not None
        try:
            native.step(
                kernel_params(self.layout, self._algorithm, self._options, addresses),
                0 if self._maps is None else self._maps.data_ptr(),
                measure,
                *self._backend.queue(self.device),
            )
        except BaseException:
            self.broken = "a step" if native.broken else self.broken
            raise

    def refresh(self, groups: np.ndarray) -> None:
        table = torch.from_numpy(groups)
        changed = [source for source, _ in self._captured["groups"] if not torch.equal(source, table)]
        if changed:
            self._backend.wait(self.device)  # a replay in flight still reads the old values
        for source in changed:
            source.copy_(table)

    def read_control(self) -> tuple[float, int]:
        return self._norm.item(), int(self._skipped.item())

    def write_control(self, norm: float, skipped: int) -> None:
        self._norm.fill_(norm)
        self._skipped.fill_(skipped)

    def page_out(self) -> None:
        self.arena.native.page_out(*self._backend.queue(self.device))

    def page_in(self) -> None:
        self.arena.native.page_in()

    def resident_bytes(self) -> int:
        return self.arena.native.resident_bytes()
