"""A paged optimizer's files: what is written, kills and failures while saving, damaged files."""

from __future__ import annotations

import collections
import io
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from optimizers.runs import assert_same, device_fixture, limited, make_fixture, net, refused, states, train, trained  # noqa: F401 - fixtures
from torch import nn

from qlora_kernels import PagedAdamW, PagedLion
from qlora_kernels.optim import state_dict
from qlora_kernels.storage import atomic_file

# ------------------------------------------------------------------------------------------------------ what is written


def test_a_saved_file_is_as_large_as_the_states(tmp_path):
    p = nn.Parameter(torch.randn(300, 300))
    optimizer = PagedAdamW([p, nn.Parameter(torch.ones(3))])
    p.grad = torch.randn(300, 300)
    optimizer.step()
    optimizer.save(tmp_path / "file")
    assert os.path.getsize(tmp_path / "file") < 8 * 300 * 300 + 10_000


def test_settings_in_numpy_numbers_can_be_saved_and_loaded(tmp_path):
    model, optimizer = trained(PagedAdamW, lr=np.float32(0.5))
    optimizer.param_groups[0]["lr"] = np.float64(0.25)
    optimizer.param_groups[0]["betas"] = (np.float64(0.5), 0.75)
    optimizer.save(tmp_path / "file")
    other = PagedAdamW(model.parameters())
    other.load(tmp_path / "file")
    assert other.param_groups[0]["lr"] == 0.25
    assert other.param_groups[0]["betas"] == (0.5, 0.75)
    assert_same(optimizer, other)


@pytest.mark.parametrize("where", ["group", "state"])
def test_what_could_not_be_loaded_is_not_saved(tmp_path, where):
    model, optimizer = trained(PagedAdamW)
    holder = optimizer.param_groups[0] if where == "group" else optimizer.state[model.scale]
    for good in ({"a", "b"}, {"x": np.float64(3.5)}, (1, [2.0, None]), torch.ones(3)):
        holder["tag"] = good
        optimizer.save(tmp_path / "file")
        optimizer.load(tmp_path / "file")
    old = (tmp_path / "file").read_bytes()
    for bad in (tmp_path, lambda: 1, range(3), np.ones(3), {"deep": [tmp_path]}):
        holder["tag"] = bad
        what = "group 0" if where == "group" else "the state of parameter 0"
        with pytest.raises(ValueError, match=f"^'tag' of {what} holds a value that load.. would refuse"):
            optimizer.save(tmp_path / "file")
    del holder["tag"]
    for name, bad in (("lr", float("nan")), ("weight_decay", -1), ("betas", (0.9, 1.0)), ("amsgrad", True)):
        earlier = optimizer.param_groups[0].get(name)
        optimizer.param_groups[0][name] = bad
        with pytest.raises(ValueError, match=name):
            optimizer.save(tmp_path / "file")
        optimizer.param_groups[0][name] = earlier
    assert (tmp_path / "file").read_bytes() == old
    optimizer.save(tmp_path / "file")


@pytest.mark.slow
def test_sets_are_saved_for_any_process(tmp_path):
    """The order of a set depends on the process, because hashes of text do."""
    words = {f"word {i}" for i in range(50)}
    optimizer = PagedAdamW([{"params": [nn.Parameter(torch.ones(1))], "tag": words}])
    code = """
import sys, torch
from qlora_kernels import PagedAdamW
words = {f"word {i}" for i in range(50)}
print(",".join(words))
PagedAdamW([{"params": [torch.nn.Parameter(torch.ones(1))], "tag": words}]).save(sys.argv[1])
"""
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "file")],
        env={**os.environ, "PYTHONHASHSEED": seed},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() != ",".join(words)
    optimizer.load(tmp_path / "file")
    assert optimizer.param_groups[0]["tag"] == words


# ------------------------------------------------------------------------------------------------------------- failures


