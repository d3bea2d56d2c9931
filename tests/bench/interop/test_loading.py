"""bench/interop/loading.py at small sizes; the sentence in docs/ is the file's."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest

from bench.interop import loading
from qlora_kernels.storage.formats import load_json

ROOT = Path(__file__).resolve().parent.parent.parent.parent


def test_the_sentence_in_the_documents_is_the_newest_results():
    result = load_json(ROOT / "bench" / "results" / "loading-memory-cpu.json")
    assert result["complete"]
    assert result["modified"] is False
    page = " ".join((ROOT / "docs" / "transformers.md").read_text().split())
    assert " ".join(textwrap.dedent(loading.sentence(result)).split()) in page


@pytest.mark.slow
def test_a_small_checkpoint(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(ROOT)
    assert loading.main(["--out", str(tmp_path / "out.json"), "--layers", "2", "--width", "128"]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert set(result["ways"]) == set(loading.WAYS)
    assert all(way["model_bytes"] < result["dense_bytes"] for way in result["ways"].values())
    assert loading.sentence(result).startswith("A float32 checkpoint")
