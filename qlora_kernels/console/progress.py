"""Progress bars."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from ..errors import missing_extra


def bar(iterable: Iterable | None = None, *, show: bool = True, **more: Any) -> Any:
    """A tqdm bar on stderr. In a log file, where each update is a line, it updates slowly.

    Args:
        iterable: what to iterate over; returned unchanged if tqdm is not installed. None for a bar that is updated by
            hand, which needs tqdm.
        show: a hidden bar behaves the same otherwise.
        more: tqdm's other arguments.

    Raises:
        ImportError: when tqdm is needed and not installed.
    """
    try:
        from tqdm.auto import tqdm
    except ImportError:
        if iterable is None:
            raise missing_extra("tqdm", "finetune") from None
        return iterable
    live = (sys.stderr is not None and sys.stderr.isatty()) or "ipykernel" in sys.modules
    show = show and sys.stderr is not None
    return tqdm(iterable, disable=not show, mininterval=0.2 if live else 10.0, dynamic_ncols=True, **more)
