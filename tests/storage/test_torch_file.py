"""Files of torch.save that someone else made."""

from __future__ import annotations

import io
import struct
import warnings
import zipfile

import pytest
import torch

from qlora_kernels.storage.torch_file import load_torch

VALUE = {"tensor": torch.arange(100.0), "number": 3, "list": [1.5, None, True, "text"]}


def saved(value, **more) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **more)
    return buffer.getvalue()


def load(data: bytes):
    return load_torch(io.BytesIO(data))


def rewritten(data: bytes, *extra: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """The archive written once more, with further members."""
    source, buffer = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as target, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that occur twice
        for name, content in [*((name, source.read(name)) for name in source.namelist()), *extra]:
            target.writestr(name, content)
    return buffer.getvalue()


def test_what_torch_wrote_is_read():
    for data in (saved(VALUE), rewritten(saved(VALUE))):
        loaded = load(data)
        assert torch.equal(loaded.pop("tensor"), VALUE["tensor"])
        assert loaded == {"number": 3, "list": [1.5, None, True, "text"]}


@pytest.mark.slow
def test_an_archive_with_a_64_bit_directory_is_read():
    assert len(load(saved([torch.ones(1) for _ in range(70_000)]))) == 70_000


def test_compressed_members_are_refused():
    """1.9 MB can stand for 1.9 GiB."""
    data = rewritten(saved(torch.zeros(1 << 20)), compression=zipfile.ZIP_DEFLATED)
    assert len(data) < 10_000
    with pytest.raises(ValueError, match="is compressed"):
        load(data)


def test_the_old_format_is_refused():
    with pytest.raises(ValueError, match="not a whole zip archive"):
        load(saved(VALUE, _use_new_zipfile_serialization=False))


@pytest.mark.parametrize("name", ["archive/data.pkl", "archive/DATA.pkl"])
def test_two_members_of_one_name_are_refused(name):
    with pytest.raises(ValueError, match="have the same name"):
        load(rewritten(saved(VALUE), (name, b"\x80\x02N.")))


def test_a_second_folder_is_refused():
    with pytest.raises(ValueError, match="should have one folder"):
        load(rewritten(saved(VALUE), ("other/data.pkl", b"\x80\x02N.")))


def directory_changed(data: bytes, member: int, field: int, value: int) -> bytes:
    """The archive with another 32-bit number at an offset in a member's entry of the directory."""
    at = -1
    for _ in range(member + 1):
        at = data.index(b"PK\x01\x02", at + 1)
    return data[: at + field] + struct.pack("<I", value) + data[at + field + 4 :]


def test_members_that_share_bytes_or_end_outside_are_refused():
    data = rewritten(saved([torch.ones(2), torch.zeros(2)]))
    entries = zipfile.ZipFile(io.BytesIO(data)).infolist()
    shared = directory_changed(data, 1, 42, entries[0].header_offset)
    with pytest.raises(ValueError, match="overlap"):
        load(shared)
    longer = directory_changed(directory_changed(data, 0, 20, 4000), 0, 24, 4000)
    with pytest.raises(ValueError, match=r"overlap|outside"):
        load(longer)


@pytest.mark.parametrize("where", ["before", "after", "both"])
def test_bytes_around_the_archive_are_refused(where):
    """Readers differ in what they make of them, so torch could read another archive than was checked."""
    data = saved(VALUE)
    around = {"before": data + data, "after": data + b"\0", "both": b"x" + data + b"x"}[where]
    with pytest.raises(ValueError, match="archive"):
        load(around)
