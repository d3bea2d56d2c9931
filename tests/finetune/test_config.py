"""Options from a YAML or TOML file."""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("yaml")

from qlora_kernels.errors import InputError
from qlora_kernels.finetune.arguments import add_arguments, from_arguments
from qlora_kernels.finetune.config import read_config_file
from qlora_kernels.finetune.options import Options


def settings(*arguments: str):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return from_arguments(parser.parse_args(arguments))


def written(tmp_path, text: str, name: str = "run.yaml") -> str:
    path = tmp_path / name
    path.write_text(text)
    return str(path)


YAML = """
model: some/folder
eval-tokens: 100   # a comment
seq_len: 64
lr: 2e-4
alpha: 8
rslora: yes
no-double-quant: true
target-modules: [q_proj, v_proj]
steps: 5.0
epochs: null
"""
TOML = """
model = "some/folder"
eval-tokens = 100
seq_len = 64
lr = 2e-4
alpha = 8
rslora = true
no-double-quant = true
target-modules = ["q_proj", "v_proj"]
steps = 5.0
"""


@pytest.mark.parametrize(("name", "text"), [("run.yaml", YAML), ("run.YML", YAML), ("run.toml", TOML)])
def test_a_file_says_what_flags_say(tmp_path, name, text):
    if name.endswith("toml") and sys.version_info < (3, 11):
        pytest.importorskip("tomli")
    flags = ["--model", "some/folder", "--eval-tokens", "100", "--seq-len", "64", "--lr", "2e-4", "--alpha", "8"]
    flags += ["--rslora", "--no-double-quant", "--target-modules", "q_proj,v_proj", "--steps", "5"]
    assert settings("--config", written(tmp_path, text, name)) == settings(*flags)


def test_the_command_line_counts_more(tmp_path):
    path = written(tmp_path, "rank: 4\nseed: 1\ncompare: true\n")
    chosen = settings("--rank", "8", "--config", path, "--no-compare")
    assert (chosen.rank, chosen.seed, chosen.compare) == (8, 1, False)
    assert settings("--config", path, "--seed", "0").seed == 0  # given, though it is the default


def test_without_a_file_the_defaults_stay():
    assert settings() == Options().resolve()


def test_an_empty_file_changes_nothing(tmp_path):
    assert read_config_file(written(tmp_path, "# nothing\n")) == {}
    assert read_config_file(written(tmp_path, "", "a.toml")) == {}


BAD = [
    ("run.yaml", "rnak: 4", r"'rnak' is not an option of finetune; did you mean rank\?"),
    ("run.yaml", "config: other.yaml", "'config' is not an option"),
    ("run.yaml", "5: 4", "5 is not an option"),
    ("run.yaml", "rank: four", "rank should be a whole number, found 'four'"),
    ("run.yaml", "rank: 4.5", "rank should be a whole number, found 4.5"),
    ("run.yaml", "rank: true", "rank should be a whole number, found True"),
    ("run.yaml", "rank: .inf", "rank should be a whole number, found inf"),
    ("run.yaml", "lr: fast", "lr should be a number, found 'fast'"),
    ("run.yaml", "lr: [1]", "lr should be a number"),
    ("run.yaml", f"lr: {'9' * 400}", "lr should be a number"),
    ("run.yaml", f"lr: {'9' * 9000}", "is not YAML"),
    ("run.yaml", "compare: 1", "compare should be true or false, found 1"),
    ("run.yaml", "no-compare: 1", "no-compare should be true or false, found 1"),
    ("run.yaml", "out: 2024-01-02", r"out should be text \(in quotes\), found datetime.date"),
    ("run.yaml", "model: [a, b]", "model should be text, found"),
    ("run.yaml", "target-modules: [1]", "target-modules should be text or a list of texts"),
    ("run.yaml", "eval-tokens: 4\neval_tokens: 4", "eval_tokens is given twice"),
    ("run.yaml", "rank: 4\nrank: 8", "rank is given twice"),
    ("run.yaml", "compare: true\nno-compare: true", "no-compare is given twice"),
    ("run.yaml", "- rank", "should hold options and their values"),
    ("run.yaml", "rank: [", "run.yaml is not YAML .line 1"),
    ("run.yaml", "rank: !!python/object/apply:os.getcwd []", "is not YAML .*could not determine a constructor"),
    ("run.yaml", "a: &a [x, x]\nb: [*a, *a]", "is not YAML .an alias"),
    ("run.yaml", "[" * 5000, "is not YAML .nested too deeply"),
    ("run.yaml", "out: 2024-13-45", "is not YAML"),
    ("run.yaml", "{[a]: 1}", "is not YAML"),
    ("run.yaml", "rank: 4" + " " * (1 << 20), "has more than 1 MiB"),
    ("run.yaml", "rank: 0", "--config .*run.yaml: --rank should be at least 1, found 0"),
    ("run.yaml", "optim: sgd", "--config .*run.yaml: --optim should be one of"),
    ("run.toml", "rank = ", "run.toml is not TOML"),
    ("run.toml", "rank = 1\nrank = 2", "run.toml is not TOML"),
    ("run.toml", "[training]\nrank = 2", "'training' is not an option of finetune"),
    ("run.json", "{}", "should end in .yaml, .yml or .toml"),
]


@pytest.mark.parametrize(("name", "text", "words"), BAD, ids=[f"{row[0]} {row[1][:30]}" for row in BAD])
def test_files_that_cannot_be_used(tmp_path, name, text, words):
    with pytest.raises(InputError, match=words) as caught:
        settings("--config", written(tmp_path, text, name))
    assert name in str(caught.value)


@pytest.mark.slow
def test_a_file_of_many_names_is_refused_at_once(tmp_path):
    path = written(tmp_path, "".join(f"k{i}: 1\n" for i in range(20_000)))
    import yaml

    parsing = time.process_time()
    yaml.safe_load(Path(path).read_text())
    parsing = time.process_time() - parsing
    began = time.process_time()
    with pytest.raises(InputError, match="'k0' is not an option"):
        read_config_file(path)
    assert time.process_time() - began < 3 * parsing


def test_an_error_of_the_command_line_does_not_blame_the_file(tmp_path):
    with pytest.raises(InputError, match=r"^--rank should be at least 1, found 0"):
        settings("--config", written(tmp_path, "rank: 4\n"), "--rank", "0")


def test_files_that_are_none(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_config_file(str(tmp_path / "nowhere.yaml"))
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(InputError, match="is not a regular file"):
        read_config_file(str(tmp_path / "folder.yaml"))
    (tmp_path / "bytes.yaml").write_bytes(b"model: \xff")
    with pytest.raises(InputError, match="is not in UTF-8"):
        read_config_file(str(tmp_path / "bytes.yaml"))


@pytest.mark.parametrize(("package", "name"), [("yaml", "a.yaml"), ("tomllib", "a.toml")])
def test_a_missing_parser_is_named(tmp_path, monkeypatch, package, name):
    for module in (package, "tomli"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match="pip install"):
        read_config_file(written(tmp_path, "rank = 1", name))


def test_the_file_in_the_documents(tmp_path):
    page = Path(__file__).parents[2] / "docs" / "fine-tuning.md"
    if not page.is_file():
        pytest.skip("the documents come with the source tree only")
    [block] = re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)
    chosen = settings("--config", written(tmp_path, block))
    assert (chosen.rank, chosen.lr, chosen.target_modules) == (32, 1e-4, "q_proj,v_proj")
