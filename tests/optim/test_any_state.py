"""Paged optimizers with every kind of tensor that torch has: the right step, or an exception and no change.

More cases than here, from a seed of one's own: ``python tests/support/any_state.py SEED FIRST LAST``.
"""

import copy
import os
import random
import signal

import any_state
import any_tensor
import pytest
import torch
from attacks import attack
from optimizers.runs import bits, refused
from torch import nn

from qlora_kernels import PagedAdamW, PagedLion
from qlora_kernels.optim import binding


def test_a_fixed_sample_of_cases():
    assert not attack(any_state, seed=1, first=0, last=60)


@pytest.mark.slow
def test_cases_of_a_new_seed():
    seed = random.SystemRandom().randrange(10**9)
    print(f"seed {seed}")
    problems = attack(any_state, seed, 0, 5_000)
    assert not problems, f"seed {seed}: {problems}"


@pytest.mark.slow
def test_the_cases_reach_every_kind():
    cases = [any_state.make_case(random.Random(f"1:{i}")) for i in range(3000)]
    text = "; ".join(twist for case in cases for twist in case.twists)
    kinds = any_tensor.ANYTHING.keys() | any_tensor.SAME_VALUES.keys() | any_state.STATE_KINDS.keys()
    assert not [kind for kind in kinds | any_state.NONSENSE.keys() if kind not in text]


def test_a_wrong_step_is_found(monkeypatch):
    """The judge itself: a step that takes one gradient for another."""
    case = any_state.Case("step", PagedAdamW, {}, [torch.ones(7), torch.ones(5)], [torch.ones(7), torch.ones(5)])

    def odd(rng, case, params):
        for p in params:
            p.grad = torch.full_like(p, 3.0)
        return case.grads

    monkeypatch.setattr(any_state, "_gradients", odd)
    assert "differs" in any_state.run(case, random.Random(0))


def test_a_refused_load_that_changes_something_is_found(monkeypatch):
    case = any_state.Case("load", PagedAdamW, {}, [torch.ones(7)], [torch.ones(7)], may_be_refused=True)

    def careless(self, state_dict):
        self.param_groups[0]["lr"] = 5.0
        raise ValueError("no")

    monkeypatch.setattr(PagedAdamW, "load_state_dict", careless)
    assert any_state.run(case, random.Random(0)) == "refused, but changed: settings"


# ------------------------------------------------------------------------------------------------------------- loads


def freed(tensor, offset=5):
    """A tensor within a freed storage, so that its address is not 0."""
    whole = torch.zeros(tensor.numel() + offset, dtype=tensor.dtype)
    view = whole[offset:].view(tensor.shape)
    whole.untyped_storage().resize_(0)
    return view


def stepped(kind=PagedAdamW, steps=2, **options):
    torch.manual_seed(1)
    params = [nn.Parameter(torch.randn(3, 200)), nn.Parameter(torch.randn(5))]
    optimizer = kind(params, **options)
    for _ in range(steps):
        step(optimizer)
    return params, optimizer


def step(optimizer):
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.linspace(-1, 1, p.numel()).view(p.shape)
    optimizer.step()


#: State dicts that used to fail midway, or to end the process.
BAD_STATES = {
    "a count beyond float32": ("step", lambda t: 1e300),
    "a count beyond any float": ("step", lambda t: 10**400),
    "a freed count": ("step", freed),
    "an expanded code": ("exp_avg_code", lambda t: t[:1].expand(t.shape)),
    "a quantized moment": ("exp_avg_sq", lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.quint8)),
    "a freed moment": ("exp_avg", freed),
    "a freed code": ("exp_avg_sq_code", freed),
    "freed constants": ("exp_avg_absmax", freed),
    "constants below 0": ("exp_avg_absmax", lambda t: -1 - t),
    "a fake moment": ("exp_avg", lambda t: any_tensor._fake(random.Random(0), t)),
    "a nested moment": ("exp_avg", lambda t: torch.nested.nested_tensor([t], layout=torch.strided)),
    "bits without a meaning": ("exp_avg", lambda t: torch.zeros(t.shape, dtype=torch.uint8).view(torch.bits8)),
}


@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("bad", BAD_STATES)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:The PyTorch API of nested tensors")
def test_a_refused_state_changes_nothing(bad, state_bits):
    name, change = BAD_STATES[bad]
    _, source = stepped(state_bits=8 if name.endswith(("code", "absmax")) else 32, steps=3)
    saved = copy.deepcopy(source.state_dict())
    saved["param_groups"][0]["lr"] = 7.0
    # In the last parameter's entry, so that the first has been copied by a load that does not check all before.
    saved["state"][1][name] = change(saved["state"][1][name])
    _, ours = stepped(state_bits=state_bits)
    _, twin = stepped(state_bits=state_bits)
    with refused(ours, (ValueError, RuntimeError), "parameter 1"):
        ours.load_state_dict(saved)
    for optimizer in (ours, twin):
        step(optimizer)
    assert any_state._difference(ours, twin) is None


