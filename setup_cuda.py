"""What setup.py builds for CUDA: reads QLORA_KERNELS_CUDA_ARCHS, looks for GPUs, finds nvcc and asks what it supports.

Errors are one-sentence ValueErrors. Tests and bench/ find the CUDA tools through this file too.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VARIABLE = "QLORA_KERNELS_CUDA_ARCHS"
OLDEST_NVCC = (12, 0)
TOOLKIT = Path("/usr/local/cuda")
# All from one release: nvcc refuses a crt or nvvm from another.
PACKAGES = (
    "nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96 "
    "nvidia-cuda-cccl==13.0.85"
)
INSTALL = f"install the CUDA toolkit, or 'pip install {PACKAGES}', or point CUDACXX at an nvcc"


def _architectures():
    # Loaded by path: importing the package would import torch, which isn't there during a build.
    spec = importlib.util.spec_from_file_location(
        "_architectures", ROOT / "qlora_kernels" / "native" / "architectures.py"
    )
    # Only a path of an unknown suffix has none.
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


architectures = _architectures()


# ----------------------------------------------------------------------------------------------------------- tools


def find_tool(name: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """The path of a CUDA tool (nvcc, cuobjdump, nvdisasm), or None.

    Searches CUDACXX (for nvcc only), CUDA_HOME and CUDA_PATH, PATH, /usr/local/cuda, and the PyPI packages: those of
    this Python, and those of the environment that pip or build isolates it from.
    """
    if name == "nvcc" and environment.get("CUDACXX"):
        return shutil.which(environment["CUDACXX"], path=environment.get("PATH"))
    homes = [Path(environment[key]) for key in ("CUDA_HOME", "CUDA_PATH") if environment.get(key)]
    folders = [
        *(home / "bin" for home in homes),
        *map(Path, filter(None, environment.get("PATH", "").split(os.pathsep))),
        TOOLKIT / "bin",
        *(folder for packages in _site_packages(environment) for folder in sorted(packages.glob("nvidia/cu*/bin"))),
    ]
    return next((found for folder in folders if (found := shutil.which(name, path=str(folder)))), None)


def _site_packages(environment: Mapping[str, str]) -> Iterable[Path]:
    # pip takes the environment's packages off sys.path in a build, but leaves the interpreter where it is;
    # build uses its own interpreter, but leaves VIRTUAL_ENV set.
    yield from (Path(sysconfig.get_path(key)) for key in ("purelib", "platlib"))
    yield Path(site.getusersitepackages())
    for key in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if environment.get(key):
            yield from Path(environment[key]).glob("lib/python3*/site-packages")


def _output(*command: str | Path) -> str:
    """What a command prints, or an empty string if it fails."""
    try:
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr if done.returncode == 0 else ""


@dataclass(frozen=True)
class Compiler:
    """An nvcc: its path, its release ("13.0"), its toolkit's folder, and the static CUDA runtime there."""

    path: str
    release: str
    runtime: Path
    known: frozenset[str]

    @staticmethod
    def at(path: str) -> Compiler:
        """Asks an nvcc about itself.

        Raises:
            ValueError: if it doesn't answer like nvcc, is too old, or comes without the CUDA runtime.
        """
        version = re.search(r"release (\d+)\.(\d+)", _output(path, "--version"))
        if not version:
            raise ValueError(f"{path} is not a working nvcc: it does not print its version; {INSTALL}")
        release = f"{version[1]}.{version[2]}"
        if (int(version[1]), int(version[2])) < OLDEST_NVCC:
            raise ValueError(
                f"{path} is from CUDA {release}, and qlora_kernels needs CUDA {'.'.join(map(str, OLDEST_NVCC))} or "
                f"later; {INSTALL}"
            )
        # The folder that nvcc itself considers the toolkit: its path may be a link, or a script elsewhere.
        top = re.search(r"^#\$ _?TOP=(.*)$", _output(path, "--dryrun", "x.cu"), re.MULTILINE)
        top = Path(os.path.normpath(top[1])) if top else Path(path).resolve().parent.parent
        folders = [top / "lib64", top / "lib", *top.glob("targets/*/lib")]
        runtime = next((f / "libcudart_static.a" for f in folders if (f / "libcudart_static.a").exists()), None)
        if runtime is None:
            raise ValueError(
                f"{path} comes without the CUDA runtime: there is no libcudart_static.a in {top}; install the "
                f"toolkit's cudart, or nvidia-cuda-runtime for the same release, {release}"
            )
        codes = _output(path, "--list-gpu-code") + _output(path, "--list-gpu-arch")
        return Compiler(path, release, runtime, frozenset(codes.split()))

    @staticmethod
    def find(environment: Mapping[str, str] = os.environ) -> Compiler:
        """The nvcc that find_tool() finds.

        Raises:
            ValueError: as at() does, and if there is no nvcc.
        """
        path = find_tool("nvcc", environment)
        if path is None:
            raise ValueError(f"there is no nvcc; {INSTALL}")
        return Compiler.at(path)

    def knows(self, architecture: str) -> bool:
        """Whether it can compile for an architecture."""
        number, suffix, ptx = architectures.parts(architecture)
        if suffix == "f" and tuple(map(int, self.release.split("."))) < (12, 9):
            return False  # family-specific targets came later than the architectures themselves
        return f"sm_{number}" in self.known and (not ptx or f"compute_{number}" in self.known)

    def probe(self, host: str | None) -> None:
        """Compiles a few lines first, so that a broken nvcc shows before minutes of building.

        Raises:
            ValueError: with nvcc's first complaint.
        """
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cu")
            source.write_text("#include <cuda_fp16.h>\n__global__ void probe(float* x) { *x = 1.0f; }\n")
            command = [
                self.path,
                "-c",
                str(source),
                "-o",
                str(Path(folder, "probe.o")),
                *(["-ccbin", host] if host else []),
            ]
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            said = (done.stderr + done.stdout).strip().splitlines() or ["nothing"]
            first = next((line for line in said if "error" in line.lower() or "not found" in line), said[0])
            raise ValueError(f"{self.path} cannot compile on this machine: {first.strip()}; {INSTALL}")


