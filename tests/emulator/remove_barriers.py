"""Checks the check: if any one barrier, wait or fence is removed from a kernel, a test on the emulator has to fail. So
does one if a launcher no longer makes its device current, or device_guard.h leaves out a call.

    python tests/emulator/remove_barriers.py [--changed-since COMMIT] [--share N] [FILE ...]

The emulator is built once, from a copy of the sources in which each statement asks whether it is the one to leave out:
an environment variable says which. Then, for each of them, tests run until one fails. A statement that survives is
either unnecessary (remove it) or a hole in the emulator (close it); the exit code is then 1.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

# One thread each: a child forked from a process with more would wait for threads that it lacks.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests/support")]

from quick_run.choice import day  # noqa: E402

#: Statements that order something: calls of these, on a line of their own, perhaps before a comment.
ORDERING = re.compile(
    r"^\s*(?:if \(.*\) )?((?:__sync\w+|__threadfence\w*|bar_\w+|barrier|cp_async_(?:wait|commit)\w*"
    r"|wgmma_(?:fence|commit|wait)\w*|mbarrier_\w+|fence_\w+"
    r"|griddep_\w+|cluster_(?:arrive|wait)\w*)"
    r"(?:<[^;]*>)?\([^;]*\);"
    # For streams, in arena.cu.
    r"|\w+\[[^\]]*\]->hold\([^;]*\);"
    # In device_guard.h.
    r"|Api::(?:set|restore)\([^;]*\);|restores_ = [^;]*;)"
)
#: The second half of an atomic operation, from which only the acquiring is removed.
ACQUIRING = re.compile(r"^(?!\s*//).*?(\batom_\w+_acquire)\(")
#: A guard in a launcher. It lasts as long as the block around it, so it is removed in another way.
GUARD = re.compile(r"^\s*(const DeviceGuard guard\(([^;]*)\);)")
#: The guards' own header is not among the kernels.
GUARDS = Path("csrc/device_guard.h")
#: Tests for each source, the quickest to fail first: a file, and what to select in it.
QUANTIZATION = tuple(
    ("tests/ops/test_quantize.py", f"emulated and {words}")
    for words in ("test_every_engine_gives_the_same_bits", "test_double_quantization", "test_dequantize", "test")
)
_OPTIMIZER = (("tests/optim/test_algorithms.py", "emulated and (scalar_float32 or 8_bit_states or clipped)"),)
_TILES = (
    ("tests/cuda/test_cuda_clusters.py", "of_dx and (case0 or case2)"),
    ("tests/cuda/test_cuda_tiles.py", "with_adapters and emulated and forward and 130"),
    ("tests/cuda/test_cuda_clusters.py", "conflicts or of_dx"),
    ("tests/cuda/test_cuda_tiles.py", "emulated and tensor_cores"),
    ("tests/cuda/test_cuda_tiles.py", "pipeline or emulated"),
    ("tests/cuda/test_cuda_low_rank.py", "begins_before and gemm"),
)
_WARPGROUPS = (
    ("tests/cuda/test_cuda_warpgroups.py", "test"),
    ("tests/cuda/test_cuda_clusters.py", "anywhere or one_order"),
)
_DEVICES = (("tests/emulator/test_devices.py", "test"),)
TESTS = {
    "adapters": (
        ("tests/cuda/test_cuda_low_rank.py", "dx_with_an_adapter and tiles16-8"),
        ("tests/cuda/test_cuda_low_rank.py", "some_of_the_other_gradients and wanted0"),
        ("tests/cuda/test_cuda_adapters.py", "test_every_shape and shape0"),
        ("tests/cuda/test_cuda_low_rank.py", "dx_with"),
        ("tests/cuda/test_cuda_adapters.py", "test_every_shape"),
        ("tests/cuda/test_cuda_adapters.py", "test_every_rank or test_the_bits"),
    ),
    "parts": (("tests/cuda/test_cuda_low_rank.py", "dx_with"),),
    "rows8": (("tests/cuda/test_cuda_few_rows.py", "emulated and test_few_rows"),),
    "rows64": (
        ("tests/cuda/test_cuda_clusters.py", "one_order and case0"),
        ("tests/cuda/test_cuda_clusters.py", "anywhere and case0"),
        ("tests/cuda/test_cuda_clusters.py", "test"),
        ("tests/cuda/test_cuda_few_rows.py", "emulated and test_middle_rows"),
    ),
    "splits": (("tests/cuda/test_cuda_clusters.py", "test"),),
    "warpgroups": _WARPGROUPS,
    "warpgroups_x": _WARPGROUPS,
    "arena": tuple(
        ("tests/optim/engines/test_paging.py", words)
        for words in ("page_out_and or page_out_comes", "budget_is_kept and case0", "copies_do")
    ),
    "norm": _OPTIMIZER,
    "optimizer": _OPTIMIZER,
    "tiles": (("tests/cuda/test_cuda_clusters.py", "dx_that_are_cut"),),
    "tiles_finish": _TILES,
    "tiles_pipeline": _TILES,
    "product": (
        ("tests/ops/test_ops.py", "emulated and test_forward_and_dx_within_the_contract"),
        ("tests/ops/test_ops.py", "emulated"),
    ),
}


@dataclass(frozen=True)
class Place:
    path: Path  # relative to the root
    line: int
    statement: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}  {self.statement}"

    def tests(self) -> tuple[tuple[str, str], ...]:
        if self.path == GUARDS or GUARD.match(self.statement):
            return _DEVICES
        return TESTS.get(self.path.stem, QUANTIZATION)


def places(paths: list[Path]) -> list[Place]:
    barriers = []
    for path in paths:
        for number, text in enumerate((ROOT / path).read_text().splitlines(), 1):
            match = ORDERING.match(text) or ACQUIRING.match(text) or GUARD.match(text)
            if match:
                barriers.append(Place(path, number, match.group(1)))
    return barriers


#: Holds the number of the place that is removed.
VARIABLE = "QLORA_KERNELS_EMULATOR_REMOVED"
#: Goes before all else in the copy of device.cuh, which all sources include.
QUESTION = f"""
#include <cstdlib>
#include <optional>
namespace emu {{
inline const int removed_place = std::getenv("{VARIABLE}") ? std::atoi(std::getenv("{VARIABLE}")) : -1;
inline bool removed(int place) {{ return place == removed_place; }}
}}  // namespace emu
"""


def chosen(barriers: list[Place], share: int, day: int, new: set[str]) -> list[Place]:
    """One in ``share``, by the day; and all that lie in new files."""
    return [place for i, place in enumerate(barriers) if (i + day) % share == 0 or str(place.path) in new]


def recently_changed() -> set[str]:
    """Sources that a commit of the last day has touched; in a clone without history, all."""
    command = ["git", "log", "--since=1 day ago", "--format=", "--name-only", "--", "csrc/cuda", str(GUARDS)]
    return set(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split())


def make_removable(barriers: list[Place], copy: Path) -> None:
    """Changes a copy of the sources so that each of these statements asks whether it is removed."""
    for number, place in enumerate(barriers):
        path = copy / place.path
        lines = path.read_text().splitlines(keepends=True)
        if guard := GUARD.match(place.statement):
            kept = f"guard.emplace({guard.group(2)});"
            asking = f"std::optional<DeviceGuard> guard; if (!::emu::removed({number})) {kept}"
        elif not place.statement.endswith(";"):
            asking = f"::emu::Weaken(::emu::removed({number})) << {place.statement}"
        else:
            asking = f"{{ if (!::emu::removed({number})) {place.statement} }}"
        assert lines[place.line - 1].count(place.statement) == 1, place
        lines[place.line - 1] = lines[place.line - 1].replace(place.statement, asking)
        path.write_text("".join(lines))
    device = copy / "tests/emulator/device.cuh"
    device.write_text(device.read_text().replace("#pragma once\n", "#pragma once\n" + QUESTION, 1))


def failing_test(module: Path, tests=QUANTIZATION, removed: int = -1, plugins: tuple = ()) -> str | None:
    """The first test that fails on an emulator module with one place removed, or None."""
    for file, expression in tests:
        code, output = pytest_in_a_child(module, removed, "-x", file, "-k", expression, plugins=plugins)
        if code == 1:
            failed = re.search(r"^FAILED \S+::(\S+)", output, re.M)
            return failed.group(1) if failed else "a test"
        if code < 0:
            return f"signal {-code}"
        if code != 0:
            raise RuntimeError(f"pytest ended with {code}:\n{output[-4000:]}")
    return None


PYTEST = ["-q", "-n", "0", "-m", "", "-p", "no:cacheprovider"]


def import_tests(files: set[str]) -> None:
    """Imports test files as pytest does, so that its children, which are forks, find them imported."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = pytest.main([*PYTEST, "--collect-only", *sorted(files)])
    if code != 0:
        raise RuntimeError(f"collecting the tests ended with {code}:\n{said.getvalue()[-4000:]}")


