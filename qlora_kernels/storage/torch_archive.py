"""The zip archive that torch.save writes, checked against its directory before torch reads it."""

from __future__ import annotations

import os
import struct
import zipfile
from dataclasses import dataclass
from typing import BinaryIO

_LOCAL, _END, _END_64, _LOCATOR = b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_LOCAL_SIZE, _END_SIZE, _END_64_SIZE, _LOCATOR_SIZE = 30, 22, 56, 20


@dataclass(frozen=True)
class Archive:
    """What an archive holds.

    Attributes:
        pickle: the bytes of data.pkl.
        storages: sizes of the tensors' storages in bytes, by key.
    """

    pickle: bytes
    storages: dict[str, int]


def read_archive(file: BinaryIO) -> Archive:
    """The pickle and the sizes of the storages in a file of torch.save. The file's position does not matter after.

    Raises:
        ValueError: for a file that torch.save does not write: not a zip archive, with compressed, overlapping or
            duplicate members, or members that end outside it.
        OSError: when it cannot be read.
    """
    size = file.seek(0, os.SEEK_END)
    _check_ends(file, size)
    file.seek(0)
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            _check_members(file, members, archive.start_dir)
            folder = members[0].filename.partition("/")[0]
            # torch finds members without regard to case.
            names = {member.filename.lower() for member in members}
            if len(names) < len(members):
                raise ValueError("two members of the archive have the same name")
            if not all(member.filename.startswith(f"{folder}/") for member in members):
                raise ValueError("the archive should have one folder")
            start = f"{folder}/data/"
            storages = {m.filename[len(start) :]: m.file_size for m in members if m.filename.startswith(start)}
            return Archive(archive.read(f"{folder}/data.pkl"), storages)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, KeyError, struct.error) as error:
        raise ValueError(f"not a whole zip archive: {error}") from None


def _check_ends(file: BinaryIO, size: int) -> None:
    """Refuses what two readers of zip archives could understand differently: bytes before and after the archive."""
    tail_size = min(size, _END_SIZE + _LOCATOR_SIZE)
    file.seek(0)
    start = file.read(4)
    file.seek(size - tail_size)
    tail = file.read(tail_size)
    end = tail[-_END_SIZE:]
    if start != _LOCAL or len(end) < _END_SIZE or end[:4] != _END or end[20:] != b"\0\0":
        raise ValueError("not a whole zip archive")
    if tail[:4] == _LOCATOR and len(tail) > _END_SIZE:
        at = size - _END_SIZE - _LOCATOR_SIZE - _END_64_SIZE
        file.seek(max(at, 0))
        if at < 0 or struct.unpack("<Q", tail[8:16])[0] != at or file.read(4) != _END_64:
            raise ValueError("not a whole zip archive: its 64-bit directory is somewhere else")


def _check_members(file: BinaryIO, members: list[zipfile.ZipInfo], end: int) -> None:
    """Refuses members that are compressed, or that share bytes with each other or the directory."""
    if not members:
        raise ValueError("the archive is empty")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise ValueError("a member of the archive is compressed; torch.save stores them as they are")
    if min(member.header_offset for member in members):
        raise ValueError("not a whole zip archive: there are bytes before it")
    free = 0
    for member in sorted(members, key=lambda member: member.header_offset):
        if member.header_offset < free:
            raise ValueError("members of the archive overlap")
        file.seek(member.header_offset)
        header = file.read(_LOCAL_SIZE)
        if len(header) < _LOCAL_SIZE or header[:4] != _LOCAL:
            raise ValueError("not a whole zip archive: a member has no header")
        name, extra = struct.unpack("<HH", header[26:30])
        free = member.header_offset + _LOCAL_SIZE + name + extra + member.file_size
        if free > end:
            raise ValueError("a member of the archive ends outside it")
