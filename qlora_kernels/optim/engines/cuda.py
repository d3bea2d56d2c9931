"""A paged optimizer on a CUDA device: the arena in managed memory, or in pinned memory with staging on the device."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import require
from ..arena import host, schedule
from ..arena.layout import Layout
from . import contract


def host_memory(owner: Any, address: int, count: int, dtype: torch.dtype) -> Tensor:
    """Host memory at an address as a tensor, which keeps the owner alive."""
    if count == 0:
        return torch.empty(0, dtype=dtype, device="cpu")
    buffer = (ctypes.c_ubyte * (count * dtype.itemsize)).from_address(address)
    buffer.owner = owner
    return torch.frombuffer(buffer, dtype=dtype)


#: Tables of which pinned memory is kept: as many steps can be captured before an eager one has to come between.
_SPARE = 8


class CudaArena:
    """The extension's Arena, with views of it.

    Managed memory where the card can use it beside the host, and QLORA_KERNELS_MANAGED=0 does not forbid it.

    Raises:
        MemoryError: when there is no memory for it.
        ValueError: when the page budget is too small for any step.
    """

    def __init__(self, backend, device: torch.device, layout: Layout, budget: int | None):
        self._backend, self._device, self._layout = backend, device, layout
        ordinal, _ = backend.queue(device)
        forbidden = os.environ.get("QLORA_KERNELS_MANAGED") == "0"
        self.managed = not forbidden and backend.kernels.pages_managed(ordinal)
        self.chunks = layout.chunks
        if self.managed:
            if budget is None and layout.nbytes > (room := backend.kernels.free_memory(ordinal) // 2):
                # All at once, the last pages to come would send away the first.
                budget = max(room, schedule.least_budget(layout))
            plan = [(s.begin, s.end, s.arrive, s.leave, (), s.stays) for s in schedule.stretches(layout, budget)]
            staging = 0
        else:
            plan, self.chunks, staging = schedule.staged(layout, budget)
        why = "QLORA_KERNELS_MANAGED=0" if forbidden else "device and host cannot use managed memory together here"
        pinned = f"pinned host memory, copied to the device piece by piece ({why})"
        self.kind = "managed memory" if self.managed else pinned
        try:
            self.native = backend.kernels.Arena(layout.nbytes, layout.header, staging, ordinal)
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError) and "cudaErrorMemoryAllocation" not in str(error):
                raise
            where = f"of {self.kind.partition(',')[0]}"
            raise host.no_memory(layout.nbytes, where, str(error), layout.state_bits) from None
        self.native.plan(plan)

    def view(self, offset: int, count: int, dtype: torch.dtype) -> Tensor:
        """A flat tensor of ``count`` elements at ``offset`` bytes, as users see it."""
        if count == 0:
            return torch.empty(0, dtype=dtype, device=self._device)
        self._check(offset, count * dtype.itemsize)
        if offset < self._layout.header:
            return self._backend.expose(self.native, self.native.header + offset, count, dtype, self._device)
        if self.managed:
            return self._backend.expose(self.native, self.native.states + offset, count, dtype, self._device)
        return self.host_view(offset, count, dtype)

    def host_view(self, offset: int, count: int, dtype: torch.dtype) -> Tensor:
        """The same for the host to fill, after to_host(): what no page of has to come to the device for."""
        if count == 0 or offset < self._layout.header:
            return self.view(offset, count, dtype)
        self._check(offset, count * dtype.itemsize)
        return host_memory(self.native, self.native.states + offset, count, dtype)

    def _check(self, offset: int, nbytes: int) -> None:
        """As torch.frombuffer does for an arena of the host's."""
        inside = offset >= 0 and offset + nbytes <= self._layout.nbytes
        require(inside, ValueError, f"{nbytes} bytes at {offset} are not in an arena of {self._layout.nbytes}")

    def synchronize(self) -> None:
        """Waits for what is on its way to where view() shows it: nothing, where pages are managed."""
        if not self.managed:
            self.native.wait()

    def to_host(self) -> None:
        """Waits for the device; then the host may use the states."""
        self.native.to_host(*self._backend.queue(self._device))


