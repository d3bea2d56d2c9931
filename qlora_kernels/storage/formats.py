"""JSON, safetensors and torch files, written whole or not at all, and read with errors that name the file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import sentence
from .atomic_file import write_atomically
from .regular_file import open_regular
from .safetensors_stream import NAMES, Entry, Reader, Writer

# An index of a very large model has about 10 MB.
_LARGEST_JSON = 100 << 20

# Python's own functions that copy or write nested values fail at a depth near 1,000.
_DEEPEST_JSON = 100


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
        ValueError: when it does not hold a JSON object, or is larger than 100 MiB, or a pipe or a device.
    """
    with open_regular(path) as file:
        text = file.read(_LARGEST_JSON + 1)
    if len(text) > _LARGEST_JSON:
        raise ValueError(f"{os.fspath(path)} should hold a JSON object, and has more than {_LARGEST_JSON >> 20} MiB")
    return parse_json(text, os.fspath(path))


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    """A JSON object from its text. NaN and Infinity pass, since there are models whose config.json has them.

    Raises:
        ValueError: when it is not a JSON object, has a key twice, or is nested deeper than 100; the sentence starts
            with ``where``.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # json's and unicode's errors are ValueErrors
        raise ValueError(f"{where} should hold a JSON object ({sentence(error)})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} should hold a JSON object, found {type(value).__name__}")
    level: list[Any] = [value]
    for _ in range(_DEEPEST_JSON):
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
        level = [inner for inner in level if isinstance(inner, (dict, list))]
    if level:
        raise ValueError(f"{where} should hold a JSON object nested at most {_DEEPEST_JSON} deep")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's keys and values; which of two values for one key counts would depend on the reader."""
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!r} occurs twice")
    return value


def save_safetensors(
    tensors: Mapping[str, torch.Tensor], path: str | os.PathLike[str], metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file, whole or not at all.

    Raises:
        TypeError: for a tensor of a type that the format lacks.
        OSError: when it cannot be written.
    """
    for key, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise TypeError(f"{key} is {tensor.dtype}, which safetensors files do not hold")
    entries = {key: Entry.like(tensor) for key, tensor in tensors.items()}

    # Not with the library's function, which reports a full disk as an error of its own, not an OSError, and leaves a
    # temporary file after a kill.
    def write(temporary: str) -> None:
        with Writer(temporary, entries, metadata or {}) as writer:
            for key, tensor in tensors.items():
                writer.write(key, tensor)

    write_atomically(path, write)


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
        OSError: when it cannot be read.
        ValueError: when it is truncated or not a safetensors file, or a pipe or a device.
    """
    with Reader(os.fspath(path)) as file:
        return {name: file.read(entry) for name, entry in file.entries.items()}, file.metadata
