"""A paged optimizer's states: saved, loaded, converted, kept in a file; and input that leaves them as they are."""

from __future__ import annotations

import contextlib
import copy
import errno
import gc
import io
import os
import resource
import signal
import subprocess
import sys
import tempfile

import numpy as np
import optimizer_runs
import pytest
import torch
from optimizer_runs import KINDS, assert_same, bits, loss_of, net, refused, states, train, values
from torch import nn

from qlora_kernels import PagedAdamW, PagedLion, arena, backends, files


@pytest.fixture(params=KINDS)
def make(request):
    return KINDS[request.param]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Where the models are: the test runs on a card, too, where one is."""
    monkeypatch.setattr(optimizer_runs, "device", request.param)
    return request.param


def trained(make, steps=range(3), dtype=torch.float32, **options):
    model = net(dtype=dtype)
    optimizer = make(model.parameters(), **options)
    train(model, optimizer, steps)
    return model, optimizer


def through_a_file(optimizer):
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# -------------------------------------------------------------------------------------------------- save and load


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(("dtype", "master"), [(torch.float32, False), (torch.bfloat16, False), (torch.float16, True)])
@pytest.mark.parametrize("paged", [False, True])
def test_resuming_is_bit_exact(tmp_path, make, dtype, master, paged):
    options = {"master_weights": master, "max_grad_norm": 1.0, "page_file": tmp_path if paged else None}
    _, expected = trained(make, range(6), dtype, **options)
    model, optimizer = trained(make, range(3), dtype, **options)
    optimizer.save(tmp_path / "optimizer.pt")
    resumed = net(3, dtype)
    resumed.load_state_dict(model.state_dict())
    other = make(resumed.parameters(), **{**options, "lr": 123.0})
    other.load(tmp_path / "optimizer.pt")
    assert_same(other, optimizer)
    assert other.paging == optimizer.paging
    train(resumed, other, range(3, 6))
    assert_same(other, expected)
    assert os.listdir(tmp_path) == ["optimizer.pt"]


@pytest.mark.usefixtures("device")
def test_loading_keeps_the_arena(make):
    _, optimizer = trained(make)
    saved = copy.deepcopy(optimizer.state_dict())
    views = [t for entry in optimizer.state.values() for t in entry.values()]
    model, other = trained(make, range(5))
    there = [t for entry in other.state.values() for t in entry.values()]
    other.load_state_dict(saved)
    assert states(other) == states(optimizer)
    assert all(a is b for a, b in zip(there, [t for entry in other.state.values() for t in entry.values()]))
    train(model, other, [5])
    assert states(other) != states(optimizer), "a step works on what was loaded, and on nothing else"
    assert [bits(t) for t in views] == [bits(t) for entry in optimizer.state.values() for t in entry.values()]


def test_a_saved_file_is_as_large_as_the_states(tmp_path):
    p = nn.Parameter(torch.randn(300, 300))
    optimizer = PagedAdamW([p, nn.Parameter(torch.ones(3))])
    p.grad = torch.randn(300, 300)
    optimizer.step()
    optimizer.save(tmp_path / "file")
    assert os.path.getsize(tmp_path / "file") < 8 * 300 * 300 + 10_000


@pytest.mark.usefixtures("device")
def test_a_state_dict_of_no_states_takes_them_away(make):
    for copied in (False, True):
        model, optimizer = trained(make)
        empty = make(net().parameters()).state_dict()
        if copied:
            model, optimizer = copy.deepcopy((model, optimizer))
        optimizer.load_state_dict(empty)
        fresh = net()
        fresh.load_state_dict(model.state_dict())
        other = make(fresh.parameters())
        train(model, optimizer, range(2))
        train(fresh, other, range(2))
        assert values(optimizer) == values(other)
        assert [s["step"] for s in states(optimizer)] == [s["step"] for s in states(other)]


@pytest.mark.usefixtures("device")
def test_a_parameter_that_is_frozen_when_states_are_loaded_gets_its_own(make):
    model, optimizer = trained(make)
    saved = through_a_file(optimizer)
    resumed = net()
    resumed.load_state_dict(model.state_dict())
    for p in resumed.up.parameters():
        p.requires_grad_(False)
    other = make(resumed.parameters())
    other.load_state_dict(saved)
    assert_same(other, optimizer)
    other.load_state_dict(through_a_file(other))
    for p in resumed.up.parameters():
        p.requires_grad_(True)
    train(model, optimizer, [3])
    train(resumed, other, [3])
    assert_same(other, optimizer)


def test_settings_are_copied_not_shared():
    _, optimizer = trained(PagedAdamW, lr=torch.tensor(0.01))
    model = net()
    other = PagedAdamW(model.parameters())
    other.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["lr"].fill_(5.0)
    assert other.param_groups[0]["lr"].item() == pytest.approx(0.01)


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
        with pytest.raises(ValueError, match=f"^'tag' of {what} holds what load.. would refuse"):
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


def test_sets_are_saved_for_any_process(tmp_path):
    """Whose order depends on the process, as the hashes of text do."""
    code = """
