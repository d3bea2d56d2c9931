"""An extension with CUDA kernels and the emulator in one process, as where the emulator is held against a card."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from emulated import ROOT, module

VARIABLE = "QLORA_KERNELS_WHEEL"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Runs code with the wheel's package, and the emulator's file as its argument."""
    if VARIABLE not in os.environ:
        pytest.skip(f"{VARIABLE} names no wheel with CUDA kernels; CI builds one")
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(os.environ[VARIABLE]) as wheel:
        wheel.extractall(folder)
    emulator = Path(module().__file__).resolve()

    def run(code: str) -> str:
        path = os.pathsep.join(map(str, (folder, ROOT, ROOT / "tests" / "support")))
        environment = {**os.environ, "PYTHONPATH": path}
        command = [sys.executable, "-c", code, emulator]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=folder)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


LOAD = {
    "extension": "from qlora_kernels.native import extension; ours = extension.native()",
    "emulator": "from bench.emulator import load; other = load(sys.argv[1])",
}
USE = """
assert ours.build_info()["cuda_archs"] and "site-packages" not in ours.__file__ and ours.__file__ != other.__file__
assert ours.cuda.Arena is not other.Arena and ours.cuda.Weight is not other.Weight
arena = other.Arena(8192, 4096, 0, 0)
assert type(arena) is other.Arena and arena.base == arena.states
import torch
from qlora_kernels import quantize
from qlora_kernels.ops import backends
from emulated import Emulated
weight, x = torch.randn(40, 192), torch.randn(3, 192)
def call():
    quantized = quantize(weight)
    return *quantized.pieces, quantized.dequantize(torch.bfloat16)
expected = call()
with backends.forced(Emulated(other)):
    other.reset_counters()
    actual = call()
assert other.kernels_run()
assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
print("both work")
"""


@pytest.mark.parametrize("order", [("extension", "emulator"), ("emulator", "extension")], ids=" first, ".join)
def test_both_load_and_work(python, order):
    assert python("\n".join(["import sys", *(LOAD[name] for name in order), USE])) == "both work\n"


def test_a_missing_driver_is_one_sentence(python):
    """What the emulator shows of other versions, from the CUDA runtime itself."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pass
    else:
        pytest.skip("there is a driver here")
    said = python(
        f"{LOAD['extension']}\ntry:\n    ours.cuda.free_memory(0)\nexcept RuntimeError as error:\n    print(error)\n"
    )
    assert said.startswith("there is no NVIDIA driver, and these kernels, built with CUDA ")
    assert said.endswith(" or later; install a newer driver, or build for an older CUDA\n")
    assert said.count("\n") == 1
