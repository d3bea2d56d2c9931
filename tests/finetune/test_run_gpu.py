"""The fine-tuning command on a card: a few steps of a small model."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers")

from small.runs import cache_fixture, losses, metrics, run_fixture  # noqa: F401 - fixtures


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_run_on_a_card(run, tmp_path, device):
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    assert run("--device", device, out="card") == 0
    assert torch.cuda.max_memory_allocated() > before, "nothing of it was on the card"
    results = metrics(tmp_path / "card")["results"]
    assert results["qlora"]["loss"] < results["nf4"]["loss"]
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "card")["qlora"])
    # The same base, data and seeds: the CPU's run, but for rounding.
    assert run("--device", "cpu", out="host") == 0
    ours, theirs = (losses(tmp_path / name)["qlora"] for name in ("card", "host"))
    assert len(ours) == len(theirs) == 6
    assert ours == pytest.approx(theirs, rel=0.05)
