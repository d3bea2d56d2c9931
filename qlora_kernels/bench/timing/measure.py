"""How a case is measured: contenders are verified, then timed round by round in changing order.

Clocks and neighbours on a machine drift, so the contenders take turns: a round gives each of them a few calls, the next
round starts with another one. What is reported is the median over all calls, with the quantiles around it.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..case import OURS, Case, Contender, OtherProcesses, Ready, Settings, WrongResult, quantiles_of, reason
from ..points import Point
from .peak import peak_allocated


@dataclass
class Runner:
    """A contender in a case: ready, or why it does not take part."""

    name: str
    ready: Ready | None = None
    error: float | None = None
    format_error: float | None = None
    failure: str | None = None
    peak: int | None = None
    typical: float = 0.0
    seconds: list[float] = field(default_factory=list)
    calls: int = 0
    known: bool = False  # one call, the verified one, says enough

    @property
    def set_up(self) -> Ready:
        """What ``ready`` is for every contender that has not failed."""
        assert self.ready is not None, self.failure
        return self.ready

    def once(self) -> float:
        """Seconds of one call, on the next copy of the weight."""
        ready = self.set_up
        index, self.calls = self.calls % ready.copies, self.calls + 1
        if ready.before is not None:
            ready.before()
        begin = time.perf_counter()
        result = ready.call(index)
        end = time.perf_counter()
        del result
        return end - begin


class Measurement:
    """A case in progress: set up and verified when made, then timed by :meth:`round`.

    Args:
        case: what to measure.
        settings: how.
        point: where.
        without: reasons why some contenders are left out, by name: in an earlier attempt the process ended with them.
        announce: called with the name of each contender before it is at work, and with "" after it; untimed.

    Attributes:
        rounds: how many there should be; none where every contender has failed.

    Raises:
        DeviceLost: also from :meth:`round`, while the contender that did it is announced.
    """

    # A call shorter than this is preceded by an untimed one, since the contender before it has left its own code in the
    # caches. A longer one doesn't notice.
    SHORT = 0.020
    # A call longer than this is timed once a round, one longer than a third of it twice, others so often:
    LONG, CALLS = 0.3, 4
    # Beside other work so many, in succession: the scheduler takes a core away for milliseconds at a time.
    CALLS_BESIDE = 25
    # One slower than this is warm after the calls that are verified, and not called once more for its peak memory.
    SLOW = 2.0
    # A rival slower than this is not called again: torch's bf16 products without bf16 instructions take minutes.
    ENDLESS = 10.0

    def __init__(
        self,
        case: Case,
        settings: Settings,
        point: Point,
        without: Mapping[str, str] | None = None,
        announce: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.case, self.settings, self.point = case, settings, point
        self.rounds_done = 0
        self._announce = announce
        torch.set_num_threads(settings.threads)
        without = without or {}
        self.runners = [Runner(contender.name, failure=without.get(contender.name)) for contender in case.contenders]
        for runner, contender in zip(self.runners, case.contenders, strict=True):
            if runner.failure is None:
                self._prepare(runner, contender)
        if case.beside is not None:
            self._again_beside()
        repeated = [runner for runner in self.running if not runner.known]
        estimate = sum(r.typical * (self._timed_calls(r) + (r.typical < self.SHORT)) for r in repeated)
        wanted = int(settings.seconds / estimate) if estimate else 0
        self.rounds = min(max(wanted, settings.min_rounds), settings.max_rounds) if self.running else 0
        self._others = OtherProcesses()

    @property
    def running(self) -> list[Runner]:
        """Those that have not failed."""
        return [runner for runner in self.runners if runner.failure is None]

    def _prepare(self, runner: Runner, contender: Contender) -> None:
        """Sets a contender up and holds its result on the first and the last copy against the truth."""
        with self._at_work(runner):
            ready = runner.ready = contender.prepare()
            for check in range(ready.checks):
                begin = time.perf_counter()
                result = ready.run(0 if check == 0 else ready.copies - 1)
                runner.typical = time.perf_counter() - begin
                error = ready.error(result)
                if ready.format_error is not None and check == 0:
                    runner.format_error = ready.format_error(result)
                del result
                runner.error = error if runner.error is None else max(runner.error, error)
                if not error <= ready.limit:
                    raise WrongResult(f"wrong result: error {error:.2e}, allowed {ready.limit:.0e}")
                if runner.typical >= self.ENDLESS and runner is not self.runners[0]:
                    runner.known, runner.seconds = True, [runner.typical]
                    return
            if runner.typical < self.SLOW:
                runner.peak = peak_allocated(lambda: ready.run(0), self.settings.device)
                runner.typical = runner.once()
            if runner.typical < self.LONG:
                runner.typical = min(runner.once() for _ in range(self.CALLS))

    def _again_beside(self) -> None:
        """How long calls take beside the other work, which decides how many there are."""
        with self._beside():
            for runner in self.running:
                with self._at_work(runner):
                    runner.typical = statistics.fmean(runner.once() for _ in range(self.CALLS))

    def _beside(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.case.beside is None else self.case.beside()

    @contextlib.contextmanager
    def _at_work(self, runner: Runner) -> Iterator[None]:
        """Announces a contender; one that raises has failed, with the reason."""
        self._announce(runner.name)
        try:
            yield
        except Exception as problem:
            runner.failure, runner.ready = reason(problem), None
            self._after_failure(runner.failure)
        self._announce("")

    def _after_failure(self, why: str) -> None:
        """What has to be looked at before others go on."""

    def _timed_calls(self, runner: Runner) -> int:
        if runner.typical >= self.LONG:
            return 1
        if self.case.beside is not None:
            return self.CALLS_BESIDE
        return 2 if runner.typical >= self.LONG / 3 else self.CALLS

    def round(self) -> float:
        """One round; returns the mean seconds of the first contender's calls in it, NaN where it has failed."""
        running = [runner for runner in self.running if not runner.known]
        if not running:
            return math.nan
        start = self.rounds_done % len(running)
        self._others.resume()
        gc.disable()
        try:
            with self._beside():
                for runner in running[start:] + running[:start]:
                    with self._at_work(runner):
                        if runner.typical < self.SHORT:
                            runner.once()
                        runner.seconds += [runner.once() for _ in range(self._timed_calls(runner))]
        finally:
            gc.enable()
            self._others.pause()
        self.rounds_done += 1
        ours = self.runners[0]
        return math.nan if ours.failure else statistics.fmean(ours.seconds[-self._timed_calls(ours) :])

    def result(self) -> dict[str, Any]:
        """What was measured, as plain values for a JSON file."""
        return {
            **self.point.as_dict(),
            "title": self.case.title,
            "flops": self.case.flops,
            "rounds": self.rounds_done,
            "other_processes": self._others.share,
            "contenders": [self._describe(runner) for runner in self.runners],
        }

    def _describe(self, runner: Runner) -> dict[str, Any]:
        if runner.failure is not None:
            return {"name": runner.name, "failed": runner.failure}
        quantiles = quantiles_of(runner.seconds)
        return {
            "name": runner.name,
            "samples": len(runner.seconds),
            "median_ms": quantiles[50] * 1e3,
            "mean_ms": statistics.fmean(runner.seconds) * 1e3,
            **{f"q{q}_ms": value * 1e3 for q, value in quantiles.items() if q != 50},
            **self._facts(runner),
        }

    def _facts(self, runner: Runner) -> dict[str, Any]:
        ready = runner.set_up
        return {
            "error": runner.error,
            **({} if runner.format_error is None else {"format_error": runner.format_error}),
            "bytes": ready.bytes,
            "copies": ready.copies,
            "peak_allocated": runner.peak,
            **({} if ready.parts is None else {"parts": ready.parts}),
        }


