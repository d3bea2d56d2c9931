"""The picture of the fused product: drawn by the script that stands beside it, and of what the code does."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.readme import design_picture

ROOT = Path(__file__).resolve().parent.parent.parent.parent

KERNEL = sorted((ROOT / "csrc" / "cuda" / "linear" / "mma").glob("tiles*.cuh"))
TABLE = ROOT / "csrc" / "cuda" / "common" / "dispatch.h"


def source(path: Path) -> str:
    pytest.importorskip("matplotlib")
    from PIL import Image

    with Image.open(path) as image:
        return image.info["Source"]


def test_the_committed_picture_is_of_this_script():
    assert source(design_picture.PATH) == design_picture.source_note(), "python -m bench.readme.design_picture"
    assert design_picture.PATH.stat().st_size < 150_000
    page = ROOT / "docs" / "design" / "fused-kernel.md"
    assert f"](../../{design_picture.PATH.relative_to(ROOT)})" in page.read_text()


def test_it_draws(tmp_path):
    pytest.importorskip("matplotlib")
    design_picture.draw(tmp_path / "design.png")
    assert source(tmp_path / "design.png") == design_picture.source_note()


def test_what_it_says_is_in_the_code():
    code, table = "".join(path.read_text() for path in KERNEL), TABLE.read_text()
    drawn = Path(design_picture.__file__).read_text()
    # The kernel with 128 columns: with 256 a thread decodes whole blocks.
    assert f'{{"tiles128", Family::kTiles, 128, 128, {design_picture.STAGES}, ' in table
    assert "kTileDepth = 64;" in table
    for phrase in (
        "kThreads = 256;",
        "kWords = kUnits * 8 / kThreads;",
        "kUnits = kColumns * kDepth / kBlock;",
        "fetch_constant(first_step + step + 2, step + 2 < steps)",
        "for (int turn = 0; turn < kTurns - 1; ++turn)",
        "__syncthreads();\n        multiply_turn(f, kTurns - 1, next_stage, (step + 1) % 2);",
        "T weights[2][",
        "ahead = step + Traits::kStages - 1;",
    ):
        assert phrase in code, phrase
    # 256 threads for 128 blocks of weights: half of one each.
    assert 256 // (128 * 64 // 64) == 2
    for phrase in (
        "128 blocks of 64",
        "128 x 64",
        "rows x 64",
        "half a\\nblock a thread",
        "two steps ahead",
        "16 at a time",
    ):
        assert phrase in drawn, phrase
