"""The CUDA kernels on the emulator, as a backend like any other: built from the sources when it is first asked for."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import torch

from qlora_kernels.ops import backends
from qlora_kernels.optim.arena import cuda

ROOT = Path(__file__).resolve().parent.parent.parent
#: "sanitized" builds it under AddressSanitizer and UBSan; python itself then needs libasan in LD_PRELOAD.
VARIANT = os.environ.get("QLORA_KERNELS_EMULATOR", "ON")


def build(folder: Path, target: str = "_emulated", root: Path = ROOT, **definitions: str) -> Path:
    """Configures and builds one of CMakeLists.txt's modules, and gives the built file. One process at a time.

    Raises:
        RuntimeError: with the compiler's output when it does not build.
    """
    import pybind11

    folder.mkdir(parents=True, exist_ok=True)
    configure = [
        *("cmake", "-S", str(root / "csrc"), "-B", str(folder), "-G", "Ninja"),
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
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
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.lru_cache(maxsize=1)
def module() -> ModuleType:
    """The emulator's module; QLORA_KERNELS_EMULATOR_MODULE names one that is built already."""
    if "QLORA_KERNELS_EMULATOR_MODULE" in os.environ:
        return load(Path(os.environ["QLORA_KERNELS_EMULATOR_MODULE"]))
    suffix = f"{VARIANT.lower()}-{sys.implementation.cache_tag}"
    return load(build(ROOT / "build" / f"emulator-{suffix}", QLK_EMULATOR=VARIANT))


class Emulated(backends.CUDA):
    """CPU tensors, CUDA kernels. What a kernel does not write stays NaN, and so does scratch."""

    @staticmethod
    def _empty(shape, dtype, device):
        tensor = torch.empty(shape, dtype=dtype, device="cpu")
        if tensor.numel():
            tensor.view(-1).view(torch.uint8).fill_(255)
        return tensor

    @staticmethod
    def _like(tensor, *sizes, dtype=None):
        return Emulated._empty(sizes, dtype or tensor.dtype, "cpu")

    @staticmethod
    def _queue(device):
        return 0, 0

    def capturing(self, device):
        return self.captures

    def pin(self, table):
        return table.clone()

    def send(self, pinned, device):
        return pinned.clone()

    def wait(self, device):
        self.waits += 1

    def expose(self, owner, address, count, dtype, device):
        return cuda.host_memory(owner, address, count, dtype)

    #: What a test says of the caller's stream.
    captures = False
    #: How often the host has waited for the device.
    waits = 0


@contextlib.contextmanager
def emulated(order: str = "forward", landing: str = "latest", **options):
    """A context in which the operations run on the emulator."""
    module().configure(order=order, landing=landing, **options)
    try:
        with backends.forced(Emulated(module())):
            yield
    finally:
        module().configure()


def paging() -> dict:
    """Pages moved since reset_paging(), and where they are (tests/emulator/managed.h)."""
    return json.loads(module().paging())


def counters() -> dict:
    """What has been counted since reset_counters()."""
    return json.loads(module().counters())
