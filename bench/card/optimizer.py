"""Paged optimizers on a card beside torch's fused AdamW and bitsandbytes' paged one:

    python -m bench.card.optimizer --out FILE

The adapters of a Llama-2-7B at rank 16: 448 float32 tensors, 40 million parameters. Steps with all states on the card;
with all of them on the host before each step; and with a page_budget of a quarter of them. What a step must at least
move, over the card's rates, stands beside what was measured: a prediction.

Three times of a step, each a median over rounds: wall, of steps one after the other with one wait at the end, host work
included; event, on the card, while the host is ahead; host, until the call returns. Bars are on the wall clock.
"""

from __future__ import annotations

import argparse
import functools
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.card.kernels import bits, cpu_kernels
from bench.card.report import _number
from bench.card.report import table as aligned
from bench.compiled import predict
from qlora_kernels import PagedAdamW, PagedLion
from qlora_kernels.bench.case import OURS, WrongResult, reason
from qlora_kernels.bench.report.ratios import find_contender
from qlora_kernels.bench.timing.cuda_timing import Card, _summary
from qlora_kernels.optim.arena import layout as arena_layout
from qlora_kernels.optim.arena import schedule
from qlora_kernels.storage.formats import save_json

OURS_8, LION = "qlora_kernels, 8 bits", "qlora_kernels, Lion"
FUSED, BNB = "torch AdamW, fused", "bitsandbytes PagedAdamW32bit"
LINK = "host link"
RESIDENT, PAGED_OUT, BUDGET = "resident", "paged out", "budget of a quarter"
SETTINGS = {"lr": 1e-3, "weight_decay": 0.01}
VERIFIED_STEPS = 3
#: Of the others' change of the parameters in those steps against ours, relative.
ALLOWED = 1e-3
#: Steps between two waits.
LOOP = 20
MIN_ROUNDS, MAX_ROUNDS = 5, 100
#: Bytes a parameter that a step reads and writes: gradient, parameter twice, states twice.
BYTES = {OURS: 28.0, FUSED: 28.0, BNB: 28.0, LION: 20.0, OURS_8: 12 + 4 + 2 * 2 * 4 / 256}
LAUNCH_US = 5.0
#: Case, contender and so many times as long as this package; of the link, the share of its rate.
BARS = ((RESIDENT, BNB, 10.0), (RESIDENT, FUSED, 1.0), (PAGED_OUT, LINK, 0.80))


def llama_adapters(layers: int = 32, hidden: int = 4096, inner: int = 11008, rank: int = 16) -> list[tuple[int, int]]:
    """Shapes of lora_A [rank, K] and lora_B [N, rank] of each projection: q, k, v, o; gate, up; down."""
    weights = 4 * [(hidden, hidden)] + 2 * [(inner, hidden)] + [(hidden, inner)]
    return [shape for _ in range(layers) for n, k in weights for shape in ((rank, k), (n, rank))]


@dataclass(frozen=True)
class Running:
    """A contender that has been verified.

    Attributes:
        name: who it is.
        step: takes a step.
        before: what comes before each step, not timed; None for steps one after the other.
        moved: bytes that cross the host link in a step, one way.
    """

    name: str
    step: Callable[[], Any]
    before: Callable[[], Any] | None = None
    moved: int = 0


