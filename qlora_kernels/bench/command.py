"""``qlora-kernels bench``: measures, prints, draws, and writes files."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

from ..errors import InputError
from ..storage.lock import claim_of, claimed
from . import options
from .case import OURS, QUIET, Settings
from .instruction_sets import limited_to
from .points import Point
from .report import compare, plots, rivals, table
from .report import results as result_files
from .report.ratios import find_contender
from .timing.machine import result_name
from .timing.measure import failed_ours
from .worker import PREPARE_SECONDS, OutOfTime, Worker, failed_case

#: A case needs this much time to be worth beginning.
_LEAST_SECONDS = 2.0
_BARS_PATIENCE = 100.0


def command(namespace: argparse.Namespace) -> int:
    """Carries the command out.

    Returns:
        0; 1 when this package failed in a case, or no contender could be measured in one; after a signal 128 more than
        its number (130 for Ctrl-C), with what was measured until then written.

    Raises:
        InputError: for arguments and files that cannot be used.
    """
    if namespace.compare:
        print(compare.terminal(*(result_files.load(path) for path in namespace.compare)))
        return 0
    if namespace.show:
        print(table.terminal(result_files.load(namespace.show)))
        return 0
    options.points_of(namespace)  # raises before anything is started
    with limited_to(namespace.isa) as limited:
        slow = options.slow_dtype(namespace)
        points = options.points_of(namespace, "float32" if slow else "bfloat16")
        if slow:
            print(f"qlora-kernels bench: {table.slow_line(slow)}", file=sys.stderr)
        if namespace.list:
            print("\n".join(map(str, points)))
            return 0
        settings = options.settings_of(namespace)
        options.check_device(points, settings.device)
        points = options.on_device(points, settings.device)
        if namespace.rivals and not (namespace.out or namespace.into):
            cases = run(points, settings, options.minutes_of(namespace, settings.device))
            return rivals.show(cases, dict.fromkeys(point.dtype for point in points))
        return _to_file(namespace, points, settings, {"limited": limited, "slow_bfloat16": slow})


def _to_file(namespace: argparse.Namespace, points: list[Point], settings: Settings, machine: dict[str, Any]) -> int:
    """Measures, and writes; returns the exit code."""
    out = namespace.out or f"bench-{settings.device}-{datetime.datetime.now():%Y%m%d-%H%M%S}.jsonl"
    if namespace.into:
        out = os.path.join(namespace.into, result_name(settings.threads))
    out = os.path.realpath(out) if os.path.islink(out) else out
    _check_writable(out)
    with claimed(claim_of(os.path.abspath(out)), out):
        return _measure(namespace, points, settings, out, machine)


def _measure(
    namespace: argparse.Namespace,
    points: list[Point],
    settings: Settings,
    out: str,
    machine: dict[str, Any] | None = None,
) -> int:
    """Measures, and writes to ``out``; returns the exit code."""
    minutes = options.minutes_of(namespace, settings.device)
    show = _progress(len(points), namespace.quiet)
    results = result_files.begin(settings, options.sweep_of(namespace), machine)
    with _Signals() as signals:
        try:
            # --bars has many cases to get through, and some rivals would take minutes in each.
            patience = _BARS_PATIENCE if namespace.bars else PREPARE_SECONDS
            taken = run(points, settings, minutes, namespace.retries, show, patience)
            with contextlib.closing(taken) as cases:
                for case in cases:
                    results["cases"].append(case)
                    _save(results, out)  # a kill leaves what was measured until then
                results["complete"] = True
        except KeyboardInterrupt:
            signals.code = signals.code or 128 + signal.SIGINT
            signals.again()
        try:
            show(None, "")
            return _tell(results, out, namespace.plots, signals.code)
        except KeyboardInterrupt:
            print("qlora-kernels bench: interrupted", file=sys.stderr)
            return signals.code


def _save(results: dict[str, Any], out: str) -> bool:
    """Writes a result in which anything was measured; an empty one is no reason to lose an older."""
    if all(case.get("left_out") for case in results["cases"]):
        return False
    result_files.save(results, out)
    return True


def _tell(results: dict[str, Any], out: str, with_plots: bool, interrupted: int) -> int:
    """Writes and shows what was measured; returns the exit code.

    Args:
        results, out: what, and the file.
        with_plots: whether to draw it.
        interrupted: the exit code of a run that was; or 0.
    """
    if not _save(results, out):
        why = "interrupted before the first case" if interrupted else "no case fits that time"
        print(f"qlora-kernels bench: {why}; nothing is written", file=sys.stderr)
        return interrupted or 1
    print(table.terminal(results))
    written = [out, *(_plots(results, out) if with_plots else [])]
    print(f"\nWritten: {', '.join(written)}")
    if interrupted:
        print("qlora-kernels bench: interrupted; what was measured is written", file=sys.stderr)
        return interrupted
    failures = []
    for case in results["cases"]:
        why = failed_ours(case)
        # Of what did not fit the time, only this package's own failure before then counts.
        if why and not (case.get("left_out") and why == case["failed"]):
            failures.append(case)
            what = "this package failed in" if find_contender(case, OURS) else "no measurement of"
            print(f"qlora-kernels bench: {what} {case['title']}: {why}", file=sys.stderr)
    return 1 if failures else 0


def run(
    points: Sequence[Point],
    settings: Settings,
    minutes: float | None = None,
    retries: int = 0,
    progress: Callable[[Point | None, str], None] = lambda point, text: None,
    patience: float = PREPARE_SECONDS,
    begin: Callable[..., Any] | None = None,
) -> Generator[dict[str, Any], None, None]:
    """Measures points, each in a process of its own.

    Args:
        points: what.
        settings: how.
        minutes: for all; a case's share is what is left by then, divided by the cases left. What is not done by then
            is ended, and is a case with ``failed`` and ``left_out``.
        retries: while other processes take more than QUIET of the machine, a case is measured again up to so many
            times. Of the measurements that did not fail the one that was disturbed least is kept, whatever it says.
        progress: called with the point and a few words.
        patience: seconds for a contender to be set up and verified, or for a round of it.
        begin: what makes a measurement in the other process; by default that of the point's operation.

    Yields:
        Cases, as :meth:`qlora_kernels.bench.timing.measure.Measurement.result` gives them.
    """
    with Worker() if begin is None else Worker(begin=begin) as worker:
        worker.prepare_seconds = patience
        if minutes is not None:
            worker.deadline = time.monotonic() + 60 * minutes
        for number, point in enumerate(points):
            progress(point, "")
            own = settings
            if worker.deadline is not None:
                # Half of a case's share is for its preparation.
                share = (worker.deadline - time.monotonic()) / (len(points) - number) / 2
                own = replace(settings, seconds=max(min(settings.seconds, share), 0.0), min_rounds=3)
            yield _quietest(worker, point, own, retries, lambda text, point=point: progress(point, text), minutes)


def _quietest(
    worker: Worker,
    point: Point,
    settings: Settings,
    retries: int,
    progress: Callable[[str], None],
    minutes: float | None,
) -> dict[str, Any]:
    """A case, measured until the machine is quiet enough or the time is over."""
    attempts: list[dict[str, Any]] = []
    without: dict[str, str] = {}
    at_work = ""
    while not attempts or (len(attempts) <= retries and (attempts[-1]["other_processes"] or 0) > QUIET):
        if worker.deadline is not None and worker.deadline - time.monotonic() < _LEAST_SECONDS:
            break
        try:
            attempts.append(worker.measure(point, settings, progress, without))
        except OutOfTime as problem:
            at_work = str(problem)
            break
    if attempts:
        return min(attempts, key=_rank)
    why = f"left out: the {minutes:g} minutes were over" + (f" while {at_work} was at work" if at_work else "")
    return {**failed_case(point, why, without), "left_out": True}


def _rank(case: dict[str, Any]) -> tuple:
    """The better of two measurements has less: failures first, then disturbance."""
    others = case["other_processes"]
    failures = sum("failed" in contender for contender in case["contenders"])
    return "failed" in case, failed_ours(case) is not None, failures, float("inf") if others is None else others


class _Signals:
    """Within it, signals that ask for the end raise KeyboardInterrupt, so that nothing is left running or lying about.

    Only the first one: a second would interrupt the cleaning up. :meth:`again` listens again.

    Attributes:
        code: to exit with after one, as shells have it; 0 before.
    """

    def __init__(self) -> None:
        self.code = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)
                # What is ignored, as under nohup, stays so; a handler that is not Python's could not be restored.
                if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.getsignal(number)
            self.again()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def again(self) -> None:
        """Listens for the next one."""
        for number in self._before:
            signal.signal(number, self._end)

    def _end(self, number: int, frame: Any) -> None:
        for other in self._before:
            signal.signal(other, signal.SIG_IGN)
        self.code = 128 + number
        raise KeyboardInterrupt


def _progress(count: int, quiet: bool) -> Callable[[Point | None, str], None]:
    """What shows how far the run is: a bar, or without tqdm a line for each case. A point of None ends it."""
    if quiet:
        return lambda point, text: None
    done, told = 0, 0.0
    try:
        from ..console.progress import bar

        shown = bar(total=count, unit="case")
    except ImportError:
        shown, begin = None, time.monotonic()

    def show(point: Point | None, text: str) -> None:
        nonlocal done, told
        if point is not None and text:
            if shown is not None and time.monotonic() > told + 0.5 and sys.stderr and sys.stderr.isatty():
                told = time.monotonic()
                shown.set_postfix_str(text)
            return
        if shown is None:
            if point is not None:
                print(f"{time.monotonic() - begin:6.1f} s  {done + 1}/{count}  {point}", file=sys.stderr, flush=True)
        elif point is None:
            shown.update(max(done - shown.n, 0))
            shown.close()
        else:
            shown.set_postfix_str("", refresh=False)
            shown.set_description_str(str(point), refresh=False)
            shown.update(done - shown.n)
            shown.refresh()
        done += point is not None

    return show


def _check_writable(out: str) -> None:
    """Finds now, not after the measurement, that the result cannot be written.

    Raises:
        InputError: saying why.
    """
    folder = os.path.dirname(os.path.abspath(out))
    if os.path.isdir(out):
        raise InputError(f"--out {out} is a folder; it should be a file")
    if os.path.exists(out) and not os.path.isfile(out):
        raise InputError(f"--out {out} is a device or the like; it should be a file")
    if not os.path.isdir(folder):
        raise InputError(f"--out {out}: there is no folder {folder}")
    try:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(out)  # raises for a name that is too long
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as problem:
        raise InputError(f"--out {out} cannot be written: {problem.strerror or problem}") from None


def _plots(results: dict[str, Any], out: str) -> list[str]:
    """Draws what the result holds, beside its file; returns the names. Without matplotlib it says so."""
    written = []
    stem = os.path.splitext(out)[0]
    for name in plots.PLOTS:
        path = f"{stem}-{name}.png"
        try:
            if plots.draw(results, name, path, f"{os.path.basename(out)} {results['date']}"):
                written.append(path)
        except ImportError:
            print("No plots: matplotlib is not installed (pip install 'qlora_kernels[finetune]')", file=sys.stderr)
            break
        except OSError as problem:
            print(f"No plot {path}: {problem.strerror or problem}", file=sys.stderr)
    return written
