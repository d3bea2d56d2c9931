"""A run with a lesser instruction set than the processor has: this package, torch and its libraries together.

A comparison is of like with like only if all of them are limited. Each reads an environment variable of its own, some
only once, when first used; so the variables are set before the processes that measure are started.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import qlora_kernels

from ..errors import InputError
from .worker import end_server

#: The variables of each set. A variable that is absent is unset: with AMX nothing is limited.
SETS: dict[str, dict[str, str]] = {
    "amx": {},
    "avx512_bf16": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    # MKL does not tell AVX-512 with and without bf16 apart.
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
}
_OURS = "QLORA_KERNELS_CPU_ISA"
_VARIABLES = (_OURS, "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
_TORCH = "import torch; print(torch.backends.cpu.get_cpu_capability())"


@contextlib.contextmanager
def limited_to(name: str | None) -> Iterator[dict[str, Any] | None]:
    """Limits what is started within to a set; None limits nothing.

    Yields:
        What a result says about it: ``forced``, and what torch then uses.

    Raises:
        InputError: for a set that this machine or build does not have, or where torch did not follow.
    """
    if name is None:
        yield None
        return
    available = qlora_kernels.build_info().get("isas_available", [])
    if name not in available:
        raise InputError(f"--isa {name}: this machine and build have {', '.join(available) or 'none'}")
    if name not in SETS:
        raise InputError(f"--isa {name}: torch cannot be limited to it; choose one of {', '.join(SETS)}")
    before = {variable: os.environ.get(variable) for variable in _VARIABLES}
    _set({variable: None for variable in _VARIABLES} | {_OURS: name} | SETS[name])
    end_server()  # what it imported may have chosen a set
    try:
        yield {"forced": name, "torch": _capability_of_torch(name)}
    finally:
        _set(before)
        end_server()


def _set(variables: dict[str, str | None]) -> None:
    for variable, value in variables.items():
        if value is None:
            os.environ.pop(variable, None)
        else:
            os.environ[variable] = value


def _capability_of_torch(name: str) -> str:
    """What torch says in a new process, which has not chosen yet."""
    done = subprocess.run([sys.executable, "-c", _TORCH], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    found = done.stdout.strip()
    wanted = SETS[name].get("ATEN_CPU_CAPABILITY")
    if done.returncode or (wanted and found.lower() != wanted):
        raise InputError(f"--isa {name}: torch uses {found or 'nothing'} in spite of ATEN_CPU_CAPABILITY={wanted}")
    return found