class OptimizerBench:
    """Parameters and gradients on a device, and the contenders over them.

    Args:
        card: the timing device.
        device: where tensors lie.
        shapes: of the parameters.
        share: of the arena that the budget lets stay on the card.
    """

    def __init__(self, card: Card, device: str = "cuda", shapes: Sequence[tuple[int, int]] = (), share: float = 0.25):
        self.card, self.device, self.share = card, device, share
        self.shapes = list(shapes) or llama_adapters()
        self.count = sum(n * k for n, k in self.shapes)
        generator = torch.Generator(device).manual_seed(1)

        def random(scale: float) -> list[Tensor]:
            return [torch.randn(s, generator=generator, device=device).mul_(scale) for s in self.shapes]

        self.start, self.grads = random(0.02), random(0.01)

    def free(self) -> int:
        """Bytes of the card that nobody has."""
        return torch.cuda.mem_get_info()[0] if self.device == "cuda" else 1 << 60

    def build(self, kind: Callable[..., Any], device: str, **options: Any) -> tuple[Any, list[Tensor]]:
        """An optimizer on parameters of its own, with gradients, and these parameters."""
        params = [torch.nn.Parameter(t.to(device, copy=True)) for t in self.start]
        for p, grad in zip(params, self.grads):
            p.grad = grad.to(device)
        return kind(params, **SETTINGS, **options), params

    @functools.lru_cache(maxsize=4)  # noqa: B019  the bench lives as long as the process
    def exact(self, kind: type, state_bits: int) -> list[Tensor]:
        """The parameters after VERIFIED_STEPS by the CPU's kernels."""
        with cpu_kernels():
            optimizer, params = self.build(kind, "cpu", state_bits=state_bits)
            for _ in range(VERIFIED_STEPS):
                optimizer.step()
        return [p.detach() for p in params]

    # ---------------------------------------------------------------------------------------------- contenders

    def require_room(self) -> None:
        """More managed memory than there is can stop the card for everybody: that of a case is less than this."""
        if self.free() < 3 * 8 * self.count:
            raise RuntimeError("too little of the card is free")

    def ours(
        self, name: str, kind: type, state_bits: int = 32, budget: int | None = None, out: bool = False
    ) -> Running:
        """This package's optimizer; ``out``: with its states on the host before each step."""
        self.require_room()
        optimizer, params = self.build(kind, self.device, state_bits=state_bits, page_budget=budget)
        for _ in range(VERIFIED_STEPS):
            if out:
                optimizer.page_out()
            optimizer.step()
        for p, wanted in zip(params, self.exact(kind, state_bits)):
            if not torch.equal(bits(p), bits(wanted)):
                raise WrongResult(f"wrong result: {name} differs from the CPU's")
        layout = optimizer._engine.layout
        moved = layout.nbytes - layout.header if out else 0
        if budget is not None:
            moved = sum(end - begin for s in schedule.stretches(layout, budget) for begin, end in s.leave)
        return Running(name, optimizer.step, optimizer.page_out if out else None, moved)

    def other(self, name: str, kind: Callable[..., Any], **options: Any) -> Running:
        """Somebody else's AdamW, held against ours, which is held to the bit."""
        self.require_room()
        optimizer, params = self.build(kind, self.device, **options)
        for _ in range(VERIFIED_STEPS):
            optimizer.step()
        for p, begin, wanted in zip(params, self.start, self.exact(PagedAdamW, 32)):
            change = wanted.double() - begin.double().cpu()
            error = ((p.detach().double().cpu() - wanted.double()).norm() / change.norm()).item()
            if not error <= ALLOWED:
                raise WrongResult(f"wrong result: error {error:.2e}, allowed {ALLOWED:.0e}")
        return Running(name, optimizer.step)

    def bnb(self) -> Running:
        from bitsandbytes.optim import PagedAdamW32bit

        return self.other(BNB, PagedAdamW32bit)

    def budgeted(self) -> Running:
        whole = arena_layout.Layout(
            [arena_layout.Slot(n * k, 0, 0, (arena_layout.FIRST, arena_layout.SECOND)) for n, k in self.shapes], 32
        ).nbytes
        return self.ours(OURS, PagedAdamW, budget=int(whole * self.share))

    def cases(self) -> Iterator[tuple[str, list[tuple[str, Callable[[], Running]]]]]:
        """What is measured, and (name, what makes the contender) for each who takes part."""
        yield (
            RESIDENT,
            [
                (OURS, functools.partial(self.ours, OURS, PagedAdamW)),
                (OURS_8, functools.partial(self.ours, OURS_8, PagedAdamW, 8)),
                (LION, functools.partial(self.ours, LION, PagedLion)),
                (FUSED, functools.partial(self.other, FUSED, torch.optim.AdamW, fused=True)),
                (BNB, self.bnb),
            ],
        )
        yield (
            PAGED_OUT,
            [
                (OURS, functools.partial(self.ours, OURS, PagedAdamW, out=True)),
                (OURS_8, functools.partial(self.ours, OURS_8, PagedAdamW, 8, out=True)),
            ],
        )
        yield BUDGET, [(OURS, self.budgeted)]

    def run_case(self, operation: str, makers: list, seconds: float) -> dict[str, Any]:
        """Prepares, verifies and times a case. Who fails is named with the reason; without this package, no case."""
        ready: list[Running] = []
        failed: dict[str, str] = {}
        about = {"operation": operation, "parameters": self.count, "tensors": len(self.shapes)}
        for name, make in makers:
            try:
                ready.append(make())
            except Exception as problem:
                if name == OURS:
                    return {**about, "failed": reason(problem), "contenders": []}
                failed[name] = reason(problem)
        times = {one["name"]: one for one in measure(self.card, ready, seconds)}
        rows = [times.get(name) or {"name": name, "failed": failed[name]} for name, _ in makers]
        return {**about, "contenders": rows}

    def link(self) -> dict[str, Any]:
        """The rate at which pinned memory of as many bytes as the states have comes to the card."""
        size, times = 8 * self.count, []
        host = torch.zeros(size, dtype=torch.uint8, pin_memory=self.device == "cuda")
        there = torch.empty(size, dtype=torch.uint8, device=self.device)
        for _ in range(MIN_ROUNDS + 1):
            begin = self.card.event()
            there.copy_(host, non_blocking=True)
            end = self.card.event()
            self.card.wait()
            times.append(self.card.microseconds(begin, end))
        us = _summary(times[1:])
        return {"bytes": size, "us": us, "gb_per_s": size / us["median"] / 1e3}


