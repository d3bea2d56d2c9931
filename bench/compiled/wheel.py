"""A wheel for all architectures: its size, how long it takes to build, and what is inside for each of them.

    python -m bench.compiled.wheel

builds the commit's wheel from nothing, in a temporary folder, looks into it, prints a table, and writes
bench/results/wheel-all.json, from where `python -m bench.readme.tables` takes the table in docs/. No GPU takes part.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.compiled import static
from qlora_kernels.bench.timing.machine import describe_commit, describe_machine, describe_versions

OUT = static.FOLDER / "wheel-all.json"
FORMAT = 1


def built(folder: Path, architectures: str) -> tuple[Path, dict[str, float]]:
    """A wheel of the commit, and how long it took: seconds on the clock, and of all cores together.

    Raises:
        RuntimeError: when it does not build, with the end of what was said.
    """
    archive, source = folder / "source.tar", folder / "source"
    subprocess.run(["git", "archive", f"--output={archive}", "HEAD"], cwd=static.ROOT, check=True)
    with tarfile.open(archive) as files:
        files.extractall(source, filter="data")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), "."]
    environment = {**os.environ, "QLORA_KERNELS_CUDA_ARCHS": architectures, "CCACHE_DISABLE": "1"}
    before, spent = time.monotonic(), _spent()
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the wheel does not build:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    seconds = {"build_seconds": round(time.monotonic() - before, 1), "build_cpu_seconds": round(_spent() - spent, 1)}
    return next(folder.glob("*.whl")), seconds


def _spent() -> float:
    """Processor time of the processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def result(wheel: Path, seconds: dict[str, float], folder: Path) -> dict[str, Any]:
    """What the file says of a wheel."""
    code = static.report(static.module_of(wheel, folder))
    return {
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "complete": True,
        **describe_commit(),
        "machine": describe_machine(),
        "compiler": describe_versions()["compiler"],
        "nvcc": code["nvcc"],
        "wheel": wheel.name,
        "wheel_bytes": wheel.stat().st_size,
        "extension_bytes": code["extension_bytes"],
        **seconds,
        "archs": static.by_architecture(code["kernels"]),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compiled.wheel", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--archs", default="all", help="as in QLORA_KERNELS_CUDA_ARCHS; default: all")
    parser.add_argument("--out", type=Path, default=OUT, help=f"the file; default: {OUT.name} in bench/results")
    options = parser.parse_args(arguments)
    if describe_commit()["modified"] is not False:
        parser.error("there are changes that are not committed, or there is no commit: what is built is a commit's")
    with tempfile.TemporaryDirectory() as folder:
        figures = result(*built(Path(folder), options.archs), Path(folder))
    options.out.write_text(json.dumps(figures, indent=1) + "\n")
    from bench.readme.tables import wheel_table

    print(wheel_table(figures, options.out.name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