class CudaEngine:
    """Steps on a CUDA device, or on the emulator: on the caller's stream, without waiting for the device."""

    def __init__(self, backend, device: torch.device, layout: Layout, algorithm: int, settings: dict[str, Any]):
        self.device, self.layout = device, layout
        self._backend, self._algorithm, self._settings = backend, algorithm, settings
        self.arena = CudaArena(backend, device, layout, settings["page_budget"])
        self.broken = ""
        self._norm = self.arena.view(layout.control + contract.NORM, 1, torch.float32)
        self._skipped = self.arena.view(layout.control + contract.SKIPPED, 1, torch.int64)
        self._chunks = self._upload(self.arena.chunks)
        maps = backend.kernels.dynamic_maps() if settings["state_bits"] == 8 else b""
        self._maps = self._upload(np.frombuffer(maps, dtype=np.uint8).copy()) if maps else None
        # What was uploaded last, to which stream, and where it lies on the device.
        self._tables: dict[str, tuple[bytes, Any, Tensor]] = {}
        # Of captured graphs, which copy them at every replay: pinned memory and the device's.
        self._captured: dict[str, list[tuple[Tensor, Tensor]]] = {"tensors": [], "groups": []}
        # Pinned memory for the next of those: none can be had while a stream is being captured.
        self._spare: dict[str, list[Tensor]] = {"tensors": [], "groups": []}

    #: CUDA itself does not work in a forked child.
    foreign = False

    def _upload(self, table: np.ndarray) -> Tensor:
        return self._backend.send(self._backend.pin(torch.from_numpy(np.ascontiguousarray(table))), self.device)

    def _table(self, name: str, table: np.ndarray) -> Tensor:
        """On the device: uploaded again only when it has changed."""
        if self._backend.capturing(self.device):
            source, spare = torch.from_numpy(table), self._spare[name]
            pinned = spare.pop(0).copy_(source) if spare else self._backend.pin(source)
            there = self._backend.send(pinned, self.device)
            self._captured[name].append((pinned, there))
            return there
        while len(self._spare[name]) < _SPARE:
            self._spare[name].append(self._backend.pin(torch.from_numpy(table)))
        now, queue = table.tobytes(), self._backend.queue(self.device)
        before = self._tables.get(name)
        if before is not None and before[:2] == (now, queue):
            return before[2]
        there = self._upload(table)
        self._tables[name] = (now, queue, there)
        return there

    def step(self, addresses: np.ndarray, groups: np.ndarray, grad_scale, found_inf) -> None:
        scale, inf = (
            None if t is None else t.detach().reshape(-1).to(self.device, torch.float32, non_blocking=True)
            for t in (grad_scale, found_inf)
        )
        tensors, table = self._table("tensors", addresses), self._table("groups", groups)
        native = self.arena.native
        where = {
            "arena": native.header,
            "states": native.base,
            "chunks": self._chunks.data_ptr(),
            "tensors": tensors.data_ptr(),
            "groups": table.data_ptr(),
            "grad_scale": 0 if scale is None else scale.data_ptr(),
            "found_inf": 0 if inf is None else inf.data_ptr(),
        }
        settings = self._settings
        measure = bool(settings["max_grad_norm"] or settings["skip_nonfinite"] or scale is not None or inf is not None)
        try:
            native.step(
                contract.operands(self.layout, self._algorithm, settings, where),
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
            self._backend.wait(self.device)  # a replay under way reads what it was launched with
        for source in changed:
            source.copy_(table)

    def found(self) -> tuple[float, int]:
        return self._norm.item(), int(self._skipped.item())

    def set_found(self, norm: float, skipped: int) -> None:
        self._norm.fill_(norm)
        self._skipped.fill_(skipped)

    def page_out(self) -> None:
        self.arena.native.page_out(*self._backend.queue(self.device))

    def page_in(self) -> None:
        self.arena.native.page_in()

    def resident_bytes(self) -> int:
        return self.arena.native.resident_bytes()
