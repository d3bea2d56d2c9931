"""Peak memory of a phase."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from qlora_kernels.finetune import memory


def test_peak_memory_sees_what_a_phase_allocates():
    with memory.PeakMemory() as idle:
        pass
    if idle.peak is None:
        pytest.skip("no /proc here")
    with memory.PeakMemory() as busy:
        block = torch.ones(64 << 20, dtype=torch.uint8)
        del block
    with memory.PeakMemory() as after:
        pass
    assert busy.peak - busy.start > 60 << 20
    assert after.peak < busy.peak
