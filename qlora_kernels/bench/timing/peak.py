"""The most memory that a call has allocated at one time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def peak_allocated(call: Callable[[], Any], device: str = "cpu") -> int | None:
    """Bytes beyond what was allocated before: results and temporaries.

    On a card, what torch's allocator handed out. On a CPU, the same, by torch's profiler's record of every allocation;
    libraries' own scratch (this package's: at most 8 MiB a thread) is not seen there.

    Args:
        call: what to do, once; warmed up.
        device: "cpu" or "cuda".

    Returns:
        Bytes; None where the profiler records nothing.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    return _peak_of_cpu(call) if _recorded() else None


@functools.cache
def _recorded() -> bool:
    """Whether the profiler sees an allocation that is known: a call without any is not one that went unseen."""
    return _peak_of_cpu(lambda: torch.empty(1 << 10)) > 0


def _peak_of_cpu(call: Callable[[], Any]) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = call()
    del result
    # Not events(): those have no record of what was freed between operations. torch annotates neither.
    kineto: Any = record.profiler
    changes = [(e.start_ns(), e.nbytes()) for e in kineto.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        now += size
        most = max(most, now)
    return most
