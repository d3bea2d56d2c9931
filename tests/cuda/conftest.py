from __future__ import annotations

import pytest
from engines import ORDERS, engine_named


@pytest.fixture(params=[*(f"emulated-{order}" for order in ORDERS), pytest.param("cuda", marks=pytest.mark.gpu)])
def cuda_engine(request):
    """The CUDA kernels: on the emulator in each order, and on a card."""
    with engine_named(request.param):
        yield request.param
