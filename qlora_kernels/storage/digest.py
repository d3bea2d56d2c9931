"""A digest of nested values, tensors included."""

from __future__ import annotations

import hashlib
from typing import Any

import torch


def digest(value: Any, file_size: int | None = None) -> str:
    """SHA-256 of everything in nested dicts and sequences, tensors byte for byte.

    Args:
        value: what to digest. Of a file that anyone may have written it can be anything: catch every exception then.
        file_size: of the file that the value was read from, in bytes. Values in a file can share their parts, so a
            small one can stand for terabytes; more than eight times the file's size is not read.

    Raises:
        ValueError: when there is more.
    """
    result = hashlib.sha256()
    left = None if file_size is None else 8 * file_size

    def add(value: Any) -> None:
        nonlocal left
        if left is not None:
            left -= value.numel() * value.itemsize + 1 if isinstance(value, torch.Tensor) else 1
            if left < 0:
                raise ValueError("it stands for more than eight times the size of its file")
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
