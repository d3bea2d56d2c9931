"""safetensors files one tensor at a time."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from qlora_kernels.storage import formats, safetensors_stream
from qlora_kernels.storage.safetensors_stream import Entry, Reader, Writer, read, read_header


def test_a_safetensors_file_of_an_unknown_type(tmp_path, monkeypatch):
    formats.save_safetensors({"a": torch.ones(3, dtype=torch.int16)}, tmp_path / "file")
    monkeypatch.delitem(safetensors_stream.DTYPES, "I16")
    with pytest.raises(ValueError, match="file holds a tensor of the type I16, which cannot be read"):
        formats.load_safetensors(tmp_path / "file")


def test_stream_writer_writes_what_the_library_reads(tmp_path):
    tensors = {
        "odd bytes": torch.arange(7, dtype=torch.uint8),
        "floats": torch.randn(3, 5),
        "halves": torch.randn(3).half(),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3.5, dtype=torch.bfloat16),
        "flags": torch.tensor([True, False, True]),
    }
    path = str(tmp_path / "file.safetensors")
    with Writer(path, {name: Entry.like(tensor) for name, tensor in tensors.items()}) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            stored = file.get_tensor(name)
            assert stored.dtype == tensor.dtype
            assert torch.equal(stored, tensor)
    for name, entry in read_header(path)[0].items():
        assert torch.equal(read(entry), tensors[name])
    with pytest.raises(ValueError, match="were not written"), Writer(path, {"a": Entry.like(torch.ones(1))}):
        pass


def test_a_reader_stays_with_its_file(tmp_path):
    path = tmp_path / "file.safetensors"
    formats.save_safetensors({"a": torch.ones(3), "b": torch.ones(5)}, path)
    with Reader(str(path)) as file:
        assert torch.equal(file.read(file.entries["a"]), torch.ones(3))
        formats.save_safetensors({"a": torch.zeros(3), "b": torch.zeros(5)}, path)
        assert torch.equal(file.read(file.entries["b"]), torch.ones(5))


def test_the_file_that_the_library_checks_is_the_one_that_is_read(tmp_path, monkeypatch):
    path = tmp_path / "file.safetensors"
    formats.save_safetensors({"a": torch.ones(3)}, path)
    opened, original = [], safetensors_stream.open_regular

    def replaced(name):
        file = original(name)
        if not opened:
            formats.save_safetensors({"a": torch.zeros(4)}, path)
        opened.append(file)
        return file

    monkeypatch.setattr(safetensors_stream, "open_regular", replaced)
    assert torch.equal(formats.load_safetensors(path)[0]["a"], torch.zeros(4))
    assert len(opened) == 2
    assert all(file.closed for file in opened)


@pytest.mark.parametrize("shape", [[0, 2**63], [2**63, 0], [0, 2**62, 2**62], [0, 2**64 - 1]])
def test_a_shape_that_torch_cannot_make(tmp_path, shape):
    path = tmp_path / "file.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert read_header(str(path))[0]["a"].shape == tuple(shape)
    with pytest.raises(ValueError, match=r"file\.safetensors holds a tensor of the shape \[.*\], which cannot be made"):
        formats.load_safetensors(path)
