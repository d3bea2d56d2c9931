"""Files that are written whole or not at all: aside, fsync, rename."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .errors import missing_extra


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: str | os.PathLike, write: Callable[[str], None]) -> None:
    """Calls ``write(temporary_path)`` beside ``path``, syncs what it wrote, and renames it into place.

    A kill at any moment leaves the old file or the new one; an exception leaves the old one and no litter.

    Raises:
        OSError: when the folder does not exist or cannot be written.
    """
    path = os.path.abspath(os.fspath(path))
    folder = os.path.dirname(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{os.path.basename(path)}.", suffix=".part", dir=folder)
    os.close(handle)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_folder(folder)


def save_json(value: Any, path: str | os.PathLike) -> None:
    """Writes JSON, indented, whole or not at all."""
    text = json.dumps(value, indent=2, sort_keys=True, default=str) + "\n"

    def write(temporary: str) -> None:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)

    write_atomically(path, write)


def save_safetensors(
    tensors: Mapping[str, torch.Tensor], path: str | os.PathLike, metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file, whole or not at all."""
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise missing_extra("safetensors", "finetune") from None
    plain = {key: value.detach().contiguous() for key, value in tensors.items()}
    write_atomically(path, lambda temporary: save_file(plain, temporary, metadata=metadata))


def save_torch(value: Any, path: str | os.PathLike) -> None:
    """``torch.save``, whole or not at all."""
    write_atomically(path, lambda temporary: torch.save(value, temporary))


def load_safetensors(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file, on the CPU.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is truncated, or not a safetensors file.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise missing_extra("safetensors", "finetune") from None
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
