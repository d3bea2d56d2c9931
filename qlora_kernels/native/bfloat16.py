"""Whether products in bfloat16 are worth choosing on a device."""

from __future__ import annotations

import os
import platform

import torch

from .build_info import build_info

_SETS = {"avx512_bf16", "amx"}  # this package's kernels that multiply in bfloat16
# Values of ONEDNN_MAX_CPU_ISA (oneDNN's documentation, "CPU Dispatcher Control") below AVX512_CORE_BF16.
_LESSER = {"sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni"}


def slow_bfloat16(device: str) -> str | None:
    """Why products in bfloat16 are slower than in float32 on a device, as a clause; None where they are not.

    An emulated product takes two to ten times as long. ``ATEN_CPU_CAPABILITY`` does not count: torch's products,
    unlike its loops over elements, come from oneDNN whatever it says.
    """
    if device.startswith("cuda"):
        # Turing's tensor cores multiply float16 alone. A card that is absent is refused elsewhere.
        if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
            return "this card has no bfloat16 instructions"
        return None
    if platform.machine().lower() in ("aarch64", "arm64"):
        supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return _capped() if supported else "this processor has no bfloat16 instructions"
    # On x86 torch says yes from AVX-512 on, where it emulates them.
    info = build_info()
    if _SETS.isdisjoint(info.get("isas_available", ())):
        return "this processor has no bfloat16 instructions that the build knows"
    if info["isa_in_use"] not in _SETS:
        return f"QLORA_KERNELS_CPU_ISA={info['isa_in_use']} leaves out the processor's bfloat16 instructions"
    return _capped()


def _capped() -> str | None:
    """The same for what limits torch's own products."""
    if not torch.backends.mkldnn.is_available():
        return "this build of torch lacks oneDNN, which has its bfloat16 products"
    # oneDNN reads the older name only where the newer is not set.
    name = next((name for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA") if os.environ.get(name)), None)
    if name is not None and os.environ[name].lower() in _LESSER:
        return f"{name}={os.environ[name]} keeps torch from the processor's bfloat16 instructions"
    return None
