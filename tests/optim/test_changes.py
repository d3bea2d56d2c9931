"""Copies of a paged optimizer, and parameters, groups and states that change between its steps."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from optimizers.runs import (  # noqa: F401 - fixtures
    assert_close,
    assert_same,
    bits,
    device_fixture,
    groups,
    loss_of,
    make_fixture,
    net,
    refused,
    states,
    train,
    values,
)
from torch import nn
from torch.optim import lr_scheduler

from qlora_kernels import PagedAdamW

# --------------------------------------------------------------------------------------------------------------- copies


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_go_on_alike_and_apart(make, how):
    model = net()
    optimizer = make(model.parameters(), skip_nonfinite=True)
    train(model, optimizer, range(2))
    loss_of(model, 9).backward()
    model.up.weight.grad[0] = float("nan")
    optimizer.step()
    both = (model, optimizer)
    other, twin = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    assert next(other.parameters()) is twin.param_groups[0]["params"][0]
    assert_same(optimizer, twin)
    assert twin.skipped_steps == 1
    train(model, optimizer, range(2, 4))
    old = states(twin)
    train(other, twin, range(2, 4))
    assert states(twin) != old
    assert_same(optimizer, twin)
    assert twin.arena_bytes == optimizer.arena_bytes


def test_a_copy_from_before_the_first_step(make):
    model, twin = copy.deepcopy((lambda m: (m, make(m.parameters())))(net()))
    train(model, twin, range(2))
    same = net()
    other = make(same.parameters())
    train(same, other, range(2))
    assert_same(twin, other)


# ----------------------------------------------------------------------------------------- groups and frozen parameters


@pytest.mark.usefixtures("device")
def test_a_group_added_in_mid_training(make):
    model, late = net(), net(5)
    optimizer = make(model.parameters())
    train(model, optimizer, range(2))
    before, old = states(optimizer), optimizer.arena_bytes
    optimizer.add_param_group({"params": late.parameters(), "lr": 0.5})
    assert states(optimizer)[: len(before)] == before
    assert optimizer.arena_bytes >= old
    alone = net(5)
    other = make(alone.parameters(), lr=0.5)
    train(late, optimizer, [7])
    train(alone, other, [7])
    assert states(optimizer)[: len(before)] == before
    assert states(optimizer)[len(before) :] == states(other)
    assert values(optimizer)[len(before) :] == values(other)


def test_frozen_parameters_unfrozen_and_frozen_again():
    ours, theirs = net(), net()
    a, b = PagedAdamW(ours.parameters(), lr=0.02), torch.optim.AdamW(theirs.parameters(), lr=0.02)
    for model, optimizer in ((ours, a), (theirs, b)):
        for step, frozen in enumerate(["up", "up", "", "down", "down", ""]):
            for name, p in model.named_parameters():
                p.requires_grad_(not (frozen and name.startswith(frozen)))
            train(model, optimizer, [step])
    assert_close(ours, theirs)
    assert a.state[ours.up.weight]["step"] == b.state[theirs.up.weight]["step"] == 4
    assert a.state[ours.down.weight]["step"] == b.state[theirs.down.weight]["step"] == 4


def test_a_parameter_that_is_frozen_keeps_its_states_in_a_new_arena(make):
    model = net()
    optimizer = make(model.parameters())
    train(model, optimizer, range(2))
    for p in model.up.parameters():
        p.requires_grad_(False)
    optimizer.zero_grad()
    before = states(optimizer)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert states(optimizer)[: len(before)] == before
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert states(optimizer)[: len(before)] == before


def test_a_parameter_moved_between_groups(make):
    model = net()
    first = model.up.weight
    rest = [p for p in model.parameters() if p is not first]
    optimizer = make([{"params": [first], "lr": 0.0}, {"params": rest, "lr": 0.5}], weight_decay=0.0)
    train(model, optimizer, [0])
    assert values(optimizer)[0] == bits(net().up.weight)
    before = states(optimizer)
    optimizer.param_groups[1]["params"].insert(0, optimizer.param_groups[0]["params"].pop())
    optimizer.zero_grad()
    optimizer.step()
    assert states(optimizer) == before
    train(model, optimizer, [1])
    assert values(optimizer)[0] != bits(net().up.weight)


# -------------------------------------------------------------------------------------------- parameters in other forms


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_changes_its_dtype_after_steps(make, dtype, master):
    model = net()
    optimizer = make(model.parameters(), master_weights=master)
    train(model, optimizer, range(2))
    before = states(optimizer)
    model.to(dtype)
    loss_of(model, 3).backward()
    expected = net(dtype=dtype)
    expected.load_state_dict(model.state_dict())
    fresh = make(expected.parameters(), master_weights=master)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert states(fresh, "master") == before
    train(model, optimizer, range(2, 4))
    train(expected, fresh, range(2, 4))
    assert_same(optimizer, fresh)
    assert all(("master" in state) == master for state in states(optimizer))
    model.float()
    train(model, optimizer, [5])
    assert not any("master" in state for state in states(optimizer))


def test_one_16_bit_dtype_after_the_other_at_the_same_place(make):
    # The next tensor may get the last one's address, so the address proves nothing.
    memory = torch.randn(64).half()
    p = nn.Parameter(memory)
    optimizer = make([p])
    p.grad = torch.randn(64).half()
    optimizer.step()
    before = states(optimizer)
    with torch.no_grad():
        shared = memory.view(torch.bfloat16)
        shared.copy_(torch.linspace(-1, 1, 64))
    p.grad = None
    p.data = shared
    grad = torch.linspace(1, -1, 64).bfloat16()
    p.grad = grad
    fresh = nn.Parameter(p.detach().clone())
    other = make([fresh])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert states(other) == before
    fresh.grad = grad
    optimizer.step()
    other.step()
    assert_same(optimizer, other)


def test_a_parameter_of_another_16_bit_dtype_in_its_place(make):
    p = nn.Parameter(torch.randn(500).bfloat16())
    optimizer = make([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    grad, address = p.grad, p.data_ptr()
    p.data = p.data.view(torch.float16)
    assert (p.grad is grad, p.data_ptr()) == (True, address)
    with refused(optimizer, RuntimeError, "is torch.bfloat16, the parameter torch.float16"):
        optimizer.step()


def test_a_model_changes_its_memory_format_after_steps(make):
    model = nn.Conv2d(5, 12, 3)
    optimizer = make(model.parameters(), lr=0.0)
    grad = torch.randn(12, 5, 3, 3) * torch.logspace(-3, 1, 12)[:, None, None, None]
    model.weight.grad = grad
    optimizer.step()
    before = optimizer.torch_state_dict()["state"][0]["exp_avg"]
    model.to(memory_format=torch.channels_last)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    after = optimizer.torch_state_dict()["state"][0]["exp_avg"]
    state = optimizer.state[model.weight]
    exact = "exp_avg" in state
    assert state["exp_avg" if exact else "exp_avg_code"].stride() == model.weight.stride() == (45, 1, 15, 5)
    # Blocks of 8-bit states run through memory; so their codes changed.
    torch.testing.assert_close(after, before, rtol=0, atol=0 if exact else 0.02 * before.abs().max().item())


@pytest.mark.parametrize("stale", [False, True])
def test_a_square_parameter_transposed_in_its_place(make, stale):
    torch.manual_seed(0)
    model = nn.Linear(20, 20)
    optimizer = make(model.parameters())
    train_square(model, optimizer, 0)
    twin = copy.deepcopy(model)
    twin.weight = nn.Parameter(model.weight.data.t().contiguous())  # the same values elsewhere, in the usual order
    other = make(twin.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    address = model.weight.data_ptr()
    model.weight.data = model.weight.data.t()
    assert (model.weight.data_ptr(), model.weight.stride()) == (address, (1, 20))
    for step in (1, 2):
        train_square(model, optimizer, step, contiguous=stale)
        train_square(twin, other, step)
        state = optimizer.state[model.weight]
        assert state["exp_avg" if "exp_avg" in state else "exp_avg_code"].stride() == (1, 20)
    if "exp_avg" in state:
        assert_same(optimizer, other)
    else:  # blocks run through memory
        torch.testing.assert_close(model.weight, twin.weight, rtol=0, atol=0.02)


def train_square(model, optimizer, step: int, contiguous: bool = False) -> None:
    """Gradients in the parameters' memory order, as backward makes them, or contiguous ones."""
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        grad = torch.randn(p.shape, generator=generator)
        p.grad = grad if contiguous else torch.empty_like(p).copy_(grad)
    optimizer.step()


