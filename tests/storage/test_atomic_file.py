"""Files that appear whole or not at all, with the permissions of any new file."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import stat
import threading

import pytest
import torch
from safetensors.torch import save_file

from qlora_kernels.storage import atomic_file, formats, leftovers
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
    elsewhere = f".a.json.{'0' * 6}{first.name[14:]}"
    kept = [
        other,
        tmp_path / first.name.replace(f"-{dead}-", f"-{os.getpid()}-"),  # of a process that lives
        tmp_path / first.name.replace(f"-{dead}-", "-1-"),  # of a process that lives, perhaps another user's
        tmp_path / elsewhere,  # of another machine, perhaps not yet locked
        tmp_path / ".a.json.abcdefgh.part",
        tmp_path / ".a.json.folder.part",  # a user's
    ]
    for path in kept[1:]:
        path.mkdir()
    gone = [
        tmp_path / first.name.replace(f"-{dead}-", f"-{'9' * 30}-"),
        tmp_path / elsewhere.replace("-", "-2", 1),  # of another machine or before the last boot, an hour ago
        tmp_path / f"{first.name.rpartition('-')[0]}-00000000.part",
    ]
    gone[0].mkdir()
    gone[1].mkdir()
    os.utime(gone[1], (0, 0))
    gone[2].write_text("a file, as earlier versions left them")
    assert gone[2].name != first.name
    formats.save_json({"a": 1}, tmp_path / "a.json")
    assert set(tmp_path.iterdir()) == {tmp_path / "a.json", *kept}


def test_a_living_writer_elsewhere_keeps_its_folder_however_old(tmp_path, monkeypatch):
    """Only the lock tells of a writer whose name this machine cannot look up."""

    def write(temporary):
        os.utime(os.path.dirname(temporary), (0, 0))
        with monkeypatch.context() as patch:
            patch.setattr(leftovers, "here", lambda: "0" * 6)
            leftovers.sweep_of(str(tmp_path / "a.json"))
        assert os.path.isdir(os.path.dirname(temporary))
        with open(temporary, "w") as file:
            file.write("{}")

    atomic_file.write_atomically(tmp_path / "a.json", write)
    assert os.listdir(tmp_path) == ["a.json"]


def write_half_and_die(path: str) -> None:
    """As safetensors does: a file of its own beside the temporary one."""

    def write(temporary):
        for name in (temporary, os.path.join(os.path.dirname(temporary), ".tmpAbCdEf")):
            with open(name, "w") as file:
                file.write("half")
        os.kill(os.getpid(), signal.SIGKILL)

    atomic_file.write_atomically(path, write)


def test_a_library_s_own_temporary_files_go_too(tmp_path):
    child = os.fork()
    if child == 0:
        write_half_and_die(str(tmp_path / "a.json"))
    os.waitpid(child, 0)
    assert len(os.listdir(tmp_path)) == 1
    formats.save_json({"a": 1}, tmp_path / "a.json")
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    ("raised", "number"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC),
        (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), errno.ENOSPC),
        (Exception("Input/output error (os error 5)"), errno.EIO),
    ],
)
def test_a_failed_write_names_the_file_and_the_system_s_reason(tmp_path, raised, number):
    def write(temporary):
        raise raised

    for writer, name in ((atomic_file.write_atomically, "file"), (write_folder_atomically, "folder")):
        with pytest.raises(OSError) as caught:
            writer(tmp_path / name, write)
        assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path / name))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("write", [formats.save_torch, formats.save_safetensors])
def test_a_disk_too_small_is_an_oserror(tmp_path, write):
    write({"a": torch.zeros(10)}, tmp_path / "file")
    before = (tmp_path / "file").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError) as caught:
            write({"a": torch.zeros(100_000)}, tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "file"))
    assert (tmp_path / "file").read_bytes() == before
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    "said",
    [
        "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534",
        "PytorchStreamWriter failed writing file data/2: file write failed",
        "basic_ios::clear: iostream error",  # when the very last bytes find no room
    ],
)
def test_a_failed_write_of_torch_is_an_oserror(tmp_path, monkeypatch, said):
    def save(value, path):
        raise RuntimeError(said)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match=rf"file cannot be written \({re.escape(said)}"):
        formats.save_torch({}, tmp_path / "file")
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(RuntimeError("another matter")))
    with pytest.raises(RuntimeError, match="another matter"):
        formats.save_torch({}, tmp_path / "file")
    assert os.listdir(tmp_path) == []


def test_odd_paths(tmp_path):
    longest = "n" * 255
    formats.save_json({"a": 1}, tmp_path / longest)
    assert formats.load_json(tmp_path / longest) == {"a": 1}
    (tmp_path / "folder").mkdir()
    for path in (
        tmp_path / f"{longest}n",
        tmp_path / "folder",
        tmp_path / "missing" / "file",
        tmp_path / longest / "x",
    ):
        with pytest.raises(OSError) as caught:
            formats.save_json({"a": 1}, path)
        assert caught.value.filename == str(path)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    formats.save_json({"a": 2}, tmp_path / "link")  # a link is replaced, and what it points to left alone
    assert not (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["folder", "link", longest]
