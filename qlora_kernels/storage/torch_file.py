"""Reading files of torch.save that anyone may have written, in time and memory that the file's size bounds."""

from __future__ import annotations

from typing import Any, BinaryIO

import torch

from .torch_archive import read_archive
from .torch_pickle import ForeignContents, check_pickle

__all__ = ["ForeignContents", "load_torch"]


def load_torch(file: BinaryIO, name: str | None = None) -> Any:
    """``torch.load(weights_only=True)`` of a file on the CPU, checked first.

    Args:
        file: open for reading.
        name: of the same file, to map it into memory; None reads it.

    Raises:
        ForeignContents: when it holds what :func:`check_pickle` refuses.
        Exception: of a damaged file whatever its bytes lead to.
    """
    archive = read_archive(file)
    check_pickle(archive.pickle, archive.storages)
    file.seek(0)
    return torch.load(file if name is None else name, map_location="cpu", weights_only=True, mmap=name is not None)