@pytest.mark.parametrize(
    "value", [10**400, [freed(torch.ones(2))], (freed(torch.ones(())), 0.5), freed(torch.ones(())), 0.5j]
)
@pytest.mark.parametrize("name", ["lr", "betas", "eps", "weight_decay"])
def test_settings_that_cannot_be_read_are_refused(name, value):
    _, ours = stepped()
    saved = copy.deepcopy(ours.state_dict())
    saved["param_groups"][0][name] = value
    with refused(ours, ValueError, rf"{name}.* should be"):
        ours.load_state_dict(saved)
    earlier, ours.param_groups[0][name] = ours.param_groups[0][name], value
    with pytest.raises(ValueError, match=rf"{name}.* of group 0 should be"):
        step(ours)
    ours.param_groups[0][name] = earlier
    step(ours)


def test_settings_that_are_nested_too_deeply():
    _, ours = stepped()
    saved = copy.deepcopy(ours.state_dict())
    saved["param_groups"][0]["tag"] = any_state._nested_list(10_000)
    with refused(ours, ValueError, "nested too deeply"):
        ours.load_state_dict(saved)
    ours.param_groups[0]["tag"] = any_state._infinite_list()
    with pytest.raises(ValueError, match="nested too deeply, or in itself"):
        ours.save("nowhere")


@pytest.mark.parametrize("state_bits", [32, 8])
def test_states_of_two_parameters_can_be_exchanged_without_a_copy(state_bits):
    """The state dict's tensors are the arena that the load writes to."""
    torch.manual_seed(2)
    params = [nn.Parameter(torch.randn(300)) for _ in range(2)]
    ours = PagedAdamW(params, state_bits=state_bits)
    for p in params:
        p.grad = torch.randn(300)
    ours.step()
    swapped = ours.state_dict()
    swapped["state"] = {0: swapped["state"][1], 1: swapped["state"][0]}
    expected = [{k: bits(v) for k, v in swapped["state"][i].items()} for i in range(2)]
    ours.load_state_dict(swapped)
    assert [{k: bits(v) for k, v in ours.state[p].items()} for p in params] == expected


@pytest.mark.parametrize(("saved_bits", "into"), [(32, 32), (8, 8), (8, 32)])
def test_states_that_only_have_to_be_copied_are_not_copied_twice(saved_bits, into):
    """Staging refers to the caller's tensors: large states are in memory once, and in the arena."""
    params, ours = stepped(state_bits=into)
    _, source = stepped(state_bits=saved_bits, steps=3)
    saved = copy.deepcopy(source.state_dict())
    entry = saved["state"][0]
    commit = ours._stage({params[0]: {**entry, "step": 3.0}})
    entry["exp_avg" if saved_bits == 32 else "exp_avg_code"].fill_(200)
    before = ours.torch_state_dict()["state"][0]["exp_avg"]
    commit()
    after = ours.torch_state_dict()["state"][0]["exp_avg"]
    assert bits(after) != bits(before)
    if saved_bits == 32:
        assert bits(after) == bits(torch.full((3, 200), 200.0))
    else:
        assert len(after.unique()) <= 3, "each block has one value"


@pytest.mark.parametrize("into", [32, 8])
@pytest.mark.parametrize("form", ["every other element", "embedded", "negative bit"])
def test_codes_in_other_memory_are_the_same(form, into):
    _, source = stepped(state_bits=8)
    saved = copy.deepcopy(source.state_dict())
    for name in ("exp_avg_code", "exp_avg_sq_code"):
        code = saved["state"][0][name]
        odd = torch._neg_view(-code) if form == "negative bit" else any_tensor.SAME_VALUES[form](random.Random(0), code)
        saved["state"][0][name] = odd
    _, ours = stepped(state_bits=into)
    _, twin = stepped(state_bits=into)
    ours.load_state_dict(saved)
    twin.load_state_dict(source.state_dict())
    assert any_state._difference(ours, twin) is None


def test_an_interrupt_waits_until_states_are_copied(monkeypatch):
    _, ours = stepped()
    _, source = stepped(steps=4)
    saved = source.state_dict()
    saved["param_groups"][0]["lr"] = 0.5

    def interrupting(*args, original=binding.state_writes):
        return [lambda: os.kill(os.getpid(), signal.SIGINT), *original(*args)]

    monkeypatch.setattr(binding, "state_writes", interrupting)
    with pytest.raises(KeyboardInterrupt):
        ours.load_state_dict(saved)
    assert ours.param_groups[0]["lr"] == 0.5
    assert any_state._all_bits(ours)["states"] == any_state._all_bits(source)["states"]
    step(ours)


