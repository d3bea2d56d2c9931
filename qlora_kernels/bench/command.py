"""``qlora-kernels bench``: measures, tells, draws, and writes down."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from ..errors import InputError
from . import compare, options, plots, table
from . import results as result_files
from .common import QUIET, Settings
from .measure import failed_ours
from .points import Point
from .worker import OutOfTime, Worker, failed_case

#: A run needs this much time to be worth beginning.
_LEAST_SECONDS = 2.0


class _Ended(KeyboardInterrupt):
    """A signal asked for the end.

    Attributes:
        code: to exit with, as shells have it.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


def command(namespace: argparse.Namespace) -> int:
    """Carries the command out.

    Returns:
        0; 1 when this package failed in a case, or nobody could be measured; 130 after Ctrl-C, and 128 more than
        another signal's number, with what was measured until then written.

    Raises:
        InputError: for arguments and files that cannot be used.
    """
    if namespace.compare:
        print(compare.terminal(*(result_files.load(path) for path in namespace.compare)))
        return 0
    if namespace.show:
        print(table.terminal(result_files.load(namespace.show)))
        return 0
    points = options.points_of(namespace)
    if namespace.list:
        print("\n".join(map(str, points)))
        return 0
    settings = options.settings_of(namespace)
    out = namespace.out or f"bench-{settings.device}-{datetime.datetime.now():%Y%m%d-%H%M%S}.jsonl"
    _check_writable(out)
    minutes = options.minutes_of(namespace, settings.device)
    show = _progress(len(points), namespace.quiet)
    results = result_files.begin(settings, options.sweep_of(namespace))
    interrupted = 0
    try:
        with _signals(), contextlib.closing(run(points, settings, minutes, namespace.retries, show)) as cases:
            for case in cases:
                results["cases"].append(case)
                result_files.save(results, out)  # a kill leaves what was measured until then
            results["complete"] = True
    except KeyboardInterrupt as problem:
        interrupted = getattr(problem, "code", 128 + signal.SIGINT)
    show(None, "")
    if not results["cases"]:
        print("qlora-kernels bench: interrupted before the first case; nothing is written", file=sys.stderr)
        return interrupted
    result_files.save(results, out)
    print(table.terminal(results))
    written = [out, *(_plots(results, out) if namespace.plots else [])]
    print(f"\nWritten: {', '.join(written)}")
    if interrupted:
        print("qlora-kernels bench: interrupted; what was measured is written", file=sys.stderr)
        return interrupted
    failures = [(case, why) for case in results["cases"] if (why := failed_ours(case)) and not case.get("left_out")]
    for case, why in failures:
        what = "no measurement of" if "failed" in case else "this package failed in"
        print(f"qlora-kernels bench: {what} {case['title']}: {why}", file=sys.stderr)
    return 1 if failures else 0


def run(
    points: Sequence[Point],
    settings: Settings,
    minutes: float | None = None,
    retries: int = 0,
    progress: Callable[[Point | None, str], None] = lambda point, text: None,
) -> Iterator[dict[str, Any]]:
    """Measures points, each in a process of its own.

    Args:
        points: what.
        settings: how.
        minutes: for all; a case's share is what is left by then, divided by the cases left. What is not done by then
            is ended, and is a case with ``failed`` and ``left_out``.
        retries: while other processes take more than QUIET of the machine, a case is measured again up to so many
            times. Of the measurements that did not fail the one that was disturbed least is kept, whatever it says.
        progress: called with the point and a few words.

    Yields:
        Cases, as :meth:`qlora_kernels.bench.measure.Measurement.result` gives them.
    """
    with Worker() as worker:
        if minutes is not None:
            worker.deadline = time.monotonic() + 60 * minutes
        for number, point in enumerate(points):
            progress(point, "")
            own = settings
            if worker.deadline is not None:
                # Half of a case's share is for its preparation.
                share = (worker.deadline - time.monotonic()) / (len(points) - number) / 2
                own = replace(settings, seconds=max(min(settings.seconds, share), 0.0), min_rounds=3)
            case = _quietest(worker, point, own, retries, lambda text, point=point: progress(point, text))
            if case is None:
                case = {**failed_case(point, f"left out: the {minutes:g} minutes were over"), "left_out": True}
            yield case


def _quietest(
    worker: Worker, point: Point, settings: Settings, retries: int, progress: Callable[[str], None]
) -> dict[str, Any] | None:
    """A case, measured until the machine is quiet enough; None where there is no time for it."""
    attempts: list[dict[str, Any]] = []
    without: dict[str, str] = {}
    while not attempts or (len(attempts) <= retries and (attempts[-1]["other_processes"] or 0) > QUIET):
        if worker.deadline is not None and worker.deadline - time.monotonic() < _LEAST_SECONDS:
            break
        try:
            attempts.append(worker.measure(point, settings, progress, without))
        except OutOfTime:
            break
    return min(attempts, key=lambda case: ("failed" in case, case["other_processes"] or 0), default=None)


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Within, what asks for the end is an exception, like Ctrl-C, so that nothing is left running or lying about."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> None:
        raise _Ended(number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _progress(count: int, quiet: bool) -> Callable[[Point | None, str], None]:
    """What shows how far the run is: a bar, or without tqdm a line for each case. A point of None ends it."""
    if quiet:
        return lambda point, text: None
    done, told = 0, 0.0
    try:
        from ..progress import bar

        shown = bar(total=count, unit="case")
    except ImportError:
        shown, begin = None, time.monotonic()

    def show(point: Point | None, text: str) -> None:
        nonlocal done, told
        if point is not None and text:
            if shown is not None and time.monotonic() > told + 0.5 and sys.stderr.isatty():
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
    if not os.path.isdir(folder):
        raise InputError(f"--out {out}: there is no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise InputError(f"--out {out}: the folder {folder} cannot be written")


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
