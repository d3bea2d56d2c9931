"""What a card should take, beside what was measured: a prediction until a card has shown it."""

from __future__ import annotations

from typing import Any

from bench.compiled import model
from bench.compiled.cards import CARDS, Card
from qlora_kernels.bench.case import OURS
from qlora_kernels.bench.contenders.names import DENSE, LINK
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

    For a dense product, and for what only moves bytes, it is the least that the call can take.
    """
    operation, name = case["operation"], contender["name"]
    if operation == "linear_forward" and not case["rank"] and not case["k"] % 64 and name in (OURS, DENSE):
        rates = model.predict(card, case["m"], case["n"], case["k"])
        return rates["us" if name == OURS else "dense_us"]
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
