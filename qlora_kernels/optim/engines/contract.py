"""What an engine does for a paged optimizer, and the table that the kernels read."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch

from ..arena.layout import Layout

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


def operands(
    layout: Layout, algorithm: int, settings: dict[str, Any], where: dict[str, int]
) -> dict[str, int | float | bool]:
    """OptimizerParams for the extension, field by field in their order; ``where`` has the addresses."""
    base = where["arena"]
    return {
        "algorithm": algorithm,
        "state_bits": settings["state_bits"],
        "chunks": where["chunks"],
        "all_chunks": layout.chunk_count,
        "tensors": where["tensors"],
        "tensor_count": len(layout.slots),
        "groups": where["groups"],
        "control": base + layout.control,
        "steps": base + layout.steps,
        "partial": base + layout.partial,
        "header": base,
        "states": where.get("states", base),
        "grad_scale": where["grad_scale"],
        "found_inf": where["found_inf"],
        "max_grad_norm": settings["max_grad_norm"] or 0.0,
        "skip_nonfinite": settings["skip_nonfinite"],
    }
