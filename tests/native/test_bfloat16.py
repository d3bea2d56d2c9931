"""Where products in bfloat16 are chosen, and what is said where they are not."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from qlora_kernels.native import bfloat16
from qlora_kernels.native.bfloat16 import slow_bfloat16
from qlora_kernels.native.build_info import build_info

ALL = ["amx", "avx512_bf16", "avx512", "avx2", "portable"]


@pytest.fixture(name="machine")
def machine_fixture(monkeypatch):
    """Pretends to be an x86 machine with some instruction sets, the first of them in use unless one is given."""
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)

    def pretend(available, in_use=None, name="x86_64"):
        info = {"isas_available": available, "isa_in_use": in_use or available[0]} if available else {}
        monkeypatch.setattr(bfloat16.platform, "machine", lambda: name)
        monkeypatch.setattr(bfloat16, "build_info", lambda: info)

    return pretend


def test_processors_with_bfloat16_instructions(machine):
    for first in (0, 1):
        machine(ALL[first:])
        assert slow_bfloat16("cpu") is None


@pytest.mark.parametrize(("name", "available"), [("x86_64", ALL[2:]), ("AMD64", ALL[3:]), ("x86_64", None)])
def test_processors_without(machine, name, available):
    machine(available, name=name)
    assert slow_bfloat16("cpu").startswith("this processor has no bfloat16 instructions")


def test_a_lesser_set_of_this_package(machine):
    for lesser in ("avx512", "avx2", "portable"):
        machine(ALL, in_use=lesser)
        assert f"QLORA_KERNELS_CPU_ISA={lesser} " in slow_bfloat16("cpu")
    machine(ALL, in_use="avx512_bf16")
    assert slow_bfloat16("cpu") is None


@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_a_lesser_set_of_torch(machine, monkeypatch, name):
    machine(ALL)
    for value in ("AVX2", "avx512_core", "AVX512_CORE_VNNI"):
        monkeypatch.setenv(name, value)
        assert f"{name}={value} " in slow_bfloat16("cpu")
    for value in ("", "AVX512_CORE_BF16", "AVX512_CORE_AMX", "DEFAULT"):
        monkeypatch.setenv(name, value)
        assert slow_bfloat16("cpu") is None


def test_the_newer_name_of_a_variable_counts(machine, monkeypatch):
    machine(ALL)
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX")
    assert slow_bfloat16("cpu") is None


def test_torch_without_onednn(machine, monkeypatch):
    machine(ALL)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert "lacks oneDNN" in slow_bfloat16("cpu")


def test_cards(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert slow_bfloat16("cuda") is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, slow in (((7, 5), True), ((8, 0), False), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)  # noqa: B023
        assert bool(slow_bfloat16("cuda:0")) is slow


_ISAS = build_info().get("isas_available", [])


@pytest.mark.slow
@pytest.mark.skipif(not {"avx512_bf16", "amx"} & set(_ISAS), reason="needs bfloat16 instructions")
def test_torch_s_bfloat16_is_fast_and_with_a_lesser_set_slow(monkeypatch):
    """What the rule rests on, in this torch: the ratio of bfloat16 to float32, measured."""
    code = """
import time, torch
torch.set_num_threads(1)
def seconds(dtype):
    x = torch.ones(384, 384, dtype=dtype)
    times = []
    for _ in range(8):
        began = time.thread_time()
        x @ x
        times.append(time.thread_time() - began)
    return min(times[2:])
print(seconds(torch.bfloat16) / seconds(torch.float32))
"""
    ratios = {}
    for isa in ("DEFAULT", "AVX512_CORE", "AVX2"):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        ratios[isa] = float(run.stdout)
    assert ratios["DEFAULT"] < 0.9, ratios
    assert ratios["AVX512_CORE"] > 1.1, ratios
    assert ratios["AVX2"] > 1.1, ratios
