"""Giving freed memory back to the system."""

from __future__ import annotations

import platform

import pytest

from qlora_kernels.native import heap


def test_the_heap_is_trimmed_now_and_then(monkeypatch):
    calls = []
    monkeypatch.setattr(heap, "_trim", lambda: lambda: calls.append(1))
    monkeypatch.setattr(heap, "_freed", 0)
    for _ in range(10):
        heap.freed(10 << 20)
    assert len(calls) == 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_glibc_trims():
    assert heap._trim()() in (0, 1)
