"""A paged optimizer's states in a file that the system pages, and too little memory or room for them."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import resource
import signal
import tempfile

import pytest
import torch
from optimizers.runs import assert_same, bits, limited, loss_of, make_fixture, net, refused, states, train, trained  # noqa: F401 - fixtures
from torch import nn

from qlora_kernels import PagedAdamW
from qlora_kernels.optim.arena import host


def mapped(folder, process="self") -> int:
    """Files in a folder that a process has mapped."""
    with open(f"/proc/{process}/maps") as maps:
        return sum(str(folder) in line for line in maps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_in_a_file_are_those_in_memory(tmp_path, make, dtype):
    options = {"dtype": dtype, "master_weights": True, "max_grad_norm": 0.5, "skip_nonfinite": True}
    _, memory = trained(make, **options)
    _, file = trained(make, **options, page_file=tmp_path)
    assert_same(memory, file)
    assert memory.grad_norm == file.grad_norm
    assert (memory.paging, file.paging) == ("host memory", "a memory-mapped file")


def test_the_file_goes_with_the_optimizer(tmp_path, make):
    _, optimizer = trained(make, page_file=tmp_path)
    assert mapped(tmp_path) == 1
    assert os.listdir(tmp_path) == []
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    gc.collect()
    assert mapped(tmp_path) == 1, "of an arena that was left nothing remains"
    del optimizer
    gc.collect()
    assert mapped(tmp_path) == 0


@pytest.mark.slow
def test_the_file_goes_with_a_process_that_is_killed(tmp_path):
    torch.set_num_threads(1)  # a forked child has none of its parent's threads
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(60)
            p = nn.Parameter(torch.ones(1000))
            optimizer = PagedAdamW([p], page_file=tmp_path)
            p.grad = torch.ones(1000)
            optimizer.step()
            os.write(writing, b"stepped")
            signal.pause()
        finally:
            os._exit(1)
    os.close(writing)
    with open(reading, "rb") as pipe:
        assert pipe.read(7) == b"stepped"
        assert mapped(tmp_path, child) == 1
        os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert os.listdir(tmp_path) == []


def test_a_relative_folder_stays_where_it_was(tmp_path, monkeypatch):
    (tmp_path / "pages").mkdir()
    monkeypatch.chdir(tmp_path)
    optimizer = PagedAdamW(net().parameters(), page_file="pages")
    monkeypatch.chdir("/")
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert mapped(tmp_path / "pages") == 1


@pytest.mark.parametrize("state_bits", [32, 8])
def test_what_was_sent_to_the_file_comes_back(tmp_path, state_bits):
    """The folder has to be on a disk: files in a memory file system always stay resident."""
    p, q = (nn.Parameter(torch.linspace(-1, 1, 1_000_000)) for _ in range(2))
    paged = PagedAdamW([p], page_file=tmp_path, state_bits=state_bits)
    memory = PagedAdamW([q], state_bits=state_bits)
    for step in range(3):
        p.grad = q.grad = torch.randn(1_000_000)
        paged.step()
        memory.step()
        assert bits(p) == bits(q)
        before = paged.resident_bytes()
        assert before > 0.9 * paged.arena_bytes > 0
        paged.page_out()
        assert paged.resident_bytes() < 0.1 * before
        if step == 1:
            paged.page_in()
    assert states(paged) == states(memory)
    assert paged.resident_bytes() > 0.9 * paged.arena_bytes
    memory.page_out()
    assert memory.resident_bytes() > 0.9 * memory.arena_bytes, "there is nowhere to go"


def test_invalid_folders(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("nowhere", "file"):
        with pytest.raises(NotADirectoryError, match=f"page_file should be a folder; .*{name} is not one"):
            PagedAdamW(net().parameters(), page_file=tmp_path / name)


def test_a_folder_that_has_gone_or_cannot_be_written_to(tmp_path, make):
    (tmp_path / "folder").mkdir()
    model = net()
    optimizer = make(model.parameters(), page_file=tmp_path / "folder")
    (tmp_path / "folder").rmdir()
    loss_of(model, 0).backward()
    with refused(optimizer, FileNotFoundError, "folder"):
        optimizer.step()
    (tmp_path / "folder").mkdir()
    optimizer.step()
    locked = make(model.parameters(), page_file="/proc")
    with refused(locked, (FileNotFoundError, PermissionError), "/proc"):
        locked.step()


@pytest.mark.parametrize("how", ["no space", "a file's largest size"])
@pytest.mark.parametrize("when", ["first step", "new group", "load"])
def test_a_full_disk(tmp_path, monkeypatch, make, how, when):
    model, source = trained(make)
    optimizer = make(model.parameters(), page_file=tmp_path)
    late = nn.Parameter(torch.ones(100_000))
    action = {
        "first step": optimizer.step,
        "new group": lambda: optimizer.add_param_group({"params": [late], "lr": 0.5}),
        "load": lambda: optimizer.load_state_dict(source.state_dict()),
    }[when]
    if when == "new group":
        optimizer.step()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, contextlib.ExitStack() as stack:
        if how == "no space":
            patch.setattr(os, "posix_fallocate", full)
        else:
            stack.enter_context(limited(resource.RLIMIT_FSIZE, 4096))
        reason = "No space left" if how == "no space" else "File too large"
        narrower = "state_bits=8 takes a quarter of it, and " if optimizer._options.state_bits == 32 else ""
        message = rf"need \d+ bytes .* in a file in {tmp_path}.*{reason}[^;]*; {narrower}page_file can be"
        with refused(optimizer, MemoryError, message):
            action()
    if when == "new group":
        assert len(optimizer.param_groups) == 1
    action()
    train(model, optimizer, [5])
    assert mapped(tmp_path) == 1


def test_a_reserved_part_of_a_full_disk_is_free_again(tmp_path, monkeypatch):
    made = []

    def keep(original=tempfile.TemporaryFile, **more):
        made.append(original(**more))
        return made[-1]

    monkeypatch.setattr(tempfile, "TemporaryFile", keep)
    with limited(resource.RLIMIT_FSIZE, 4096), pytest.raises(MemoryError):
        host.HostArena(1 << 20, tmp_path)
    assert [file.closed for file in made] == [True]


def test_no_memory_for_the_arena(make):
    p = nn.Parameter(torch.ones(16_000_000))
    optimizer = make([p])
    p.grad = torch.ones(16_000_000)
    with open("/proc/self/statm") as file:
        here = int(file.read().split()[0]) * resource.getpagesize()
    message = r"states need \d+ bytes \(0\.\d+ GiB\) of memory.*page_file=FOLDER"
    with refused(optimizer, MemoryError, message), limited(resource.RLIMIT_AS, here + (4 << 20)):
        optimizer.step()
    assert not optimizer.state
    optimizer.step()
    assert optimizer.state[p]["step"] == 1
