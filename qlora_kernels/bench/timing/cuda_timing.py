"""How calls on a card are timed: cold caches, full queues, contenders in turn.

Four times of a call, each the median over many with the 20% and 80% quantiles:

graph   on the device, in replays of a CUDA graph of many calls: the kernels and no host.
event   on the device, between events around each call that Python makes, while the queue is full: the kernels and what
        lies between those of one call.
host    until the call returns to Python.
wall    of calls one after the other, the host's work included, with one wait for the device at the end.

A call finds neither its inputs nor the place of its results in the L2 cache: copies of the inputs are used in turn, the
last results are kept, and together they are several times as large as that cache.
"""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..case import DeviceLost, quantiles_of, reason

#: Copies that take turns are together at least this many times as large as the L2 cache.
TIMES_L2 = 4
#: A sample by graph lasts at least this long, so that the start and end of a replay (microseconds) hardly count.
SAMPLE_US = 1000.0
#: The most calls in a graph.
MOST_CALLS = 240
#: The host's time is taken over at most this many calls in a row: a card queues about a thousand launches, and a launch
#: waits when the queue is full.
HOST_CALLS = 32
#: Calls in a row last at least this long, as far as HOST_CALLS allows: they share the one wait at their end.
WALL_US = 10_000.0
MIN_ROUNDS, MAX_ROUNDS = 8, 200


class Card:
    """The current CUDA device, as far as timing needs it."""

    def __init__(self) -> None:
        self.l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size

    def event(self) -> torch.cuda.Event:
        """An event recorded now in the current stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def microseconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return begin.elapsed_time(end) * 1e3

    def wait(self) -> None:
        torch.cuda.synchronize()

    def recover(self, why: str) -> None:
        """After a call that failed: frees what it held.

        Raises:
            DeviceLost: with ``why``, when the device answers no more, as after a fault of a kernel.
        """
        try:
            self.wait()
            gc.collect()
            torch.cuda.empty_cache()
        except Exception:
            raise DeviceLost(why) from None

    def occupy(self, microseconds: float) -> None:
        """Keeps the device busy about so long, so that what the host sends meanwhile queues up."""
        torch.cuda._sleep(int(microseconds * 2000))  # clocks; Hopper's run at up to 1.98 GHz

    def capture(self, function: Callable[[], Any]) -> Callable[[], None]:
        """A graph of what ``function`` sends; returns what replays it."""
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                function()
        finally:
            torch.cuda.set_stream(before)  # a capture that fails leaves its own stream behind
        return graph.replay


@dataclass(frozen=True)
class Timed:
    """A contender that is ready and verified.

    Attributes:
        name: the contender's.
        call: does the work once on copy i of its inputs, and returns the result.
        copies: how many copies there are.
        bytes: what the work must at least read and write.
        waits: whether the call waits for the device, and so can neither be captured nor queue up.
        before: runs before each call, untimed. Calls are then timed one by one, each on an idle device.
    """

    name: str
    call: Callable[[int], Any]
    copies: int
    bytes: int
    waits: bool = False
    before: Callable[[], Any] | None = None


def copies_for(bytes_each: int, l2_bytes: int) -> int:
    """How many copies of what a call touches exceed the L2 cache TIMES_L2 times; at least 3."""
    return max(3, math.ceil(TIMES_L2 * l2_bytes / bytes_each))


@dataclass
class _Runner:
    timed: Timed
    kept: list[Any] = field(default_factory=list)
    calls: int = 0
    replay: Callable[[], None] | None = None
    graph_calls: int = 0
    launch_us: float = 0.0
    no_graph: str | None = None
    calls_in_a_row: int = 1
    failure: str | None = None
    graph_us: list[float] = field(default_factory=list)
    event_us: list[float] = field(default_factory=list)
    host_us: list[float] = field(default_factory=list)
    wall_us: list[float] = field(default_factory=list)

    def once(self) -> None:
        """A call on the next copy. Its result replaces the oldest one: the memory of that is used next, not this."""
        i = self.calls % self.timed.copies
        self.calls += 1
        if not self.kept:
            self.kept = [None] * self.timed.copies
        self.kept[i] = self.timed.call(i)

    def a_turn(self) -> None:
        for _ in range(self.timed.copies):
            if self.timed.before is not None:
                self.timed.before()
            self.once()


def measure(
    card: Card,
    contenders: Sequence[Timed],
    seconds: float,
    announce: Callable[[str], None] = lambda name: None,
) -> list[dict[str, Any]]:
    """Times contenders in turn, each round beginning with another one.

    Args:
        card: the device.
        contenders: all verified.
        seconds: how long, all together; at least MIN_ROUNDS rounds.
        announce: called with the name of the contender at work.

    Returns:
        For each: ``name``, and ``failed``, the reason, where a call raised; or else ``bytes``, ``copies``,
        ``graph_us``, ``event_us``, ``host_us`` and ``wall_us`` (``median``, ``q20``, ``q80``, ``samples``; None where
        there is none), ``graph_calls``, ``no_graph`` (the reason), ``us`` (the time by graph, or else by event), and
        ``gb_per_s`` by that.

    Raises:
        DeviceLost: when the device answers no more.
    """
    end = time.perf_counter() + seconds
    runners = [_Runner(one) for one in contenders]

    def at_work(do: Callable[[Card, _Runner], None], runner: _Runner) -> None:
        announce(runner.timed.name)
        try:
            do(card, runner)
        except Exception as problem:
            runner.failure, runner.kept, runner.replay = reason(problem), [], None
            card.recover(runner.failure)
        announce("")

    for runner in runners:
        at_work(_prepare, runner)
    rounds = 0
    gc.disable()
    try:
        while rounds < MIN_ROUNDS or (time.perf_counter() < end and rounds < MAX_ROUNDS):
            running = [runner for runner in runners if runner.failure is None]
            if not running:
                break
            start = rounds % len(running)
            for runner in running[start:] + running[:start]:
                at_work(_sample, runner)
            rounds += 1
    finally:
        gc.enable()
    return [_describe(runner) for runner in runners]


def _prepare(card: Card, runner: _Runner) -> None:
    """Warms a contender up, and makes its graph."""
    for _ in range(2):
        runner.a_turn()
    card.wait()
    begin = time.perf_counter()
    runner.a_turn()
    card.wait()
    turn_us = (time.perf_counter() - begin) * 1e6
    copies = runner.timed.copies
    long_enough = math.ceil(WALL_US * copies / max(turn_us, 1e-3))
    runner.calls_in_a_row = min(max(copies, long_enough), HOST_CALLS)
    if runner.timed.waits or runner.timed.before is not None:
        first = "the call waits for the device"
        runner.no_graph = first if runner.timed.waits else "something untimed comes before each call"
        return
    turn_us = min(turn_us, _queued(card, runner, turn_us, one_by_one=False)[0])
    turns = max(1, min(math.ceil(SAMPLE_US / turn_us), MOST_CALLS // copies))

    def all_turns() -> None:
        for _ in range(turns):
            runner.a_turn()

    try:
        runner.replay = card.capture(all_turns)
        runner.graph_calls = turns * copies
        runner.replay()  # the first time the graph is sent to the device
        card.wait()
        begin = time.perf_counter()
        runner.replay()
        runner.launch_us = (time.perf_counter() - begin) * 1e6
        card.wait()
    except Exception as problem:
        runner.replay = None
        runner.no_graph = f"not captured: {type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
    # What was captured belongs to the graph; calls from here on make their own.
    runner.kept = []
    runner.a_turn()
    card.wait()


def _queued(card: Card, runner: _Runner, host_us: float, one_by_one: bool) -> list[float]:
    """Microseconds by events of a turn, or of each call of one, sent while the device is busy with something else."""
    if not runner.timed.waits:
        card.occupy(2 * host_us + 50)
    events = [card.event()]
    for _ in range(runner.timed.copies):
        runner.once()
        if one_by_one:
            events.append(card.event())
    if not one_by_one:
        events.append(card.event())
    card.wait()
    return [card.microseconds(a, b) for a, b in itertools.pairwise(events)]


def _sample(card: Card, runner: _Runner) -> None:
    """One sample by graph, calls in a row by the host's clock, and a turn by events."""
    if runner.timed.before is not None:
        for _ in range(runner.timed.copies):
            _sample_alone(card, runner)
        return
    if runner.replay is not None:
        card.occupy(2 * runner.launch_us + 50)
        begin = card.event()
        runner.replay()
        end = card.event()
        card.wait()
        runner.graph_us.append(card.microseconds(begin, end) / runner.graph_calls)
    begin = time.perf_counter()
    for _ in range(runner.calls_in_a_row):
        runner.once()
    returned = time.perf_counter()
    card.wait()
    ended = time.perf_counter()
    host_us, wall_us = ((t - begin) * 1e6 / runner.calls_in_a_row for t in (returned, ended))
    runner.host_us.append(host_us)
    runner.wall_us.append(wall_us)
    runner.event_us += _queued(card, runner, host_us * runner.timed.copies, one_by_one=True)


