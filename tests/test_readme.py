"""README: its examples run, one after the other, and its first commands stand where they should."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"


def test_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = README.read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    assert len(blocks) >= 6
    names: dict = {}
    for block in blocks:
        first_line = text[: block.start(1)].count("\n")
        # Line numbers in a traceback are README's.
        exec(compile("\n" * first_line + block.group(1), str(README), "exec"), names)
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert "quantized to NF4" in capsys.readouterr().out


def test_first_example_has_ten_lines_or_so():
    block = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL).group(1)
    statements = [line for line in block.splitlines() if line and not line.startswith(("import ", "from "))]
    assert len(statements) <= 10


def test_commands_stand_at_the_top():
    head = README.read_text().split("\n## ")[0]
    commands = [line.strip() for line in head.splitlines() if line.startswith("    ")]
    assert commands == [
        "pip install -e '.[finetune]' && qlora-kernels finetune",
        "pip install -e '.[test]' && pytest",
    ]


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text()))))
def test_links_lead_somewhere(target):
    assert (README.parent / target).exists()


@pytest.mark.parametrize("name", ["csrc", "qlora_kernels", "tests", "bench"])
def test_named_files_exist(name):
    for path in re.findall(rf"`({name}/[\w./]+)`", README.read_text()):
        assert "foo" in path or (README.parent / path).exists(), path
