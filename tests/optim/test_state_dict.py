"""State dicts of a paged optimizer: saved, loaded, and by torch.distributed.checkpoint."""

from __future__ import annotations

import copy
import io
import os

import pytest
import torch
from optimizers.runs import (  # noqa: F401 - fixtures
    assert_same,
    bits,
    device_fixture,
    groups,
    make_fixture,
    net,
    refused,
    states,
    train,
    trained,
    values,
)
from torch import nn

from qlora_kernels import PagedAdamW, PagedLion

# -------------------------------------------------------------------------------------------------------- save and load


def through_a_file(optimizer):
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


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


@pytest.mark.usefixtures("device")
def test_a_state_dict_without_states_removes_them(make):
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


# ----------------------------------------------------------------------------------------- torch.distributed.checkpoint


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


# ------------------------------------------------------------------------------------------ state dicts that do not fit


def of_another_shape(saved, key):
    entry = saved["state"][key]
    name = next(name for name in entry if name.startswith("exp_avg"))
    entry[name] = torch.zeros(41, 8, dtype=entry[name].dtype)


#: A fault put into a state dict of AdamW with 32 or 8 bits, and what the error says.
DAMAGES = {
    "shape": (
        lambda s: of_another_shape(s, 5),
        r"another model: 'exp_avg.*' of parameter 5 is \[41, 8\], the parameter",
    ),
    "groups": (
        lambda s: s["param_groups"].append({"params": []}),
        "another model: it has 2 parameter groups, this optimizer 1",
    ),
    "params": (
        lambda s: s["param_groups"][0]["params"].pop(),
        "another model: its group 0 has 7 parameters, this optimizer's 8",
    ),
    "no moment": (lambda s: [s["state"][7].pop(k) for k in list(s["state"][7]) if "_sq" in k], "another optimizer"),
    "amsgrad": (lambda s: s["param_groups"][0].update(amsgrad=True), "amsgrad=True"),
    "maximize": (lambda s: s["param_groups"][0].update(maximize=True), "maximize=True"),
    "lr": (lambda s: s["param_groups"][0].update(lr=float("nan")), "lr should be a finite number"),
    "betas": (lambda s: s["param_groups"][0].update(betas=(0.9, 1.0)), r"betas\[1\] should be"),
    "step": (lambda s: s["state"][7].update(step=torch.tensor(float("nan"))), "parameter 7 has no step count"),
    "endless": (lambda s: s["state"][7].update(step=float("inf")), "parameter 7 has no step count"),
    "text": (lambda s: s["state"][7].update(step="three"), "parameter 7 has no step count"),
    "master": (lambda s: s["state"][7].update(master=torch.zeros(1, 1)), "'master' of parameter 7"),
    "nothing": (lambda s: s.pop("state"), "a state dict should have 'state' and 'param_groups'"),
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


@pytest.mark.parametrize("kind", ["sparse", "complex", "meta"])
def test_moments_of_other_kinds(kind):
    _, optimizer = trained(PagedAdamW)
    saved = copy.deepcopy(optimizer.state_dict())
    like = saved["state"][7]["exp_avg"]
    other = {"sparse": like.to_sparse(), "complex": like.to(torch.complex64), "meta": like.to("meta")}[kind]
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
