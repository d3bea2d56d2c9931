"""``qlora-kernels quantize``: sizes, and one sentence for each kind of bad input."""

from __future__ import annotations

import json
import os
import resource
import shutil

import pytest
from small.model_folder import TINY, model_fixture  # noqa: F401 - fixtures

from qlora_kernels.cli.main import main
from qlora_kernels.cli.quantize import parse_size
from qlora_kernels.errors import InputError
from qlora_kernels.storage.lock import claim_of, claimed


def test_double_quantization_of_a_4_bit_folder_cannot_be_turned_off(tmp_path, model, capsys):
    for name, flags in (("nested", []), ("plain", ["--no-double-quant"])):
        assert main(["quantize", model, str(tmp_path / name), "--quiet", *flags]) == 0
    capsys.readouterr()

    def finetune(name, *flags):
        return main(["finetune", *TINY, "--model", str(tmp_path / name), "--out", str(tmp_path / "out"), *flags])

    assert finetune("nested", "--no-double-quant") == 2
    error = capsys.readouterr().err
    assert f"--no-double-quant comes too late: {tmp_path / 'nested'} is 4-bit and double-quantized already" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    for flags in ([], ["--no-double-quant"]):  # agreed, or nothing said
        assert finetune("plain", *flags) == 0
        metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
        assert metrics["options"]["double_quant"] is False
        assert metrics["size"]["bits_per_weight"] == 4.5
    for name in ("nested", "plain"):
        assert main(["quantize", str(tmp_path / name), str(tmp_path / "again"), "--no-double-quant"]) == 2
        error = capsys.readouterr().err
        assert "is quantized already (by qlora_kernels); a model with dense weights was expected" in error
        assert error.count("\n") == 1
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["{t}/nowhere", "{t}/out"], "no such folder"),
        (["{m}", "{t}/full"], "exists already"),
        (["{m}", "{t}/full/file/out"], "cannot be written"),
        (["{m}", "{t}/full/file"], "exists already"),
        (["{m}", "/dev/null"], "exists already"),
        (["{m}", "/proc/sys/out"], "cannot be written"),
        (["{m}", "{t}/new/" + 300 * "x"], "cannot be written: File name too long"),
        (["{m}", "{t}/out", "--max-shard-size", "huge"], "--max-shard-size should be a size"),
        (["{m}", "{t}/out", "--max-shard-size", "0.1"], "--max-shard-size should be a size"),
    ],
)
def test_bad_input_of_quantize(tmp_path, model, capsys, arguments, expected):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    filled = [argument.format(t=tmp_path, m=model) for argument in arguments]
    assert main(["quantize", *filled]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == ["full"]
    assert (tmp_path / "full" / "file").read_text() == "mine"


def test_a_second_command_is_told_who_writes_the_folder(tmp_path, model, capsys):
    out = str(tmp_path / "out")
    with claimed(claim_of(out), out):
        assert main(["quantize", model, out, "--quiet"]) == 2
        error = capsys.readouterr().err
        assert f"{out} is being written by process {os.getpid()} on " in error
        assert error.count("\n") == 1
    assert main(["quantize", model, out, "--quiet"]) == 0
    assert os.listdir(tmp_path) == ["out"]


def test_a_full_disk_is_one_sentence(tmp_path, model, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        assert main(["quantize", model, str(tmp_path / "out"), "--quiet"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert error == f"qlora-kernels quantize: the output folder {tmp_path}/out cannot be written: File too large\n"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("config.json", '{"quantization_config": "x"}', "quantization_config should be a JSON object"),
        ("config.json", "[]", "should hold a JSON object"),
        ("model.safetensors.index.json", '{"weight_map": {"a": 5}}', "is not an index of safetensors files"),
    ],
)
def test_quantize_refuses_odd_json(tmp_path, model, capsys, name, text, expected):
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / name).write_text(text)
    assert main(["quantize", str(tmp_path / "model"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


def test_sizes():
    assert parse_size("2GB") == 2 * 10**9
    assert parse_size("1.5 MiB") == 3 << 19
    assert parse_size("1") == parse_size("0.001kB") == 1
    for text in ("", "two", "-1GB", "0", "0.0GB", "3XB", "0.1", "0.9B", "0.0000001MiB", "1e3", "9" * 400):
        with pytest.raises(InputError, match=r"max-shard-size .* such as 2GB, 500MB or 1\.5GiB"):
            parse_size(text)
