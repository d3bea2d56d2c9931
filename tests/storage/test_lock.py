"""One writer at a time: claims of an output, and turns."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import threading
import time

import pytest

from qlora_kernels.errors import InputError
from qlora_kernels.storage.lock import claim_of, claimed, exclusive, unchanging


def test_the_second_is_told_who_has_it_and_the_third_gets_it(tmp_path):
    path = tmp_path / ".running"
    with claimed(str(path), "out"):
        who = f"out is being written by process {os.getpid()} on {socket.gethostname()} since 20"
        with pytest.raises(InputError, match=who), claimed(str(path), "out"):
            pass
        assert path.exists()
    assert not path.exists()
    with claimed(str(path), "out"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_killed_process_keeps_nothing(tmp_path):
    path = tmp_path / ".running"
    child = os.fork()
    if child == 0:
        with claimed(str(path), "out"):
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert json.loads(path.read_text())["process"] == child
    with claimed(str(path), "out"):
        assert json.loads(path.read_text())["process"] == os.getpid()
    assert os.listdir(tmp_path) == []


def test_never_two_at_once(tmp_path):
    """The file is removed and made again all the time, which must not give it to two."""
    inside, most, turns, problems = 0, 0, 0, []

    def work():
        nonlocal inside, most, turns
        until = time.monotonic() + 0.5
        try:
            while time.monotonic() < until:
                try:
                    with claimed(str(tmp_path / ".running"), "out"):
                        inside += 1
                        most = max(most, inside)
                        turns += 1
                        time.sleep(0.0001)
                        inside -= 1
                except InputError:
                    pass
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert most == 1
    assert turns > 10


@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_something_else_of_that_name(tmp_path, kind):
    path = tmp_path / ".running"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "mine")
    with pytest.raises((OSError, InputError)) as caught, claimed(str(path), "out"):
        pass
    assert str(path) in str(caught.value)
    assert os.listdir(tmp_path) == [".running"]


@pytest.fixture
def _no_locks(monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("_no_locks")
def test_without_locks_the_file_decides(tmp_path):
    path = tmp_path / ".running"
    with claimed(str(path), "out"):
        with pytest.raises(InputError, match=r"if that has ended, remove .*\.running"), claimed(str(path), "out"):
            pass
        mine = json.loads(path.read_text())
    assert not path.exists()
    for text, taken in (
        (json.dumps({**mine, "process": 10**9}), True),  # has ended
        ("", True),
        ("{", True),
        (json.dumps({**mine, "process": 10**300}), True),
        (json.dumps({**mine, "process": 10**9, "machine": "000000"}), False),  # cannot be known
    ):
        path.write_text(text)
        try:
            with claimed(str(path), "out"):
                assert taken
        except InputError:
            assert not taken
            assert path.read_text() == text
    with exclusive(str(tmp_path)):
        pass


def test_the_name_of_a_claim(tmp_path):
    assert claim_of("/a/out") == "/a/.out.running"
    assert len(os.path.basename(claim_of("/a/" + "n" * 255))) < 255


def test_turns(tmp_path):
    inside, most = 0, 0

    def work():
        nonlocal inside, most
        for _ in range(20):
            with exclusive(str(tmp_path)):
                inside += 1
                most = max(most, inside)
                time.sleep(0.0005)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert os.listdir(tmp_path) == []


def test_readers_wait_for_a_writer_and_not_for_each_other(tmp_path):
    events = []

    def read():
        with unchanging(str(tmp_path)):
            events.append("read")

    thread = threading.Thread(target=read)
    with exclusive(str(tmp_path)):
        thread.start()
        time.sleep(0.1)
        events.append("written")
    thread.join()
    with unchanging(str(tmp_path)):
        read()
    assert events == ["written", "read", "read"]
    with unchanging(str(tmp_path / "nowhere")):
        pass


@pytest.mark.parametrize("kind", ["exclusive", "claimed"])
def test_a_child_that_was_forked_meanwhile_keeps_nothing(tmp_path, kind):
    def context():
        return exclusive(str(tmp_path)) if kind == "exclusive" else claimed(str(tmp_path / ".running"), "out")

    with context():
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        descriptor = os.open(tmp_path, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
        with context():
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 4000,
        '{"process": Infinity}',
        '{"process": 1e999}',
        '{"process": NaN}',
        "[1]",
        '{"process": []}',
        '{"process": 1e300}',
    ],
)
def test_a_record_may_be_anything(tmp_path, text):
    path = tmp_path / ".running"
    with claimed(str(path), "out"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"^out is being written by another process$"), claimed(str(path), "out"):
            pass


def test_a_record_cannot_control_the_terminal(tmp_path):
    path = tmp_path / ".running"
    with claimed(str(path), "out"):
        path.write_text(json.dumps({"process": 5, "host": "hö\x1b[2J\u202e\n", "since": "\x9b1\r"}))
        expected = "out is being written by process 5 on hö\\x1b[2J\\u202e\\n since \\x9b1\\r"
        with pytest.raises(InputError) as caught, claimed(str(path), "out"):
            pass
        assert str(caught.value) == expected


def test_a_host_may_be_anything(tmp_path):
    path = tmp_path / ".running"
    with claimed(str(path), "out"):
        path.write_text('{"process": 5, "host": ' + "[" * 900 + "]" * 900 + "}")
        with pytest.raises(InputError, match=r"process 5 on \? since \?"), claimed(str(path), "out"):
            pass
