"""The arena in host memory, and how much memory the system has left."""

from __future__ import annotations

import errno
import mmap

import pytest
import torch

from qlora_kernels.optim.arena import host, memory


@pytest.mark.parametrize("in_file", [False, True])
def test_an_arena_is_zeros_at_first_and_views_share_it(tmp_path, in_file):
    made = host.HostArena(1 << 20, tmp_path if in_file else None)
    assert made.view(0, 1 << 20, torch.uint8).count_nonzero() == 0
    made.view(65536, 3, torch.float32).copy_(torch.tensor([1.0, 2.0, 3.0]))
    assert made.view(65540, 2, torch.float32).tolist() == [2.0, 3.0]
    assert made.view(65536, 0, torch.float32).shape == (0,)
    assert made.address == made.view(0, 1, torch.uint8).data_ptr()
    view = made.view(65536, 3, torch.float32)
    del made
    assert view.tolist() == [1.0, 2.0, 3.0], "a view keeps the memory"


def test_more_memory_than_the_system_has_is_not_requested(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "memory_left", lambda: 1 << 20)
    monkeypatch.setattr(mmap, "MAP_ANONYMOUS", "not asked for")
    with pytest.raises(MemoryError, match=r"need 1048577 bytes \(0.00 GiB\) of memory.*1048576 bytes are left"):
        host.HostArena((1 << 20) + 1)
    monkeypatch.undo()
    for left in (1 << 20, None):
        monkeypatch.setattr(memory, "memory_left", lambda left=left: left)
        assert host.HostArena(1 << 20).nbytes == 1 << 20
    monkeypatch.setattr(memory, "memory_left", lambda: 0)
    assert host.HostArena(1 << 20, tmp_path).nbytes == 1 << 20, "a file needs none"


def test_the_memory_that_the_system_has_left(tmp_path, monkeypatch):
    left = memory.memory_left()
    with open("/proc/meminfo") as file:
        total = {line.split(":")[0]: int(line.split()[1]) << 10 for line in file}
    assert 0 < left <= total["MemTotal"] + total["SwapTotal"]
    (tmp_path / "a" / "b").mkdir(parents=True)
    for path, text in (("", "max"), ("a", "5000000\n"), ("a/b", "7000000\n")):
        (tmp_path / path / "memory.max").write_text(text)
    assert memory.cgroup_limits(str(tmp_path), "/a/b", "memory.max") == [5_000_000, 7_000_000]
    assert memory.cgroup_limits(str(tmp_path), "/", "memory.max") == []
    assert memory.cgroup_limits(str(tmp_path), "/elsewhere/a", "memory.max") == []
    monkeypatch.setattr(memory, "cgroup_limits", lambda *_: [12345])
    assert memory.memory_left() == 12345


@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("page_file", [None, "/folder"])
def test_advice_names_only_options_not_in_use(state_bits, page_file):
    text = str(memory.out_of_memory(3 << 30, "of memory", "why", state_bits, page_file))
    assert text.startswith(
        "the optimizer's states need 3221225472 bytes (3.00 GiB) of memory, which cannot be allocated (why)"
    )
    assert ("state_bits=8" in text) == (state_bits == 32)
    assert ("page_file=FOLDER" in text) == (page_file is None)
    assert ("another disk" in text) == (page_file is not None)


def test_a_kernel_without_large_pages(monkeypatch):
    class Memory(mmap.mmap):
        def madvise(self, *_):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Memory)
    assert host.HostArena(65536).view(0, 65536, torch.uint8).count_nonzero() == 0
