"""A digest of nested values, tensors included."""

from __future__ import annotations

import hashlib
from typing import Any

import torch


def digest(value: Any) -> str:
    """SHA-256 of everything in nested dicts and sequences, tensors byte for byte."""
    result = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
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
