"""The cases that only a card has, on the emulator: what takes part, what is verified, what crosses the host link."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from bench_runs.cases import TINY
from bench_runs.steady_card import SteadyCard
from emulated import emulated, paging

from qlora_kernels import PagedAdamW, ops
from qlora_kernels.bench.case import OURS
from qlora_kernels.bench.contenders.adapter_tensors import adapter_shapes
from qlora_kernels.bench.contenders.names import (
    BNB,
    BNB_EVAL,
    EQUAL_COPY,
    KERNEL,
    LINK,
    NO_ADAPTER,
    OURS_8BIT,
    PEFT_EVAL,
)
from qlora_kernels.bench.contenders.weights import Lab
from qlora_kernels.bench.operations import CASES
from qlora_kernels.bench.operations import paging as paged_steps
from qlora_kernels.bench.points import CARD_OPERATIONS, Point
from qlora_kernels.bench.timing import cuda_timing
from qlora_kernels.bench.timing.measure import CudaMeasurement
from qlora_kernels.optim.arena import layout, schedule

PAGE = 4096
CARD_POINTS = (
    Point("quantize", n=24, k=64),
    Point("dequantize", n=24, k=64),
    Point("dequantize_out", n=24, k=64),
    Point("linear_forward", m=3, rank=0, n=24, k=64),
    Point("linear_forward", m=3, rank=2, n=24, k=64),
    Point("linear_dx", m=20, n=24, k=64),
    Point("linear_backward", m=20, rank=2, n=24, k=64),
    Point("linear_step", m=20, rank=2, n=24, k=64),
    Point("adamw_step", "float32", rank=1, model="tiny"),
    *(Point(name, "float32", rank=10, model="tiny") for name in CARD_OPERATIONS),
)
POINT_OF = {point.operation: point for point in CARD_POINTS}
#: Who takes part in these beside the peers that a CPU has, too.
ONLY_HERE = {
    "quantize": {KERNEL, EQUAL_COPY},
    "dequantize": {EQUAL_COPY},
    "linear_forward": {EQUAL_COPY, NO_ADAPTER},
    "linear_backward": {NO_ADAPTER},
    "linear_step": {NO_ADAPTER},
    "adamw_step": {EQUAL_COPY},
    "adamw_paged_step": {OURS_8BIT, LINK},
    "adamw_budget_step": {LINK},
}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """The CPU passes for a card; few calls; an arena of more pages than one, part of which fits the budget."""
    monkeypatch.setattr(Lab, "cuda", True)
    monkeypatch.setattr(cuda_timing, "MIN_ROUNDS", 1)
    monkeypatch.setattr(cuda_timing, "MOST_CALLS", 1)
    monkeypatch.setattr(cuda_timing, "HOST_CALLS", 1)
    monkeypatch.setattr(layout, "PAGE", PAGE)
    monkeypatch.setattr(schedule, "LEAST_STRETCH", 1 << 14)
    monkeypatch.setattr(paged_steps, "BUDGET_SHARE", 0.95)


def lab_of(point: Point) -> Lab:
    return Lab(replace(TINY, cache_bytes=1), point)


def measured(point: Point, only: str | None = None) -> dict:
    """A case on the emulator; of one contender alone, if asked."""
    with emulated(page_bytes=PAGE, forbid_faults=True):
        lab = lab_of(point)
        case = CASES[point.operation](lab)
        if only is not None:
            case = replace(case, contenders=[c for c in case.contenders if c.name == only])
        measurement = CudaMeasurement(case, lab.settings, point, card=SteadyCard(l2_bytes=0))
        if measurement.rounds:
            measurement.round()
        return measurement.result()


@pytest.mark.share(3)
@pytest.mark.parametrize("point", CARD_POINTS, ids=str)
def test_a_cards_cases_on_the_emulator(point):
    """The contenders that only a card has, this package's through the CUDA kernels."""
    case = measured(point)
    names = {one["name"] for one in case["contenders"]}
    assert not {BNB_EVAL, PEFT_EVAL} & names
    wanted = ONLY_HERE.get(point.operation, set()) - ({NO_ADAPTER} if point.rank == 0 else set())
    wanted -= {EQUAL_COPY} if point.operation == "linear_forward" and point.rank else set()
    assert wanted <= names
    assert case["contenders"][0]["name"] == OURS
    for one in case["contenders"]:
        assert "wrong result" not in one.get("failed", ""), one
        if "bitsandbytes" in one["name"] and "failed" in one:
            # What it has not for a CPU; anything else is a fault of the comparison.
            missing = "not installed" if find_spec("bitsandbytes") is None else "NotImplementedError"
            assert missing in one["failed"], one
            continue
        assert "failed" not in one, one
        assert one["median_ms"] > 0
        assert one["wall_ms"] >= one["host_ms"] > 0


