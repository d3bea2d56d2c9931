"""safetensors files one tensor at a time; the library's own writer needs all of them in memory.

The format: the header's length as 8 bytes little-endian, the header as JSON (name -> dtype, shape, data_offsets from
the end of the header), the data without gaps. https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BufferedReader
from typing import Any

import torch

from ..errors import missing_extra
from .regular_file import open_regular

DTYPES = {
    "C64": torch.complex64,
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_COPY_BYTES = 16 << 20


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes:
        dtype: the format's name, e.g. "BF16".
        shape: its shape.
        nbytes: its size.
        file: the file's path.
        begin: offset of its first byte in that file.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str = ""
    begin: int = 0

    @classmethod
    def like(cls, tensor: torch.Tensor) -> Entry:
        return cls(NAMES[tensor.dtype], tuple(tensor.shape), tensor.numel() * tensor.element_size())


class Reader:
    """A file held open: its header and its tensors are of one file, even if another takes its name meanwhile.

    Args:
        path: the file.

    Attributes:
        entries: its tensors by name, without their data.
        metadata: the strings stored beside them.

    Raises:
        FileNotFoundError: when there is no such file.
        OSError: when it cannot be read.
        ValueError: when it is truncated or not a safetensors file, or a pipe or a device.
    """

    entries: dict[str, Entry]
    metadata: dict[str, str]

    def __init__(self, path: str) -> None:
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError:
            raise missing_extra("safetensors", "finetune") from None
        self._file = open_regular(path)
        try:
            while True:
                with safe_open(path, framework="pt"):  # checks the header, the offsets and the file's size
                    pass
                # The library opens files by their names only, so it may have checked another file than this one.
                if os.path.samestat(os.fstat(self._file.fileno()), os.stat(path)):
                    break
                self._file.close()
                self._file = open_regular(path)
            length = int.from_bytes(self._file.read(8), "little")
            header = json.loads(self._file.read(length))
            self.metadata = header.pop("__metadata__", None) or {}
            self.entries = {name: _entry(value, path, 8 + length) for name, value in header.items()}
        # The second reading may find what the first did not: Python's parser is another one, and files change.
        except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            self._file.close()
            raise ValueError(f"{path} is not a whole safetensors file ({error})") from None
        except BaseException:
            self._file.close()
            raise

    def read(self, entry: Entry) -> torch.Tensor:
        """One of its tensors, as :func:`read` does."""
        return _read(self._file, entry)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def read_header(path: str) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a file by name, without their data, and its metadata.

    Raises:
        FileNotFoundError, OSError, ValueError: as :class:`Reader`.
    """
    with Reader(path) as file:
        return file.entries, file.metadata


def _entry(value: Any, path: str, data: int) -> Entry:
    begin, end = value["data_offsets"]
    return Entry(value["dtype"], tuple(value["shape"]), end - begin, path, data + begin)


def read(entry: Entry) -> torch.Tensor:
    """One tensor, in its own memory (not a map of the file, which would stay resident).

    Raises:
        ValueError: when its type is unknown, torch cannot make its shape, or the file is now shorter.
    """
    with open_regular(entry.file) as file:
        return _read(file, entry)


def _read(file: BufferedReader, entry: Entry) -> torch.Tensor:
    if entry.dtype not in DTYPES:
        raise ValueError(f"{entry.file} holds a tensor of the type {entry.dtype}, which cannot be read")
    data = bytearray(entry.nbytes)
    file.seek(entry.begin)
    if file.readinto(data) != entry.nbytes:
        raise ValueError(f"{entry.file} ends early")
    dtype = DTYPES[entry.dtype]
    try:
        return torch.frombuffer(data, dtype=dtype).view(entry.shape) if data else torch.empty(entry.shape, dtype=dtype)
    # The header may have sizes that torch's integers cannot hold, beside a 0.
    except (TypeError, ValueError, RuntimeError) as error:
        shape = f"{list(entry.shape)}"
        raise ValueError(f"{entry.file} holds a tensor of the shape {shape:.100}, which cannot be made") from error


class Writer:
    """Writes a file whose contents are known beforehand; tensors may be written in any order.

    Larger element types come first, as from the library's writer, so that every tensor is aligned to its elements.

    Args:
        path: the file, created or replaced.
        entries: what it will hold; only dtype, shape and nbytes of each matter.
        metadata: strings to store beside the tensors, by default that they are for PyTorch.
    """

    def __init__(self, path: str, entries: Mapping[str, Entry], metadata: Mapping[str, str] | None = None) -> None:
        order = sorted(entries, key=lambda name: (-_element_size(entries[name].dtype), name))
        metadata = {"format": "pt"} if metadata is None else dict(metadata)
        header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
        offset, self._begin, self._left = 0, {}, dict(entries)
        for name in order:
            entry = entries[name]
            self._begin[name] = offset
            header[name] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": [offset, offset + entry.nbytes],
            }
            offset += entry.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._file = open(path, "wb")  # noqa: SIM115 - closed by close()
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._start + offset)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes one tensor.

        Raises:
            ValueError: when it is another than was announced.
            RuntimeError: when its storage was freed: numpy would write what lies in fresh memory instead.
        """
        entry = self._left.pop(name)
        if Entry.like(tensor) != entry:
            raise ValueError(f"{name} should be {entry.dtype} {list(entry.shape)}, found {tensor.dtype} {tensor.shape}")
        if tensor.numel() and not tensor._is_zerotensor() and tensor.untyped_storage().data_ptr() == 0:
            raise RuntimeError(f"{name} cannot be written: its memory was freed")
        self._file.seek(self._start + self._begin[name])
        if tensor.numel():
            data = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
            self._file.write(data.reshape(-1).view(torch.uint8).numpy().data)

    def copy(self, name: str, source: Entry) -> None:
        """Copies the bytes of a tensor from another file."""
        entry = self._left.pop(name)
        if (source.dtype, source.shape) != (entry.dtype, entry.shape):
            raise ValueError(f"{name} should be {entry.dtype} {list(entry.shape)}, found {source.dtype} {source.shape}")
        self._file.seek(self._start + self._begin[name])
        with open_regular(source.file) as file:
            file.seek(source.begin)
            for size in _chunk_sizes(source.nbytes):
                data = file.read(size)
                if len(data) != size:
                    raise ValueError(f"{source.file} ends early")
                self._file.write(data)

    def close(self) -> None:
        """Closes the file.

        Raises:
            ValueError: when a tensor was not written.
        """
        self._file.close()
        if self._left:
            raise ValueError(f"{len(self._left)} tensors were not written, first {next(iter(self._left))}")

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


def _chunk_sizes(size: int) -> Iterable[int]:
    while size > 0:
        yield min(size, _COPY_BYTES)
        size -= _COPY_BYTES


def _element_size(dtype: str) -> int:
    return DTYPES[dtype].itemsize if dtype in DTYPES else 1
