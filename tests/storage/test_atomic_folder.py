"""Folders that appear whole or not at all."""

from __future__ import annotations

import fcntl
import os
import threading

import pytest

from qlora_kernels.storage import atomic_folder, formats, leftovers
from qlora_kernels.storage.atomic_folder import write_folder_atomically


def test_the_first_of_two_writers_of_a_folder_wins(tmp_path):
    def slow(folder):
        write_folder_atomically(tmp_path / "folder", lambda inner: formats.save_json({"by": "first"}, f"{inner}/who"))
        formats.save_json({"by": "second"}, f"{folder}/who")

    with pytest.raises(FileExistsError, match="folder"):
        write_folder_atomically(tmp_path / "folder", slow)
    assert formats.load_json(tmp_path / "folder" / "who") == {"by": "first"}
    assert os.listdir(tmp_path) == ["folder"]


def test_a_folder_that_a_sweeper_looked_at_when_it_was_new_is_not_swept_later(tmp_path, monkeypatch):
    original, releases = leftovers.make_beside, []

    def make_beside(path, make):
        made = original(path, make)
        lock = os.open(made, os.O_RDONLY)  # the sweeper is just there
        fcntl.flock(lock, fcntl.LOCK_EX)
        releases.append(threading.Timer(0.2, os.close, [lock]))
        releases[-1].start()
        return made

    def write(folder):
        with open(f"{folder}/file", "w"):
            pass
        releases[-1].join()
        for old in (f"{folder}/file", folder):
            os.utime(old, (0, 0))
        atomic_folder.sweep_folders(str(tmp_path), "folder")
        assert os.listdir(folder) == ["file"]

    monkeypatch.setattr(leftovers, "make_beside", make_beside)
    write_folder_atomically(tmp_path / "folder", write)
    assert len(releases) == 1
    assert os.listdir(tmp_path / "folder") == ["file"]
