"""Ctrl-C and SIGTERM: finish the work in progress, then stop and say so."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A signal asked the run to stop. Not an Exception, so that error handlers do not swallow it.

    Attributes:
        signum: the signal.
        note: what was saved, for the message.
    """

    def __init__(self, signum: int, note: str = "") -> None:
        super().__init__(note)
        self.signum = signum
        self.note = note


class StopSignal:
    """A context that catches SIGINT and SIGTERM, in the main thread; in others it does nothing.

    Inside :meth:`deferred` a first signal only sets :attr:`signum`, which the training loop reads between steps; a
    second one, or any signal outside it, raises :class:`Interrupted` at once.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._deferring = False
        self._earlier: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._earlier = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        self._earlier = {}

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._deferring and self.signum is None:
            self.signum = signum
            return
        raise Interrupted(signum)

    def check(self) -> None:
        """Raises :class:`Interrupted` if a signal arrived while deferred."""
        if self.signum is not None:
            raise Interrupted(self.signum)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """A context that completes before a signal takes effect."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
