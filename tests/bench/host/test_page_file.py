"""bench/host/page_file.py at small sizes, under a cgroup that limits nothing; the sentence in docs/ is the file's."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path

import pytest

from bench.host import page_file

ROOT = Path(__file__).resolve().parent.parent.parent.parent

SMALL = ["--layers", "3", "--width", "128", "--steps", "3", "--limit", "1.5"]


@pytest.fixture(name="group")
def group_fixture(tmp_path, monkeypatch):
    """A folder in the place of a cgroup."""
    folder = tmp_path / "group"
    folder.mkdir()
    (folder / "memory.max_usage_in_bytes").write_text("12345\n")

    @contextlib.contextmanager
    def pretended(limit):
        (folder / "limit").write_text(str(limit))
        yield folder

    monkeypatch.setattr(page_file, "memory_cgroup", pretended)
    monkeypatch.chdir(ROOT)
    return folder


@pytest.fixture
def _without_processes(monkeypatch):
    """Without a limit, trainings run here: a process for each takes seconds to import torch."""
    in_a_process = page_file.in_a_process

    def run(arguments, limit=None):
        return json.loads(json.dumps(page_file.train(**arguments))) if limit is None else in_a_process(arguments, limit)

    monkeypatch.setattr(page_file, "in_a_process", run)


@pytest.mark.slow
@pytest.mark.usefixtures("_without_processes")
def test_the_same_steps_in_memory_and_in_a_file(group, tmp_path, capsys):
    (tmp_path / "states").mkdir()
    where = ["--folder", str(tmp_path / "states"), "--out", str(tmp_path / "out.json")]
    assert page_file.main([*SMALL, *where]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert int((group / "limit").read_text()) == 1.5 * 2**30
    assert int((group / "cgroup.procs").read_text()) > 1, "the process that trains has joined"
    memory, file, limited = (result["cases"][name] for name in ("in memory", "in a file", "in a file, memory limited"))
    assert [case["where"] for case in (memory, file, limited)] == ["host memory", *2 * ["a memory-mapped file"]]
    assert result["same"]
    assert result["complete"]
    assert (limited["limit_bytes"], limited["peak_cgroup_bytes"]) == (1.5 * 2**30, 12345)
    losses = [[step["loss"] for step in case["steps"]] for case in (memory, file, limited)]
    assert losses == 3 * losses[:1]
    assert losses[0][2] < losses[0][0]
    assert memory["parameters"] == 3 * 128 * 128
    assert memory["states_bytes"] > 12 * 3 * 128 * 128
    assert file["written_bytes"] >= 12 * 3 * 128 * 128 > 0
    assert str(tmp_path) not in json.dumps(result)
    assert page_file.sentence(result) in capsys.readouterr().out

    other = copy.deepcopy(result)
    other["cases"]["in a file"]["sha256"] = "0"

    def run(*arguments):
        return {**other, "same": len({case["sha256"] for case in other["cases"].values()}) == 1}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_file, "run", run)
        assert page_file.main([*SMALL, *where]) == 1
    assert "DO NOT MATCH" in capsys.readouterr().out


@pytest.mark.slow
def test_a_training_that_is_killed_is_no_result(group):
    arguments = {"layers": 1, "width": 64, "steps": 1, "page_file": "/nowhere/at/all"}
    with pytest.raises(RuntimeError, match="the training ended with 1"):
        page_file.in_a_process(arguments, limit=1)
    assert group.is_dir()


def test_the_page_says_what_was_measured():
    result = json.loads((ROOT / "bench" / "results" / "page-file-cpu.json").read_text())
    limited = result["cases"]["in a file, memory limited"]
    assert result["complete"]
    assert result["same"]
    assert result["modified"] is False, "a result that is quoted is of a commit"
    assert limited["states_bytes"] > 1.5 * limited["limit_bytes"]
    assert limited["peak_cgroup_bytes"] <= limited["limit_bytes"]
    losses = [step["loss"] for step in limited["steps"]]
    assert losses == sorted(losses, reverse=True)
    text = " ".join((ROOT / "docs" / "paged-optimizers.md").read_text().split())
    assert page_file.sentence(result) in text
    assert "(../bench/results/page-file-cpu.json)" in text
