"""What ``qlora-kernels info`` prints."""

from __future__ import annotations

import json
import os

from qlora_kernels.cli.main import main
from qlora_kernels.native.build_info import build_info


def test_info(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for title in ("compiler", "instruction sets built in", "in use", "CUDA architectures", "GPUs seen", "torch"):
        assert title in text
    assert main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info == json.loads(json.dumps(build_info()))
    assert info["native"]
    assert info["isa_in_use"] in info["isas_available"]
    assert set(info["isas_available"]) <= set(info["isas_built"])


def test_info_without_the_extension(capsys, monkeypatch):
    from qlora_kernels.native import extension

    def absent():
        raise ImportError("the native extension could not be loaded; build it with 'pip install -e .'")

    monkeypatch.setattr(extension, "native", absent)
    assert main(["info"]) == 0
    assert "pip install -e ." in capsys.readouterr().out


def test_dispatch_prints_which_kernel_runs(capsys, monkeypatch):
    monkeypatch.delenv("QLORA_KERNELS_CUDA_KERNEL", raising=False)
    assert main(["info", "--dispatch", "4096", "4096", "--arch", "90"]) == 0
    text = capsys.readouterr().out
    assert "sm_90, 132 multiprocessors, 227 KiB" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["1", "to", "4", "few", "1", "0.0"] in rows
    assert ["65", "to", "128", "warpgroup128", "4", "0.0"] in rows
    # Where a last round doesn't fill 132 multiprocessors, its tiles are shared.
    assert ["769", "or", "more", "tiles128wide", "1,", "last", "more", "15.0"] in rows
    assert main(["info", "--dispatch", "4096", "100", "--arch", "75", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["card"]["architecture"] == 75
    assert {row["kernel"] for row in printed["table"]} == {"floats"}, "K is no multiple of 64"
    monkeypatch.setenv("QLORA_KERNELS_CUDA_KERNEL", "tiles64")
    assert main(["info", "--dispatch", "4096", "4096", "--arch", "80"]) == 0
    text = capsys.readouterr().out
    assert " few " in text
    assert text.endswith("QLORA_KERNELS_CUDA_KERNEL=tiles64 is set: that one runs, or the call fails.\n")
    assert os.environ["QLORA_KERNELS_CUDA_KERNEL"] == "tiles64"
    for arguments, words in (
        (["--dispatch", "0", "64"], "N and K should be from 1"),
        (["--dispatch", "64", "64", "--arch", "42"], "there are figures for 75, 80"),
        (["--arch", "90"], "--arch goes with --dispatch"),
    ):
        assert main(["info", *arguments]) == 2
        assert words in capsys.readouterr().err
