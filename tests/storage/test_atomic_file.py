"""Files that appear whole or not at all, with the permissions of any new file."""

from __future__ import annotations

import os
import signal
import stat
import threading

import pytest
import torch
from safetensors.torch import save_file

from qlora_kernels.storage import atomic_file, formats
from qlora_kernels.storage.atomic_folder import write_folder_atomically


@pytest.fixture
def umask(request):
    """Sets the process's umask for a test."""
    earlier = os.umask(request.param)
    yield request.param
    os.umask(earlier)


def mode(path) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002], indirect=True)
def test_the_umask_decides_on_permissions_and_is_never_set(tmp_path, monkeypatch, umask):
    def write(folder):
        save_file({"a": torch.ones(1)}, os.path.join(folder, "file"))

    # A thread that makes a file between setting the umask and setting it back would make it with the wrong one.
    with monkeypatch.context() as patch:
        patch.setattr(os, "umask", lambda _: pytest.fail("the umask was set"))
        formats.save_json({"a": 1}, tmp_path / "new.json")
        formats.save_json({"a": 2}, tmp_path / "new.json")
        formats.save_safetensors({"a": torch.ones(1)}, tmp_path / "new.safetensors")
        write_folder_atomically(tmp_path / "folder", write)
    assert mode(tmp_path / "new.json") == mode(tmp_path / "new.safetensors") == 0o666 & ~umask
    assert mode(tmp_path / "folder") == 0o777 & ~umask
    assert mode(tmp_path / "folder" / "file") == 0o666 & ~umask
    assert sorted(os.listdir(tmp_path)) == ["folder", "new.json", "new.safetensors"]


def test_many_writers_of_one_file(tmp_path):
    """Each writes to a temporary file of its own; the final file is whole."""
    path, errors = tmp_path / "file.json", []

    def write(number):
        try:
            for _ in range(20):
                formats.save_json({"numbers": [number] * 500}, path)
                assert len(set(formats.load_json(path)["numbers"])) == 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(formats.load_json(path)["numbers"]) == 500
    assert os.listdir(tmp_path) == ["file.json"]


def test_an_exception_leaves_the_old_file_and_no_litter(tmp_path):
    formats.save_json({"a": 1}, tmp_path / "file")

    def write(temporary):
        with open(temporary, "w") as file:
            file.write("half")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        atomic_file.write_atomically(tmp_path / "file", write)
    assert formats.load_json(tmp_path / "file") == {"a": 1}
    assert os.listdir(tmp_path) == ["file"]


def test_what_a_killed_writer_left_goes_with_the_next_write_of_that_file(tmp_path, monkeypatch):
    def left_by_a_killed_writer(name):
        child = os.fork()
        if child == 0:
            atomic_file.write_atomically(tmp_path / name, lambda _: os.kill(os.getpid(), signal.SIGKILL))
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        [left] = set(tmp_path.iterdir()) - before
        return left

    before = set()
    first = left_by_a_killed_writer("a.json")
    before.add(first)
    other = left_by_a_killed_writer("b.json")  # of another name
    dead = first.name.split("-")[1]
    kept = [
        other,
        tmp_path / first.name.replace(f"-{dead}-", f"-{os.getpid()}-"),  # of a process that lives
        tmp_path / first.name.replace(f"-{dead}-", "-1-"),  # of a process that lives, perhaps another user's
        tmp_path / f".a.json.{'0' * 6}{first.name[14:]}",  # of another machine
        tmp_path / ".a.json.abcdefgh.part",
    ]
    for path in kept[1:]:
        path.write_text("")
    endless = tmp_path / first.name.replace(f"-{dead}-", f"-{'9' * 30}-")
    endless.write_text("")
    formats.save_json({"a": 1}, tmp_path / "a.json")
    assert set(tmp_path.iterdir()) == {tmp_path / "a.json", *kept}