def _sample_alone(card: Card, runner: _Runner) -> None:
    """A call after what comes before it, each with the device to itself."""
    assert runner.timed.before is not None
    runner.timed.before()
    card.wait()
    first = card.event()
    begin = time.perf_counter()
    runner.once()
    returned = time.perf_counter()
    last = card.event()
    card.wait()
    ended = time.perf_counter()
    runner.host_us.append((returned - begin) * 1e6)
    runner.wall_us.append((ended - begin) * 1e6)
    runner.event_us.append(card.microseconds(first, last))


def _describe(runner: _Runner) -> dict[str, Any]:
    if runner.failure is not None:
        return {"name": runner.timed.name, "failed": runner.failure}
    graph, event = _summary(runner.graph_us), _summary(runner.event_us)
    best = graph or event
    assert best is not None, "MIN_ROUNDS samples at least"
    return {
        "name": runner.timed.name,
        "bytes": runner.timed.bytes,
        "copies": runner.timed.copies,
        "graph_us": graph,
        "graph_calls": runner.graph_calls,
        "no_graph": runner.no_graph,
        "event_us": event,
        "host_us": _summary(runner.host_us),
        "wall_us": _summary(runner.wall_us),
        "waits": runner.timed.waits,
        "us": best["median"],
        "gb_per_s": runner.timed.bytes / best["median"] / 1e3,
    }


def _summary(samples: list[float]) -> dict[str, float] | None:
    if not samples:
        return None
    quantiles = quantiles_of(samples)
    return {"median": quantiles[50], "q20": quantiles[20], "q80": quantiles[80], "samples": len(samples)}