def test_a_parameter_of_another_size_in_the_same_place():
    p = nn.Parameter(torch.randn(1000))
    optimizer = PagedAdamW([p])
    p.grad = torch.ones(1000)
    optimizer.step()
    old = p.data
    for size in (500, 3000):
        p.grad = None
        p.data = torch.randn(size)
        p.grad = torch.ones(size)
        with refused(optimizer, ValueError, rf"'exp_avg' of parameter 0 is \[1000\], the parameter \[{size}\]"):
            optimizer.step()
    p.data = old  # the gradient is still that of the larger one
    with refused(optimizer, RuntimeError, r"gradient of parameter 0, .* has another shape, \[3000\]"):
        optimizer.step()
    p.grad = torch.ones(1000)
    optimizer.step()
    assert optimizer.state[p]["step"] == 2


# -------------------------------------------------------------------------------------- parameters and states exchanged


def test_weights_loaded_into_the_model_count(make):
    model, other = net(), net(3)
    optimizer = make(model.parameters())
    train(model, optimizer, range(2))
    before = states(optimizer)
    model.load_state_dict(other.state_dict())
    assert states(optimizer) == before
    fresh = make(other.parameters())
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, [2])
    train(other, fresh, [2])
    assert_same(optimizer, fresh)


def test_a_parameter_exchanged_for_another_with_its_states(make):
    # As programs do that add or prune rows during training.
    p = nn.Parameter(torch.randn(10, 256))
    optimizer = make([p])
    p.grad = torch.randn(10, 256)
    optimizer.step()
    state = optimizer.state.pop(p)
    kept = {k: v[:6] if v.dim() else v for k, v in state.items()}  # of 8-bit states, a block is a row
    q, same = (nn.Parameter(p.detach()[:6].clone()) for _ in range(2))
    other = make([same])
    other.load_state_dict({"state": {0: copy.deepcopy(kept)}, "param_groups": other.state_dict()["param_groups"]})
    optimizer.param_groups[0]["params"][0] = q
    optimizer.state[q] = kept
    q.grad = same.grad = torch.randn(6, 256)
    before = bits(q)
    optimizer.step()
    other.step()
    assert bits(q) != before
    assert optimizer.state[q]["step"] == 2
    assert list(optimizer.state) == [q]
    assert_same(optimizer, other)


