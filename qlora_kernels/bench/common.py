"""How things are measured: contenders are verified, then timed round by round in changing order.

A *case* is one operation at one size, with several *contenders*; the first is this package. Clocks and neighbours on a
machine drift, so the contenders take turns: a round gives each of them a few calls, the next round starts with another
one. What is reported is the median over all calls, with the quantiles around it.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

OURS = "qlora_kernels"
QUANTILES = (0, 20, 50, 80, 100)
QUIET = 0.05


@dataclass(frozen=True)
class Settings:
    """What is measured, and for how long.

    Attributes:
        n, k: out_features and in_features of the weight.
        rank, alpha: of the adapter, where there is one.
        threads: given to torch, whose setting every contender follows.
        copies: copies of each weight, used in turn, so that no cache holds the one that comes next.
        seconds: how long to measure a case.
        min_rounds, max_rounds: limits that come before ``seconds``.
    """

    n: int = 4096
    k: int = 4096
    rank: int = 16
    alpha: float = 32.0
    threads: int = 2
    copies: int = 4
    seconds: float = 6.0
    min_rounds: int = 5
    max_rounds: int = 40


@dataclass(frozen=True)
class Ready:
    """A contender that is set up.

    Attributes:
        call: does the work once, on the weight of the given number.
        error: how far a result of ``call`` is from the truth.
        limit: the largest error that counts as correct.
        bytes: what the work must at least read or write of weights.
    """

    call: Callable[[int], Any]
    error: Callable[[Any], float]
    limit: float
    bytes: int


@dataclass(frozen=True)
class Contender:
    """Somebody who does the work of a case; ``prepare`` may raise, which is reported with its reason."""

    name: str
    prepare: Callable[[], Ready]


@dataclass(frozen=True)
class Case:
    """One operation at one size.

    Attributes:
        operation: its name in the code.
        title: its name for people, without the number of rows.
        m: rows of x, or None for operations on the weight alone.
        flops: floating-point operations of the work, or None.
        contenders: this package first.
    """

    operation: str
    title: str
    m: int | None
    flops: int | None
    contenders: list[Contender]

    @property
    def name(self) -> str:
        return self.title if self.m is None else f"{self.title}, M = {self.m}"


class WrongResult(Exception):
    """A contender computed something else than what was asked for."""


@dataclass
class _Runner:
    name: str
    ready: Ready | None = None
    error: float | None = None
    failure: str | None = None
    typical: float = 0.0
    seconds: list[float] = field(default_factory=list)
    calls: int = 0

    def once(self, copies: int) -> float:
        """Seconds of one call, on the next copy of the weight."""
        index, self.calls = self.calls % copies, self.calls + 1
        begin = time.perf_counter()
        result = self.ready.call(index)
        end = time.perf_counter()
        del result
        return end - begin


class Measurement:
    """A case in progress: set up and verified when made, then timed by :meth:`round`.

    Raises:
        Exception: whatever this package raises; and WrongResult when its result is wrong. The others may fail.
    """

    # A call shorter than this is preceded by an untimed one, since the contender before it has left its own code in the
    # caches. A longer one doesn't notice.
    SHORT = 0.020
    # A call longer than this is timed once a round, one longer than a third of it twice.
    LONG = 0.3

    def __init__(self, case: Case, settings: Settings) -> None:
        self.case, self.settings = case, settings
        self.rounds_done = 0
        torch.set_num_threads(settings.threads)
        self.runners = [self._prepare(contender) for contender in case.contenders]
        self.running = [runner for runner in self.runners if runner.failure is None]
        estimate = sum(r.typical * (self._timed_calls(r) + (r.typical < self.SHORT)) for r in self.running)
        self.rounds = min(max(int(settings.seconds / estimate), settings.min_rounds), settings.max_rounds)
        self._others = OtherProcesses()

    def _prepare(self, contender: Contender) -> _Runner:
        """Sets a contender up and holds its result on each copy against the truth; which is its warm-up, too."""
        runner = _Runner(contender.name)
        copies = self.settings.copies
        try:
            runner.ready = contender.prepare()
            for copy in range(copies):
                error = runner.ready.error(runner.ready.call(copy))
                runner.error = error if runner.error is None else max(runner.error, error)
                if not error <= runner.ready.limit:
                    raise WrongResult(f"wrong result: error {error:.2e}, allowed {runner.ready.limit:.0e}")
            runner.typical = runner.once(copies)
            if runner.typical < self.LONG:
                runner.typical = min(runner.once(copies) for _ in range(copies))
        except Exception as problem:
            if contender.name == OURS:
                raise
            runner.failure = reason(problem)
        return runner

    def _timed_calls(self, runner: _Runner) -> int:
        if runner.typical >= self.LONG:
            return 1
        return 2 if runner.typical >= self.LONG / 3 else self.settings.copies

    def round(self) -> float:
        """One round; returns the mean time of this package's calls in it, in seconds."""
        start = self.rounds_done % len(self.running)
        self._others.resume()
        gc.disable()
        try:
            for runner in self.running[start:] + self.running[:start]:
                if runner.typical < self.SHORT:
                    runner.once(self.settings.copies)
                runner.seconds += [runner.once(self.settings.copies) for _ in range(self._timed_calls(runner))]
        finally:
            gc.enable()
            self._others.pause()
        self.rounds_done += 1
        ours = self.runners[0]
        return statistics.fmean(ours.seconds[-self._timed_calls(ours) :])

    def result(self) -> dict[str, Any]:
        """What was measured, as plain values for a JSON file."""
        case = self.case
        return {
            "operation": case.operation,
            "title": case.title,
            "m": case.m,
            "rounds": self.rounds_done,
            "other_processes": self._others.share,
            "contenders": [self._describe(runner) for runner in self.runners],
        }

    def _describe(self, runner: _Runner) -> dict[str, Any]:
        if runner.failure is not None:
            return {"name": runner.name, "failed": runner.failure}
        quantiles = quantiles_of(runner.seconds)
        median = quantiles[50]
        return {
            "name": runner.name,
            "samples": len(runner.seconds),
            "median_ms": median * 1e3,
            **{f"q{q}_ms": value * 1e3 for q, value in quantiles.items() if q != 50},
            "error": runner.error,
            "gb_per_s": runner.ready.bytes / median / 1e9,
            "gflop_per_s": None if self.case.flops is None else self.case.flops / median / 1e9,
        }


