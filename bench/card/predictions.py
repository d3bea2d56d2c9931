"""What a card should take, beside what was measured: a prediction until a card has shown it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from bench.compiled import launches, model, rivals
from bench.compiled.cards import CARDS, Card
from qlora_kernels.bench.case import OURS
from qlora_kernels.bench.contenders.names import (
    BNB,
    COPY,
    DENSE,
    DEQUANTIZED,
    EQUAL_COPY,
    IN_PLACE,
    LINK,
    NO_ADAPTER,
    PRODUCT,
)
from qlora_kernels.bench.points import Point, point_of
from qlora_kernels.bench.report.ratios import find_contender

#: Microseconds from a launch to the kernel's start.
LAUNCH_US = 5.0
#: Operations that do little but move bytes.
STREAMS = ("quantize", "dequantize", "dequantize_out", "adamw_step", "adamw_8bit_step", "lion_step")


def card_named(device: str) -> Card | None:
    """The card that bench/compiled/predict.py knows by a device's name; None for others."""
    words = device.lower().replace("-", " ").split()
    return next((card for name, card in CARDS.items() if name in words), None)


def predicted_us(case: dict[str, Any], contender: dict[str, Any], card: Card) -> float | None:
    """What a contender's call should take by a card's rates, in microseconds; None where there is no model.

    For others' products, and for what only moves bytes, it is the least that the call can take.
    """
    operation, name = case["operation"], contender["name"]
    if name in (COPY, EQUAL_COPY, IN_PLACE) and contender.get("bytes"):
        return contender["bytes"] / card.copy_rate * 1e6
    if operation == "limits":
        return case["flops"] / card.dense_rate * 1e6 if name == PRODUCT else None
    if operation.startswith("linear_"):
        return _product_us(case, name, card) if case["k"] % 64 == 0 and case["dtype"] != "float32" else None
    if operation in STREAMS and contender.get("bytes"):
        launch = 0.0 if operation.endswith("quantize") or operation.startswith("dequantize") else LAUNCH_US
        return contender["bytes"] / card.copy_rate * 1e6 + launch
    link = find_contender(case, LINK)
    if name == OURS and link is not None and "failed" not in link:
        on_card = contender["bytes"] / card.copy_rate * 1e6 + LAUNCH_US
        coming = link["wall_ms"] * 1e3
        # With a budget, pages come while others are worked on; else they come first.
        return max(on_card, coming) if operation == "adamw_budget_step" else on_card + coming
    return None


def _product_us(case: dict[str, Any], name: str, card: Card) -> float | None:
    """Of a layer's products: this package's by the model, others' by what they must at least move and multiply."""
    m, n, k, rank = case["m"], case["n"], case["k"], case["rank"] or 0
    way = case["operation"].removeprefix("linear_")
    ways = {"forward": [False], "dx": [True], "backward": [True], "step": [False, True]}[way]
    if name == OURS and rank:
        return sum(rivals.way_us(card, m, n, k, rank, backward) for backward in ways)
    if name in (OURS, NO_ADAPTER):
        return sum(model.predict(card, m, n, k, backward)["us"] for backward in ways)
    if rank:
        return rivals.separate_us(card, m, n, k, rank) if (way, name) == ("step", DEQUANTIZED) else None
    if name == DENSE:
        return len(ways) * model.dense_us(card, m, n, k)
    return rivals.bitsandbytes_us(card, m, n, k) if (way, name) == ("forward", BNB) else None


def furthest(cases: Sequence[dict[str, Any]], card: Card, count: int) -> list[tuple[Point, float]]:
    """The points whose time is furthest from its prediction, with the ratio of both; a product for each kernel, as a
    profile of one tells about all that it runs."""
    found: dict[Any, tuple[Point, float]] = {}
    for case in cases:
        ours = find_contender(case, OURS)
        if not case["operation"].startswith("linear_") or ours is None or "failed" in ours:
            continue
        predicted = predicted_us(case, ours, card)
        if not predicted or not ours["median_ms"]:
            continue
        ratio = ours["median_ms"] * 1e3 / predicted
        backward = case["operation"] != "linear_forward"
        kernel = (
            launches.launch_of(card, case["m"], case["n"], case["k"], backward).name,
            backward,
            bool(case["rank"]),
        )
        if kernel not in found or abs(math.log(ratio)) > abs(math.log(found[kernel][1])):
            found[kernel] = point_of(case), ratio
    return sorted(found.values(), key=lambda one: -abs(math.log(one[1])))[:count]
