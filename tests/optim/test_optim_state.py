"""A paged optimizer's states: saved, loaded, converted, and state dicts that leave them as they are."""

from __future__ import annotations

import copy
import io
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import optimizer_runs
import pytest
import torch
from optimizer_runs import KINDS, assert_same, bits, limited, net, refused, states, train, trained, values
from torch import nn

from qlora_kernels import PagedAdamW, PagedLion
from qlora_kernels.native import extension
from qlora_kernels.ops import backends
from qlora_kernels.storage import atomic_file


@pytest.fixture(params=KINDS)
def make(request):
    return KINDS[request.param]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Where the models are: the test runs on a card, too, where one is."""
    monkeypatch.setattr(optimizer_runs, "device", request.param)
    return request.param


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


@pytest.mark.slow
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
            table = torch.tensor(extension.native().dynamic_map(name == "exp_avg"))
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