class OtherProcesses:
    """How much of the machine other processes took while the clock ran: what disturbed a measurement, says so here."""

    def __init__(self) -> None:
        self._busy = self._own = self._all = 0.0
        self._begin: tuple[float, float, float] | None = None

    def resume(self) -> None:
        self._begin = self._now()

    def pause(self) -> None:
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
        """Seconds of all processors' work, of this process's work, and of all processors' time."""
        own = os.times()
        cores = os.cpu_count() or 1
        try:
            with open("/proc/stat") as file:
                user, nice, system = map(int, file.readline().split()[1:4])
        except (OSError, ValueError):
            user = nice = system = 0
        busy = (user + nice + system) / os.sysconf("SC_CLK_TCK")
        return busy, own.user + own.system, time.perf_counter() * cores


def reason(problem: Exception) -> str:
    """One line on why a contender did not take part."""
    if isinstance(problem, ModuleNotFoundError):
        return f"not installed ({(problem.name or str(problem)).split('.')[0]})"
    text = " ".join(str(problem).split())
    return text if isinstance(problem, WrongResult) else f"{type(problem).__name__}: {text}"[:200]


def quantiles_of(samples: list[float]) -> dict[int, float]:
    """The quantiles in QUANTILES, linear between neighbouring samples."""
    data = torch.tensor(samples, dtype=torch.float64)
    values = torch.quantile(data, torch.tensor(QUANTILES, dtype=torch.float64) / 100)
    return dict(zip(QUANTILES, values.tolist(), strict=True))


def measure(case: Case, settings: Settings, retries: int = 0) -> dict[str, Any]:
    """A case from beginning to end.

    Args:
        case: what to measure.
        settings: how.
        retries: while other processes take more than QUIET of the machine, measure again up to so many times. The
            measurement that was disturbed least is kept, whatever it says.
    """
    attempts: list[dict[str, Any]] = []
    while not attempts or (len(attempts) <= retries and (attempts[-1]["other_processes"] or 0) > QUIET):
        measurement = Measurement(case, settings)
        for _ in range(measurement.rounds):
            measurement.round()
        attempts.append(measurement.result())
    return min(attempts, key=lambda result: result["other_processes"] or 0)


class RoundClock:
    """A clock for pytest-benchmark that shows the time this package took, and stands still for the others.

    pytest-benchmark times one function. Here that function is a whole round, so that the contenders alternate, and the
    clock moves on by this package's share of it alone.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = RoundClock()


def run_under_pytest(benchmark: Any, case: Case, settings: Settings) -> dict[str, Any]:
    """Measures a case with pytest-benchmark's fixture, whose table and JSON then hold it; needs CLOCK as its timer."""
    measurement = Measurement(case, settings)

    def one_round() -> None:
        CLOCK.now += measurement.round()

    benchmark.pedantic(one_round, rounds=measurement.rounds, iterations=1)
    result = measurement.result()
    benchmark.extra_info.update(result)
    return result


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative Frobenius error against float64; NaN when anything is NaN."""
    return ((actual.detach().double() - exact).norm() / exact.norm()).item()