def test_states_that_were_removed_start_from_zero(make):
    model, fresh = net(), net()
    optimizer = make(model.parameters())
    train(model, optimizer, range(2))
    fresh.load_state_dict(model.state_dict())
    optimizer.state.clear()
    other = make(fresh.parameters())
    train(model, optimizer, [2])
    train(fresh, other, [2])
    assert_same(optimizer, other)


def test_a_state_replaced_by_another_tensor_counts():
    model = net()
    optimizer = PagedAdamW(model.parameters(), lr=0.01)
    train(model, optimizer, range(2))
    entry = optimizer.state[model.up.weight]
    entry["exp_avg"] = torch.zeros_like(model.up.weight)
    entry["mine"] = "kept"
    twin = copy.deepcopy(model)
    other = PagedAdamW(twin.parameters(), lr=0.01)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, [2])
    train(twin, other, [2])
    assert optimizer.state[model.up.weight].pop("mine") == "kept"
    assert_same(optimizer, other)


def test_the_last_reference_frees_the_arena(make):
    model = net()
    optimizer = make(model.parameters())
    lr_scheduler.StepLR(optimizer, 1)
    train(model, optimizer, [0])
    inner = __import__("weakref").ref(optimizer._engine.arena)
    assert groups(optimizer)
    del optimizer
    gc.collect()
    assert inner() is None
