"""The arena on a CUDA device: managed memory, or pinned host memory staged on the device piece by piece."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import torch
from torch import Tensor

from ...errors import require
from . import schedule
from .layout import Layout
from .memory import out_of_memory


def host_memory(owner: Any, address: int, count: int, dtype: torch.dtype) -> Tensor:
    """A tensor over host memory at an address. It keeps the memory's owner alive."""
    if count == 0:
        return torch.empty(0, dtype=dtype, device="cpu")
    buffer = (ctypes.c_ubyte * (count * dtype.itemsize)).from_address(address)
    buffer.owner = owner  # pyright: ignore[reportAttributeAccessIssue] - ctypes arrays take any attribute
    return torch.frombuffer(buffer, dtype=dtype)


class CudaArena:
    """The extension's Arena, and tensors that view it.

    It is managed memory if the card and the host can use that concurrently and QLORA_KERNELS_MANAGED is not 0.

    Raises:
        MemoryError: if there is not enough memory.
        ValueError: if the page budget is too small for any step.
    """

    def __init__(self, backend, device: torch.device, layout: Layout, budget: int | None):
        self._backend, self._device, self._layout = backend, device, layout
        ordinal, _ = backend.queue(device)
        forbidden = os.environ.get("QLORA_KERNELS_MANAGED") == "0"
        self.managed = not forbidden and backend.kernels.pages_managed(ordinal)
        self.chunks = layout.chunks
        if self.managed:
            if budget is None and layout.nbytes > (room := backend.kernels.free_memory(ordinal) // 2):
                # With everything arriving at once, the last pages would evict the first.
                budget = max(room, schedule.least_budget(layout))
            plan = [(s.begin, s.end, s.arrive, s.leave, (), s.stays) for s in schedule.stretches(layout, budget)]
            staging = 0
        else:
            plan, self.chunks, staging = schedule.staged_stretches(layout, budget)
        why = "QLORA_KERNELS_MANAGED=0" if forbidden else "device and host cannot use managed memory together here"
        pinned = f"pinned host memory, copied to the device piece by piece ({why})"
        self.kind = "managed memory" if self.managed else pinned
        try:
            self.native = backend.kernels.Arena(layout.nbytes, layout.header, staging, ordinal)
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError) and "cudaErrorMemoryAllocation" not in str(error):
                raise
            where = f"of {self.kind.partition(',')[0]}"
            raise out_of_memory(layout.nbytes, where, str(error), layout.state_bits) from None
        self.native.plan(plan)

    def view(self, offset: int, count: int, dtype: torch.dtype) -> Tensor:
        """A flat tensor of ``count`` elements at ``offset`` bytes, on the device where the memory is managed."""
        if count == 0:
            return torch.empty(0, dtype=dtype, device=self._device)
        self._check(offset, count * dtype.itemsize)
        if offset < self._layout.header:
            return self._backend.expose(self.native, self.native.header + offset, count, dtype, self._device)
        if self.managed:
            return self._backend.expose(self.native, self.native.states + offset, count, dtype, self._device)
        return self.host_view(offset, count, dtype)

    def host_view(self, offset: int, count: int, dtype: torch.dtype) -> Tensor:
        """The same bytes for the host to fill, after to_host(), so that no page has to move to the device."""
        if count == 0 or offset < self._layout.header:
            return self.view(offset, count, dtype)
        self._check(offset, count * dtype.itemsize)
        return host_memory(self.native, self.native.states + offset, count, dtype)

    def _check(self, offset: int, nbytes: int) -> None:
        """The bounds check that torch.frombuffer does for a host arena."""
        inside = offset >= 0 and offset + nbytes <= self._layout.nbytes
        require(inside, ValueError, f"{nbytes} bytes at {offset} lie outside an arena of {self._layout.nbytes}")

    def synchronize(self) -> None:
        """Waits for copies back to the memory that view() shows. Managed memory is shown directly, without copies."""
        if not self.managed:
            self.native.wait()

    def to_host(self) -> None:
        """Waits for the device, after which the host may read and write the states."""
        self.native.to_host(*self._backend.queue(self._device))
