"""The settings of a low-rank adapter."""

# Users' arguments are checked whatever their annotations say.
# pyright: reportUnnecessaryIsInstance=false, reportUnnecessaryComparison=false

from __future__ import annotations

import math
from dataclasses import dataclass

_LARGEST_SCALING = (2 - 2**-23) * 2.0**127  # the largest float32, which is what the kernels take


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of a low-rank adapter: everything but its two matrices.

    Attributes:
        rank: r, at least 1 and at most min(N, K).
        alpha: numerator of the scaling, positive.
        dropout: probability in [0, 1) of dropping an element of x on the adapter's path, in training mode.
        rslora: scale by alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732) rather than alpha / r.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def check(self, n: int, k: int, name: str = "") -> None:
        """Checks the values for a layer [n, k]; rank 0 passes, as a layer without an adapter.

        Raises:
            TypeError: when rank is not an int.
            ValueError: when a value is out of range; the message names it, and the layer if given.
        """
        where = f"{name}: " if name else ""
        if not isinstance(self.rank, int) or isinstance(self.rank, bool):
            raise TypeError(f"{where}rank should be an int, found {self.rank!r}")
        if self.rank < 0:
            raise ValueError(f"{where}rank should be 0 (no adapter) or more, found {self.rank}")
        if self.rank > min(n, k):
            raise ValueError(
                f"{where}rank {self.rank} is larger than the layer: a weight [{n}, {k}] takes at most {min(n, k)}"
            )
        if not (_is_finite(self.alpha) and self.alpha > 0):
            raise ValueError(f"{where}alpha should be positive and finite, found {self.alpha}")
        if self.rank and self.scaling > _LARGEST_SCALING:
            raise ValueError(f"{where}alpha {self.alpha} is too large: the scaling {self.scaling:.3g} exceeds float32")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"{where}dropout should be in [0, 1), found {self.dropout}")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False
