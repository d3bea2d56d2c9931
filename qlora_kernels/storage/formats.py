"""JSON, safetensors and torch files, written whole or not at all, and read with errors that name the file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import missing_extra, sentence
from .atomic_file import write_atomically
from .safetensors_stream import read, read_header


def save_json(value: Any, path: str | os.PathLike[str]) -> None:
    """Writes JSON, indented, whole or not at all."""
    text = json.dumps(value, indent=2, sort_keys=True, default=str) + "\n"

    def write(temporary: str) -> None:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)

    write_atomically(path, write)


def load_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        OSError: when it cannot be read.
        ValueError: when it does not hold a JSON object.
    """
    with open(path, "rb") as file:
        return parse_json(file.read(), os.fspath(path))


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    """A JSON object from its text.

    Raises:
        ValueError: when it is not a JSON object; the sentence starts with ``where``.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # json's and unicode's errors are ValueErrors
        raise ValueError(f"{where} should hold a JSON object ({sentence(error)})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} should hold a JSON object, found {type(value).__name__}")
    return value


def save_safetensors(
    tensors: Mapping[str, torch.Tensor], path: str | os.PathLike[str], metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file, whole or not at all."""
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise missing_extra("safetensors", "finetune") from None
    contiguous = {key: value.detach().contiguous() for key, value in tensors.items()}
    write_atomically(path, lambda temporary: save_file(contiguous, temporary, metadata=metadata))


def save_torch(value: Any, path: str | os.PathLike[str]) -> None:
    """``torch.save``, whole or not at all.

    Raises:
        OSError: when the file cannot be written.
    """

    def write(temporary: str) -> None:
        try:
            torch.save(value, temporary)
        except RuntimeError as error:
            # torch's writer does not pass on what the system said, so it is asked again.
            with open(temporary, "ab") as file:
                file.write(bytes(1 << 20))
                file.flush()
                os.fsync(file.fileno())
            if not re.search("inline_container|PytorchStreamWriter|iostream", str(error)):
                raise
            raise OSError(f"{os.fspath(path)} cannot be written ({sentence(error)})") from error

    write_atomically(path, write)


def load_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file, on the CPU.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is truncated or not a safetensors file.
    """
    entries, metadata = read_header(os.fspath(path))
    return {name: read(entry) for name, entry in entries.items()}, metadata
