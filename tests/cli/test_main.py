"""The command line as a whole: help, version, and environment variables that cannot be honoured."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from small.model_folder import TINY, model_fixture  # noqa: F401 - fixtures

from qlora_kernels import __version__
from qlora_kernels.cli.main import main


def test_help_and_info_are_quick():
    """None of them loads transformers or matplotlib, which take seconds."""
    script = """
import contextlib, sys
from qlora_kernels.cli.main import main

for arguments in (["--help"], ["info"], ["finetune", "--help"]):
    print("printed by", *arguments)
    with contextlib.suppress(SystemExit):
        main(arguments)
    print([name for name in ("transformers", "matplotlib") if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.split() == ["[]"] * 3
    printed = done.stdout.split("printed by ")[1:]
    for text, words in zip(printed, ("usage: qlora-kernels [-h]", "compiler", "--target-modules"), strict=True):
        assert words in text


def test_module_and_version():
    done = subprocess.run([sys.executable, "-m", "qlora_kernels", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, f"qlora-kernels {__version__}")


@pytest.mark.parametrize(
    "arguments", [["info"], ["info", "--json"], ["quantize", "{m}", "{t}/out"], ["finetune", *TINY, "--out", "{t}/out"]]
)
def test_an_instruction_set_that_is_not_there(tmp_path, model, capsys, monkeypatch, arguments):
    monkeypatch.setenv("QLORA_KERNELS_CPU_ISA", "nonsense")
    command = [argument.format(t=tmp_path, m=model) for argument in arguments]
    assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(
        f"qlora-kernels {command[0]}: QLORA_KERNELS_CPU_ISA=nonsense is not available here; built in: "
    )
    assert captured.err.count("\n") == 1
    assert "portable" in captured.err
    assert ".cpp" not in captured.err
    assert captured.out == ""
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("command", [["info"], ["info", "--dispatch", "64", "64"], ["finetune", *TINY]])
def test_a_kernel_that_is_not_there(tmp_path, capsys, monkeypatch, command):
    monkeypatch.setenv("QLORA_KERNELS_CUDA_KERNEL", "nonsense")
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    captured = capsys.readouterr()
    words = (
        f"qlora-kernels {command[0]}: QLORA_KERNELS_CUDA_KERNEL=nonsense names no kernel; there are few, warpgroup16"
    )
    assert captured.err.startswith(words)
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert os.listdir(tmp_path) == []


def test_unknown_flags_are_argparse_errors():
    with pytest.raises(SystemExit) as caught:
        main(["finetune", "--no-such-flag"])
    assert caught.value.code == 2
