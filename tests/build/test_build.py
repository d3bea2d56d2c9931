"""The built extension: what it links to, whose OpenMP it runs on, how much memory it takes, how a build can fail."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engines import ISAS

import qlora_kernels
from qlora_kernels import NF4Weight, default_nested_table, linear
from qlora_kernels.native import extension

ROOT = Path(__file__).resolve().parent.parent.parent
EXTENSION = Path(extension.native().__file__)
MIB = 2**20


def needs(tool: str) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} (binutils) is not installed")


def output_of(*command: object) -> str:
    return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs code in a fresh interpreter, with the package importable wherever it was imported from here."""
    path = os.pathsep.join(map(str, (Path(qlora_kernels.__file__).parent.parent, ROOT, ROOT / "tests/support")))
    env = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)


def random_weight(n: int, k: int) -> NF4Weight:
    """A double-quantized weight of random codes: nothing dense is ever made."""
    blocks = (n * k + 63) // 64
    return NF4Weight(
        packed=torch.randint(0, 256, ((n * k + 1) // 2,), dtype=torch.uint8),
        absmax=torch.randint(0, 256, (blocks,), dtype=torch.uint8),
        nested_absmax=torch.full(((blocks + 255) // 256,), 0.5),
        nested_offset=torch.ones(1),
        nested_table=default_nested_table(),
        shape=torch.Size((n, k)),
    )


def forward_and_backward(weight: NF4Weight, m: int, dtype: torch.dtype, rank: int = 16, dropout: float = 0.0) -> None:
    n, k = weight.shape
    x = torch.ones(m, k, dtype=dtype, requires_grad=True)
    lora_A = torch.ones(rank, k, dtype=dtype, requires_grad=True)
    lora_B = torch.ones(n, rank, dtype=dtype, requires_grad=True)
    linear(x, weight, None, lora_A, lora_B, dropout=dropout).sum().backward()
    assert x.grad is not None
    assert lora_A.grad is not None
    assert lora_B.grad is not None


# ------------------------------------------------------------------------------------------------------- libraries


def test_extension_needs_no_torch_and_no_openmp_library():
    needs("readelf")
    libraries = re.findall(r"\(NEEDED\).*\[(.*)\]", output_of("readelf", "-d", EXTENSION))
    assert libraries
    unwanted = re.compile(r"lib(torch|c10|[gi]?omp|python)")
    assert not [name for name in libraries if unwanted.match(name)]


def test_extension_leaves_only_openmp_to_torch():
    needs("nm")
    undefined = [line.split()[-1] for line in output_of("nm", "-DC", "--undefined-only", EXTENSION).splitlines()]
    assert any(name.startswith("GOMP_") for name in undefined)
    assert not [name for name in undefined if re.match(r"(c10|at|torch|caffe2)(::|_)", name)]


def test_one_openmp_runtime_serves_torch_and_the_kernels():
    result = python(
        """
import os, re
import torch, qlora_kernels
from tests.build.test_build import random_weight

weight = random_weight(1024, 1024)
torch.set_num_threads(2)
before = len(os.listdir("/proc/self/task"))
qlora_kernels.linear(torch.ones(64, 1024), weight)
assert len(os.listdir("/proc/self/task")) > before, "the kernel did not start a second thread"
paths = {line.split()[-1] for line in open("/proc/self/maps") if re.search(r"/lib[gi]?omp[^/]*[.]so", line)}
print(len(paths), *paths)
""",
        OPENBLAS_NUM_THREADS="1",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("1 "), result.stdout


# LD_BIND_NOW resolves the GOMP_* symbols at load: torch's runtime has to be there by then.
@pytest.mark.parametrize("environment", [{}, {"LD_BIND_NOW": "1"}], ids=["lazy", "bind-now"])
@pytest.mark.parametrize("module", ["qlora_kernels", "qlora_kernels._C"])
def test_import_in_a_fresh_process(module, environment):
    code = f"import {module}, qlora_kernels; print(qlora_kernels.quantize(__import__('torch').ones(3, 64)).nbytes)"
    result = python(code, **environment)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 0


def test_an_extension_that_is_missing_says_how_to_build_it(monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(extension.importlib, "import_module", missing)
    extension.native.cache_clear()
    try:
        with pytest.raises(ImportError, match=r"qlora_kernels\._C could not be loaded .*; build it with 'pip install"):
            extension.native()
    finally:
        extension.native.cache_clear()


# ------------------------------------------------------------------------------------------------ instruction sets


def test_each_instruction_set_can_be_forced(isa):
    assert extension.native().build_info()["isa_in_use"] == isa


def test_the_best_instruction_set_is_the_default(monkeypatch):
    monkeypatch.delenv("QLORA_KERNELS_CPU_ISA", raising=False)
    assert extension.native().build_info()["isa_in_use"] == ISAS[0]


def test_an_unknown_instruction_set_is_an_error_that_names_the_others(monkeypatch):
    weight = random_weight(8, 64)
    monkeypatch.setenv("QLORA_KERNELS_CPU_ISA", "nonsense")
    with pytest.raises(RuntimeError, match=rf"QLORA_KERNELS_CPU_ISA=nonsense.*available.*{','.join(ISAS)}"):
        weight.dequantize(torch.float32)


@pytest.fixture(scope="module")
def objects() -> dict[str, Path]:
    """The object files of the newest build in this tree, by the name of their source."""
    needs("nm")
    needs("objdump")
    folders = sorted(ROOT.glob("build/temp*/cmake*/CMakeFiles/_C.dir/cpu"), key=lambda f: f.stat().st_mtime)
    if not folders:
        pytest.skip("the extension was not built in this tree: there are no object files to look into")
    # A build folder may hold objects of sources that have moved since.
    compiled = sorted(folders[-1].rglob("*.cpp.o"), key=lambda path: path.stat().st_mtime)
    return {path.name.removesuffix(".cpp.o"): path for path in compiled}


def test_no_instruction_set_shares_a_function_with_another(objects):
    """A weak symbol is merged by the linker, which may keep the copy that needs AVX-512 for everybody."""
    for name, path in objects.items():
        if not name.startswith("isa_"):
            continue
        own = f"qlk::cpu::{name.removeprefix('isa_')}::"
        for line in output_of("nm", "-C", "--defined-only", path).splitlines():
            kind, symbol = line.split(maxsplit=2)[1:]
            # DW.ref.* is a pointer to the exception handler's name: data, the same in every file.
            if kind in "WVu" and own not in symbol and not symbol.startswith("DW.ref."):
                pytest.fail(f"{path.name} defines {symbol}, which the linker may hand to another instruction set")


def test_code_that_runs_everywhere_uses_no_vector_extension(objects):
    checked = 0
    for name, path in objects.items():
        if name in ("isa_avx2", "isa_avx512", "isa_avx512_bf16", "isa_amx"):
            # Nothing of these may run before dispatch has looked: no static initializers.
            sections = output_of("objdump", "-h", path)
            assert not re.search(r"\.(init_array|ctors)", sections), f"{path.name} has code that runs at load"
        else:
            code = output_of("objdump", "-d", "--no-show-raw-insn", path)
            wide = re.search(r"^.*(%[yz]mm|%k[0-7]|%tmm|\sv[a-z0-9]+ .*%xmm).*$", code, re.MULTILINE)
            assert wide is None, f"{path.name}: {wide.group().strip()}"
            checked += 1
    assert checked >= 4


# ---------------------------------------------------------------------------------------------------------- memory

SHAPES = [
    *((m, 4096, 4096) for m in (1, 512, 4096)),
    # Long rows of W; many of them; rows that cut blocks.
    *((512, 512, 14336), (512, 14336, 512), (65, 999, 14335)),
    # Sums so long that not even 32 packed rows of x, or of dy in backward, would fit; the kernels for few rows as well.
    *((33, 65536, 256), (33, 256, 65536), (65, 70001, 70), (65, 70, 70001)),
    *((1, 128256, 64), (8, 64, 131072), (8, 131072, 64), (4, 64, 600064)),
]


@pytest.mark.share(4)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_scratch_stays_within_8_mib_a_thread(m, n, k, threads):
    weight = random_weight(n, k)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        dtypes = [torch.bfloat16] if m == 4096 else [torch.bfloat16, torch.float32]
        for dtype, (rank, dropout) in itertools.product(dtypes, [(16, 0.0), (256, 0.1)]):
            extension.native().scratch_peak_bytes(reset=True)
            forward_and_backward(weight, m, dtype, rank, dropout)
            assert 0 < extension.native().scratch_peak_bytes() <= 8 * MIB, f"{dtype}, rank {rank}"
    finally:
        torch.set_num_threads(before)


def test_scratch_with_a_rank_of_thousands():
    """Beyond the ranks of the test above, to where the promise ends."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for m, n, k in ((512, 512, 512), (33, 40000, 64), (33, 64, 40000)):
            extension.native().scratch_peak_bytes(reset=True)
            forward_and_backward(random_weight(n, k), m, torch.float32, 4096, 0.1)
            assert 0 < extension.native().scratch_peak_bytes() <= 8 * MIB, f"M={m} N={n} K={k}"
    finally:
        torch.set_num_threads(before)


def test_a_dense_copy_of_the_weight_never_exists():
    """Peak memory of the process: a bf16 copy of this weight would take 128 MiB."""
    result = python(
        """
import torch
from tests.build.test_build import MIB, forward_and_backward, random_weight

def status(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024

torch.set_num_threads(2)
forward_and_backward(random_weight(64, 64), 1, torch.bfloat16)  # what is loaded at the first call
weight = random_weight(8192, 8192)
before = status("VmHWM")
assert before - status("VmRSS") < 4 * MIB, "an earlier peak would hide what follows"
for m in (1, 64):
    for dtype in (torch.bfloat16, torch.float32):
        forward_and_backward(weight, m, dtype)
print((status("VmHWM") - before) / MIB)
weight.dequantize(torch.bfloat16)
print((status("VmHWM") - before) / MIB)
"""
    )
    assert result.returncode == 0, result.stderr
    grown, with_a_copy = map(float, result.stdout.split())
    assert grown < 128 / 4
    assert with_a_copy > 120, "the measurement does not see a dense copy"


# -------------------------------------------------------------------------------------------------------- setup.py


@pytest.fixture
def build_ext(tmp_path):
    """Runs `setup.py build_ext` in a copy of the sources with another compiler."""
    setuptools = pytest.importorskip("setuptools")
    if not (ROOT / "setup.py").exists():
        pytest.skip("there are no sources beside the tests")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip(f"setuptools {setuptools.__version__} is older than pyproject.toml asks for")
    copy = tmp_path / "copy"
    for folder in ("csrc", "qlora_kernels"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for file in ("setup.py", "setup_cuda.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    # A stand-in for pybind11, which an isolated build has and the tests' environment need not: the build ends before.
    (copy / "pybind11.py").write_text("def get_cmake_dir():\n    return ''\n")

    def run(compiler: Path) -> subprocess.CompletedProcess:
        env = {**os.environ, "CXX": str(compiler), "PYTHONPATH": str(copy), "QLORA_KERNELS_CUDA_ARCHS": "none"}
        return subprocess.run(
            [sys.executable, "setup.py", "build_ext"], cwd=copy, env=env, capture_output=True, text=True, timeout=120
        )

    return run


def assert_one_sentence(result: subprocess.CompletedProcess, *parts: str) -> None:
    everything = result.stdout + result.stderr
    assert result.returncode == 1, everything
    assert "Traceback" not in everything
    assert "CMake" not in everything
    sentences = [line for line in result.stderr.splitlines() if "C++17" in line]
    assert len(sentences) == 1, everything
    for piece in parts:
        assert piece in sentences[0]


def test_a_missing_compiler_is_one_sentence(build_ext, tmp_path):
    assert_one_sentence(build_ext(tmp_path / "no-such-compiler"), "found none", "install one", "CXX")


def test_an_old_compiler_is_one_sentence(build_ext, tmp_path):
    old = tmp_path / "old-c++"
    old.write_text(
        "#!/bin/sh\n"
        'for argument in "$@"; do\n'
        '  case "$argument" in -std=c++17) echo "error: unrecognized option $argument" >&2; exit 1 ;; esac\n'
        "done\n"
    )
    old.chmod(old.stat().st_mode | stat.S_IXUSR)
    assert_one_sentence(build_ext(old), str(old), "install a newer one")
