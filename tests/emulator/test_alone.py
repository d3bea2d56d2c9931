"""The emulator without this package: README.md's one line compiles example.cu, which runs and finds its fault."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> Path:
    """The program, built from copies: the package contributes only headers."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    [line] = re.findall(r"^    (g\+\+ .*)$", (ROOT / "tests/emulator/README.md").read_text(), re.MULTILINE)
    folder = tmp_path_factory.mktemp("alone")
    (folder / "csrc").mkdir()
    for header in (ROOT / "csrc").glob("*.h"):
        shutil.copy(header, folder / "csrc")
    shutil.copytree(ROOT / "tests/emulator", folder / "tests/emulator")
    subprocess.run(["bash", "-c", line], cwd=folder, check=True)
    return folder / "a.out"


@pytest.mark.slow
def test_the_example_runs(example):
    done = subprocess.run([example], capture_output=True, text=True, check=True)
    reversed_, counted = done.stdout.splitlines()
    assert reversed_ == "63 62 ... 65 64"
    assert '"launches": 1' in counted
    assert '"barrier": 128' in counted


@pytest.mark.slow
def test_the_examples_fault_is_found_with_its_line(example):
    done = subprocess.run([example, "faulty"], capture_output=True, text=True)
    assert done.returncode == 1
    line = next(
        n
        for n, text in enumerate((ROOT / "tests/emulator/example.cu").read_text().splitlines(), 1)
        if "load_shared" in text
    )
    assert re.search(r"example\.cu:\d+: thread .* a race: .*example\.cu:\d+", done.stdout)
    assert f"example.cu:{line}" in done.stdout
