"""README: its examples run, one after the other, and its first commands stand where they should."""

from __future__ import annotations

import json
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


def test_the_measured_run_is_that_of_the_file():
    pytest.importorskip("transformers")
    from qlora_kernels.finetune import report

    text = README.read_text()
    section = text.split("\n## A run, measured\n")[1].split("\n## ")[0]
    found = json.loads((README.parent / "bench" / "results" / "finetune-compare-cpu.json").read_text())
    header, *rows = ("| " + " | ".join(cells) + " |" for cells in report.cells(found["results"], found["size"]))
    assert len(rows) == 5
    assert [line for line in section.splitlines() if line.startswith("| ")] == [header, *rows]
    assert report.recovery(found["results"]) == found["recovery"] >= 0.95
    [sentence] = [line for line in report.conclusions(found["results"], None, "") if "recovers" in line]
    results, options, machine = found["results"], found["options"], found["machine"]
    flat = " ".join(section.split())
    for phrase in (
        sentence,
        f"on {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, ",
        f"kernels for {machine['kernels']}, torch {found['versions']['torch']} ",
        f"{results['qlora']['steps']} steps of {options['batch_size']} sequences, rank {options['rank']}.",
        f"Python and its libraries are {found['library_memory'] / 2**20:.0f} MiB",
        f"{results['full']['trainable'] / 1e6:.1f} million parameters",
    ):
        assert phrase in flat, phrase
    assert len({result["steps"] for result in results.values() if "steps" in result}) == 1


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text()))))
def test_links_lead_somewhere(target):
    assert (README.parent / target).exists()


@pytest.mark.parametrize("name", ["csrc", "qlora_kernels", "tests", "bench"])
def test_named_files_exist(name):
    for path in re.findall(rf"`({name}/[\w./]+)`", README.read_text()):
        assert "foo" in path or (README.parent / path).exists(), path