def test_a_copy_moves_as_many_bytes_as_this_package():
    contenders = {one["name"]: one for one in measured(POINT_OF["dequantize"])["contenders"]}
    assert abs(contenders[EQUAL_COPY]["bytes"] - contenders[OURS]["bytes"]) < 8
    blocks = 24 * 64 // 64
    assert contenders[OURS]["bytes"] == 24 * 64 * 2 + 24 * 64 // 2 + blocks + 4 + 4


def test_missing_bitsandbytes_says_so(monkeypatch):
    import sys

    for name in ("bitsandbytes", "bitsandbytes.functional"):
        monkeypatch.setitem(sys.modules, name, None)
    contenders = {one["name"]: one for one in measured(POINT_OF["dequantize"])["contenders"]}
    assert contenders[BNB] == {"name": BNB, "failed": "not installed (bitsandbytes)"}
    assert "failed" not in contenders[OURS]


@pytest.mark.parametrize("result", [0, 1, 2])
@pytest.mark.parametrize("value", [1.5, torch.nan])
def test_a_gradient_that_is_wrong_is_not_timed(result, value, monkeypatch):
    right = ops.linear_backward

    def wrong(*arguments):
        gradients = list(right(*arguments))
        if gradients[result] is not None:
            gradients[result] = gradients[result] * value
        return tuple(gradients)

    monkeypatch.setattr(ops, "linear_backward", wrong)
    [ours] = measured(POINT_OF["linear_backward"], only=OURS)["contenders"]
    assert ours["failed"].startswith("wrong result")


@pytest.mark.parametrize("name", [OURS, OURS_8BIT])
def test_a_step_that_forgets_what_was_paged_out_is_not_timed(name, monkeypatch):
    """A step is verified as it is timed: with what comes before it."""
    right = PagedAdamW.page_out

    def forgetful(self):
        right(self)
        for p in self.param_groups[0]["params"][-1:]:
            with torch.no_grad():
                p.add_(1.0)

    monkeypatch.setattr(PagedAdamW, "page_out", forgetful)
    [ours] = measured(POINT_OF["adamw_paged_step"], only=name)["contenders"]
    assert ours["failed"].startswith("wrong result")


def test_what_the_link_copies_is_what_is_paged():
    point = POINT_OF["adamw_paged_step"]
    with emulated(page_bytes=PAGE, forbid_faults=True):
        lab = lab_of(point)
        states = 8 * lab.adapter_tensors.count
        whole, budget = (CASES[f"adamw_{kind}_step"](lab) for kind in ("paged", "budget"))
        copied = {}
        for case in (whole, budget):
            link = next(c for c in case.contenders if c.name == LINK).prepare()
            assert link.error(link.call(0)) == 0.0
            copied[case.title] = link.bytes
        assert states <= copied[whole.title] <= states + 256 * 2 * len(lab.adapter_tensors.parameters) + PAGE
        ready = budget.contenders[0].prepare()
        for _ in range(2):
            ready.run(0)
        optimizer_native = _native_of(ready)
        optimizer_native.wait()
        before = paging()["to_device"]
        ready.run(0)
        optimizer_native.wait()
        assert (paging()["to_device"] - before) * PAGE == copied[budget.title]
    assert 0.1 * states < copied[budget.title] < 0.7 * states


def _native_of(ready):
    """The arena of the optimizer whose step a contender takes."""
    step = next(cell.cell_contents for cell in ready.call.__closure__ if callable(cell.cell_contents))
    return step.__self__._engine.arena.native


def test_a_full_card_is_left_alone(monkeypatch):
    monkeypatch.setattr(Lab, "free_bytes", lambda self: 10_000)
    for point in (POINT_OF[name] for name in ("adamw_step", *CARD_OPERATIONS)):
        [ours] = measured(point, only=OURS)["contenders"]
        assert ours["failed"] == "RuntimeError: too little of the card is free"


def test_the_adapters_are_those_of_a_llama_2_7b():
    shapes = adapter_shapes("llama-2-7b", 16)
    assert len(shapes) == 448
    assert sum(n * k for n, k in shapes) == 39_976_960
