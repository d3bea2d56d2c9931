"""Parameter groups as the kernels read them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .checks import LR_ROUNDING, check_settings, setting


def group_table(param_groups: Sequence[dict[str, Any]], optimizer: str) -> np.ndarray:
    """OptimizerGroup[groups]. Settings are checked here, because torch lets anyone change them between steps.

    Raises:
        ValueError: for a setting out of range.
    """
    rows = []
    for i, g in enumerate(param_groups):
        try:
            (beta1, beta2), lr = (float(setting(beta)) for beta in g["betas"]), float(setting(g["lr"]))
            eps, decay = float(setting(g.get("eps", 0.0))), float(setting(g["weight_decay"]))
            in_range = -LR_ROUNDING <= lr < math.inf and 0 <= beta1 < 1 and 0 <= beta2 < 1
            in_range = in_range and 0 <= eps < math.inf and 0 <= decay < math.inf
        except (TypeError, ValueError, OverflowError):  # not a number, several, or an integer beyond any float
            in_range = False
        if not in_range or g.get("amsgrad") or g.get("maximize"):
            check_settings(g, optimizer, f" of group {i}")
        rows.append((max(lr, 0.0), beta1, beta2, eps, decay, 0.0))
    return np.array(rows, dtype=np.float64)
