"""A run that is limited to an instruction set: everything in it is, and nothing after it."""

from __future__ import annotations

import os

import pytest
import torch
from bench_runs.cases import POINT, contender

import qlora_kernels
from qlora_kernels.bench import instruction_sets, options
from qlora_kernels.bench.case import OURS
from qlora_kernels.bench.contenders import ggml_weights, weights
from qlora_kernels.bench.contenders.names import DENSE, GGML, INT4
from qlora_kernels.bench.points import Point
from qlora_kernels.bench.report import results, rivals
from qlora_kernels.bench.timing import machine
from qlora_kernels.cli.main import main
from qlora_kernels.errors import InputError

AVAILABLE = qlora_kernels.build_info().get("isas_available", [])
needs_avx2 = pytest.mark.skipif("avx2" not in AVAILABLE, reason="the processor has no AVX2")


@needs_avx2
def test_all_libraries_are_limited_and_then_no_longer(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    before = dict(os.environ)
    with instruction_sets.limited_to("avx2") as limited:
        assert limited == {"forced": "avx2", "torch": "AVX2"}
        assert machine.isa_in_use() == "avx2"
        assert os.environ["ONEDNN_MAX_CPU_ISA"] == os.environ["MKL_ENABLE_INSTRUCTIONS"] == "AVX2"
        described = machine.describe_machine()
        assert described["isa_in_use"] == "avx2"
        assert described["environment"]["ATEN_CPU_CAPABILITY"] == "avx2"
    assert dict(os.environ) == before
    with instruction_sets.limited_to(None) as limited:
        assert limited is None


def test_a_set_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(qlora_kernels, "build_info", lambda: {"isas_available": ["avx2", "portable"]})
    with (
        pytest.raises(InputError, match="--isa amx: this machine and build have avx2, portable"),
        instruction_sets.limited_to("amx"),
    ):
        pass
    assert main(["bench", "--rivals", "--isa", "amx", "--device", "cpu"]) == 2
    assert "--isa amx" in capsys.readouterr().err


@needs_avx2
def test_torch_that_does_not_follow_is_refused(monkeypatch):
    monkeypatch.setattr(instruction_sets, "_TORCH", "print('AVX512')")
    with pytest.raises(InputError, match="torch uses AVX512 in spite of"), instruction_sets.limited_to("avx2"):
        pass
    assert os.environ.get("QLORA_KERNELS_CPU_ISA") != "avx2"


@needs_avx2
def test_a_limited_run_is_in_float32(capsys):
    assert main(["bench", "--list", "--device", "cpu", "--isa", "avx2"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("limits, float32\n")
    assert "float32, which is faster here than bfloat16: QLORA_KERNELS_CPU_ISA=avx2 leaves out" in err


@needs_avx2
@pytest.mark.slow
def test_a_limited_run_says_so_in_a_file_that_is_named_after_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        options, "points_of", lambda namespace, dtype=None: [POINT]
    )  # the limits take long on one thread
    arguments = ["--isa", "avx2", "--seconds", "0.01"]
    assert main(["bench", *arguments, "--threads", "1", "--quiet", "--no-plots", "--into", str(tmp_path)]) == 0
    [path] = tmp_path.iterdir()
    assert path.name.startswith("cpu-")
    assert path.name.endswith("-avx2-1cores.jsonl")
    run = results.load(path)
    assert run["machine"]["limited"] == {"forced": "avx2", "torch": "AVX2"}
    assert run["machine"]["isa_in_use"] == "avx2"
    assert "kernels for avx2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cpuinfo", "kind"),
    [
        ({"vendor_id": "AuthenticAMD", "cpu family": "25", "model": "17"}, "zen4"),
        ({"vendor_id": "AuthenticAMD", "cpu family": "25", "model": "1"}, "zen3"),
        ({"vendor_id": "AuthenticAMD", "cpu family": "26", "model": "2"}, "zen5"),
        ({"vendor_id": "GenuineIntel", "cpu family": "6", "model": "207"}, "emeraldrapids"),
        (
            {"vendor_id": "GenuineIntel", "cpu family": "6", "model": "1", "model name": "Intel(R) Core(TM) X9"},
            "corex9",
        ),
        ({"model name": "Cortex/A-72 é"}, "cortexa72"),
    ],
)
def test_processors_have_short_names(cpuinfo, kind):
    assert machine.kind_of_processor(cpuinfo) == kind


def test_which_set_is_beyond_which():
    assert machine.beyond("avx512_bf16", "avx2")
    assert not machine.beyond("avx2", "avx512")
    assert not machine.beyond("avx2", "avx2")
    assert not machine.beyond("neon", "avx2")
    assert not machine.beyond("avx2", None)


def test_a_library_that_has_more_than_the_run_is_refused(monkeypatch):
    monkeypatch.setattr(ggml_weights, "ggml", lambda: None)
    monkeypatch.setattr(ggml_weights, "compiled_for", lambda library: "avx512")
    with pytest.raises(RuntimeError, match="compiled for avx512, beyond avx2"):
        ggml_weights.check_set("avx2")
    ggml_weights.check_set("avx512_bf16")


@pytest.mark.parametrize(("isa", "supported"), [("avx2", False), ("avx512_bf16", True), ("amx", True)])
def test_bitsandbytes_layer_does_what_it_would_on_such_a_processor(isa, supported, monkeypatch):
    monkeypatch.setattr(weights, "isa_in_use", lambda: isa)
    layer = torch.nn.Linear(4, 4)
    layer.support_avx512bf16_for_cpu = True
    assert weights.as_limited(layer).support_avx512bf16_for_cpu is supported


def test_operations_of_a_cpu_are_left_out_on_a_card():
    points = [Point("quantize"), Point("linear_busy", n=64, k=64, m=1)]
    assert options.on_device(points, "cpu") == points
    assert options.on_device(points, "cuda") == points[:1]
    with pytest.raises(InputError, match="linear_busy, experts can only be measured on a CPU"):
        options.on_device(points[1:], "cuda")


def test_rivals_are_a_line_for_each_number_of_rows(capsys):
    case = {
        **Point("linear_forward", n=4096, k=4096, m=16, rank=0).as_dict(),
        "other_processes": 0.2,
        "contenders": [
            contender(OURS, 2.0),
            contender(DENSE, 3.0),
            contender(INT4, 1.0),
            {"name": GGML, "failed": "not installed (ggml)"},
        ],
    }
    limits = {**Point("limits", "float32").as_dict(), "contenders": [], "other_processes": None}
    assert rivals.show([limits, case], ["float32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "times ours; float32; kernels for" in lines[0]
    assert lines[2].split()[:7] == ["16", "2", "3", "(1.50)", "-", "1", "(0.50)"]
    assert "others took 20% of the machine" in lines[2]
    assert lines[3] == "  ggml Q4_0: not installed (ggml)"
    failed = {**case, "contenders": [{"name": OURS, "failed": "wrong result"}, contender(DENSE, 3.0)]}
    assert rivals.show([failed]) == 1
    assert rivals.show([{**case, "contenders": [], "failed": "why"}]) == 1
