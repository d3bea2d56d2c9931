"""Which kernel runs, by the table or by QLORA_KERNELS_CUDA_KERNEL, and what is refused on which architecture."""

from __future__ import annotations

import re

import pytest
import torch
from contract import make_weight, relative_error
from emulated import counters, emulated, module

from qlora_kernels import ops


def test_a_kernel_can_be_forced(monkeypatch):
    weight = make_weight(64, 128)
    x = torch.randn(5, 128).bfloat16()
    exact = x.double() @ weight.dequantize(torch.bfloat16).double().T

    def forward():
        return ops.linear_forward(x, *weight.pieces, 64, None, None, None, 1.0, 0.0, None)[0]

    used = {}
    tiles = ("tiles16", "tiles32", "tiles64", "tiles128", "tiles128x3", "tiles128wide")
    warpgroups = ("warpgroup16", "warpgroup32", "warpgroup64", "warpgroup128")
    for name in ("few", *warpgroups, "middle8", "middle16", "middle32", *tiles, "floats"):
        monkeypatch.setenv("QLORA_KERNELS_CUDA_KERNEL", name)
        with emulated():
            module().reset_counters()
            assert relative_error(forward(), exact) < 4e-3
            instructions = counters()["instructions"]
            used[name] = instructions.get("wgmma" if name in warpgroups else "mma", 0)
    assert used["few"] < used["tiles16"] < used["tiles32"] < used["tiles64"] < used["tiles128"] == used["tiles128x3"]
    assert used["tiles128wide"] == 2 * used["tiles128"]
    assert [used[f"middle{rows}"] for rows in (16, 32)] == [used[f"tiles{rows}"] for rows in (16, 32)]
    # A step is 512 deep, or 256; four products of 64 x 16 for each 64 in depth, by two warpgroups.
    assert [used[name] for name in warpgroups] == [2 * 8 * 4 * 128] * 2 + [2 * 4 * 4 * 128] * 2
    assert used["floats"] == 0
    with emulated(), pytest.raises(RuntimeError, match="names no kernel; there are few, warpgroup16"):
        monkeypatch.setenv("QLORA_KERNELS_CUDA_KERNEL", "fast")
        forward()
    with emulated(), pytest.raises(RuntimeError, match="few cannot take M = 9, N = 64, K = 128: more than 8 rows"):
        monkeypatch.setenv("QLORA_KERNELS_CUDA_KERNEL", "few")
        x = torch.randn(9, 128).bfloat16()
        forward()
    with emulated(max_shared_bytes=64 * 1024), pytest.raises(RuntimeError, match="its stages do not fit"):
        monkeypatch.setenv("QLORA_KERNELS_CUDA_KERNEL", "tiles128")
        forward()


#: Those that fit the 99 KiB of sm_86, sm_89 and sm_120; those that fit the 64 KiB of sm_75; the others.
FIT_99 = {"few", "middle8", "middle16", "middle32", "tiles64", "tiles128x3"}
FIT_64 = {"tiles16", "tiles32", "tiles32any"}
FIT_163 = {"tiles128", "tiles128wide"}
#: Those that only sm_90a has.
HOPPER = {"warpgroup16", "warpgroup32", "warpgroup64", "warpgroup128"}
ALL = FIT_64 | FIT_99 | FIT_163 | HOPPER


@pytest.mark.parametrize(
    ("architecture", "dtype", "taken"),
    [
        (75, torch.bfloat16, set()),
        (75, torch.float16, FIT_64),
        *((one, torch.bfloat16, FIT_64 | FIT_99) for one in (86, 89, 120)),
        *((one, torch.float16, FIT_64 | FIT_99 | FIT_163) for one in (80, 100)),
        *((90, dtype, ALL) for dtype in (torch.bfloat16, torch.float16)),
    ],
)
def test_what_has_no_code_on_an_architecture_cannot_be_forced(architecture, dtype, taken, monkeypatch):
    """Not even on a card with enough shared memory that runs an older architecture's PTX. test_static_gates.py checks
    in a wheel that exactly these have code."""
    weight = make_weight(64, 128)
    x = torch.randn(5, 128).to(dtype)
    refusals = {}
    with emulated(architecture=architecture, max_shared_bytes=227 * 1024):
        for name in ALL:
            monkeypatch.setenv("QLORA_KERNELS_CUDA_KERNEL", name)
            try:
                ops.linear_forward(x, *weight.pieces, 64, None, None, None, 1.0, 0.0, None)
            except RuntimeError as error:
                refusals[name] = str(error)
    assert set(refusals) == ALL - taken
    for name, refusal in refusals.items():
        why = "it is for sm_90a|the architecture lacks|.* not fit into shared memory"
        assert re.search(rf"={name} cannot take .*: ({why})", refusal)


@pytest.mark.parametrize(
    ("dtype", "architecture", "tiled"),
    [
        (torch.bfloat16, 80, True),
        (torch.bfloat16, 75, False),
        (torch.float16, 75, True),
        (torch.float32, 90, False),
    ],
)
def test_which_kernel_runs(dtype, architecture, tiled):
    weight = make_weight(64, 128)
    x = torch.randn(20, 128).to(dtype)
    with emulated(architecture=architecture, max_shared_bytes=(64 if architecture == 75 else 227) * 1024):
        module().reset_counters()
        y, _ = ops.linear_forward(x, *weight.pieces, 64, None, None, None, 1.0, 0.0, None)
        assert ("mma" in counters()["instructions"]) == tiled
    assert relative_error(y, x.double() @ weight.dequantize(dtype).double().T) < 4e-3
