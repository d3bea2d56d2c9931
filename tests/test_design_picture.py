"""The picture of the fused product: drawn by the script that stands beside it, and of what the code does."""

from __future__ import annotations

from pathlib import Path

import pytest

if not (Path(__file__).resolve().parent.parent / "bench" / "design_picture.py").is_file():
    pytest.skip("the bench comes with the source tree only", allow_module_level=True)

from bench import design_picture

ROOT = Path(__file__).resolve().parent.parent


def source(path: Path) -> str:
    pytest.importorskip("matplotlib")
    from PIL import Image

    with Image.open(path) as image:
        return image.info["Source"]


def test_the_committed_picture_is_of_this_script():
    assert source(design_picture.PATH) == design_picture.source_note(), "python -m bench.design_picture"
    assert design_picture.PATH.stat().st_size < 150_000
    assert f"]({design_picture.PATH.relative_to(ROOT)})" in (ROOT / "README.md").read_text()


def test_it_draws(tmp_path):
    pytest.importorskip("matplotlib")
    design_picture.draw(tmp_path / "design.png")
    assert source(tmp_path / "design.png") == design_picture.source_note()


def test_what_it_says_is_in_the_code():
    code = (ROOT / "csrc" / "cuda" / "gemm.cuh").read_text()
    table = (ROOT / "csrc" / "cuda" / "dispatch.h").read_text()
    for phrase in ("kTileColumns = 128;", "kTileDepth = 64;"):
        assert phrase in table, phrase
    for phrase in ("kUnits == kThreads / 2", "T weights[2]["):
        assert phrase in code, phrase
    assert f"Family::kTiles, 128, {design_picture.STAGES}, kAnyRows" in table
