"""Processes that start quickly, because they are forked from one that has imported everything.

A fresh interpreter takes seconds to import torch and transformers. The server that these processes are forked from has
only imported them, so it runs no threads of theirs, and a fork is safe.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "transformers.models.llama.modeling_llama",
        "transformers.generation.utils",
        "matplotlib.backends.backend_agg",
        "qlora_kernels.interop.transformers.quantize_folder",
        "qlora_kernels.finetune.run",
        "qlora_kernels.cli.main",
    ]
)


def start(function: Callable[..., int | None], *arguments: Any, errors: os.PathLike | None = None):
    """Calls a module's function in a new process, which exits with the returned value; ``errors`` gets its stderr."""
    process = _CONTEXT.Process(target=_call, args=(errors, function, *arguments))
    process.start()
    return process


def _call(errors: os.PathLike | None, function: Callable[..., int | None], *arguments: Any) -> None:
    if errors is not None:
        descriptor = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 2)
    code = function(*arguments)
    sys.stdout.flush()
    sys.exit(code or 0)