import torch, sys
from qlora_kernels import PagedAdamW
optimizer = PagedAdamW([{"params": [torch.nn.Parameter(torch.ones(1))], "tag": {f"word {i}" for i in range(50)}}])
getattr(optimizer, sys.argv[1])(sys.argv[2])
"""
    for seed, action in (("1", "save"), ("2", "load")):
        command = [sys.executable, "-c", code, action, str(tmp_path / "file")]
        subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": seed}, check=True)


def test_hooks_of_loading():
    model, optimizer = trained(PagedAdamW)
    other, called = PagedAdamW(model.parameters()), []

    def swap(_, state_dict):
        called.append("before")
        return {**state_dict, "param_groups": [{**state_dict["param_groups"][0], "lr": 0.125}]}

    other.register_load_state_dict_pre_hook(swap)
    other.register_load_state_dict_post_hook(lambda o: called.append(len(o.state)))
    other.load_state_dict(optimizer.state_dict())
    assert called == ["before", len(optimizer.state)]
    assert other.param_groups[0]["lr"] == 0.125


# ---------------------------------------------------------------------------------------------------- other forms


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("kind", [PagedAdamW, PagedLion])
def test_from_32_bits_to_8_and_back(kind):
    model, wide = trained(kind)
    narrow = kind(model.parameters(), state_bits=8)
    narrow.load_state_dict(through_a_file(wide))
    back = kind(model.parameters())
    back.load_state_dict(through_a_file(narrow))
    for p in model.parameters():
        for name in ("exp_avg", "exp_avg_sq")[: len(kind._moments)]:
            code, absmax = backends.CPU.quantize_states(wide.state[p][name].cpu().reshape(-1), name == "exp_avg")
            assert bits(narrow.state[p][f"{name}_code"].reshape(-1)) == bits(code)
            assert bits(narrow.state[p][f"{name}_absmax"]) == bits(absmax)
            table = torch.tensor(backends.native().dynamic_map(name == "exp_avg"))
            decoded = table[code.long()] * absmax.repeat_interleave(256)[: p.numel()]
            assert bits(back.state[p][name]) == bits(decoded.reshape(p.shape))
        assert narrow.state[p]["step"] == back.state[p]["step"] == 3
    assert narrow.arena_bytes > 0
    assert "exp_avg" not in narrow.state[model.up.weight]
    again = kind(model.parameters(), state_bits=8)
    again.load_state_dict(narrow.torch_state_dict())
    for mine, theirs in zip(again.torch_state_dict()["state"].values(), narrow.torch_state_dict()["state"].values()):
        largest = mine["exp_avg"].abs().max() if mine["exp_avg"].numel() else 0
        torch.testing.assert_close(mine["exp_avg"], theirs["exp_avg"], rtol=0, atol=0.01 * float(largest))


def test_from_torch_and_back():
    ours, theirs = net(), net()
    a, b = PagedAdamW(ours.parameters(), lr=0.01), torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1)
    train(theirs, b, range(3))
    ours.load_state_dict(theirs.state_dict())
    a.load_state_dict(copy.deepcopy(b.state_dict()))
    for p, q in zip(ours.parameters(), theirs.parameters()):
        assert {k: bits(v) for k, v in a.state[p].items()} == {k: bits(v) for k, v in b.state[q].items()}
    assert a.param_groups[0]["weight_decay"] == 0.1
    train(ours, a, range(3, 6))
    train(theirs, b, range(3, 6))
    back = torch.optim.AdamW(ours.parameters(), lr=7.0)
    back.load_state_dict(copy.deepcopy(a.state_dict()))
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert {k: bits(v) for k, v in a.state[p].items()} == {k: bits(v) for k, v in back.state[p].items()}
    train(ours, back, range(6, 9))
    train(theirs, b, range(6, 9))
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_bits", [32, 8])
def test_torch_state_dict_is_a_copy_that_torch_goes_on_from(state_bits, dtype):
    model, optimizer = trained(PagedAdamW, dtype=dtype, state_bits=state_bits, lr=0.01, master_weights=True)
    before = states(optimizer)
    twin = copy.deepcopy(model)
    theirs = torch.optim.AdamW(twin.parameters())
    theirs.load_state_dict(optimizer.torch_state_dict())
    train(twin, theirs, range(3, 6))
    assert states(optimizer) == before
    train(model, optimizer, range(3, 6))
    exact = (state_bits, dtype) == (32, torch.float32)
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5 if exact else 0, atol=1e-6 if exact else 0.02)
    assert theirs.param_groups[0]["lr"] == 0.01


def test_another_default_dtype_is_not_that_of_states():
    model, optimizer = trained(PagedAdamW, state_bits=8)
    expected = [{k: bits(v) for k, v in s.items()} for s in optimizer.torch_state_dict()["state"].values()]
    torch.set_default_dtype(torch.float64)
    try:
        decoded = optimizer.torch_state_dict()["state"].values()
        other = PagedAdamW(model.parameters())
        other.load_state_dict(optimizer.state_dict())
    finally:
        torch.set_default_dtype(torch.float32)
    assert [{k: bits(v) for k, v in s.items()} for s in decoded] == states(other) == expected


def test_states_of_16_bits_from_torch():
    theirs = net(dtype=torch.bfloat16)
    b = torch.optim.AdamW(theirs.parameters(), lr=0.01)
    train(theirs, b, range(3))
    for state_bits in (32, 8):
        a = PagedAdamW(theirs.parameters(), state_bits=state_bits, master_weights=True)
        a.load_state_dict(b.state_dict())
        before = values(a)
        assert all(bits(a.state[p]["master"]) == bits(p.float()) for p in theirs.parameters())
        train(theirs, a, [3])
        assert values(a) != before


# ---------------------------------------------------------------------------------------- torch.distributed.checkpoint


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("paged", [False, True])
def test_a_distributed_checkpoint(tmp_path, make, paged):
    import torch.distributed.checkpoint as dcp

    options = {"page_file": tmp_path if paged else None}
    model, optimizer = trained(make, **options)
    dcp.save({"optimizer": optimizer.state_dict()}, checkpoint_id=str(tmp_path / "saved"), no_dist=True)
    resumed = net()
    resumed.load_state_dict(model.state_dict())
    other = make(resumed.parameters(), **options)
    for p in resumed.parameters():
        p.grad = torch.zeros_like(p)
    other.step()  # so that there are tensors to read into
    resumed.load_state_dict(model.state_dict())
    state = {"optimizer": other.state_dict()}
    dcp.load(state, checkpoint_id=str(tmp_path / "saved"), no_dist=True)
    other.load_state_dict(state["optimizer"])
    assert_same(other, optimizer)
    train(model, optimizer, [3])
    train(resumed, other, [3])
    assert_same(other, optimizer)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("offload", [False, True])
def test_distributed_state_dicts_of_a_model(tmp_path, make, flat, offload):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as api

    options = api.StateDictOptions(flatten_optimizer_state_dict=flat, cpu_offload=offload)
    model, optimizer = trained(make)
    state = api.get_optimizer_state_dict(model, optimizer, options=options)
    before = states(optimizer), values(optimizer)
    dcp.save({"optimizer": state}, checkpoint_id=str(tmp_path), no_dist=True)
    resumed = net()
    resumed.load_state_dict(model.state_dict())
    other = make(resumed.parameters(), lr=99.0)
    mine = {"optimizer": api.get_optimizer_state_dict(resumed, other, options=options)}
    assert values(other) == values(optimizer), "torch takes a step to have states; it changes nothing"
    dcp.load(mine, checkpoint_id=str(tmp_path), no_dist=True)
    api.set_optimizer_state_dict(resumed, other, mine["optimizer"], options=options)
    assert_same(other, optimizer)
    assert (states(optimizer), values(optimizer)) == before
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    train(model, optimizer, [3])
    train(resumed, other, [3])
    assert_same(other, optimizer)


# --------------------------------------------------------------------------------------------------- files of states


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
            files.sync_folder = die
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


def test_files_that_cannot_be_loaded(tmp_path, make):
    _, optimizer = trained(make)
    optimizer.save(tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for name, content in (("empty", b""), ("half", whole[: len(whole) // 2]), ("text", b"hello " * 99)):
        (tmp_path / name).write_bytes(content)
        with refused(optimizer, ValueError, f"{name} is not a whole optimizer file"):
            optimizer.load(tmp_path / name)
    torch.save({"state": {}, "param_groups": []}, tmp_path / "other")
    torch.save([1, 2], tmp_path / "list")
    for name in ("other", "list"):
        with refused(optimizer, ValueError, f"{name} is not an optimizer's file"):
            optimizer.load(tmp_path / name)
    with refused(optimizer, FileNotFoundError, "nowhere"):
        optimizer.load(tmp_path / "nowhere")
    with refused(optimizer, IsADirectoryError, "directory"):
        optimizer.load(tmp_path)
    other = (PagedLion if isinstance(optimizer, PagedAdamW) else PagedAdamW)(net().parameters())
    with refused(other, ValueError, f"is of {type(optimizer).__name__}, not of {type(other).__name__}"):
        other.load(tmp_path / "whole")


def test_a_save_that_fails_leaves_the_old_file(tmp_path):
    model, optimizer = trained(PagedAdamW)
    optimizer.save(tmp_path / "file")
    old = (tmp_path / "file").read_bytes()
    train(model, optimizer, [3])
    with limited(resource.RLIMIT_FSIZE, 1000), refused(optimizer, OSError, "file cannot be written"):
        optimizer.save(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == old
    assert os.listdir(tmp_path) == ["file"]
    with refused(optimizer, FileNotFoundError, "nowhere"):
        optimizer.save(tmp_path / "nowhere" / "file")


# --------------------------------------------------------------------------------------------- state dicts of others


def of_another_shape(saved, key):
    entry = saved["state"][key]
    name = next(name for name in entry if name.startswith("exp_avg"))
    entry[name] = torch.zeros(41, 8, dtype=entry[name].dtype)


#: What is wrong, done to a state dict of AdamW's with 32 or 8 bits, and what the sentence says.
DAMAGES = {
    "shape": (lambda s: of_another_shape(s, 5), r"another model: 'exp_avg.*' of parameter 5 is \[41, 8\] there"),
    "groups": (lambda s: s["param_groups"].append({"params": []}), "another model: 2 parameter groups there, 1 here"),
    "params": (lambda s: s["param_groups"][0]["params"].pop(), "another model: group 0 has 7 parameters there, 8 here"),
    "no moment": (lambda s: [s["state"][7].pop(k) for k in list(s["state"][7]) if "_sq" in k], "another optimizer"),
    "amsgrad": (lambda s: s["param_groups"][0].update(amsgrad=True), "amsgrad=True"),
    "maximize": (lambda s: s["param_groups"][0].update(maximize=True), "maximize=True"),
    "lr": (lambda s: s["param_groups"][0].update(lr=float("nan")), "lr should be a finite number"),
    "betas": (lambda s: s["param_groups"][0].update(betas=(0.9, 1.0)), r"betas\[1\] should be"),
    "step": (lambda s: s["state"][7].update(step=torch.tensor(float("nan"))), "parameter 7 has no step count"),
    "endless": (lambda s: s["state"][7].update(step=float("inf")), "parameter 7 has no step count"),
    "text": (lambda s: s["state"][7].update(step="three"), "parameter 7 has no step count"),
    "master": (lambda s: s["state"][7].update(master=torch.zeros(1, 1)), "'master' of parameter 7"),
    "nothing": (lambda s: s.pop("state"), "a state dict with 'state' and 'param_groups'"),
    "empty group": (lambda s: s.update(param_groups=[{}]), "'params' of group 0 of the state dict should be a list"),
    "no keys": (lambda s: s["param_groups"][0].update(params=None), "'params' of group 0 of the state dict should be"),
    "odd keys": (lambda s: s["param_groups"][0].update(params=[[1]]), "'params' of group 0 of the state dict should"),
    "one group": (lambda s: s.update(param_groups=5), "'param_groups' of the state dict should be a list of dicts"),
    "texts": (lambda s: s.update(param_groups=["a"]), "'param_groups' of the state dict should be a list of dicts"),
    "list": (lambda s: s.update(state=[]), "'state' of the state dict should be a dict, found list"),
    "no entry": (
        lambda s: s["state"].update({7: torch.ones(3)}),
        "state of parameter 7 should be a dict, found Tensor",
    ),
    "a word": (lambda s: s["state"].update({7: "x"}), "the state of parameter 7 should be a dict, found str"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("begun", [False, True])
def test_state_dicts_that_do_not_fit(damage, state_bits, begun):
    _, source = trained(PagedAdamW, state_bits=state_bits, lr=0.5)
    saved = copy.deepcopy(source.state_dict())
    change, message = DAMAGES[damage]
    change(saved)
    model = net()
    optimizer = PagedAdamW(model.parameters(), lr=0.01)
    if begun:
        train(model, optimizer, [0])
    with refused(optimizer, ValueError, message):
        optimizer.load_state_dict(saved)
    assert bool(optimizer.state) == begun
    train(model, optimizer, [1])


@pytest.mark.parametrize("form", ["sparse", "complex", "meta"])
def test_moments_of_other_kinds(form):
    _, optimizer = trained(PagedAdamW)
    saved = copy.deepcopy(optimizer.state_dict())
    like = saved["state"][7]["exp_avg"]
    other = {"sparse": like.to_sparse(), "complex": like.to(torch.complex64), "meta": like.to("meta")}[form]
    saved["state"][7]["exp_avg"] = other
    with refused(optimizer, ValueError, "'exp_avg' of parameter 7 should be a dense tensor of real numbers"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("absmax", [None, torch.zeros(3), "text"])
def test_constants_of_8_bits_that_do_not_fit(absmax):
    _, optimizer = trained(PagedAdamW, state_bits=8)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][6]["exp_avg_sq_absmax"] = absmax
    with refused(optimizer, ValueError, "'exp_avg_sq_absmax' of parameter 6 should have 1 constants"):
        optimizer.load_state_dict(saved)


def test_state_dicts_of_other_optimizers():
    model = net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, sgd, [0])
    lion = PagedLion(model.parameters())
    train(model, lion, [0])
    _, optimizer = trained(PagedAdamW)
    for other, name in ((sgd, "exp_avg"), (lion, "exp_avg_sq")):
        with refused(optimizer, ValueError, f"another optimizer: PagedAdamW needs '{name}' of parameter 0"):
            optimizer.load_state_dict(other.state_dict())


# -------------------------------------------------------------------------------------------------------- page_file


@contextlib.contextmanager
def limited(what: int, most: int):
    soft, hard = resource.getrlimit(what)
    resource.setrlimit(what, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(what, (soft, hard))


def mapped(folder, process="self") -> int:
    """Files in a folder that lie in a process's memory."""
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


