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
            small one can stand for terabytes; more than eight times the file's size, text included, is not read.

    Raises:
        ValueError: when there is more.
    """
    result = hashlib.sha256()
    left = None if file_size is None else 8 * file_size

    def spend(amount: int) -> None:
        nonlocal left
        if left is not None:
            left -= amount
            if left < 0:
                raise ValueError("it stands for more than eight times the size of its file")

    def text(value: Any) -> bytes:
        """The value's repr; what it holds is counted first, because a tuple can hold itself many times over."""
        todo = [] if left is None else [value]
        while todo:
            one = todo.pop()
            spend(1 + len(one) if isinstance(one, (str, bytes, bytearray)) else 1)
            if isinstance(one, (tuple, list, set, frozenset)):
                todo += one
            elif isinstance(one, dict):
                todo += [*one.keys(), *one.values()]
        return repr(value).encode(errors="surrogatepass")

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            spend(value.numel() * value.itemsize + 1)
            flat = value.detach().cpu().contiguous().flatten()
            result.update(f"{value.dtype}{list(value.shape)}".encode())
            result.update(flat.view(torch.uint8).numpy().data)
        elif isinstance(value, dict):
            spend(1)
            result.update(f"{{{len(value)}".encode())
            for key, inner in value.items():
                result.update(text(key) + b":")
                add(inner)
        elif isinstance(value, (set, frozenset)):  # their order differs from process to process
            add(sorted(text(one).decode(errors="surrogatepass") for one in value))
        elif isinstance(value, (list, tuple)):
            spend(1)
            result.update(f"[{len(value)}".encode())
            for inner in value:
                add(inner)
        else:
            result.update(text(value) + b",")

    add(value)
    return result.hexdigest()
