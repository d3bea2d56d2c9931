"""A wheel with CUDA kernels: its name against what is inside, what it links to, and that it needs no driver."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from cuda_code import cuda_wheel
from cuda_code.cuda_wheel import ROOT, built_for, setup_cuda

from qlora_kernels.native import architectures
from qlora_kernels.version import BASE

MIB = 2**20


#: A wheel takes minutes to build.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel() -> Path:
    return cuda_wheel.wheel()


@pytest.fixture(scope="module")
def extension() -> Path:
    return cuda_wheel.extension()


def output_of(*command: object) -> str:
    return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout


def inside(module: Path) -> set[str]:
    """The machine code (sm_N) and PTX (compute_N) in an object, by cuobjdump."""
    cuobjdump = cuda_wheel.tool("cuobjdump")
    code = re.findall(r"\.(sm_\w+)\.cubin", output_of(cuobjdump, "--list-elf", module))
    # A file without PTX is an error to it.
    ptx = subprocess.run([cuobjdump, "--list-ptx", str(module)], capture_output=True, text=True).stdout
    return {*code, *(name.replace("sm_", "compute_") for name in re.findall(r"\.(sm_\w+)\.ptx", ptx))}


def claimed(name: str) -> set[str]:
    """The same according to a wheel's name."""
    local = name.split("-")[1].partition("+")[2]
    release, *targets = local.split(".")
    assert re.fullmatch(r"cu\d+", release), name
    return {re.sub(r"^(sm|compute)", r"\1_", target) for target in targets}


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs code with the unpacked wheel in place of the package under test."""
    path = f"{cuda_wheel.unpacked()}{os.pathsep}{ROOT / 'tests' / 'support'}"
    env = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300, cwd="/")


# ------------------------------------------------------------------------------------------------------------ name


def test_the_name_says_what_is_inside(wheel, extension):
    release = setup_cuda.Compiler.at(cuda_wheel.tool("nvcc")).release
    assert wheel.name.startswith(f"qlora_kernels-{BASE}{architectures.local_version(release, built_for())}-")
    assert inside(extension) == claimed(wheel.name) == set(architectures.names(built_for()))
    if "QLORA_KERNELS_WHEEL" not in os.environ or "QLORA_KERNELS_REQUIRE_NVCC" in os.environ:
        assert inside(extension) == {"sm_80", "sm_90a"}
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        assert f"\nVersion: {wheel.name.split('-')[1]}\n" in archive.read(metadata).decode()
        assert sum(name.endswith(".so") for name in archive.namelist()) == 1


def test_a_name_that_says_something_else_is_noticed(extension):
    true = architectures.local_version("13.0", built_for())
    assert inside(extension) == claimed(f"qlora_kernels-0.1.0{true}-cp311-cp311-linux_x86_64.whl")
    for local in (true.rpartition(".")[0], true + ".sm103", true + ".compute103", true + "f"):
        assert inside(extension) != claimed(f"qlora_kernels-0.1.0{local}-cp311-cp311-linux_x86_64.whl"), local


def test_every_file_of_kernels_has_every_architecture(extension):
    listed = re.findall(r"\.(sm_\w+)\.cubin", output_of(cuda_wheel.tool("cuobjdump"), "--list-elf", extension))
    sources = len(list((ROOT / "csrc" / "cuda").rglob("*.cu")))
    assert sorted(listed) == sorted([f"sm_{one.removesuffix('+PTX')}" for one in built_for()] * sources)


def test_ptx_goes_along_where_asked_for(tmp_path):
    """One source file through CMake's rule: a whole wheel would show nothing more."""
    pybind11 = pytest.importorskip("pybind11")
    cuda_wheel.tool("nvcc")
    configure = [
        *("cmake", "-S", ROOT / "csrc", "-B", tmp_path, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"),
        *(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", "-DQLK_CUDA_ARCHS=75;90+PTX"),
    ]
    output_of(*configure)
    output_of("cmake", "--build", tmp_path, "--target", "cuda/quantize/quantize_absmax.cu.o")
    embedded = inside(tmp_path / "cuda" / "quantize" / "quantize_absmax.cu.o")
    assert embedded == set(architectures.names(["75", "90+PTX"])) == {"sm_75", "sm_90", "compute_90"}


def test_the_kernels_for_conformance_on_a_card_build(tmp_path):
    """What the gpu tests build on a card's machine; compile errors are exceptions here too."""
    cuda_wheel.tool("nvcc")
    from bench.emulator import build, load

    module = load(build(tmp_path, "_conformance", QLK_CONFORMANCE="ON", QLK_CUDA_ARCHS="90a"), "_conformance")
    assert {"prmt", "shuffles", "async_copies"} <= set(module.conformance_kernels())
    for run in (module.run_conformance, module.run_wide):
        with pytest.raises(ValueError, match="no conformance kernel 'nonsense'"):
            run("nonsense", 0, 0, 0, 0)
    if not has_driver():
        with pytest.raises(RuntimeError, match=r"^there is no NVIDIA driver"):
            module.run_conformance("prmt", 0, 0, 0, 0)


# --------------------------------------------------------------------------------------------------------- contents


def test_neither_the_driver_nor_a_shared_runtime_is_linked(extension):
    cuda_wheel.tool("readelf")
    libraries = re.findall(r"\(NEEDED\).*\[(.*)\]", output_of("readelf", "-d", extension))
    assert libraries
    assert not [name for name in libraries if re.match(r"lib(cu|nv|torch|c10)", name)]


def test_the_runtime_inside_is_out_of_reach_of_another(extension):
    """torch has its own CUDA runtime: a symbol that both export would resolve to one runtime for both."""
    cuda_wheel.tool("nm")
    symbols = [line.split()[-1] for line in output_of("nm", "-D", extension).splitlines()]
    assert "PyInit__C" in symbols
    assert not [name for name in symbols if re.match(r"_*cu[A-Z]|_*cuda", name)]


def test_no_path_of_the_building_machine_is_inside(extension):
    content = extension.read_bytes()
    assert b"csrc/cuda/quantize/quantize.cu" in content
    toolkit = setup_cuda.Compiler.at(cuda_wheel.tool("nvcc")).runtime.parent.parent
    for path in (ROOT, cuda_wheel.FOLDER, Path.home(), Path(sys.prefix), toolkit):
        assert bytes(f"{path}/", "utf-8") not in content, path


def test_all_architectures_together_stay_below_30_mib(wheel):
    """Counts the rest of this wheel as if it grew with the architectures. bench/results/wheel-all.json is measured
    (test_static_gates.py)."""
    assert wheel.stat().st_size / len(built_for()) * len(architectures.ALL) < 30 * MIB


# ---------------------------------------------------------------------------------------------------------- running


def test_it_tells_what_is_inside(wheel):
    done = python("import json, qlora_kernels as q; print(json.dumps({**q.build_info(), 'version': q.__version__}))")
    assert done.returncode == 0, done.stderr
    info = json.loads(done.stdout)
    assert info["version"] == wheel.name.split("-")[1]
    assert info["cuda_archs"] == [*built_for()]
    assert re.fullmatch(r"\d+\.\d+", info["nvcc"])
    done = python("import sys; from qlora_kernels.cli.main import main; sys.exit(main(['info']))")
    assert f"CUDA architectures built in  {', '.join(built_for())}\n" in done.stdout, done.stderr
    assert f"nvcc                         {info['nvcc']}\n" in done.stdout


def test_the_driver_is_reached_only_by_a_cuda_call(tmp_path):
    mark = tmp_path / "loaded"
    environment = {"LD_LIBRARY_PATH": str(cuda_wheel.fake_driver(tmp_path)), "FAKE_DRIVER_MARK": str(mark)}
    done = python(
        """
import os, torch, qlora_kernels as q
from cuda_code.calls import call_kernels
from qlora_kernels.native.extension import native
weight = q.quantize(torch.ones(2, 64))
weight.dequantize(torch.bfloat16)
q.linear(torch.ones(1, 64), weight)
assert native().build_info()["cuda_archs"] and q.__version__
print(os.path.exists(os.environ["FAKE_DRIVER_MARK"]))
try:
    call_kernels(native().cuda, "quantize", count=64)
except RuntimeError:
    pass
print(os.path.exists(os.environ["FAKE_DRIVER_MARK"]))
""",
        **environment,
    )
    assert done.stdout.split() == ["False", "True"], done.stdout + done.stderr


def test_without_a_driver_a_cuda_call_is_an_exception_and_the_process_lives_on(extension):
    if has_driver():
        pytest.skip("this machine has a driver")
    done = python(
        """
import torch, qlora_kernels as q
from cuda_code.calls import call_kernels
from qlora_kernels.native.extension import native
for _ in range(2):
    try:
        call_kernels(native().cuda, "quantize", count=64)
    except RuntimeError as error:
        print(error)
print(q.quantize(torch.ones(2, 64)).dequantize().sum().item())
"""
    )
    first, second, last = done.stdout.splitlines()
    assert first == second
    assert first.startswith("there is no NVIDIA driver, and these kernels, built with CUDA ")
    assert float(last) == 128
