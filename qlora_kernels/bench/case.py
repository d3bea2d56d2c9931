"""What is measured: a *case* is one operation at one size, with several *contenders*, this package first."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

OURS = "qlora_kernels"
QUANTILES = (0, 20, 50, 80, 100)
QUIET = 0.05


@dataclass(frozen=True)
class Settings:
    """What all cases of a run have in common.

    Attributes:
        device: "cpu" or "cuda".
        threads: given to torch, whose setting every contender follows.
        alpha: of adapters; their term is scaled by alpha / r.
        cache_bytes: the largest cache. Copies of each weight take turns that together are larger, so that a weight
            comes from memory, as in a model, where many others have been used since.
        most_copies: but no more than these.
        seconds: how long to time a case.
        min_rounds, max_rounds: limits that come before ``seconds``.
        only: the contenders to measure, by name; all if empty. Trainings always have all.
    """

    device: str = "cpu"
    threads: int = 2
    alpha: float = 32.0
    cache_bytes: int = 64 << 20
    most_copies: int = 128
    seconds: float = 6.0
    min_rounds: int = 5
    max_rounds: int = 40
    only: tuple[str, ...] = ()

    def copies(self, bytes_each: int) -> int:
        """How many copies of so many bytes take turns: a quarter more than the cache holds, from 3 to most_copies."""
        wanted = math.ceil(1.25 * self.cache_bytes / max(bytes_each, 1))
        return max(3, min(wanted, self.most_copies))


@dataclass(frozen=True)
class Ready:
    """A contender that is set up.

    Attributes:
        call: does the work once, on the copy of the given number.
        error: how far a result of ``call`` is from the truth.
        limit: the largest error that counts as correct.
        bytes: what the work must at least read and write.
        copies: of what the work is done on, used in turn.
        checks: how many calls are verified before any is timed, the first on the first copy and the others on the last.
        waits: on a card: the call waits for the device, and so can neither be captured in a graph nor queue up.
        before: runs before each call, untimed, and finishes on the device first; a call with it is not captured either.
        parts: bytes of memory by purpose, for the plot of memory.
        format_error: how far a result is from the truth of the weight before quantization; of contenders that quantize.
    """

    call: Callable[[int], Any]
    error: Callable[[Any], float]
    limit: float
    bytes: int
    copies: int = 1
    checks: int = 2
    waits: bool = False
    before: Callable[[], Any] | None = None
    parts: dict[str, int] | None = None
    format_error: Callable[[Any], float] | None = None

    def run(self, index: int) -> Any:
        """A call and what comes before it, untimed."""
        if self.before is not None:
            self.before()
        return self.call(index)


@dataclass(frozen=True)
class Contender:
    """One of those that do the work of a case. ``prepare`` may raise; the reason is then reported."""

    name: str
    prepare: Callable[[], Ready]


@dataclass(frozen=True)
class Case:
    """One operation at one size.

    Attributes:
        title: the operation's name for people, without sizes.
        flops: floating-point operations of the work, or None.
        contenders: this package first.
        beside: makes what runs beside every round, and ends with it; on a CPU.
    """

    title: str
    flops: int | None
    contenders: list[Contender]
    beside: Callable[[], AbstractContextManager[Any]] | None = None


class WrongResult(Exception):
    """A contender computed something other than what was asked for."""


class DeviceLost(Exception):
    """The card no longer answers this process: every further call on it fails."""


class OtherProcesses:
    """How much of the machine other processes took while the clock ran."""

    def __init__(self) -> None:
        self._busy = self._own = self._all = 0.0
        self._begin: tuple[float, float, float] | None = None

    def resume(self) -> None:
        self._begin = self._now()

    def pause(self) -> None:
        assert self._begin is not None, "pause() follows resume()"
        busy, own, everything = (end - begin for begin, end in zip(self._begin, self._now(), strict=True))
        self._busy, self._own, self._all = self._busy + busy, self._own + own, self._all + everything

    @property
    def share(self) -> float | None:
        """Of all processors' time, 0 to 1; None on systems that don't tell."""
        if not self._all or not self._busy:
            return None
        return round(min(max((self._busy - self._own) / self._all, 0.0), 1.0), 3)

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds of all processors' work, of this process's and its ended children's, and of all processors' time."""
        own = os.times()
        cores = os.cpu_count() or 1
        try:
            with open("/proc/stat") as file:
                user, nice, system = map(int, file.readline().split()[1:4])
        except (OSError, ValueError):
            user = nice = system = 0
        busy = (user + nice + system) / os.sysconf("SC_CLK_TCK")
        mine = own.user + own.system + own.children_user + own.children_system
        return busy, mine, time.perf_counter() * cores


def printable(text: str) -> str:
    """Someone else's text on one line, without characters that a terminal would obey or cannot show."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def reason(problem: Exception) -> str:
    """One line on why a contender did not take part."""
    if isinstance(problem, ModuleNotFoundError):
        return f"not installed ({(problem.name or str(problem)).split('.')[0]})"
    try:
        text = printable(str(problem))
    except Exception:
        text = "(its message cannot be told)"
    return text if isinstance(problem, WrongResult) else f"{type(problem).__name__}: {text}"[:200]


def quantiles_of(samples: list[float]) -> dict[int, float]:
    """The quantiles in QUANTILES, linear between neighbouring samples."""
    data = torch.tensor(samples, dtype=torch.float64)
    values = torch.quantile(data, torch.tensor(QUANTILES, dtype=torch.float64) / 100)
    return dict(zip(QUANTILES, values.tolist(), strict=True))


def largest_error(results: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """The largest relative error of several results; NaN when anything is NaN.

    Raises:
        ValueError: when there are not as many results as there should be.
    """
    errors = [relative_error(one, truth) for one, truth in zip(results, exact, strict=True)]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative Frobenius error against float64; NaN when anything is NaN."""
    return ((actual.detach().double() - exact).norm() / exact.norm()).item()
