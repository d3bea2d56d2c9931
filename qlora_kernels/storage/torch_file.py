"""Reading files of torch.save that anyone may have written, in time and memory that the file's size bounds."""

from __future__ import annotations

from typing import Any, BinaryIO

import torch

from .torch_archive import read_archive


class ForeignContents(ValueError):
    """The file is whole, but holds what this package does not save."""


def load_torch(file: BinaryIO, name: str | None = None) -> Any:
    """``torch.load(weights_only=True)`` of a file on the CPU, checked first.

    Args:
        file: open for reading.
        name: of the same file, to map it into memory; None reads it.

    Raises:
        ForeignContents: when its pickle makes anything but tensors, numbers, text and the containers for them.
        Exception: of a damaged file whatever its bytes lead to.
    """
    read_archive(file)
    file.seek(0)
    return torch.load(file if name is None else name, map_location="cpu", weights_only=True, mmap=name is not None)
