"""What a check on a card was made with: card, driver, versions, commit. Nothing is changed, and what cannot be read is
"unknown"."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import qlora_kernels
import setup_cuda
from bench.card.parsers import nvcc_release, smi_rows
from qlora_kernels.bench.timing.machine import ROOT, describe_commit, describe_machine, describe_versions

UNKNOWN = "unknown"
SMI_FIELDS = (
    *("name", "driver_version", "memory.total", "memory.used", "pstate", "temperature.gpu", "power.draw"),
    *("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "ecc.mode.current", "mig.mode.current"),
)


def tool(name: str) -> str | None:
    """The path of a CUDA tool: nvcc where the build finds it, others in CUDA_HOME, PATH or /usr/local/cuda."""
    if name == "nvcc" and (path := setup_cuda.find_tool(name)):
        return path
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places = [Path(root, folder, name) for root in roots if root for folder in ("bin", "compute-sanitizer")]
    places += [Path(path)] if (path := shutil.which(name)) else []
    places += [Path("/usr/local/cuda", folder, name) for folder in ("bin", "compute-sanitizer")]
    return next((str(place) for place in places if os.access(place, os.X_OK) and place.is_file()), None)


def output_of(*command: str, seconds: float = 10.0) -> str:
    """Runs a program and returns its stdout.

    Raises:
        OSError, subprocess.SubprocessError: when it is missing, fails or takes too long. It is killed then, and not
            waited for: it may be stuck in the driver.
    """
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        text, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command)
    return text


def cards_now() -> list[dict[str, str]] | str:
    """What nvidia-smi reports about the cards now, or why it failed."""
    try:
        text = output_of("nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader")
        return smi_rows(text, SMI_FIELDS)
    except (OSError, subprocess.SubprocessError, ValueError) as problem:
        return f"{UNKNOWN} ({type(problem).__name__})"


#: Sources that decide a result, and of these what is compiled.
SOURCES = ("csrc/**/*", "qlora_kernels/**/*.py", "bench/**/*.py", "setup.py", "setup_cuda.py")
COMPILED = ("csrc/**/*", "tests/emulator/*.c*", "tests/emulator/*.h")


def sources_digest(patterns: Sequence[str] = SOURCES) -> str:
    """A hash of the sources that decide the result. Without .git, it shows which commit was measured."""
    digest = hashlib.sha256()
    files = sorted(path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file())
    for path in files:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(ROOT).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def facts() -> dict[str, Any]:
    """Device, driver, versions, commit and host. Needs a CUDA device."""
    index = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(index)
    commit, machine, versions = describe_commit(), describe_machine(), describe_versions()
    cards = cards_now()
    nvcc = tool("nvcc")
    try:
        nvcc_version = nvcc_release(output_of(nvcc, "--version")) if nvcc else "not found"
    except (OSError, subprocess.SubprocessError):
        nvcc_version = UNKNOWN
    return {
        "device": properties.name,
        "devices_seen": torch.cuda.device_count(),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
        "driver": cards[0]["driver_version"] if isinstance(cards, list) else UNKNOWN,
        "nvidia_smi": cards,
        "torch": versions["torch"],
        "cuda_of_torch": torch.version.cuda or UNKNOWN,
        "nvcc": nvcc_version,
        "python": versions["python"],
        "qlora_kernels": versions["qlora_kernels"],
        "bitsandbytes": versions["bitsandbytes"],
        "commit": commit["commit"] or UNKNOWN,
        "modified": UNKNOWN if commit["modified"] is None else commit["modified"],
        "sources": sources_digest(),
        "cpu": machine["cpu"],
        "cores": machine["cores"],
        "usable_cores": machine["usable_cores"],
        "memory_host_gib": machine["memory_gib"],
        "system": machine["system"],
        "environment": machine["environment"],
    }


def main() -> int:
    """Prints the facts, and what the extension has, as a line of JSON."""
    if not torch.cuda.is_available():
        print(f"no CUDA device is seen by torch {torch.__version__}: there are no facts", file=sys.stderr)
        return 2
    found = facts()
    found["build_info"] = qlora_kernels.build_info()
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
