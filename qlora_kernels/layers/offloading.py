"""Layers whose tensors accelerate keeps elsewhere (offloaded to the host or to disk) between two calls."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

from torch import nn


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate brings the module's tensors for a call, and takes them away after it."""
    return bool(getattr(getattr(module, "_hf_hook", None), "offload", False))


@contextlib.contextmanager
def offloaded(*modules: nn.Module) -> Generator[None, None, None]:
    """Within it, modules that are read but never called have their tensors.

    accelerate's hooks bring a module's own tensors when it is called. Adapters lie in modules of their own.
    """
    begun: list[tuple[nn.Module, Any]] = []
    try:
        for module in filter(is_offloaded, modules):
            hook: Any = module._hf_hook
            begun.append((module, hook))
            hook.pre_forward(module)
        yield
    finally:
        for module, hook in begun:
            hook.post_forward(module, None)
