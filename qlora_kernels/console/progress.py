"""Progress bars."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from ..errors import missing_extra


def bar(iterable: Iterable | None = None, *, show: bool = True, **more: Any) -> Any:
    """A tqdm bar on stderr; in a log file, where every update is a line of its own, a slow one.

    Args:
        iterable: what to go through; without tqdm installed it comes back as it is. None for a bar that is updated by
            hand, which needs tqdm.
        show: a bar that is not shown behaves the same otherwise.
        more: as tqdm takes it.

    Raises:
        ImportError: when tqdm is missed.
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
