"""Builds and loads the emulator of CUDA kernels, and the conformance kernels for the card that is there.

    python -m bench.emulator [emulator] [conformance]

builds those named, both by default, so that whatever needs them next finds them built.
"""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
#: "sanitized" builds it under AddressSanitizer and UBSan; python itself then needs libasan in LD_PRELOAD.
VARIANT = os.environ.get("QLORA_KERNELS_EMULATOR", "ON")


def build(
    folder: Path, target: str = "_emulated", root: Path = ROOT, python: str = sys.executable, **definitions: str
) -> Path:
    """Configures and builds one of CMakeLists.txt's modules; returns the built file. One process at a time builds.

    Args:
        folder: for what is built, and kept for the next time.
        target: the module's name.
        root: the source folder.
        python: the interpreter that it is for; it needs its headers, and no packages.
        definitions: CMakeLists.txt's options.

    Raises:
        RuntimeError: with the compiler's output when it does not build.
    """
    import pybind11

    folder.mkdir(parents=True, exist_ok=True)
    configure = [
        *("cmake", "-S", str(root / "csrc"), "-B", str(folder), "-G", "Ninja"),
        *(f"-DPython_EXECUTABLE={python}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
        *(f"-D{name}={value}" for name, value in definitions.items()),
    ]
    # The preloaded sanitizer is meant for python alone.
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, ["cmake", "--build", str(folder)]):
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"'{' '.join(command[:2])}' failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return next(folder.glob(f"{target}.*.so"))


def load(path: Path, name: str = "_emulated") -> ModuleType:
    """An extension module from its file."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.lru_cache(maxsize=1)
def module() -> ModuleType:
    """The emulator, built on first use; QLORA_KERNELS_EMULATOR_MODULE names one that is built already."""
    if "QLORA_KERNELS_EMULATOR_MODULE" in os.environ:
        return load(Path(os.environ["QLORA_KERNELS_EMULATOR_MODULE"]))
    suffix = f"{VARIANT.lower()}-{sys.implementation.cache_tag}"
    return load(build(ROOT / "build" / f"emulator-{suffix}", QLK_EMULATOR=VARIANT))


@functools.lru_cache(maxsize=1)
def conformance_module() -> ModuleType:
    """The conformance kernels (tests/emulator/conformance.cu), compiled by nvcc for this card on first use.

    QLORA_KERNELS_CONFORMANCE_MODULE names ones that are built already.
    """
    if "QLORA_KERNELS_CONFORMANCE_MODULE" in os.environ:
        return load(Path(os.environ["QLORA_KERNELS_CONFORMANCE_MODULE"]), "_conformance")
    import torch

    from qlora_kernels.native import architectures

    arch = architectures.for_card(*torch.cuda.get_device_capability())
    folder = ROOT / "build" / f"conformance-{arch}"
    return load(build(folder, "_conformance", QLK_CONFORMANCE="ON", QLK_CUDA_ARCHS=arch), "_conformance")


MODULES = {"emulator": module, "conformance": conformance_module}

if __name__ == "__main__":
    for wanted in sys.argv[1:] or MODULES:
        MODULES[wanted]()
