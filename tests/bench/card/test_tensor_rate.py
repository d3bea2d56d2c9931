"""What bench/card/tensor_rate.py has a card do, on the emulator; the times themselves only a card has."""

from __future__ import annotations

import pytest
import torch
from cuda_code.fragments import fragment
from emulated import emulated, module

from bench.card import tensor_rate

TURNS, BLOCKS = 3, 2


def run(launch) -> torch.Tensor:
    given, out = tensor_rate.operands("cpu"), torch.full((BLOCKS * 256,), torch.nan)
    assert given.abs().max() <= 1
    assert given.unique().numel() > 1000
    with emulated():
        launch(given.data_ptr(), out.data_ptr(), TURNS, BLOCKS, 0, 0)
    return out


def test_every_warp_multiplies_so_many_times():
    given = tensor_rate.operands("cpu")[: 32 * 8].double().reshape(32, 4, 2)  # lane, register, element
    g, t = torch.arange(32) // 4, torch.arange(32) % 4
    a = torch.zeros(16, 16, dtype=torch.float64)
    for i in range(4):
        for e in range(2):
            a[g + i % 2 * 8, 2 * t + e + i // 2 * 8] = given[:, i, e]
    total = torch.zeros(16, 8, dtype=torch.float64)
    for chain in range(8):
        b = torch.zeros(16, 8, dtype=torch.float64)
        for half, register in enumerate((chain % 4, (chain + 1 + chain // 4) % 4)):
            for e in range(2):
                b[2 * t + e + 8 * half, g] = given[:, register, e]
        total += a @ b
    lanes = torch.stack([total[g + i // 2 * 8, 2 * t + i % 2] for i in range(4)]).sum(0)
    sums = run(module().launch_rate).reshape(BLOCKS * 8, 32)
    assert torch.allclose(sums.double(), TURNS * lanes.expand(BLOCKS * 8, 32), rtol=1e-4, atol=1e-4)
    assert module().RATE_FLOP == 8 * 8 * 2 * 16 * 8 * 16


def test_every_warpgroup_does():
    given = tensor_rate.operands("cpu").double()
    swizzled = [((i // 8) * 8 + (i % 8 ^ i // 8 % 8)) for i in range(2**15 // 8)]
    unswizzled = given.reshape(-1, 8)[swizzled].reshape(-1, 64)
    row, column = (torch.from_numpy(x) for x in fragment(256))
    expected = [(unswizzled[64 * w : 64 * w + 64] @ unswizzled[128:384].T)[row, column].sum(1) for w in range(2)]
    sums = run(module().launch_wide_rate).reshape(BLOCKS, 256)
    assert torch.allclose(sums.double(), TURNS * torch.cat(expected).expand(BLOCKS, 256), rtol=1e-4, atol=1e-3)
    assert module().WIDE_RATE_FLOP == 2 * 4 * 2 * 64 * 256 * 16


def test_rates_are_work_by_time(monkeypatch):
    now = [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def synchronize(self):
            pass

        def elapsed_time(self, after):
            return after.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)

    def launch(turns):
        now[0] += turns * 1e-3  # milliseconds: a microsecond each

    timing = tensor_rate.time_one(launch, 5e6, 3)
    assert timing["tflops"] == pytest.approx(5.0)
    assert timing["turns"] == pytest.approx(100_000, rel=1e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a card")
def test_without_a_card_nothing_is_measured(tmp_path, capsys):
    assert tensor_rate.main(["--out", str(tmp_path / "out.json")]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
