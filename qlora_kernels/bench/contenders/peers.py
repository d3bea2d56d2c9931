"""Imports what is compared, quietly: what the process is forked from that measures. What is missing says so later."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys

NAMES = ("bitsandbytes", "peft", "ggml", "transformers.models.llama.modeling_llama")

with open(os.devnull, "w") as nowhere:
    try:
        before = os.dup(2)
        sys.stderr.flush()
        os.dup2(nowhere.fileno(), 2)
    except (OSError, AttributeError):
        before = None  # no stderr
    try:
        for name in NAMES:
            # A broken installation raises anything, and may even exit; the contender that needs it will do it again.
            with contextlib.suppress(BaseException):
                importlib.import_module(name)
    finally:
        if before is not None:
            os.dup2(before, 2)
            os.close(before)