# ------------------------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("offset", [0, 5])
@pytest.mark.parametrize("what", ["parameter 1", "the gradient of parameter 1"])
@pytest.mark.parametrize("kind", [PagedAdamW, PagedLion])
@pytest.mark.parametrize("begun", [False, True])
def test_freed_memory_is_refused_by_name(kind, what, offset, begun):
    params, ours = stepped(kind, steps=2 * begun)
    kept = params[1].detach().clone()
    for p in params:
        p.grad = torch.ones_like(p)
    if what.startswith("the"):
        params[1].grad = freed(params[1], offset)
    else:
        params[1].data = freed(params[1].data, offset)
    before, states = bits(params[0]), [dict(ours.state[p]) for p in params if p in ours.state]
    with pytest.raises(RuntimeError, match=rf"^{what} needs \d+ bytes of memory, and its storage holds 0"):
        ours.step()
    assert bits(params[0]) == before
    assert all(int(state["step"]) == 2 for state in states)
    params[1].data, params[1].grad = kept, torch.ones(5)
    ours.step()
    _, twin = stepped(kind, steps=2 * begun)
    for p in twin.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    twin.step()
    assert any_state._difference(ours, twin) is None


GRADIENTS = {
    "negative": lambda p: torch._neg_view(-p.detach()),
    "imaginary": lambda p: torch.complex(torch.zeros_like(p), -p.detach()).conj().imag,
    "zeros": lambda p: torch._efficientzerotensor(p.shape),
    "expanded": lambda p: torch.ones(1).expand(p.shape),
    "the parameter": lambda p: p.detach(),
    "behind the parameter's first element": lambda p: p.detach().as_strided(p.shape, p.stride(), 1),
}


@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("form", GRADIENTS)
def test_gradients_in_other_memory(form, state_bits):
    n = 20_000  # chunks of several threads
    pair = [torch.linspace(-1, 1, n + 1)[:n].requires_grad_() for _ in range(2)]
    ours, twin = (PagedAdamW([p], lr=0.1, state_bits=state_bits) for p in pair)
    for _ in range(2):
        pair[0].grad = GRADIENTS[form](pair[0])
        pair[1].grad = pair[0].grad.resolve_neg().clone(memory_format=torch.contiguous_format) + 0
        ours.step()
        twin.step()
        assert any_state._difference(ours, twin) is None
        assert bits(pair[0]) == bits(pair[1])


@pytest.mark.parametrize("begun", [False, True])
def test_a_parameter_that_becomes_a_negative_view_is_refused(begun):
    params, ours = stepped(steps=2 * begun)
    params[1].data = torch._neg_view(params[1].data)
    for p in params:
        p.grad = torch.ones_like(p)
    with refused(ours, TypeError, "parameter 1 holds the negatives"):
        ours.step()
    params[1].data = params[1].data.resolve_neg()
    ours.step()


@pytest.mark.parametrize("holder", ["group", "state", "a moment"])
def test_freed_tensors_are_not_written(tmp_path, holder):
    params, ours = stepped()
    ours.save(tmp_path / "file")
    old = (tmp_path / "file").read_bytes()
    if holder == "group":
        ours.param_groups[0]["tag"] = [freed(torch.ones(3))]
    else:
        ours.state[params[1]]["tag" if holder == "state" else "exp_avg"] = freed(params[1])
    with pytest.raises(RuntimeError, match=r"of (group 0|the state of parameter 1) needs .* bytes of memory"):
        ours.save(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == old
    if holder == "a moment":
        with pytest.raises(RuntimeError, match="'exp_avg' of the state of parameter 1 needs"):
            ours.torch_state_dict()
        with pytest.raises(RuntimeError, match="'exp_avg' of parameter 1 needs"):
            step(ours)


def test_a_gradient_in_another_parameters_memory():
    whole = torch.linspace(-1, 1, 600)
    params = [nn.Parameter(whole[:300]), nn.Parameter(whole[300:])]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    params[0].grad, params[1].grad = params[1].detach(), whole[150:450]
    for p, twin in zip(params, twins):
        twin.grad = p.grad.clone()
    PagedAdamW(params, lr=0.1).step()
    PagedAdamW(twins, lr=0.1).step()
    assert [bits(p) for p in params] == [bits(p) for p in twins]


@pytest.mark.parametrize("bad", [torch.ones(0), torch.ones(2), 3.0, freed(torch.ones(1))])
@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
def test_what_a_scaler_hands_over_is_checked(name, bad):
    _, ours = stepped()
    setattr(ours, name, bad)
    with refused(ours, (ValueError, RuntimeError), name):
        ours.step()
    ours.grad_scale = torch._neg_view(torch.tensor(-2.0))
    ours.step()
    _, twin = stepped()
    twin.grad_scale = torch.tensor(2.0)
    twin.step()
    assert any_state._difference(ours, twin) is None


def test_a_whole_optimizer_of_another_version_is_refused():
    _, ours = stepped()
    state = ours.__getstate__()
    assert "Options" not in str(type(state["_options"]))
    for options in (None, {"option_of_later": 3}):
        other = PagedAdamW.__new__(PagedAdamW)
        with pytest.raises(ValueError, match="pickled whole by another version"):
            other.__setstate__({**state, "_options": options})
