"""A digest of nested values, tensors included."""

from __future__ import annotations

import hashlib
from typing import Any

import torch


def digest(value: Any) -> str:
    """SHA-256 of everything in nested dicts and sequences, tensors byte for byte."""
    result = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            flat = part.detach().cpu().contiguous().flatten()
            result.update(f"{part.dtype}{list(part.shape)}".encode())
            result.update(flat.view(torch.uint8).numpy())
        elif isinstance(part, dict):
            result.update(f"{{{len(part)}".encode())
            for key, inner in part.items():
                result.update(f"{key!r}:".encode(errors="surrogatepass"))
                add(inner)
        elif isinstance(part, (set, frozenset)):  # whose order is another in every process
            add(sorted(map(repr, part)))
        elif isinstance(part, (list, tuple)):
            result.update(f"[{len(part)}".encode())
            for inner in part:
                add(inner)
        else:
            result.update(f"{part!r},".encode(errors="surrogatepass"))

    add(value)
    return result.hexdigest()