class CudaMeasurement(Measurement):
    """The same on a card, whose one round is the whole of :func:`qlora_kernels.bench.timing.cuda_timing.measure`.

    All contenders of a case are told by one clock: by graph, or by events where one of them has no graph.
    """

    def __init__(self, *args: Any, card: Any = None, **more: Any) -> None:
        from .cuda_timing import Card

        self.card = Card() if card is None else card
        super().__init__(*args, **more)
        self.rounds = min(self.rounds, 1)
        self._measured: dict[str, dict[str, Any]] = {}

    def _after_failure(self, why: str) -> None:
        self.card.recover(why)

    def round(self) -> float:
        from .cuda_timing import Timed, measure

        runners = {runner.name: runner for runner in self.running}
        timed = [
            Timed(name, ready.call, ready.copies, ready.bytes, ready.waits, ready.before)
            for name, ready in ((name, runner.set_up) for name, runner in runners.items())
        ]
        self._others.resume()
        for one in measure(self.card, timed, self.settings.seconds, self._announce):
            if "failed" in one:
                runners[one["name"]].failure = one["failed"]
            else:
                self._measured[one["name"]] = one
        self._others.pause()
        self.rounds_done += 1
        ours = self._measured.get(self.runners[0].name)
        return math.nan if ours is None else ours["us"] / 1e6

    def _describe(self, runner: Runner) -> dict[str, Any]:
        if runner.failure is not None:
            return {"name": runner.name, "failed": runner.failure}
        measured = self._measured[runner.name]
        graph, event = measured["graph_us"], measured["event_us"]
        by = "graph" if all(self._measured[one.name]["graph_us"] for one in self.running) else "events"
        best = graph if by == "graph" else event
        return {
            "name": runner.name,
            "samples": best["samples"],
            "median_ms": best["median"] / 1e3,
            "q20_ms": best["q20"] / 1e3,
            "q80_ms": best["q80"] / 1e3,
            "by": by,
            "graph_ms": None if graph is None else graph["median"] / 1e3,
            "event_ms": event["median"] / 1e3,
            "event_q20_ms": event["q20"] / 1e3,
            "event_q80_ms": event["q80"] / 1e3,
            "event_samples": event["samples"],
            "host_ms": measured["host_us"]["median"] / 1e3,
            "wall_ms": measured["wall_us"]["median"] / 1e3,
            "no_graph": measured["no_graph"],
            **self._facts(runner),
        }


def start(
    case: Case,
    settings: Settings,
    point: Point,
    without: Mapping[str, str] | None = None,
    announce: Callable[[str], None] = lambda name: None,
) -> Measurement:
    """A measurement on the settings' device."""
    kind = CudaMeasurement if settings.device.startswith("cuda") else Measurement
    return kind(case, settings, point, without, announce)


def failed_ours(case: dict[str, Any]) -> str | None:
    """None, or why this package has no figure in a case; where it takes no part, why no contender has one."""
    ours = next((c for c in case["contenders"] if c["name"] == OURS), None)
    if ours is not None:
        return ours.get("failed")
    failures = [c.get("failed") for c in case["contenders"]]
    return case.get("failed") or (failures[0] if failures and all(failures) else None)
