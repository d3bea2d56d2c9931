"""The source distribution: everything that building needs is inside, and it installs and runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
if not (ROOT / "MANIFEST.in").is_file():
    pytest.skip("sources come with the source tree only", allow_module_level=True)

SOURCES = (".h", ".cpp", ".cuh", ".cu", ".txt")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Made from a copy, so that the tree's own metadata stays as it is."""
    copy, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("out")
    for folder in ("csrc", "qlora_kernels"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, copy)
    make = f"from setuptools import build_meta; print(build_meta.build_sdist({str(out)!r}))"
    run(sys.executable, "-c", make, cwd=copy)
    [archive] = out.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return folder / sdist.name.removesuffix(".tar.gz")


def test_every_source_is_inside(unpacked):
    wanted = {path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*") if path.suffix in SOURCES}
    wanted |= {path.relative_to(ROOT) for path in (ROOT / "qlora_kernels").rglob("*.py")}
    wanted |= {Path(name) for name in ("qlora_kernels/py.typed", "setup.py", "setup_cuda.py", "pyproject.toml")}
    wanted |= {Path(name) for name in ("README.md", "CHANGELOG.md", "LICENSE")}
    assert len(wanted) > 100
    missing = sorted(str(path) for path in wanted if not (unpacked / path).is_file())
    assert not missing


def test_what_an_index_shows(unpacked):
    text = (unpacked / "PKG-INFO").read_text()
    shown = ("Name: qlora_kernels", "License-Expression: Apache-2.0", "Classifier: Typing :: Typed", "Keywords: QLoRA")
    for line in (*shown, "Description-Content-Type: text/markdown"):
        assert f"\n{line}" in text, line


@pytest.mark.slow
def test_it_builds_installs_and_runs(sdist, tmp_path):
    """Without isolation: pip would fetch what this environment has already."""
    pytest.importorskip("pybind11")
    site = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", site)
    run(*pip, sdist, cwd=tmp_path, QLORA_KERNELS_CUDA_ARCHS="none")
    assert (site / "qlora_kernels" / "py.typed").is_file()
    program = (
        "import torch, qlora_kernels as q\n"
        "w = q.quantize(torch.randn(64, 64))\n"
        "print(q.__file__, q.linear(torch.randn(2, 64), w).shape)\n"
    )
    said = run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(site))
    assert said.startswith(str(site))
    assert "[2, 64]" in said
    info = json.loads(run(sys.executable, "-m", "qlora_kernels", "info", "--json", cwd=tmp_path, PYTHONPATH=str(site)))
    assert info["native"] is True
    assert info["cuda_archs"] == []