class TheFirst:
    """A plugin for pytest: of the tests selected, the first alone runs."""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items) -> None:
        del items[1:]


def pytest_in_a_child(module: Path, removed: int, *arguments: str, plugins: tuple = ()) -> tuple[int, str]:
    """pytest's exit code, or a signal's number below zero, and what it printed.

    A fork of this process, which has imported torch and the tests: that takes longer than most of them.
    """
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            os.environ.update({"QLORA_KERNELS_EMULATOR_MODULE": str(module), VARIABLE: str(removed)})
            code = 3
            try:
                code = int(pytest.main([*PYTEST, *arguments], plugins=plugins))
                sys.stdout.flush()
            finally:
                os._exit(code)
        status = waited(child)
        output.seek(0)
        return os.waitstatus_to_exitcode(status), output.read()


def waited(child: int) -> int:
    """The status with which a child ends; after ten minutes it is killed, and all it has started."""
    end = time.monotonic() + 600
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError("tests took more than ten minutes")


def spent() -> float:
    """Seconds of CPU time, in all children."""
    times = os.times()
    return times.children_user + times.children_system


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="sources in csrc/cuda, device_guard.h; all by default")
    parser.add_argument("--changed-since", metavar="COMMIT", help="only files that differ from that commit")
    parser.add_argument("--share", type=int, default=1, metavar="N", help="one in N, others each day; all in new files")
    options = parser.parse_args()
    if options.share < 1:
        parser.error(f"--share should be at least 1, found {options.share}")
    torch.set_num_threads(1)
    os.chdir(ROOT)
    from tqdm import tqdm

    from bench.emulator import build

    files = [f.resolve().relative_to(ROOT) for f in options.files]
    files = files or [GUARDS, *sorted(p.relative_to(ROOT) for p in (ROOT / "csrc/cuda").rglob("*.cu*"))]
    # These files define the statements; they do not use them.
    files = [f for f in files if f.parent != Path("csrc/cuda/device")]
    if options.changed_since:
        command = ["git", "diff", "--name-only", options.changed_since, "--", "csrc/cuda", str(GUARDS)]
        changed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
        files = [f for f in files if str(f) in changed]
    barriers = places(files)
    print(f"{len(barriers)} barriers, waits, fences and guards in {len(files)} files")
    if options.share > 1:
        barriers = chosen(barriers, options.share, day(), recently_changed())
        print(f"{len(barriers)} of them today")
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        shutil.copytree(ROOT / "csrc", copy / "csrc")
        shutil.copytree(ROOT / "tests/emulator", copy / "tests/emulator")
        make_removable(barriers, copy)
        module = build(Path(folder, "build"), root=copy, QLK_EMULATOR="quick")
        import_tests({file for place in barriers for file, _ in place.tests()})
        # One test of each kind has to pass; the test suite checks the rest.
        for test in {place.tests()[0]: None for place in barriers}:
            if failed := failing_test(module, [test], plugins=(TheFirst(),)):
                print(f"{failed} fails before anything is removed")
                return 1
        for number, place in enumerate(tqdm(barriers, disable=None)):
            start = spent()
            failed = failing_test(module, place.tests(), number)
            if failed is None:
                survivors.append(place)
            seconds = spent() - start
            tqdm.write(f"{place}: {'SURVIVES' if failed is None else 'seen by ' + failed} ({seconds:.0f} s)")
    for place in survivors:
        print(f"no test fails without {place}")
    print(f"{len(barriers) - len(survivors)} seen, {len(survivors)} survive")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
