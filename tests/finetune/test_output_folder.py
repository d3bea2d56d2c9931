"""The output folder of a run: one run at a time, full disks, and what killed writers left."""

from __future__ import annotations

import os
import resource
import signal

import pytest

pytest.importorskip("transformers")

from small.runs import cache_fixture, losses, run_fixture  # noqa: F401 - fixtures

from qlora_kernels.finetune.train import Trainer
from qlora_kernels.storage import leftovers
from qlora_kernels.storage.lock import claimed


def test_a_full_disk_is_one_sentence_and_resume_goes_on(run, tmp_path, monkeypatch, capsys):
    assert run(out="whole") == 0
    original, limits = Trainer._step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def stepped(self, phase, optimizer, parameters, step, total):
        if step == 5:  # the checkpoint of step 4 is whole, that of step 6 finds no room
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
        return original(self, phase, optimizer, parameters, step, total)

    path = tmp_path / "out" / "checkpoint.pt"
    capsys.readouterr()
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_step", stepped)
            assert run() == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capsys.readouterr().err == (
        f"qlora-kernels finetune: {path}: File too large; --resume goes on from {path}\n"
    )
    assert os.listdir(tmp_path / "out") == ["checkpoint.pt"]
    assert run("--resume") == 0
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")


@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_a_second_run_is_told_who_has_the_folder(run, tmp_path, monkeypatch, capsys, more):
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(Trainer, "run", lambda *_: pytest.fail("training has begun"))
    with claimed(str(out / ".running"), "it"):
        (out / ".checkpoint.pt.abcdefgh.part").write_text("of the first run")
        before = sorted(os.listdir(out))
        assert run(*more) == 2
        assert sorted(os.listdir(out)) == before
    error = capsys.readouterr().err
    assert f"the output folder {out} is being written by process {os.getpid()} on " in error
    assert error.count("\n") == 1


def test_a_run_has_the_folder_from_beginning_to_end(run, tmp_path, monkeypatch):
    seen, original = [], Trainer._step

    def stepped(self, *more):
        seen.append(os.path.exists(tmp_path / "out" / ".running"))
        return original(self, *more)

    monkeypatch.setattr(Trainer, "_step", stepped)
    assert run() == 0
    assert seen
    assert all(seen)
    assert not (tmp_path / "out" / ".running").exists()


def test_folders_and_links_named_like_temporary_files(run, tmp_path):
    """A user's stay, and stop nothing; one of a killed writer goes."""
    out = tmp_path / "out"
    out.mkdir()
    mine = [".metrics.json.mine.part", ".loss.png.abcdefgh.part"]
    for name in mine:
        (out / name).mkdir()
        (out / name / "file").write_text("mine")
    dead = f"{leftovers.here()}-{'9' * 10}"
    (out / f".metrics.json.{dead}-00000000.part").mkdir()
    (out / f".metrics.json.{dead}-11111111.part").symlink_to(out / mine[0])
    assert run() == 0
    assert sorted(name for name in os.listdir(out) if name.startswith(".")) == sorted(mine)
    assert (out / mine[0] / "file").read_text() == "mine"
