"""bench/compiled/wheel.py: what it builds, and what it says of it; the wheels themselves stand in."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bench.compiled import static, wheel
from bench.readme import tables

NAME = "qlora_kernels-0.1.0+cu130.sm75.sm80-cp311-cp311-linux_x86_64.whl"


def row(arch: str, kernel: str, **changes: int) -> dict:
    common = {"instructions": 500, "code_bytes": 8192, "registers": 40, "local_accesses": 0}
    return {"arch": arch, "kernel": kernel, **common, **changes}


ROWS = [
    row("sm_80", "a"),
    row("sm_80", "b", registers=90, local_accesses=2, code_bytes=1024),
    row("sm_75", "a"),
    row("sm_75", "b", instructions=2, code_bytes=128, registers=4),
]


def test_kernels_without_code_are_told_apart():
    assert static.by_architecture(ROWS) == [
        {"arch": "sm_75", "kernels": 1, "left_out": 1, "code_bytes": 8320, "registers": 40, "local_accesses": 0},
        {"arch": "sm_80", "kernels": 2, "left_out": 0, "code_bytes": 9216, "registers": 90, "local_accesses": 2},
    ]


@pytest.fixture
def commit(monkeypatch):
    """A commit as it is, and a table in place of what nvcc's tools find."""
    commit = {"commit": "0123456789abcdef", "modified": False}
    monkeypatch.setattr(wheel, "describe_commit", lambda: commit)
    report = {"nvcc": "13.0.88", "extension_bytes": 3 * 2**20, "kernels": ROWS}
    monkeypatch.setattr(static, "report", lambda module: report)
    return commit


def test_the_commit_is_built_and_described(commit, monkeypatch, tmp_path, capsys):
    commands = []

    def run(command, **options):
        commands.append((command, options))
        if command[0] == "git":
            return real(command, **options)
        assert (options["cwd"] / "csrc" / "CMakeLists.txt").is_file()
        with zipfile.ZipFile(Path(command[command.index("-w") + 1], NAME), "w") as made:
            made.writestr("qlora_kernels/_C.cpython-311-x86_64-linux-gnu.so", bytes(2**20))
        return subprocess.CompletedProcess(command, 0, "", "")

    real = subprocess.run
    with monkeypatch.context() as patched:
        patched.setattr(wheel.subprocess, "run", run)
        # What describes the machine asks for nothing by a command here.
        patched.setattr(wheel, "describe_machine", lambda: {"cpu": "some", "virtual": True, "usable_cores": 2})
        assert wheel.main(["--archs", "75;80", "--out", str(tmp_path / "wheel.json")]) == 0
    git, pip = commands
    assert git[0][:2] == ["git", "archive"]
    assert pip[0][:4] == [sys.executable, "-m", "pip", "wheel"]
    assert pip[1]["env"]["QLORA_KERNELS_CUDA_ARCHS"] == "75;80"
    assert pip[1]["env"]["CCACHE_DISABLE"] == "1"
    result = json.loads((tmp_path / "wheel.json").read_text())
    assert (result["wheel"], result["modified"], result["complete"]) == (NAME, False, True)
    assert result["archs"] == static.by_architecture(ROWS)
    assert result["build_seconds"] >= 0
    table = capsys.readouterr().out
    assert table.strip() == tables.wheel_table(result, "wheel.json")
    assert table.startswith(
        f"`{NAME}`: 1.0 MiB, 3.0 unpacked, built in 0 s of processor time, all cores together, on some (v"
    )
    assert table.splitlines()[-2:] == ["| sm_75 | 1 | 1 | 8 | 40 | 0 |", "| sm_80 | 2 | 0 | 9 | 90 | 2 |"]


@pytest.mark.parametrize("modified", [True, None])
def test_what_is_no_commit_is_refused(commit, modified, tmp_path, capsys):
    commit["modified"] = modified
    with pytest.raises(SystemExit):
        wheel.main(["--out", str(tmp_path / "wheel.json")])
    assert "a commit's" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_build_that_fails_says_why(commit, monkeypatch, tmp_path):
    real = subprocess.run
    failed = subprocess.CompletedProcess([], 1, "", "nvcc fatal")
    monkeypatch.setattr(
        wheel.subprocess, "run", lambda command, **o: real(command, **o) if command[0] == "git" else failed
    )
    with pytest.raises(RuntimeError, match=r"does not build:\n\nnvcc fatal"):
        wheel.built(tmp_path, "80")
