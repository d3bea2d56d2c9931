"""Files that are written whole or not at all: aside, fsync, rename."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import socket
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .errors import missing_extra, sentence
from .safetensors_stream import read, read_header


def sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_beside(path: str, make: Callable[[str], None], whose: str = "") -> str:
    """Calls ``make``, which creates a file or folder and fails if there is one, with a hidden name beside ``path``.

    tempfile would do the same, but keeps what it makes from everybody else; here the process's umask decides, as it
    does for any new file. To ask for the umask one has to set it, which other threads would notice.

    Returns:
        ``.NAME.WHOSExxxxxxxx.part`` beside ``path``.
    """
    folder, name = os.path.split(path)
    while True:
        temporary = os.path.join(folder, f".{name}.{whose}{secrets.token_hex(4)}.part")
        with contextlib.suppress(FileExistsError):
            make(temporary)
            return temporary


def _here() -> str:
    """Six letters for this machine since it was started, or rather for those of its processes that can see each other.

    Machines made from one image have one name, and a folder may be shared by them: the kernel draws a number as it
    starts.
    """
    known = [socket.gethostname()]
    with contextlib.suppress(OSError):  # no Linux
        known += [os.readlink("/proc/self/ns/pid"), Path("/proc/sys/kernel/random/boot_id").read_text()]
    return hashlib.sha256(" ".join(known).encode()).hexdigest()[:6]


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # somebody else's
        pass
    return True


def _sweep_files(path: str) -> None:
    """Removes what killed writers of ``path`` left beside it; what one left on another machine stays, or before this
    one was last started."""
    folder, name = os.path.split(path)
    pattern = re.compile(rf"\.{re.escape(name)}\.{_here()}-(\d+)-[0-9a-f]{{8}}\.part")
    with contextlib.suppress(OSError):
        for found in filter(None, map(pattern.fullmatch, os.listdir(folder))):
            if not _lives(int(found[1])):
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(folder, found[0]))


def write_atomically(path: str | os.PathLike, write: Callable[[str], None]) -> None:
    """Calls ``write(temporary_path)`` beside ``path``, syncs what it wrote, and renames it into place.

    A kill at any moment leaves the old file or the new one; an exception leaves the old one and no litter. What a
    killed writer of the same ``path`` left is removed.

    Raises:
        OSError: when the folder does not exist or cannot be written.
    """
    path = os.path.abspath(os.fspath(path))
    folder = os.path.dirname(path)
    _sweep_files(path)
    temporary = make_beside(path, lambda name: open(name, "x").close(), f"{_here()}-{os.getpid()}-")
    mode = os.stat(temporary).st_mode
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, stat.S_IMODE(mode))  # safetensors puts another file there, that only its owner may read
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_folder(folder)


def save_json(value: Any, path: str | os.PathLike) -> None:
    """Writes JSON, indented, whole or not at all."""
    text = json.dumps(value, indent=2, sort_keys=True, default=str) + "\n"

    def write(temporary: str) -> None:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)

    write_atomically(path, write)


def load_json(path: str | os.PathLike) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        OSError: when it cannot be read.
        ValueError: when it holds something else.
    """
    with open(path, "rb") as file:
        return parse_json(file.read(), os.fspath(path))


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    """A JSON object from its text.

    Raises:
        ValueError: when it is something else; ``where`` begins the sentence.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # json's and unicode's errors are ValueErrors
        raise ValueError(f"{where} should hold a JSON object ({sentence(error)})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} should hold a JSON object, found {type(value).__name__}")
    return value


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


def load_safetensors(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file, on the CPU.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is truncated, or not a safetensors file.
    """
    entries, metadata = read_header(os.fspath(path))
    return {name: read(entry) for name, entry in entries.items()}, metadata
