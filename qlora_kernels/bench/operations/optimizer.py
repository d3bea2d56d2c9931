"""Optimizers' steps over all adapter tensors of a model: of Llama-2-7B, at r = 16, 448 of float32, 40 M elements."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from qlora_kernels import PagedAdamW, PagedLion

from ..case import OURS, Case, Contender, Ready
from ..contenders.adapter_tensors import SCALES, adamw_moves, lion_moves
from ..contenders.names import BNB, EQUAL_COPY, FOREACH, FUSED
from ..contenders.weights import Lab, bitsandbytes

LR, LION_LR, DECAY, EPS = 1e-3, 1e-4, 0.01, 1e-8
BETAS, LION_BETAS = (0.9, 0.999), (0.9, 0.99)
MAX_GRAD_NORM = 1.0
ADAMW: dict[str, Any] = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
LION: dict[str, Any] = {"lr": LION_LR, "betas": LION_BETAS, "weight_decay": DECAY}

# Of a step's length, after one to four. Rounding parameters to float32 makes 1e-5 of Lion's, which are the shortest.
LIMIT = 1e-4
# States of 8 bits: a moment is rounded to one of 256 levels in every step, and so moves the next.
LIMIT_8BIT = 0.3

# Bytes an element: what a step must read and write. p and g of float32, p again; then a moment, both ways.
PARAMETER, MOMENT, MOMENT_8BIT = 12, 8, 2 * (1 + 4 / 256)
NORM = 4  # the gradients once before


def adamw(lab: Lab) -> Case:
    make = maker(lab, adamw_error(lab, None), LIMIT, PARAMETER + 2 * MOMENT)
    contenders = [
        Contender(OURS, make(lambda params: PagedAdamW(params, **ADAMW).step)),
        Contender(FUSED, make(lambda params: _torch(lab, params, fused=True).step)),
        Contender(FOREACH, make(lambda params: _torch(lab, params, foreach=True).step)),
        Contender(BNB, make(lambda params: _bitsandbytes("PagedAdamW32bit", params, **ADAMW))),
        Contender(EQUAL_COPY, _copy(lab, PARAMETER + 2 * MOMENT)),
    ]
    return Case("AdamW", None, contenders)


def adamw_clipped(lab: Lab) -> Case:
    make = maker(lab, adamw_error(lab, MAX_GRAD_NORM), LIMIT, PARAMETER + 2 * MOMENT + NORM)

    def clipping(**kind: bool) -> Callable[[list], Callable[[], object]]:
        def made(params: list) -> Callable[[], object]:
            optimizer = _torch(lab, params, **kind)

            def call() -> None:
                torch.nn.utils.clip_grad_norm_(params, MAX_GRAD_NORM)
                optimizer.step()

            return call

        return made

    contenders = [
        Contender(OURS, make(lambda params: PagedAdamW(params, **ADAMW, max_grad_norm=MAX_GRAD_NORM).step)),
        Contender(FUSED, make(clipping(fused=True))),
        Contender(FOREACH, make(clipping(foreach=True))),
    ]
    return Case("AdamW with clipping", None, contenders)


def adamw_8bit(lab: Lab) -> Case:
    make = maker(lab, adamw_error(lab, None), LIMIT_8BIT, PARAMETER + 2 * MOMENT_8BIT)
    wide = maker(lab, adamw_error(lab, None), LIMIT, PARAMETER + 2 * MOMENT)
    contenders = [
        Contender(OURS, make(lambda params: PagedAdamW(params, **ADAMW, state_bits=8).step)),
        Contender(FUSED, wide(lambda params: _torch(lab, params, fused=True).step)),
        Contender(BNB, make(lambda params: _bitsandbytes("AdamW8bit", params, **ADAMW))),
    ]
    return Case("AdamW, 8-bit states", None, contenders)


def lion(lab: Lab) -> Case:
    tensors = lab.adapter_tensors

    def error(steps: int) -> float:
        return tensors.error(lion_moves(tensors.scales(steps, None), LION_LR, LION_BETAS), 1 - LION_LR * DECAY)

    make = maker(lab, error, LIMIT, PARAMETER + MOMENT)
    contenders = [
        Contender(OURS, make(lambda params: PagedLion(params, **LION).step)),
        Contender(BNB, make(lambda params: _bitsandbytes("PagedLion32bit", params, **LION))),
    ]
    return Case("Lion", None, contenders)


def adamw_error(lab: Lab, max_grad_norm: float | None) -> Callable[[int], float]:
    tensors = lab.adapter_tensors

    def error(steps: int) -> float:
        moves = adamw_moves(tensors.scales(steps, max_grad_norm), LR, BETAS, EPS)
        return tensors.error(moves, 1 - LR * DECAY)

    return error


def maker(lab: Lab, error: Callable[[int], float], limit: float, bytes_each: float) -> Callable:
    """From what makes an optimizer's step (or a pair, the step and what comes before it) to what prepares a contender.

    All work on the same parameters and gradients. The first steps are verified, with gradients that change in between;
    those that are timed go on with the last ones.
    """
    tensors = lab.adapter_tensors

    def make(made: Callable[[list], Callable[[], object]]) -> Callable[[], Ready]:
        def prepare() -> Ready:
            require_room(lab)
            tensors.set_step(0)
            step, done = made(tensors.parameters), 0
            step, before = step if isinstance(step, tuple) else (step, None)

            def checked(_: object) -> float:
                nonlocal done
                done += 1
                distance = error(done)
                tensors.set_step(done if done < len(SCALES) else len(SCALES) - 1)
                return distance

            moved = round(bytes_each * tensors.count)
            return Ready(lambda _: step(), checked, limit, moved, checks=len(SCALES), before=before)

        return prepare

    return make


def require_room(lab: Lab) -> None:
    """More managed memory than there is can stop a card for everything on it: a case has less than this.

    Raises:
        RuntimeError: when that much of the card is not free.
    """
    if lab.free_bytes() < 3 * 8 * lab.adapter_tensors.count:
        raise RuntimeError("too little of the card is free")


def _torch(lab: Lab, params: list, **kind: bool) -> torch.optim.Optimizer:
    """On a card, one that a CUDA graph can hold."""
    options: dict[str, Any] = {**ADAMW, **kind, "capturable": lab.device.type == "cuda"}
    return torch.optim.AdamW(params, **options)


def _bitsandbytes(name: str, params: list, **options) -> Callable[[], object]:
    optim = bitsandbytes("bitsandbytes.optim")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = getattr(optim, name)(params, **options)

    def call() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on the CPU the paged ones are not
            optimizer.step()

    return call


def _copy(lab: Lab, bytes_each: int) -> Callable[[], Ready]:
    """As many bytes as a step reads and writes, half of them read, into memory that has been touched before.

    By a kernel, which changes the sign, as a step is one: see Lab.card_copies.
    """

    def prepare() -> Ready:
        count = lab.adapter_tensors.count * bytes_each // 8
        source, out = torch.ones(count, device=lab.device), torch.zeros(count, device=lab.device)
        return Ready(
            lambda _: torch.neg(source, out=out),
            lambda result: 0.0 if torch.equal(result, -source) else 1.0,
            0.5,
            8 * count,
        )

    return prepare
