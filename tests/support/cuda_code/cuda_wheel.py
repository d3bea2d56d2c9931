"""A wheel with CUDA kernels for the tests that look into one: built once, or given by QLORA_KERNELS_WHEEL.

Where QLORA_KERNELS_REQUIRE_NVCC is set, as in CI, a missing tool is a failure; elsewhere the tests are skipped.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
if not (ROOT / "setup_cuda.py").exists():
    pytest.skip("there are no sources beside the tests", allow_module_level=True)
sys.path.append(str(ROOT))

import setup_cuda  # noqa: E402

#: What CI builds.
ARCHITECTURES = ("80", "90a")
FOLDER = ROOT / "build" / "wheel"


def tool(name: str) -> str:
    """The path of nvcc, cuobjdump, or one of binutils."""
    path = setup_cuda.find_tool(name)
    if path is None:
        reason = f"{name} is not installed"
        if os.environ.get("QLORA_KERNELS_REQUIRE_NVCC"):
            pytest.fail(f"{reason}, and QLORA_KERNELS_REQUIRE_NVCC is set")
        pytest.skip(reason)
    return path


@functools.lru_cache(maxsize=1)
def _built() -> Path:
    if given := os.environ.get("QLORA_KERNELS_WHEEL"):
        return Path(given)
    FOLDER.mkdir(parents=True, exist_ok=True)
    out, made_in = FOLDER / "out", FOLDER / "run"
    # Workers of one run share the wheel that the first of them makes.
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if run is None or not made_in.is_file() or made_in.read_text() != run:
            made_in.unlink(missing_ok=True)
            _build(out)
            made_in.write_text(run or "")
    return next(out.glob("*.whl"))


def _build(out: Path) -> None:
    # A copy, so that the tree's own build and metadata stay unchanged; kept, so that only changes are compiled.
    source = FOLDER / "source"
    for name in ("csrc", "qlora_kernels"):
        shutil.rmtree(source / name, ignore_errors=True)
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "setup_cuda.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, source)
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--no-build-isolation"]
    environment = {**os.environ, "QLORA_KERNELS_CUDA_ARCHS": ";".join(ARCHITECTURES)}
    done = subprocess.run([*command, "-w", str(out)], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the wheel does not build:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")


def built_for() -> tuple[str, ...]:
    """The architectures of the wheel, by its name: ARCHITECTURES, or what the wheel that was given names."""
    parts = wheel().name.split("-")[1].partition("+")[2].split(".")
    ptx = {target.removeprefix("compute") for target in parts if target.startswith("compute")}
    machine = [target.removeprefix("sm") for target in parts if target.startswith("sm")]
    return tuple(one + ("+PTX" if one in ptx else "") for one in machine)


def wheel() -> Path:
    """A wheel for ARCHITECTURES, or another one that was given."""
    for name in ("nvcc", "cuobjdump", "nvdisasm"):
        tool(name)
    return _built()


@functools.lru_cache(maxsize=1)
def _unpacked() -> tuple[tempfile.TemporaryDirectory, Path]:
    keep = tempfile.TemporaryDirectory()
    with zipfile.ZipFile(wheel()) as archive:
        archive.extractall(keep.name)
    return keep, Path(keep.name)


def unpacked() -> Path:
    """Its contents: a folder to import from."""
    wheel()
    return _unpacked()[1]


def extension() -> Path:
    """Its _C."""
    (path,) = (unpacked() / "qlora_kernels").glob("_C*.so")
    return path


# A stand-in for the driver: leaves a mark when it is loaded, and shows one card of compute capability 9.0.
_DRIVER = r"""
#include <cstdio>
#include <cstdlib>
static const bool loaded = [] {
    const char* mark = std::getenv("FAKE_DRIVER_MARK");
    if (std::FILE* file = mark ? std::fopen(mark, "w") : nullptr) std::fclose(file);
    return true;
}();
extern "C" {
int cuInit(unsigned) { return 0; }
int cuDeviceGetCount(int* count) { return *count = 1, 0; }
int cuDeviceGet(int* device, int) { return *device = 0, 0; }
int cuDeviceGetAttribute(int* value, int attribute, int) { return *value = attribute == 75 ? 9 : 0, 0; }
}
"""


def fake_driver(folder: Path) -> Path:
    """Compiles a libcuda.so.1 into a folder, to be put on LD_LIBRARY_PATH."""
    (folder / "driver.cpp").write_text(_DRIVER)
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    output = folder / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(output), str(folder / "driver.cpp")], check=True)
    return folder
