"""Optimizer steps on a card whose states come from the host: all of them, or what a budget keeps off the card.

A paged step can only be as fast as the host link. LINK copies as many bytes as the step pages, from pinned memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qlora_kernels import PagedAdamW
from qlora_kernels.optim.arena.layout import FIRST, SECOND, Layout, Slot
from qlora_kernels.optim.arena.schedule import stretches

from ..case import OURS, Case, Contender, Ready
from ..contenders.names import LINK, OURS_8BIT
from ..contenders.weights import Lab
from .optimizer import ADAMW, LIMIT, LIMIT_8BIT, MOMENT, MOMENT_8BIT, PARAMETER, adamw_error, maker

#: Of the states, the share that the budget lets stay on the card.
BUDGET_SHARE = 0.25


def paged_out(lab: Lab) -> Case:
    """All states are on the host before each step."""
    wide = maker(lab, adamw_error(lab, None), LIMIT, PARAMETER + 2 * MOMENT)
    narrow = maker(lab, adamw_error(lab, None), LIMIT_8BIT, PARAMETER + 2 * MOMENT_8BIT)

    def paged(bits: int) -> Callable[[list], tuple[Callable, Callable]]:
        def made(params: list) -> tuple[Callable[[], Any], Callable[[], Any]]:
            optimizer = PagedAdamW(params, **ADAMW, state_bits=bits)
            return optimizer.step, optimizer.page_out

        return made

    layout = layout_of(lab)
    contenders = [
        Contender(OURS, wide(paged(32))),
        Contender(OURS_8BIT, narrow(paged(8))),
        Contender(LINK, _link(lab, layout.nbytes - layout.header)),
    ]
    return Case("AdamW, states on the host", None, contenders)


def budgeted(lab: Lab) -> Case:
    """A part of the states stays on the card, the rest comes and goes in each step."""
    budget = budget_of(lab)
    make = maker(lab, adamw_error(lab, None), LIMIT, PARAMETER + 2 * MOMENT)
    contenders = [
        Contender(OURS, make(lambda params: PagedAdamW(params, **ADAMW, page_budget=budget).step)),
        Contender(LINK, _link(lab, paged_bytes(layout_of(lab), budget))),
    ]
    return Case(f"AdamW, {BUDGET_SHARE:.0%} of the states on the card", None, contenders)


def layout_of(lab: Lab) -> Layout:
    """The arena of 32-bit AdamW states."""
    return Layout([Slot(p.numel(), 0, 0, (FIRST, SECOND)) for p in lab.adapter_tensors.parameters], 32)


def budget_of(lab: Lab) -> int:
    return int(layout_of(lab).nbytes * BUDGET_SHARE)


def paged_bytes(layout: Layout, budget: int) -> int:
    """Bytes that cross the host link in a step, one way."""
    return sum(end - begin for stretch in stretches(layout, budget) for begin, end in stretch.leave)


def _link(lab: Lab, count: int) -> Callable[[], Ready]:
    def prepare() -> Ready:
        host = torch.ones(count, dtype=torch.uint8, pin_memory=lab.device.type == "cuda")
        there = torch.zeros(count, dtype=torch.uint8, device=lab.device)
        return Ready(
            lambda _: there.copy_(host, non_blocking=True),
            lambda copied: 0.0 if bool((copied == 1).all()) else 1.0,
            0.5,
            count,
        )

    return prepare
