"""JSON and safetensors, and errors that name the file."""

from __future__ import annotations

import pytest
import torch

from qlora_kernels.storage import formats


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"file should hold a JSON object \(Expecting"),
        ("[1]", "file should hold a JSON object, found list"),
        ("[" * 100_000, r"file should hold a JSON object \("),
        (b"\xff\xfe\xfd", r"file should hold a JSON object \("),
    ],
)
def test_files_without_a_json_object(tmp_path, text, message):
    (tmp_path / "file").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        formats.load_json(tmp_path / "file")


def test_safetensors_of_every_type(tmp_path):
    names = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64", "bool")
    names += ("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8")
    tensors = {name: torch.tensor([[0, 1, 1]]).to(getattr(torch, name)) for name in names}
    formats.save_safetensors(tensors, tmp_path / "file", metadata={"who": "me"})
    loaded, metadata = formats.load_safetensors(tmp_path / "file")
    assert metadata["who"] == "me"
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].tolist() == tensor.tolist()
