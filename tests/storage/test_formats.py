"""JSON and safetensors, and errors that name the file."""

from __future__ import annotations

import os
import resource
import signal

import forked
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
        ('{"a": {"b": 1, "c": 2, "b": 3}}', r"file should hold a JSON object \(the key 'b' occurs twice\)"),
        ('{"a": ' * 101 + "1" + "}" * 101, "file should hold a JSON object nested at most 100 deep"),
        ('{"a": ' + "9" * 5000 + "}", r"file should hold a JSON object \("),
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


def test_json_of_any_size_and_depth_that_is_sensible(tmp_path, monkeypatch):
    (tmp_path / "file").write_text('{"a": ' * 99 + "[1, Infinity]" + "}" * 99)
    value = formats.load_json(tmp_path / "file")
    for _ in range(99):
        value = value["a"]
    assert value == [1, float("inf")]
    monkeypatch.setattr(formats, "_LARGEST_JSON", 100)
    with pytest.raises(ValueError, match="file should hold a JSON object, and has more than"):
        formats.load_json(tmp_path / "file")


@pytest.mark.parametrize("load", [formats.load_json, formats.load_safetensors])
def test_pipes_and_devices_are_refused_unopened(tmp_path, load):
    os.mkfifo(tmp_path / "pipe")
    os.symlink("/dev/zero", tmp_path / "zeros")
    for name in ("pipe", "zeros", "."):
        with pytest.raises(ValueError, match="is not a regular file"):
            load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="absent: no such file"):
        load(tmp_path / "absent")
    with pytest.raises(ValueError, match="is not a file's name"):
        load("a\0b")


def full_disk(path: str, result: str) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        formats.save_safetensors({"a": torch.ones(1000)}, path)
    except OSError:
        os.mkdir(result)


def test_a_safetensors_file_that_cannot_be_written_is_an_os_error(tmp_path):
    process = forked.start(full_disk, str(tmp_path / "file"), str(tmp_path / "result"))
    process.join()
    assert os.listdir(tmp_path) == ["result"]


def test_safetensors_are_written_as_their_values_read(tmp_path):
    z = torch.tensor([1 + 2j, 3 - 4j])
    tensors = {"conj": z.conj(), "neg": z.conj().imag, "strided": torch.arange(6).view(2, 3).T}
    formats.save_safetensors(tensors, tmp_path / "file")
    loaded, metadata = formats.load_safetensors(tmp_path / "file")
    assert not metadata
    assert {key: value.tolist() for key, value in loaded.items()} == {k: v.tolist() for k, v in tensors.items()}
    with pytest.raises(TypeError, match=r"bad is torch\.complex128, which safetensors files do not hold"):
        formats.save_safetensors({"bad": z.to(torch.complex128)}, tmp_path / "file")
