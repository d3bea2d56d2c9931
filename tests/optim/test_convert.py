"""States between 32 and 8 bits, and between a paged optimizer and torch.optim."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from optimizers.runs import bits, device_fixture, net, states, train, trained, values  # noqa: F401 - fixtures
from torch import nn

from qlora_kernels import PagedAdamW, PagedLion
from qlora_kernels.native import extension
from qlora_kernels.ops import backends


def through_a_file(optimizer):
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("kind", [PagedAdamW, PagedLion])
def test_from_32_bits_to_8_and_back(kind):
    model, wide = trained(kind)
    narrow = kind(model.parameters(), state_bits=8)
    narrow.load_state_dict(through_a_file(wide))
    back = kind(model.parameters())
    back.load_state_dict(through_a_file(narrow))
    for p in model.parameters():
        for name in ("exp_avg", "exp_avg_sq")[: len(narrow._algorithm.moments)]:
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


def test_foreign_entries_of_the_state_are_not_given_to_torch():
    p, frozen = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4), requires_grad=False)
    p.grad = torch.ones(4)
    ours = PagedAdamW([p, frozen])
    ours.step()
    assert ours.state[frozen] == {}
    assert set(ours.torch_state_dict()["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
