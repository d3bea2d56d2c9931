"""What a result was measured with: machine, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import qlora_kernels

ROOT = Path(__file__).resolve().parent.parent.parent.parent

# Instruction sets that decide how fast the contenders are.
_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_vbmi", "avx512_bf16", "avx512_fp16", "amx_bf16")

#: This package's names of instruction sets, best first.
ISAS = ("amx", "avx512_bf16", "avx512", "avx2", "portable")
# Families and models from the makers' lists of CPUID values: what a file of results is named after.
_KINDS = (
    ("AuthenticAMD", 23, range(0x00, 0x30), "zen"),
    ("AuthenticAMD", 23, range(0x30, 0xFF), "zen2"),
    ("AuthenticAMD", 25, (*range(0x00, 0x10), *range(0x20, 0x60)), "zen3"),
    ("AuthenticAMD", 25, (*range(0x10, 0x20), *range(0x60, 0x80), *range(0xA0, 0xB0)), "zen4"),
    ("AuthenticAMD", 26, range(0x00, 0xFF), "zen5"),
    ("GenuineIntel", 6, (60, 63, 69, 70), "haswell"),
    ("GenuineIntel", 6, (61, 71, 79, 86), "broadwell"),
    ("GenuineIntel", 6, (78, 85, 94, 142, 158), "skylake"),
    ("GenuineIntel", 6, (106, 108, 125, 126), "icelake"),
    ("GenuineIntel", 6, (143,), "sapphirerapids"),
    ("GenuineIntel", 6, (207,), "emeraldrapids"),
    ("GenuineIntel", 6, (173, 174), "graniterapids"),
    ("GenuineIntel", 6, (151, 154, 183, 186, 191), "alderlake"),
)


def isa_in_use() -> str | None:
    """The instruction set that this package computes with."""
    return qlora_kernels.build_info().get("isa_in_use")


def beyond(name: str | None, limit: str | None) -> bool:
    """Whether an instruction set has more than another one; of names that are unknown, neither has."""
    return name in ISAS and limit in ISAS and ISAS.index(name) < ISAS.index(limit)


def kind_of_processor(cpuinfo: dict[str, str]) -> str:
    """A short name for file names: the design where it is known, or else what is left of the model's name."""
    try:
        family, model = int(cpuinfo["cpu family"]), int(cpuinfo["model"])
        return next(
            k for vendor, f, models, k in _KINDS if (vendor, f) == (cpuinfo["vendor_id"], family) and model in models
        )
    except (KeyError, ValueError, StopIteration):
        words = re.findall("[a-z0-9]+", cpuinfo.get("model name", platform.machine()).lower())
        return "".join(word for word in words if word not in ("r", "tm", "cpu", "processor", "intel", "amd"))


def result_name(threads: int) -> str:
    """What a run on this processor, with the instruction set in use, is called in bench/results/."""
    return f"cpu-{kind_of_processor(_cpuinfo())}-{(isa_in_use() or 'none').replace('_', '')}-{threads}cores.jsonl"


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, instruction sets, cores, memory, system; and the card, where the device is one."""
    info = qlora_kernels.build_info()
    cpuinfo = _cpuinfo()
    flags = set(cpuinfo.get("flags", "").split())
    return {
        "cpu": cpuinfo.get("model name") or platform.processor() or platform.machine(),
        "instruction_sets": [flag for flag in _FLAGS if flag in flags],
        "isa_in_use": info.get("isa_in_use"),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "virtual": "hypervisor" in flags,
        "system": f"{platform.system()} {platform.release()}",
        **({} if device == "cpu" else {"gpu": _describe_card()}),
        "environment": {name: os.environ[name] for name in sorted(os.environ) if _matters(name)},
    }


def _describe_card() -> dict[str, Any]:
    """The current card: name, architecture, memory, driver."""
    card = torch.cuda.get_device_properties(torch.cuda.current_device())
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        driver = subprocess.run(query, check=True, capture_output=True, text=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    return {
        "name": card.name,
        "architecture": f"sm_{card.major}{card.minor}",
        "memory_gib": round(card.total_memory / 2**30, 1),
        "processors": card.multi_processor_count,
        "driver": driver,
    }


def describe_versions() -> dict[str, str]:
    info = qlora_kernels.build_info()
    versions = {"qlora_kernels": info["version"], "compiler": str(info.get("compiler"))}
    versions["python"] = platform.python_version()
    versions["torch"] = torch.__version__
    # "kernels" is an extra of bitsandbytes: with it, that library fetches another kernel for its eval-mode layer.
    for name in ("bitsandbytes", "peft", "transformers", "kernels", "ggml-python"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def describe_commit() -> dict[str, Any]:
    """The commit, and whether kernels or package differ from it.

    Where there is no git or no repository: what QLORA_KERNELS_COMMIT says, or None; nor is it known then what differs.
    """
    given = {"commit": os.environ.get("QLORA_KERNELS_COMMIT") or None, "modified": None}
    if not (ROOT / "csrc" / "CMakeLists.txt").is_file():  # another project's commit, perhaps
        return given
    try:
        commit = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--", "csrc", "qlora_kernels", "bench/*.py")
    except (OSError, subprocess.CalledProcessError):
        return given
    return {"commit": commit, "modified": bool(changed)}


def _git(*arguments: str) -> str:
    # Without the locks "status" writes nothing: killed, it would leave index.lock, which stops every later command.
    command = ["git", "--no-optional-locks", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    first = text.split("\n\n")[0]
    return {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in first.splitlines())}


def _matters(name: str) -> bool:
    libraries = ("ATEN_", "MKL_", "ONEDNN_", "DNNL_", "TORCH_NUM")
    return name.startswith(("OMP_", "KMP_", "GOMP_", "QLORA_KERNELS_", *libraries))