def killed_at(point: str, optimizer, path) -> None:
    """In a process of its own, save() up to ``point``, where the process is killed."""

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    def after(function):
        return lambda *args, **more: (function(*args, **more), die())

    def half(value, where):
        if not isinstance(where, str):  # a trial
            return save(value, where)
        buffer = io.BytesIO()
        save(value, buffer)
        with open(where, "wb") as file:
            file.write(buffer.getvalue()[: buffer.tell() // 2])
        die()

    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        return
    try:
        save = torch.save
        if point == "written in half":
            torch.save = half
        elif point == "before the folder's sync":
            atomic_file.sync_folder = die
        else:
            when, name = point.split()
            setattr(os, name, die if when == "before" else after(getattr(os, name)))
        optimizer.save(path)
    finally:
        os._exit(1)


@pytest.mark.parametrize(
    ("point", "new"),
    [
        ("written in half", False),
        ("before fsync", False),
        ("after fsync", False),
        ("before replace", False),
        ("after replace", True),
        ("before the folder's sync", True),
    ],
)
def test_a_kill_while_saving_leaves_the_old_file_or_the_new(tmp_path, point, new):
    model, optimizer = trained(PagedAdamW, state_bits=8)
    optimizer.save(tmp_path / "file")
    old = states(optimizer)
    train(model, optimizer, [3])
    killed_at(point, optimizer, tmp_path / "file")
    other = PagedAdamW(net().parameters(), state_bits=8)
    other.load(tmp_path / "file")
    assert states(other) == (states(optimizer) if new else old)
    optimizer.save(tmp_path / "file")
    other.load(tmp_path / "file")
    assert states(other) == states(optimizer)
    assert os.listdir(tmp_path) == ["file"], "what the killed process left has gone"


def test_a_save_that_fails_leaves_the_old_file(tmp_path):
    model, optimizer = trained(PagedAdamW)
    optimizer.save(tmp_path / "file")
    old = (tmp_path / "file").read_bytes()
    train(model, optimizer, [3])
    with limited(resource.RLIMIT_FSIZE, 1000), refused(optimizer, OSError, "File too large: .*file"):
        optimizer.save(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == old
    assert os.listdir(tmp_path) == ["file"]
    with refused(optimizer, FileNotFoundError, "nowhere"):
        optimizer.save(tmp_path / "nowhere" / "file")


def test_files_that_cannot_be_loaded(tmp_path, make):
    _, optimizer = trained(make)
    optimizer.save(tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for name, content in (("empty", b""), ("half", whole[: len(whole) // 2]), ("text", b"hello " * 99)):
        (tmp_path / name).write_bytes(content)
        with refused(optimizer, ValueError, f"{name} is not a complete optimizer file"):
            optimizer.load(tmp_path / name)
    torch.save({"state": {}, "param_groups": []}, tmp_path / "other")
    torch.save([1, 2], tmp_path / "list")
    for name in ("other", "list"):
        with refused(optimizer, ValueError, f"{name} is not an optimizer's file"):
            optimizer.load(tmp_path / name)
    with refused(optimizer, FileNotFoundError, "nowhere"):
        optimizer.load(tmp_path / "nowhere")
    with refused(optimizer, ValueError, "is not a regular file"):
        optimizer.load(tmp_path)
    other = (PagedLion if isinstance(optimizer, PagedAdamW) else PagedAdamW)(net().parameters())
    with refused(other, ValueError, f"was saved by {type(optimizer).__name__}, not by {type(other).__name__}"):
        other.load(tmp_path / "whole")


@pytest.mark.usefixtures("device")
def test_a_file_with_one_bit_changed_is_refused(tmp_path, make):
    _, ours = trained(make)
    path = tmp_path / "optimizer.pt"
    ours.save(path)
    ours.load(path)
    good = path.read_bytes()
    # In the data of a state, which torch does not check.
    largest = max((t for entry in ours.state.values() for t in entry.values()), key=torch.Tensor.numel)
    at = good.index(largest.cpu().numpy().tobytes()) + 100
    path.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
    with refused(ours, ValueError, "its digest is not the one"):
        ours.load(path)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("how", ["cut", "overwritten"])
def test_a_file_that_changes_once_it_was_read_is_loaded_as_it_was(tmp_path, make, monkeypatch, how, short):
    """Where memory is short, from a copy in page_file. Reading a mapping of a file that was cut kills the process."""
    (tmp_path / "pages").mkdir()
    _, ours = trained(make, page_file=tmp_path / "pages")
    expected = states(ours)
    path = tmp_path / "file"
    ours.save(path)

    def change(value, *rest):
        result = digest(value, *rest)
        if how == "cut":
            os.truncate(path, 10)
        else:
            path.write_bytes(b"\x55" * path.stat().st_size)
        return result

    digest = state_dict.digest
    with monkeypatch.context() as patch:
        patch.setattr(state_dict, "digest", change)
        if short:
            patch.setattr(state_dict, "memory_left", lambda: 0)
        _, other = trained(make, range(1), page_file=tmp_path / "pages")
        other.load(path)
    assert states(other) == expected
    assert os.listdir(tmp_path / "pages") == []
    with refused(ours, ValueError, "file is not a complete optimizer file"):
        ours.load(path)


def test_a_file_that_is_cut_while_it_is_copied_is_refused(tmp_path, monkeypatch):
    _, ours = trained(PagedAdamW)
    path = tmp_path / "file"
    ours.save(path)
    monkeypatch.setattr(state_dict, "memory_left", lambda: 0)
    ours.load(path)
    whole, copy = path.stat().st_size, state_dict.shutil.copyfileobj

    def cut(source, target, length):
        os.truncate(path, whole // 2)
        copy(source, target, length)

    monkeypatch.setattr(state_dict.shutil, "copyfileobj", cut)
    with refused(ours, ValueError, "file is not a complete optimizer file"):
        ours.load(path)
    assert os.listdir(tmp_path) == ["file"], "the copy had no name"


def test_a_copy_that_finds_no_room_changes_nothing(tmp_path, monkeypatch):
    _, ours = trained(PagedAdamW)
    ours.save(tmp_path / "file")
    monkeypatch.setattr(state_dict, "memory_left", lambda: 0)
    with limited(resource.RLIMIT_FSIZE, 1000), refused(ours, OSError, "too large"):
        ours.load(tmp_path / "file")
    ours.load(tmp_path / "file")


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    _, ours = trained(PagedAdamW)
    for path in (tmp_path / "pipe", "/dev/zero"):
        with refused(ours, ValueError, f"{path} is not a regular file"):
            ours.load(path)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:TypedStorage")
def test_files_with_tensors_that_no_optimizer_saves(tmp_path):
    _, ours = trained(PagedAdamW)
    endless: list = []
    endless.append(endless)
    hostile = {
        "expanded": torch.ones(1).expand(1 << 45),
        "sparse": torch.ones(3).to_sparse(),
        "meta": torch.ones(1 << 40, device="meta"),
        "quantized": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
        "endless": endless,
    }
    for name, value in hostile.items():
        saved = {"format": "qlora_kernels.optim/1", "optimizer": "PagedAdamW", "sha256": "0", **ours.state_dict()}
        torch.save({**saved, "tag": [value]}, tmp_path / name)
        with refused(ours, ValueError, f"{name} (holds what no optimizer saves|is damaged)"):
            ours.load(tmp_path / name)


def test_the_class_in_a_file_may_be_anything(tmp_path):
    _, ours = trained(PagedAdamW)
    doubled: list = []
    for _ in range(40):
        doubled = [doubled, doubled]
    for writer, expected in ((doubled, "something else"), ("A\x1b[2J" + "b" * 10_000, r"A\\x1b\[2Jb{95}")):
        torch.save({"format": "qlora_kernels.optim/1", "optimizer": writer}, tmp_path / "file")
        with refused(ours, ValueError, f"file was saved by {expected}, not by PagedAdamW"):
            ours.load(tmp_path / "file")


def test_calls_in_a_file_are_refused_by_name(tmp_path):
    _, ours = trained(PagedAdamW)
    torch.save({"format": "qlora_kernels.optim/1", "tag": collections.Counter("a")}, tmp_path / "file")
    with refused(ours, ValueError, "file holds what no optimizer saves .*collections.Counter"):
        ours.load(tmp_path / "file")
    ours.param_groups[0]["tag"] = collections.Counter("a")
    with refused(ours, ValueError, "^'tag' of group 0 holds a value that load.. would refuse"):
        ours.save(tmp_path / "file")


def test_text_that_recurs_too_often_to_be_read_is_not_saved(tmp_path):
    _, ours = trained(PagedAdamW)
    ours.param_groups[0]["tag"] = ["x" * 10_000] * 100
    with refused(ours, ValueError, "^'tag' of group 0 holds a value that load.. would refuse"):
        ours.save(tmp_path / "file")
    ours.param_groups[0]["tag"] = ["x" * 10_000] * 4
    ours.save(tmp_path / "file")
    ours.load(tmp_path / "file")