def measure(card: Card, contenders: Sequence[Running], seconds: float) -> list[dict[str, Any]]:
    """Times contenders in turn, each round beginning with another one; ``wall_us``, ``event_us``, ``host_us``."""
    samples: dict[str, dict[str, list[float]]] = {
        one.name: {"wall_us": [], "event_us": [], "host_us": []} for one in contenders
    }
    end, rounds = time.perf_counter() + seconds, 0
    gc.collect()
    gc.disable()
    try:
        while rounds < MIN_ROUNDS or (time.perf_counter() < end and rounds < MAX_ROUNDS):
            start = rounds % max(len(contenders), 1)
            for one in (*contenders[start:], *contenders[:start]):
                for kind, us in (_steps(card, one) if one.before is None else _one_step(card, one)).items():
                    samples[one.name][kind].append(us)
            rounds += 1
    finally:
        gc.enable()
    return [
        {"name": one.name, "moved": one.moved, **{kind: _summary(us) for kind, us in samples[one.name].items()}}
        for one in contenders
    ]


def _steps(card: Card, one: Running) -> dict[str, float]:
    """Steps one after the other, and one while the card is busy with something else."""
    one.step()
    card.wait()
    begin = time.perf_counter()
    for _ in range(LOOP):
        one.step()
    returned = time.perf_counter()
    card.wait()
    wall, host = ((t - begin) / LOOP * 1e6 for t in (time.perf_counter(), returned))
    card.occupy(2 * host + 50)
    first = card.event()
    one.step()
    last = card.event()
    card.wait()
    return {"wall_us": wall, "host_us": host, "event_us": card.microseconds(first, last)}


def _one_step(card: Card, one: Running) -> dict[str, float]:
    """A step after what comes before it."""
    one.before()
    card.wait()
    first = card.event()
    begin = time.perf_counter()
    one.step()
    returned = time.perf_counter()
    last = card.event()
    card.wait()
    wall, host = ((t - begin) * 1e6 for t in (time.perf_counter(), returned))
    return {"wall_us": wall, "host_us": host, "event_us": card.microseconds(first, last)}


def run(bench: OptimizerBench, seconds: float, save: Callable[[dict], None], facts: dict[str, Any]) -> dict[str, Any]:
    """Measures everything.

    Args:
        bench: the device.
        seconds: for all of it, about.
        save: called with the result after every case.
        facts: of the device and the software.

    Returns:
        ``facts``, ``settings``, ``link``, ``cases``, ``complete``.
    """
    end = time.perf_counter() + seconds
    settings = {**SETTINGS, "budget_share": bench.share, "loop": LOOP, "min_rounds": MIN_ROUNDS, "seconds": seconds}
    result: dict[str, Any] = {"complete": False, "facts": facts, "settings": settings}
    result.update(link=bench.link(), cases=[])
    save(result)
    todo = list(bench.cases())
    for i, (operation, makers) in enumerate(todo):
        print(operation, flush=True)
        # Half of a case's share is for its preparation.
        share = max(end - time.perf_counter(), 0.0) / (len(todo) - i) / 2
        result["cases"].append(bench.run_case(operation, makers, share))
        save(result)
    result["complete"] = True
    save(result)
    return result


