"""The tools that check the sources: one version of each, wherever it is named; and words spelled right."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
if not (ROOT / ".pre-commit-config.yaml").is_file():
    pytest.skip("the settings come with the source tree only", allow_module_level=True)

PROJECT = (ROOT / "pyproject.toml").read_text()


def test_pre_commit_has_the_versions_of_the_extra():
    [dev] = re.findall(r"^dev = \[(.*)\]$", PROJECT, re.MULTILINE)
    pinned = set(re.findall(r'"([\w\[\]-]+==[^"]+)"', dev))
    used = set(re.findall(r'additional_dependencies: \["([^"]+)"\]', (ROOT / ".pre-commit-config.yaml").read_text()))
    assert {name.partition("==")[0] for name in used} == {"ruff", "clang-format", "codespell[toml]"}
    assert used <= pinned


def test_pre_commit_takes_tools_from_no_repository():
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"- repo: (\S+)", text) == ["local"]


def test_types_are_published():
    """Type checkers ignore the annotations of a package without py.typed."""
    assert (ROOT / "qlora_kernels" / "py.typed").read_bytes() == b""
    assert 'package-data = { qlora_kernels = ["py.typed"] }' in PROJECT


def test_words_are_spelled_right():
    pytest.importorskip("codespell_lib")
    done = subprocess.run([sys.executable, "-m", "codespell_lib"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
