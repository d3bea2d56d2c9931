"""The native extension and its codes for dtypes."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from typing import Any

import torch

#: The extension's name, and the variable that names the file of one that lies elsewhere, as for another Python.
NAME, FILE = "qlora_kernels._C", "QLORA_KERNELS_EXTENSION_MODULE"
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.lru_cache(maxsize=1)
def native() -> Any:
    """The extension. torch is imported before it, so that both share torch's OpenMP runtime.

    Raises:
        ImportError: when it has not been built, or QLORA_KERNELS_EXTENSION_MODULE names a file that does not load.
    """
    if path := os.environ.get(FILE):
        return _from(path)
    try:
        return importlib.import_module(NAME)
    except ImportError as error:
        raise ImportError(
            f"the native extension qlora_kernels._C could not be loaded ({error}); build it with 'pip install -e .' "
            "in the source folder"
        ) from error


def _from(path: str) -> Any:
    """The extension in a file."""
    try:
        spec = importlib.util.spec_from_file_location(NAME, path)
        if spec is None or spec.loader is None:
            raise ImportError("its name is not that of a module")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (ImportError, OSError) as error:
        raise ImportError(f"the native extension that {FILE} names could not be loaded ({error})") from error
    sys.modules[NAME] = module
    return module


def code_of(dtype: torch.dtype) -> int:
    """The extension's code for a dtype."""
    return DTYPE_CODES[dtype]
