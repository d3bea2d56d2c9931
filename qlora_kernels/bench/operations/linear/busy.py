"""linear_busy: forward while another process keeps each core busy, as on a desktop that does other things, too."""

from __future__ import annotations

from ...case import OURS, Case, Contender
from ...contenders.names import DENSE, GGML, INT4
from ...contenders.weights import Lab
from ...timing.busy import every_core
from .forward import Setup


def case(lab: Lab) -> Case:
    """Threads that wait for one whose core was taken away lose that time, too: means say more than medians here."""
    setup = Setup(lab)
    contenders = [
        Contender(OURS, setup.ours),
        Contender(DENSE, setup.dense),
        Contender(INT4, setup.int4),
        Contender(GGML, setup.ggml),
    ]
    return Case("forward beside busy processes", setup.flops, contenders, beside=every_core)
