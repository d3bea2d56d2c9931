"""Drives csrc/CMakeLists.txt and sets the version; everything else about the package is in pyproject.toml.

QLORA_KERNELS_CUDA_ARCHS selects the CUDA architectures: native (the GPUs found here), none, all, or a list; see
setup_cuda.py.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # an isolated build leaves out the folder of setup.py

import setup_cuda  # noqa: E402


def compiler() -> str:
    """The C++ compiler to use; exits with one sentence if it is missing or too old.

    CXX may include arguments ("ccache g++", "g++ -m64"); the result has the form that CMake takes in CXX.
    """
    candidates = [shlex.split(os.environ["CXX"])] if os.environ.get("CXX") else [["c++"], ["g++"], ["clang++"]]
    found = next((words for words in candidates if words and shutil.which(words[0])), None)
    wanted = "qlora_kernels needs a C++17 compiler (g++ 9 or clang 10, or newer)"
    if found is None:
        sys.exit(f"{wanted}, and found none; install one (Debian, Ubuntu: apt-get install g++) or set CXX")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(
            "#include <optional>\n#include <string_view>\n"
            "int main() { if constexpr (sizeof(int) > 1) return std::optional<int>(0).value(); }\n"
        )
        probe = [*found, "-std=c++17", "-fopenmp", "-c", str(source), "-o", str(Path(folder, "probe.o"))]
        if subprocess.run(probe, capture_output=True).returncode != 0:
            sys.exit(f"{wanted} with OpenMP, and '{shlex.join(found)}' is not one; install a newer one or set CXX")
    return shlex.join(found)


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        import pybind11

        if PLAN.note:
            print(f"qlora_kernels: {PLAN.note}", file=sys.stderr)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / f"cmake-{sysconfig.get_config_var('SOABI')}"
        build.mkdir(parents=True, exist_ok=True)
        host = compiler()
        configure = [
            "cmake",
            "-S",
            str(ROOT / "csrc"),
            "-B",
            str(build),
            "-G",
            "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DQLK_VERSION={VERSION}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build}/out",
            *cuda_options(host),
        ]
        # The cache of an earlier isolated build names tools that are gone.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        environment = os.environ | {"CXX": host}
        for command in (configure, ["cmake", "--build", str(build)]):
            if subprocess.run(command, env=environment).returncode != 0:
                sys.exit(f"building the native extension failed at '{' '.join(command[:2])}'; its message is above")
        built = next((build / "out").glob("_C*.so"))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(built, target.with_suffix(".part"))
        os.replace(target.with_suffix(".part"), target)


def cuda_options(host: str) -> list[str]:
    """CMake options for CUDA."""
    if PLAN.compiler is None or not PLAN.architectures:
        return []
    words = shlex.split(host)
    ccbin = words[0] if len(words) == 1 else ""
    try:
        PLAN.compiler.probe(ccbin)
    except ValueError as problem:
        sys.exit(str(problem))
    return [
        f"-DQLK_CUDA_ARCHS={';'.join(PLAN.architectures)}",
        f"-DQLK_NVCC_HOST={shutil.which(ccbin) if ccbin else ''}",
    ]


def plan() -> setup_cuda.Plan:
    if "sdist" in sys.argv:
        return setup_cuda.Plan()  # the sources are the same for every architecture
    try:
        return setup_cuda.plan()
    except ValueError as problem:
        sys.exit(str(problem))


PLAN = plan()
# The local version names the architectures inside: "0.1.0+cu130.sm80.sm90a".
VERSION = re.findall(r'"(.+)"', (ROOT / "qlora_kernels/version.py").read_text().split("BASE = ")[1])[0]
VERSION += PLAN.local_version

setup(version=VERSION, ext_modules=[Extension("qlora_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
