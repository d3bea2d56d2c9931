"""A paged optimizer whose parameters, states or process have changed since its arena was made."""

from __future__ import annotations

import copy
import os
import signal

import pytest
import torch
from engines import engine_named
from optimizers.runs import bits, make_fixture, refused  # noqa: F401 - fixtures
from torch import nn

from qlora_kernels import PagedAdamW
from qlora_kernels.optim import binding


@pytest.fixture(params=["cpu", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request):
    """Where parameters and states are; new tensors go there by default."""
    named = {"cpu": "portable", "emulated": "emulated-forward", "cuda": "cuda"}
    with engine_named(named[request.param]):
        yield request.param


def stepped(make, *parameters, steps=2, **options):
    """An optimizer that has taken some steps over the tensors given, with its parameters."""
    params = [nn.Parameter(p.clone()) for p in parameters]
    optimizer = make(params, **options)
    for _ in range(steps):
        step(optimizer, params)
    return params, optimizer


def step(optimizer, params) -> None:
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()


def exact(optimizer) -> list:
    """The states of each parameter in torch's form, whatever their order in memory."""
    return [{k: bits(v) for k, v in s.items()} for s in optimizer.torch_state_dict()["state"].values()]


# ---------------------------------------------------------------------------------------------- loading after changes


def change_order(params) -> None:
    params[0].data = params[0].data.contiguous(memory_format=torch.channels_last)


def change_a_little(params) -> None:
    params[-1].data = torch.randn(params[-1].numel() + 7)


def change_to_much_more(params) -> None:
    params[-1].data = torch.randn(100_000)  # more than the whole arena had, even of 8 bits


def change_to_less(params) -> None:
    params[0].data = torch.randn(3)


CHANGES = {
    "order": change_order,
    "a little": change_a_little,
    "much": change_to_much_more,
    "less": change_to_less,
}


@pytest.mark.share(3)
@pytest.mark.parametrize("change", CHANGES)
def test_states_loaded_after_a_parameter_has_changed_its_form(place, make, change):
    params, optimizer = stepped(make, torch.randn(12, 5, 3, 3), torch.randn(300), torch.randn(1000))
    for p in params:
        p.grad = None
    CHANGES[change](params)
    twins, source = stepped(make, *[p.detach() for p in params])
    saved = copy.deepcopy(source.state_dict())
    optimizer.load_state_dict(saved)
    assert [p.stride() for p in params] == [p.stride() for p in twins]
    assert exact(optimizer) == exact(source)
    for p in params:
        assert all(v.shape == p.shape for k, v in optimizer.state[p].items() if k.startswith("exp") and "abs" not in k)
    with torch.no_grad():
        for p, twin in zip(params, twins):
            p.copy_(twin)
    for p, twin in zip(params, twins):
        p.grad, twin.grad = (torch.full_like(p, 0.25) for _ in range(2))
    optimizer.step()
    source.step()
    assert [bits(p) for p in params] == [bits(p) for p in twins]
    assert exact(optimizer) == exact(source)


def test_states_loaded_after_a_model_has_16_bits(place, make):
    values = torch.randn(12, 5), torch.randn(300)
    params, optimizer = stepped(make, *values, master_weights=True)
    saved = copy.deepcopy(optimizer.state_dict())
    for p in params:
        p.grad = None
        p.data = p.data.bfloat16()
    optimizer.load_state_dict(saved)
    assert exact(optimizer) == [{k: bits(v) for k, v in s.items()} for s in exact_of(saved, make, params)]
    for p in params:
        assert bits(optimizer.state[p]["master"]) == bits(p.float())
        assert optimizer.state[p]["step"] == 2
    step(optimizer, params)
    assert all(bits(optimizer.state[p]["master"].bfloat16()) == bits(p) for p in params)


def exact_of(saved, make, params) -> list:
    """The states of a new optimizer that loads a state dict."""
    other = make([nn.Parameter(p.detach().clone()) for p in params])
    other.load_state_dict(saved)
    return list(other.torch_state_dict()["state"].values())


def test_a_dict_without_states_after_a_change_removes_them(place, make):
    params, optimizer = stepped(make, torch.randn(12, 5, 3, 3), torch.randn(300))
    change_a_little(params)
    params[-1].grad = None
    optimizer.load_state_dict(make([nn.Parameter(p.detach()) for p in params]).state_dict())
    assert not optimizer.state
    step(optimizer, params)
    assert all(optimizer.state[p]["step"] == 1 for p in params)


def test_a_load_that_finds_no_memory_changes_nothing(place, make, monkeypatch):
    params, optimizer = stepped(make, torch.randn(12, 5, 3, 3), torch.randn(300))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 0.5
    change_order(params)

    def full(*_):
        raise MemoryError("full")

    with monkeypatch.context() as patch:
        patch.setattr("qlora_kernels.optim.engines.choose.engine_for", full)
        with refused(optimizer, MemoryError, "full"):
            optimizer.load_state_dict(saved)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_a_load_whose_conversion_fails_changes_nothing(place, make, monkeypatch):
    params, optimizer = stepped(make, torch.randn(12, 5), torch.randn(300))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 0.5
    step(optimizer, params)

    def fail(views, entry, p, in_use, original=binding.state_writes):
        if p is params[1]:
            raise MemoryError("no memory to encode")
        return original(views, entry, p, in_use)

    with monkeypatch.context() as patch:
        patch.setattr(binding, "state_writes", fail)
        with refused(optimizer, MemoryError, "no memory to encode"):
            optimizer.load_state_dict(saved)
    step(optimizer, params)


def test_nothing_continues_from_a_copy_that_failed_midway(place, make, monkeypatch, tmp_path):
    """As when a device fails: everything else has been checked before."""
    params, optimizer = stepped(make, torch.randn(12, 5), torch.randn(300))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 0.5
    step(optimizer, params)
    before, lr = [bits(p) for p in params], optimizer.param_groups[0]["lr"]

    def failing():
        raise OSError("the device is gone")

    def stage(views, entry, p, in_use, original=binding.state_writes):
        return [failing] if p is params[1] else original(views, entry, p, in_use)

    with monkeypatch.context() as patch:
        patch.setattr(binding, "state_writes", stage)
        with pytest.raises(OSError, match="is gone"):
            optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == lr
    for action in (optimizer.step, optimizer.state_dict, lambda: optimizer.save(tmp_path / "file")):
        with pytest.raises(RuntimeError, match="a load failed midway"):
            action()
    assert [bits(p) for p in params] == before
    optimizer.load_state_dict(saved)
    assert [s["step"] for s in exact(optimizer)] == [bits(torch.tensor(2.0, device="cpu"))] * 2
    step(optimizer, params)


def test_views_outside_an_arena_are_refused(place):
    _, optimizer = stepped(PagedAdamW, torch.randn(300))
    made = optimizer._engine.arena
    for view in (made.view, made.host_view):
        for offset, count in ((-1, 1), (optimizer.arena_bytes - 4, 2), (optimizer.arena_bytes, 1)):
            with pytest.raises(ValueError, match=r"offset|outside an arena"):
                view(offset, count, torch.float32)
        assert view(optimizer.arena_bytes - 4, 1, torch.float32).numel() == 1


@pytest.mark.parametrize("how", ["data", "another tensor", "none"])
@pytest.mark.parametrize("key", [0, 1, -2, -1])
def test_states_that_are_exchanged_count(place, make, key, how):
    """As programs do that move them to the host and back; t.data = … keeps the same tensor object."""
    params, optimizer = stepped(make, torch.randn(40), torch.randn(600).bfloat16(), master_weights=True)
    state = optimizer.state[params[1]]
    name = list(state)[key]
    assert key != -1 or name == "master"
    new = torch.zeros_like(state[name]) if name != "step" else torch.full_like(state[name], 9.0)
    if how == "data":
        state[name].data = new
    elif how == "another tensor":
        state[name] = new
    saved = copy.deepcopy(optimizer.state_dict())
    assert how == "none" or bits(saved["state"][1][name]) == bits(new)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    other = make(twins, master_weights=True)
    other.load_state_dict(saved)
    for _ in range(2):
        for p, twin in zip(params, twins):
            p.grad = torch.randn_like(p)
            twin.grad = p.grad.clone()
        optimizer.step()
        other.step()
        assert exact(optimizer) == exact(other)
        assert [bits(p) for p in params] == [bits(p) for p in twins]
        assert bits(optimizer.state[params[1]]["master"]) == bits(other.state[twins[1]]["master"])
    assert bits(optimizer.state_dict()["state"][1][name]) != bits(saved["state"][1][name])


@pytest.mark.parametrize("elsewhere", ["meta", "cpu"])
def test_another_default_device_is_not_that_of_states(place, make, tmp_path, elsewhere):
    """With "cpu", states on a card are elsewhere; with "meta", whose tensors have no memory, all are."""
    params, source = stepped(make, torch.randn(700), torch.empty(0, 3))
    options = {"max_grad_norm": 1.0, "state_bits": 40 - source._options.state_bits}
    twins, expected = stepped(make, *[p.detach() for p in params], **options)
    expected.load_state_dict(copy.deepcopy(source.state_dict()))
    for p in twins:
        p.grad = torch.full_like(p, 0.5)
    expected.step()
    params = [nn.Parameter(p.detach().clone()) for p in params]
    for p in params:
        p.grad = torch.full_like(p, 0.5)
    before = exact(source)
    with torch.device(elsewhere):
        source.save(tmp_path / "file")
        other = make(params, **options)
        other.load_state_dict(copy.deepcopy(source.state_dict()))
        assert all(v.device == params[0].device for p in params for v in other.state[p].values())
        other.save(tmp_path / "other")
        other.load(tmp_path / "other")
        other = copy.deepcopy(other)
        for p, grad in zip(other.param_groups[0]["params"], params):
            p.grad = grad.grad
        other.step()
        assert exact(other) == exact(expected)
        source.load(tmp_path / "file")
        assert exact(source) == before
    assert [bits(p) for p in other.param_groups[0]["params"]] != [bits(p) for p in params]


# ------------------------------------------------------------------------------------------------------------ processes


@pytest.mark.parametrize("load", [False, True])
@pytest.mark.parametrize("in_file", [False, True])
def test_a_forked_child_has_states_of_its_own(tmp_path, make, in_file, load):
    torch.set_num_threads(1)  # a child has none of its parent's others
    params, optimizer = stepped(make, torch.randn(900), page_file=tmp_path if in_file else None)
    saved, before = copy.deepcopy(optimizer.state_dict()), exact(optimizer)
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(60)
            if load:
                saved["state"][0]["step"] = torch.tensor(7.0)
                optimizer.load_state_dict(saved)
            optimizer.step()
            torch.save((optimizer.state_dict(), params[0].detach()), tmp_path / "child")
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert exact(optimizer) == before
    state, value = torch.load(tmp_path / "child")
    assert bits(value) != bits(params[0])
    optimizer.step()
    assert bits(optimizer.state[params[0]]["step"]) == bits(torch.tensor(3.0))
    assert state["state"][0]["step"] == (8 if load else 3)
    if not load:
        assert bits(value) == bits(params[0])
        assert state["state"][0].keys() == optimizer.state[params[0]].keys()
        assert all(bits(v) == bits(optimizer.state[params[0]][k]) for k, v in state["state"][0].items())