# ------------------------------------------------------------------------------------------------------------ GPUs


def cards() -> list[tuple[int, int]]:
    """The distinct compute capabilities of the GPUs here, from the driver or else from nvidia-smi."""
    found = _cards_of_driver()
    if found is None:
        smi = _output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
        found = [(int(major), int(minor)) for major, minor in re.findall(r"^(\d+)\.(\d+)\s*$", smi, re.MULTILINE)]
    return sorted(set(found))


def _cards_of_driver() -> list[tuple[int, int]] | None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count, device, value = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return None
    found = []
    for index in range(count.value):
        capability = []
        if driver.cuDeviceGet(ctypes.byref(device), index):
            return None
        for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
            if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
                return None
            capability.append(value.value)
        found.append(tuple(capability))
    return found


# ------------------------------------------------------------------------------------------------------------ plan


@dataclass(frozen=True)
class Plan:
    """What to build."""

    architectures: tuple[str, ...] = ()
    compiler: Compiler | None = None
    #: A sentence to print while building if something is left out.
    note: str = ""

    @property
    def local_version(self) -> str:
        """The suffix of the version."""
        if self.compiler is None or not self.architectures:
            return ""
        return architectures.local_version(self.compiler.release, self.architectures)


def plan(environment: Mapping[str, str] = os.environ) -> Plan:
    """Reads QLORA_KERNELS_CUDA_ARCHS and looks at this machine.

    Raises:
        ValueError: for an invalid value, or for architectures named there that cannot be built.
    """
    asked = environment.get(VARIABLE, "native").strip()
    word = asked.lower()
    if word == "none":
        return Plan()
    if word == "native":
        return _native(environment)
    wanted = architectures.ALL if word == "all" else architectures.parse(asked)
    nvcc = find_tool("nvcc", environment)
    if nvcc is None:
        raise ValueError(f"{VARIABLE} is '{asked}', and there is no nvcc to build for it; {INSTALL}")
    compiler = Compiler.at(nvcc)
    unknown = [one for one in wanted if not compiler.knows(one)]
    if unknown and word != "all":
        raise ValueError(
            f"{VARIABLE} names {', '.join(unknown)}, which {nvcc} from CUDA {compiler.release} does not support; "
            "leave it out, or install a CUDA release that does (100a needs 12.8; 75 needs one that has not dropped it)"
        )
    note = (
        f"'all' without {', '.join(unknown)}: nvcc from CUDA {compiler.release} does not support it" if unknown else ""
    )
    return Plan(tuple(one for one in wanted if one not in unknown), compiler, note)


def _native(environment: Mapping[str, str]) -> Plan:
    seen = [architectures.for_card(*card) for card in cards() if 10 * card[0] + card[1] >= architectures.OLDEST]
    if not seen:
        return Plan()
    cpu_only = f"found a GPU with architecture {', '.join(seen)}, but only the CPU part is built"
    nvcc = find_tool("nvcc", environment)
    if nvcc is None:
        return Plan(note=f"{cpu_only}, because there is no nvcc; {INSTALL}")
    try:
        compiler = Compiler.at(nvcc)
    except ValueError as problem:
        return Plan(note=f"{cpu_only}: {problem}")
    known = tuple(one for one in seen if compiler.knows(one))
    if not known:
        return Plan(note=f"{cpu_only}, because {nvcc} from CUDA {compiler.release} does not support that architecture")
    left_out = [one for one in seen if one not in known]
    note = (
        f"built without {', '.join(left_out)}: nvcc from CUDA {compiler.release} does not support it"
        if left_out
        else ""
    )
    return Plan(known, compiler, note)


if __name__ == "__main__":  # as CMakeLists.txt asks
    try:
        answer = Compiler.find()
    except ValueError as problem:
        sys.exit(str(problem))
    print(answer.path, answer.release, answer.runtime, sep=";")