def test_the_file_goes_with_a_process_that_is_killed(tmp_path):
    code = """
import sys, torch
from qlora_kernels import PagedAdamW
p = torch.nn.Parameter(torch.ones(1000))
optimizer = PagedAdamW([p], page_file=sys.argv[1])
p.grad = torch.ones(1000)
optimizer.step()
print("stepped", flush=True)
sys.stdin.read()
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with child:
        assert child.stdout.readline() == "stepped\n"
        assert mapped(tmp_path, child.pid) == 1
        child.kill()
    assert child.returncode == -signal.SIGKILL
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
    """The folder has to lie on a disk: what a file system in memory holds is resident for good."""
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


def test_folders_that_are_none(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("nowhere", "file"):
        with pytest.raises(NotADirectoryError, match=f"page_file should be a folder; .*{name} is none"):
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
        narrower = "state_bits=8 takes a quarter of it, and " if optimizer._settings["state_bits"] == 32 else ""
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
        arena.HostArena(1 << 20, tmp_path)
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


# -------------------------------------------------------------------------------------------------------- bad input


BAD_GROUPS = [
    *[({"lr": lr}, "lr should be a finite number at least 0") for lr in (-1, -1e-9, float("nan"), float("inf"))],
    *[({"lr": lr}, "lr should be a finite number at least 0") for lr in ("0.1", None, True, 1j, torch.ones(2))],
    ({"lr": torch.tensor(-1.0)}, "lr should be a finite number at least 0"),
    *[({"betas": (beta, 0.9)}, r"betas\[0\] should be") for beta in (1.0, -0.1, float("nan"), "a", None)],
    *[({"betas": (0.9, beta)}, r"betas\[1\] should be") for beta in (1.0, -0.1, float("nan"), "a", None)],
    *[({"betas": betas}, "betas should be two numbers") for betas in (0.9, (0.9,), (0.9, 0.9, 0.9), "ab", None)],
    *[({"weight_decay": decay}, "weight_decay should be") for decay in (-1, float("nan"), None)],
]
BAD_EPS = [({"eps": eps}, "eps should be") for eps in (-1, float("nan"), float("inf"), None)]


@pytest.mark.parametrize("kind", [PagedAdamW, PagedLion])
def test_settings_out_of_range(kind):
    for options, message in BAD_GROUPS + BAD_EPS * (kind is PagedAdamW):
        with pytest.raises(ValueError, match=message):
            kind(net().parameters(), **options)
        model, optimizer = trained(kind)
        with refused(optimizer, ValueError, message):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], **options})
        saved = copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][0].update(options)
        with refused(optimizer, ValueError, message):
            optimizer.load_state_dict(saved)
        train(model, optimizer, [3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *[({"state_bits": b}, "state_bits should be 32 or 8") for b in (16, 0, None, "8", 8.0, np.int64(16))],
        *[({"max_grad_norm": norm}, "max_grad_norm should be") for norm in (0, -1, float("nan"), float("inf"), "1")],
        *[({"page_budget": budget}, "page_budget should be") for budget in (0, -1, 1.5, True, "1")],
        ({"page_file": ""}, "page_file should be a folder; '' names none"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        PagedAdamW(net().parameters(), **options)


@pytest.mark.parametrize("name", ["master_weights", "skip_nonfinite"])
def test_options_that_are_no_yes_or_no(name):
    for value in ("no", 1, None, torch.ones(1)):
        with pytest.raises(TypeError, match=f"{name} should be True or False, found"):
            PagedAdamW(net().parameters(), **{name: value})
    PagedAdamW(net().parameters(), **{name: np.True_})


def test_options_in_numpy_numbers():
    model, optimizer = trained(PagedAdamW, state_bits=np.int64(8), page_budget=np.int32(1 << 20))
    assert "exp_avg_code" in optimizer.state[model.scale]
    copied = copy.deepcopy(optimizer)._settings
    assert (type(copied["state_bits"]), type(copied["page_budget"])) == (int, int)


NOT_FINITE = (float("nan"), float("inf"), torch.tensor(float("nan")), None, "much", torch.ones(2))
LATER = {
    "lr": (-1e-9, -1, torch.tensor(-0.5), *NOT_FINITE),
    "weight_decay": (-1e-9, *NOT_FINITE),
    "betas": ((1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, float("nan")), (0.9,), (0.9, 0.9, 0.9), 0.9, None),
    "eps": (-1e-9, *NOT_FINITE),
    "maximize": (True,),
    "amsgrad": (True,),
}


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("name", LATER)
def test_settings_that_go_out_of_range_are_refused_at_the_step(make, name, begun):
    model, optimizer = trained(make, range(1) if begun else ())
    second = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [second]})
    second.grad = torch.ones(3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    group = optimizer.param_groups[1]
    if name == "eps" and "eps" not in group:
        return  # Lion has none
    for bad in LATER[name]:
        earlier = dict(group)
        group[name] = bad
        with refused(optimizer, ValueError, rf"{name}(\[[01]\])?(=True)? of group 1 (should be|is not supported)"):
            optimizer.step()
        group.clear()
        group.update(earlier)
    assert bool(states(optimizer)[0]) == begun
    before = values(optimizer)
    optimizer.step()
    assert values(optimizer) != before


def test_without_a_gradient_settings_do_not_matter(make):
    model, optimizer = trained(make)
    before = states(optimizer), values(optimizer)
    optimizer.param_groups[0]["lr"] = -1.0
    optimizer.zero_grad()
    optimizer.step()
    assert (states(optimizer), values(optimizer)) == before
    with pytest.raises(ValueError, match=r"lr of group 0 should be a finite number at least 0, found -1\.0"):
        train(model, optimizer, [3])


def test_parameters_twice():
    model, optimizer = trained(PagedAdamW)
    p = model.up.weight
    with pytest.raises(ValueError, match="more than one parameter group"):
        PagedAdamW([{"params": [p]}, {"params": [p]}])
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match="more than once"):
        PagedAdamW([p, p])
    with refused(optimizer, ValueError, "more than one parameter group"):
        optimizer.add_param_group({"params": [p]})
    train(model, optimizer, [3])


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_parameters_without_kernels(dtype):
    bad = nn.Parameter(torch.ones(3, dtype=dtype))
    with pytest.raises(TypeError, match=f"parameter 1 of the group is {dtype}; only float32, bfloat16 and float16"):
        PagedAdamW([nn.Parameter(torch.ones(3)), bad])
    model, optimizer = trained(PagedAdamW)
    with refused(optimizer, TypeError, f"{dtype}"):
        optimizer.add_param_group({"params": [bad]})
    train(model, optimizer, [3])


def test_parameters_that_are_not_dense():
    with pytest.raises(TypeError, match="only dense"):
        PagedAdamW([nn.Parameter(torch.eye(3).to_sparse())])
    for holes in (torch.ones(6, 6)[:, ::2], torch.ones(1).expand(6)):
        with pytest.raises(TypeError, match="has holes or overlaps"):
            PagedAdamW([nn.Parameter(holes)])


def test_a_model_that_becomes_float64(make):
    model, optimizer = trained(make)
    model.double()
    with refused(optimizer, TypeError, "float64; only float32"):
        train(model, optimizer, [3])
    model.float()
    train(model, optimizer, [3])
    assert optimizer.state[model.scale]["step"] == 4


def test_a_model_without_memory():
    model = nn.Linear(3, 3, device="meta")
    optimizer = PagedAdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="parameters on meta cannot be optimized"):
        optimizer.step()


def test_parameters_on_two_devices(make):
    far = nn.Parameter(torch.ones(3, device="meta"))
    with pytest.raises(ValueError, match="on one device, found cpu, meta; use an optimizer for each device"):
        make([nn.Parameter(torch.ones(3)), far])
    model, optimizer = trained(make)
    with refused(optimizer, ValueError, "on one device, found cpu, meta"):
        optimizer.add_param_group({"params": [far]})
    far.requires_grad_(False)
    optimizer.add_param_group({"params": [far]})
    far.requires_grad_(True)
    far.grad = torch.ones(3, device="meta")
    before = states(optimizer), [bits(p) for p in model.parameters()]
    with pytest.raises(ValueError, match="on one device, found cpu, meta"):
        optimizer.step()
    assert (states(optimizer), [bits(p) for p in model.parameters()]) == before
    far.grad = None
    train(model, optimizer, [3])


def test_sparse_gradients(make):
    model, embedding = net(), nn.Embedding(5, 4, sparse=True)
    optimizer = make([*model.parameters(), *embedding.parameters()])
    train(model, optimizer, range(2))
    loss_of(model, 2).backward()
    embedding(torch.tensor([1, 2])).sum().backward()
    with refused(optimizer, RuntimeError, r"gradient of parameter 8, of shape \[5, 4\], is sparse"):
        optimizer.step()
    embedding.weight.grad = embedding.weight.grad.to_dense()
    optimizer.step()
    assert optimizer.state[embedding.weight]["step"] == 1


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float64, torch.float16])
def test_gradients_of_another_dtype(make, dtype):
    p = nn.Parameter(torch.ones(300, dtype=dtype))
    p.grad = torch.ones(300, dtype=dtype)
    p.data = torch.ones(300)  # beneath its gradient
    first = nn.Parameter(torch.ones(300))
    optimizer = make([first, p])
    first.grad = torch.ones(300)
    for _ in range(2):
        before = bits(first), bits(p)
        with pytest.raises(RuntimeError, match=f"gradient of parameter 1, .* is {dtype}, the parameter torch.float32"):
            optimizer.step()
        assert (bits(first), bits(p)) == before
        assert all(state["step"] == 0 for state in optimizer.state.values())
    p.grad = torch.ones(300)
    optimizer.step()
    assert bits(first) == bits(p) != before[0]


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
    with refused(ours, ValueError, "does not have the digest"):
        ours.load(path)


@pytest.mark.parametrize("what", ["gradient", "freed"])
def test_tensors_without_memory_of_their_own_are_refused(what):
    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            if function in (torch.ops.aten.empty_like.default, torch.ops.aten.detach.default):
                return torch.empty(args[0].shape, **{k: v for k, v in (kwargs or {}).items() if k == "device"})
            raise NotImplementedError(str(function))

    p = nn.Parameter(torch.ones(4))
    ours = PagedAdamW([p])
    p.grad = torch.ones(4)
    ours.step()
    if what == "freed":
        p.untyped_storage().resize_(0)
    else:
        p.grad = None
        p.grad = Wrapper(torch.ones(4))
    with pytest.raises(TypeError, match="no memory of its own"):
        ours.step()


@pytest.mark.parametrize(
    "bad", [torch.ones(1, device="meta"), torch.ones(1).to_sparse(), torch.ones(1, dtype=torch.cfloat)]
)
def test_constants_that_are_no_numbers_change_nothing(bad):
    p = nn.Parameter(torch.ones(4))
    p.grad = torch.ones(4)
    ours = PagedAdamW([p], state_bits=8)
    ours.step()
    saved = copy.deepcopy(ours.state_dict())
    saved["param_groups"][0]["lr"] = 7.0
    saved["state"][0]["exp_avg_code"].zero_()
    saved["state"][0]["exp_avg_absmax"] = bad
    with refused(ours, ValueError, "dense tensor of real numbers"):
        ours.load_state_dict(saved)


def test_what_others_left_in_the_state_is_not_for_torch():
    p, frozen = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4), requires_grad=False)
    p.grad = torch.ones(4)
    ours = PagedAdamW([p, frozen])
    ours.step()
    assert ours.state[frozen] == {}
    assert set(ours.torch_state_dict()["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
