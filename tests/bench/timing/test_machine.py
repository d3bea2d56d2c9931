"""What a result says about where it was measured."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from qlora_kernels.bench.timing import machine


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_asking_for_the_commit_does_not_write_to_the_repository(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-C", tmp_path, *arguments], check=True, capture_output=True)

    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "CMakeLists.txt").write_text("")
    git("init")
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "a")
    os.utime(tmp_path / "csrc" / "CMakeLists.txt", (1e9, 1e9))  # git would note that in its index
    index = (tmp_path / ".git" / "index").read_bytes()
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.describe_commit()["modified"] is False
    assert (tmp_path / ".git" / "index").read_bytes() == index
