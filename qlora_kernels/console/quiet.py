"""transformers without its bars and long warnings."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No loading and saving bars, and no report of missing keys, which the caller checks for."""
    from transformers.utils import logging as their_logging

    logger, bars = logging.getLogger("transformers"), their_logging.is_progress_bar_enabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    their_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            their_logging.enable_progress_bar()