def times_ours(case: dict[str, Any], name: str) -> float | None:
    """How many times as long as this package's step a contender's took, by the wall clock."""
    ours, other = find_contender(case, OURS), find_contender(case, name)
    if not ours or not other or "failed" in ours or "failed" in other:
        return None
    return other["wall_us"]["median"] / ours["wall_us"]["median"]


def share_of_link(result: dict[str, Any], contender: dict[str, Any] | None) -> float | None:
    """What a step moved to the card, over its time by the wall clock, of the link's rate."""
    if not contender or "failed" in contender or not contender["moved"]:
        return None
    return contender["moved"] / contender["wall_us"]["median"] / 1e3 / result["link"]["gb_per_s"]


def predicted_us(result: dict[str, Any], case: dict[str, Any], contender: dict[str, Any], card: predict.Card) -> float:
    """A step's bytes over the card's rate, after or while its pages come over the link."""
    on_card = BYTES[contender["name"]] * case["parameters"] / (card.memory * predict.COPY_SHARE) / 1e6 + LAUNCH_US
    coming = contender["moved"] / result["link"]["gb_per_s"] / 1e3
    return max(on_card, coming) if case["operation"] == BUDGET else on_card + coming


def judged(result: dict[str, Any]) -> list[tuple[str, float, float | None, str]]:
    """(what, bar, reached, why not) for each bar, the worst first; None where nothing was measured comes before all."""
    cases = {case["operation"]: case for case in result["cases"]}
    found = []
    for operation, contender, bar in BARS:
        case = cases.get(operation, {"failed": "the case was not run", "contenders": []})
        whose = OURS if contender == LINK else contender
        entry = find_contender(case, whose)
        reached = share_of_link(result, entry) if contender == LINK else times_ours(case, contender)
        why = "" if reached is not None else case.get("failed") or (entry or {}).get("failed", "")
        found.append((f"{operation}: {contender}", bar, reached, why))
    return sorted(found, key=lambda one: 0.0 if one[2] is None else one[2] / one[1])


def markdown(result: dict[str, Any], card: predict.Card | None = None) -> str:
    """Bars and times, as Markdown that also reads well on a terminal.

    Args:
        result: of :func:`run`.
        card: whose predictions stand beside the times; None for none.
    """
    rows = []
    for what, bar, got, why in judged(result):
        word = "not measured" if got is None else "met" if got >= bar else "missed"
        rows.append([what, word, _number(got, ".2f"), f"{bar:.2f}", why])
    head = ("contender's time over ours; of the link's rate", "", "reached", "bar", "why")
    lines = ["## Bars", "", *aligned(head, rows, left=2)]
    lines += ["", "## Times", "", f"Pinned memory comes to the card at {result['link']['gb_per_s']:.1f} GB/s.", ""]
    rows = []
    for case in result["cases"]:
        if "failed" in case:
            rows.append([case["operation"], OURS, *[""] * 6, case["failed"]])
        for one in case["contenders"]:
            if "failed" in one:
                rows.append([case["operation"], one["name"], *[""] * 6, one["failed"]])
                continue
            rows.append(
                [
                    case["operation"],
                    one["name"],
                    *(f"{one[kind]['median']:.0f}" for kind in ("wall_us", "event_us", "host_us")),
                    "" if card is None else f"{predicted_us(result, case, one, card):.0f}",
                    _number(times_ours(case, one["name"]), ".2f"),
                    _number(share_of_link(result, one), ".0%"),
                    "",
                ]
            )
    head = ("", "", "wall us", "event us", "host us", "predicted us", "/ ours", "of link", "why")
    return "\n".join([*lines, *aligned(head, rows, left=2), ""])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.card.optimizer", description=__doc__.splitlines()[0])
    parser.add_argument("--out", metavar="FILE", required=True, help="where the result goes, as JSON")
    parser.add_argument("--seconds", type=float, default=60.0, help="for all of it, about (default %(default)s)")
    parser.add_argument("--card", choices=predict.CARDS, help="whose predictions to print beside the times")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(f"no CUDA device is seen by torch {torch.__version__}: nothing to measure", file=sys.stderr)
        return 2
    from bench.card.facts import facts

    result = run(OptimizerBench(Card()), arguments.seconds, lambda r: save_json(r, arguments.out), facts())
    print(markdown(result, predict.CARDS.get(arguments.card)))
    return 1 if any("failed" in case for case in result["cases"]) else 0


if __name__ == "__main__":
    sys.exit(main())
