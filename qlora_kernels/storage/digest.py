"""A digest of nested values, tensors included."""

from __future__ import annotations

import hashlib
from typing import Any

import torch


def digest(value: Any, largest: int | None = None) -> str:
    """SHA-256 of everything in nested dicts and sequences, tensors byte for byte.

    Args:
        value: what to digest. Of a file that anyone may have written it can be anything: catch every exception then.
        largest: the most bytes that a tensor may have; an expanded one of a small file could fill the memory.

    Raises:
        ValueError: when a tensor is larger.
    """
    result = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            nbytes = value.numel() * value.itemsize
            if largest is not None and nbytes > largest:
                raise ValueError(f"a tensor of {nbytes} bytes, where at most {largest} can be")
            flat = value.detach().cpu().contiguous().flatten()
            result.update(f"{value.dtype}{list(value.shape)}".encode())
            result.update(flat.view(torch.uint8).numpy().data)
        elif isinstance(value, dict):
            result.update(f"{{{len(value)}".encode())
            for key, inner in value.items():
                result.update(f"{key!r}:".encode(errors="surrogatepass"))
                add(inner)
        elif isinstance(value, (set, frozenset)):  # their order differs from process to process
            add(sorted(map(repr, value)))
        elif isinstance(value, (list, tuple)):
            result.update(f"[{len(value)}".encode())
            for inner in value:
                add(inner)
        else:
            result.update(f"{value!r},".encode(errors="surrogatepass"))

    add(value)
    return result.hexdigest()
