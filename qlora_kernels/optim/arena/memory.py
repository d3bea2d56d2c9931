"""How much memory the system can still give, and the error when an arena does not fit."""

from __future__ import annotations

import contextlib
import os


def memory_left() -> int | None:
    """Bytes that can still be allocated: free memory and swap, or the cgroups' limit where that is less.

    None where the system does not say. A cgroup's limit counts in full, because it can drop the file pages it holds.
    """
    limits = []
    with contextlib.suppress(OSError, ValueError, KeyError), open("/proc/meminfo") as file:
        fields = dict(line.split(":", 1) for line in file)
        limits.append(sum(int(fields[name].split()[0]) << 10 for name in ("MemAvailable", "SwapFree")))
    with contextlib.suppress(OSError), open("/proc/self/cgroup") as file:
        for line in file:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            if controllers in ("", "memory"):
                mount, name = ("memory", "memory.limit_in_bytes") if controllers else ("", "memory.max")  # v1, v2
                limits += cgroup_limits(os.path.join("/sys/fs/cgroup", mount), path, name)
    return min(limits, default=None)


def cgroup_limits(root: str, path: str, name: str) -> list[int]:
    """Limits of a cgroup and its ancestors. Inside a container the container's own limit is at the root."""
    parts = path.strip("/").split("/")
    limits = []
    for depth in range(len(parts) + 1):
        with contextlib.suppress(OSError, ValueError), open(os.path.join(root, *parts[:depth], name)) as file:
            limits.append(int(file.read()))  # "max" is not a number
    return limits


def out_of_memory(nbytes: int, where: str, why: str, state_bits: int, page_file: str | None = None) -> MemoryError:
    """The error for an arena that does not fit, with advice that its options do not follow yet."""
    advice = ["state_bits=8 takes a quarter of it"] if state_bits == 32 else []
    advice += [
        "page_file=FOLDER (on the CPU) keeps them in a file there"
        if page_file is None
        else "page_file can be a folder on another disk"
    ]
    return MemoryError(
        f"the optimizer's states need {nbytes} bytes ({nbytes / 2**30:.2f} GiB) {where}, which cannot be allocated "
        f"({why}); " + ", and ".join(advice)
    )
