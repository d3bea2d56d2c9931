"""The conformance kernels (emulator/conformance.cu) as nvcc compiles them for the card that is there."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from emulated import ROOT, build, load

from qlora_kernels.native import architectures


@functools.lru_cache(maxsize=1)
def conformance_module() -> ModuleType:
    """Built when it is first asked for."""
    arch = architectures.for_card(*torch.cuda.get_device_capability())
    folder = ROOT / "build" / f"conformance-{arch}"
    return load(build(folder, "_conformance", QLK_CONFORMANCE="ON", QLK_CUDA_ARCHS=arch), "_conformance")
