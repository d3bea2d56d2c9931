"""What is measured: a module for each operation, whose ``case`` names the contenders, this package first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ..case import Case, Settings
from ..contenders.weights import Lab
from ..points import Point
from ..timing.measure import start
from . import block_step, decode, dequantize, experts, gpt2_forward, limits, optimizer, paging, quantize
from .finetune import FinetuneMeasurement
from .linear import backward, busy, dx, forward, step
from .rank_study import RankStudy

CASES: dict[str, Callable[[Lab], Case]] = {
    "limits": limits.case,
    "quantize": quantize.case,
    "dequantize": dequantize.case,
    "dequantize_out": dequantize.case_out,
    "linear_forward": forward.case,
    "linear_busy": busy.case,
    "linear_dx": dx.case,
    "linear_backward": backward.case,
    "linear_step": step.case,
    "decode": decode.case,
    "experts": experts.case,
    "block_step": block_step.case,
    "gpt2_forward": gpt2_forward.case,
    "adamw_step": optimizer.adamw,
    "adamw_clipped_step": optimizer.adamw_clipped,
    "adamw_8bit_step": optimizer.adamw_8bit,
    "lion_step": optimizer.lion,
    "adamw_paged_step": paging.paged_out,
    "adamw_budget_step": paging.budgeted,
}
#: Whole trainings, which cannot take turns call by call.
TRAININGS = {"finetune": FinetuneMeasurement, "rank_study": RankStudy}
OPERATIONS = (*CASES, *TRAININGS)


def begin(
    settings: Settings,
    point: Point,
    without: Mapping[str, str] | None = None,
    announce: Callable[[str], None] = lambda name: None,
) -> Any:
    """A measurement of a point: its contenders set up and verified, ready for rounds.

    Args:
        settings, point: how, and what.
        without, announce: see :class:`qlora_kernels.bench.timing.measure.Measurement`.

    Returns:
        An object with ``rounds``, ``round()`` and ``result()``.
    """
    if point.operation in TRAININGS:
        return TRAININGS[point.operation](settings, point, announce)
    case = CASES[point.operation](Lab(settings, point))
    if settings.only:
        case = replace(case, contenders=[one for one in case.contenders if one.name in settings.only])
    return start(case, settings, point, without, announce)
