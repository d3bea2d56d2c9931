"""Progress bars."""

from __future__ import annotations

import sys

import pytest
from small.model_folder import TINY, damaged, model_fixture  # noqa: F401 - fixtures

from qlora_kernels.console import progress


def test_a_bar_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    assert list(progress.bar([1, 2, 3])) == [1, 2, 3]
    with pytest.raises(ImportError, match="tqdm"):
        progress.bar(total=3)
