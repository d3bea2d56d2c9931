"""The native extension and its codes for dtypes."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.lru_cache(maxsize=1)
def native() -> Any:
    """The extension. torch is imported before it, so that both share torch's OpenMP runtime.

    Raises:
        ImportError: when it has not been built.
    """
    try:
        return importlib.import_module("qlora_kernels._C")
    except ImportError as error:
        raise ImportError(
            f"the native extension qlora_kernels._C could not be loaded ({error}); build it with 'pip install -e .' "
            "in the source folder"
        ) from error


def code_of(dtype: torch.dtype) -> int:
    """The extension's code for a dtype."""
    return DTYPE_CODES[dtype]
