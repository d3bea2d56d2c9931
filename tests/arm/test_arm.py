"""The CPU kernels for 64-bit ARM: compiled by a cross compiler, executed by qemu, without an ARM machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
COMPILER = "aarch64-linux-gnu-g++"
#: Where Debian puts the libraries that the cross compiler links.
LIBRARIES = "/usr/aarch64-linux-gnu"


def tool(*names: str) -> str:
    """The path of the first of these programs that is installed."""
    for name in names:
        if path := shutil.which(name):
            return path
    reason = f"{' or '.join(names)} is not installed (Debian: apt-get install g++-aarch64-linux-gnu qemu-user-static)"
    if os.environ.get("QLORA_KERNELS_REQUIRE_ARM"):
        pytest.fail(f"{reason}, and QLORA_KERNELS_REQUIRE_ARM is set")
    pytest.skip(reason)


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Path:
    if not (ROOT / "csrc" / "CMakeLists.txt").is_file():
        pytest.skip("there are no sources beside the tests")
    compiler, folder = tool(COMPILER), tmp_path_factory.mktemp("arm")
    target = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={compiler}")
    run("cmake", "-S", ROOT / "csrc", "-B", folder, "-G", "Ninja", "-DQLK_ARM_CHECK=ON", *target)
    run("cmake", "--build", folder, "-j", "1")
    return folder


def test_neon_gives_the_bits_of_portable_and_both_are_right(build):
    emulator = tool("qemu-aarch64-static", "qemu-aarch64")
    # A limit of OpenMP's would turn three threads into one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    command = [emulator, "-L", LIBRARIES, build / "arm_check"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
    passed = re.fullmatch(r"arm_check: (\d+) cases passed\n", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 5000


def objects(build: Path) -> dict[str, Path]:
    return {path.name.removesuffix(".cpp.o"): path for path in build.glob("CMakeFiles/arm_check.dir/cpu/**/*.o")}


def test_neon_looks_codes_up_in_registers_and_portable_does_not(build):
    disassembler, looked_up = tool(COMPILER.replace("g++", "objdump")), {}
    for name in ("isa_neon", "isa_portable"):
        code = run(disassembler, "-d", "--no-show-raw-insn", objects(build)[name])
        assert re.search(r"\tfmla\t", code), f"{name} does not fuse multiplications with additions"
        looked_up[name] = len(re.findall(r"\ttbl\t", code))
    assert looked_up["isa_neon"] > 50
    assert looked_up["isa_portable"] == 0


def test_the_sets_share_no_code(build):
    """The linker keeps one of several inline functions of a name, whatever they were compiled for."""
    names = tool(COMPILER.replace("g++", "nm"))
    for name in ("isa_neon", "isa_portable"):
        own = f"qlk::cpu::{name.removeprefix('isa_')}::"
        lines = run(names, "-C", "--defined-only", objects(build)[name]).splitlines()
        assert any(own in line for line in lines)
        for line in lines:
            kind, symbol = line.split(maxsplit=2)[1:]
            assert kind not in "WVu" or own in symbol or symbol.startswith("DW.ref."), f"{name} defines {symbol}"
