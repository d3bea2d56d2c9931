"""What a paged optimizer needs from an engine, and the parameters that its kernels take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..arena.layout import Layout
from ..options import Options


class Engine(Protocol):
    """Runs a paged optimizer's steps on one kind of device."""

    device: torch.device
    layout: Layout
    arena: Any
    #: What failed midway and left states that only a load can replace; empty if nothing did.
    broken: str

    @property
    def shared_with_parent(self) -> bool:
        """Whether this is a forked child whose writes would reach its parent's states."""
        ...

    def step(
        self,
        tensors: np.ndarray,
        groups: np.ndarray,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        sum_over_processes: Callable[[np.ndarray], float] | None = None,
    ) -> None:
        """Takes a step.

        Args:
            tensors: OptimizerTensor of each parameter.
            groups: OptimizerGroup of each group.
            grad_scale, found_inf: what torch.amp.GradScaler hands over.
            sum_over_processes: for shards, turns the sums of squares of this process's chunks, float64 [chunks], into
                the sum over all processes.
        """
        ...

    def refresh(self, groups: np.ndarray) -> None:
        """Passes OptimizerGroup of each group on to captured graphs."""
        ...

    def read_control(self) -> tuple[float, int]:
        """The gradients' norm in the last step, and how many steps were skipped."""
        ...

    def write_control(self, norm: float, skipped: int) -> None: ...
    def page_out(self) -> None: ...
    def page_in(self) -> None: ...
    def resident_bytes(self) -> int: ...


def kernel_params(
    layout: Layout, algorithm: int, options: Options, addresses: dict[str, int]
) -> dict[str, int | float | bool]:
    """OptimizerParams for the extension, field by field in their order."""
    base = addresses["arena"]
    return {
        "algorithm": algorithm,
        "state_bits": options.state_bits,
        "chunks": addresses["chunks"],
        "all_chunks": layout.chunk_count,
        "tensors": addresses["tensors"],
        "tensor_count": len(layout.slots),
        "groups": addresses["groups"],
        "control": base + layout.control,
        "steps": base + layout.steps,
        "partial": base + layout.partial,
        "header": base,
        "states": addresses.get("states", base),
        "grad_scale": addresses["grad_scale"],
        "found_inf": addresses["found_inf"],
        "max_grad_norm": options.max_grad_norm or 0.0,
        "skip_nonfinite": options.skip_nonfinite,
    }
