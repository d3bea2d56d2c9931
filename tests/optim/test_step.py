"""Steps of a paged optimizer with schedulers, groups, gradients, closures and hooks, as torch users have them."""

from __future__ import annotations

import pytest
import torch
from optimizers.runs import assert_close, assert_same, bits, groups, loss_of, make_fixture, net, states, train, values  # noqa: F401 - fixtures
from torch import nn
from torch.optim import lr_scheduler

from qlora_kernels import PagedAdamW

# ----------------------------------------------------------------------------------------------------------- schedulers


SCHEDULERS = {
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "cosine": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "chained": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.05, total_steps=10),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_do_what_they_do_to_torch(name):
    ours, theirs = net(), net()
    a, b = PagedAdamW(ours.parameters(), lr=0.02), torch.optim.AdamW(theirs.parameters(), lr=0.02)
    schedules = SCHEDULERS[name](a), SCHEDULERS[name](b)
    seen = set()
    for step in range(8):
        train(ours, a, [step], schedules[0])
        train(theirs, b, [step], schedules[1])
        assert a.param_groups[0]["lr"] == b.param_groups[0]["lr"]
        assert a.param_groups[0]["betas"] == b.param_groups[0]["betas"]
        seen.add((a.param_groups[0]["lr"], a.param_groups[0]["betas"]))
    assert len(seen) > 2
    assert (len({betas for _, betas in seen}) > 2) == (name == "one cycle")
    assert_close(ours, theirs)


def test_a_plateau_lowers_lr():
    model = net()
    optimizer = PagedAdamW(model.parameters(), lr=0.02)
    schedule = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1)
    for _ in range(3):
        schedule.step(1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.02 * 0.1**2)
    train(model, optimizer, [0])
    moved = net()
    train(moved, PagedAdamW(moved.parameters(), lr=optimizer.param_groups[0]["lr"]), [0])
    assert values(optimizer) == [bits(p) for p in moved.parameters()]


PAUSES = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: step % 2),
    "warmup from 0": lambda o: lr_scheduler.LambdaLR(o, lambda step: step / 4),
    "down to 0": lambda o: lr_scheduler.PolynomialLR(o, 4),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 2),
    "below 0 by rounding": lambda o: lr_scheduler.LinearLR(o, 0.1, 0.0, 5),
}


@pytest.mark.parametrize("name", PAUSES)
def test_schedulers_that_come_to_0(tmp_path, name):
    ours, theirs = net(), net()
    a = PagedAdamW(ours.parameters(), lr=3e-4, weight_decay=0.1)
    b = torch.optim.AdamW(theirs.parameters(), lr=3e-4, weight_decay=0.1)
    schedules = PAUSES[name](a), PAUSES[name](b)
    rates = []
    for step in range(8):
        before = values(a)
        rates.append(a.param_groups[0]["lr"])
        train(ours, a, [step], schedules[0])
        train(theirs, b, [step], schedules[1])
        assert (values(a) == before) == (rates[-1] <= 0), "moments go on, parameters stay"
        a.save(tmp_path / "optimizer.pt")
        a.load(tmp_path / "optimizer.pt")
    assert min(rates) <= 0 < max(rates)
    assert (min(rates) < 0) == (name == "below 0 by rounding")
    assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_lr_as_a_tensor(make, shape):
    ours, same = net(), net()
    optimizer = make(ours.parameters(), lr=torch.full(shape, 0.0078125))
    number = make(same.parameters(), lr=0.0078125)
    train(ours, optimizer, range(2))
    train(same, number, range(2))
    optimizer.param_groups[0]["lr"].fill_(0.25)
    number.param_groups[0]["lr"] = 0.25
    train(ours, optimizer, range(2, 4))
    train(same, number, range(2, 4))
    assert_same(optimizer, number)


# ------------------------------------------------------------------------------------------------- groups and gradients


def test_groups_have_settings_of_their_own():
    ours, theirs = net(), net()
    both = []
    for model in (ours, theirs):
        decay = [p for p in model.parameters() if p.ndim == 2]
        rest = [p for p in model.parameters() if p.ndim != 2]
        both.append([{"params": decay, "weight_decay": 0.3, "betas": (0.5, 0.9)}, {"params": rest, "lr": 0.1}])
    a = PagedAdamW(both[0], lr=0.02, weight_decay=0, eps=1e-4)
    b = torch.optim.AdamW(both[1], lr=0.02, weight_decay=0, eps=1e-4)
    train(ours, a, range(4))
    train(theirs, b, range(4))
    assert_close(ours, theirs)


def test_named_parameters_keep_their_names():
    model, unnamed = net(), net()
    optimizer = PagedAdamW(model.named_parameters(), lr=0.01)
    names = [name for name, _ in model.named_parameters()]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names
    other = PagedAdamW(unnamed.parameters(), lr=0.01)
    train(model, optimizer, range(2))
    train(unnamed, other, range(2))
    assert_same(optimizer, other)
    other.load_state_dict(optimizer.state_dict())
    assert other.state_dict()["param_groups"][0]["param_names"] == names


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(make, set_to_none):
    model = net()
    optimizer = make(model.parameters(), weight_decay=0.0)
    train(model, optimizer, [0])
    optimizer.zero_grad(set_to_none=set_to_none)
    before = states(optimizer)
    assert all((p.grad is None) if set_to_none else (p.grad == 0).all() for p in model.parameters())
    optimizer.step()
    # Gradients of zero are gradients: moments decay. None means that nothing is done.
    assert (states(optimizer) == before) == set_to_none


def test_without_any_gradient_nothing_is_made_or_done(make):
    model = net()
    optimizer = make(model.parameters())
    before = values(optimizer)
    assert optimizer.step() is None
    assert optimizer.step(lambda: 7) == 7
    assert values(optimizer) == before
    assert optimizer.arena_bytes == optimizer.resident_bytes() == 0
    assert not optimizer.state
    optimizer.page_out()
    optimizer.page_in()


def test_parameters_without_a_gradient_in_some_steps():
    ours, theirs = net(), net()
    a, b = PagedAdamW(ours.parameters(), lr=0.02), torch.optim.AdamW(theirs.parameters(), lr=0.02)
    for step in range(6):
        for model, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            for i, p in enumerate(model.parameters()):
                if (step + i) % 3 == 0:
                    p.grad = None
            optimizer.step()
    assert_close(ours, theirs)
    assert [a.state[p]["step"].item() for p in ours.parameters()] == [b.state[p]["step"] for p in theirs.parameters()]


def test_only_parameters_of_no_elements(make):
    p = nn.Parameter(torch.empty(0, 3))
    optimizer = make([p], max_grad_norm=1.0)
    for _ in range(2):
        p.grad = torch.empty(0, 3)
        optimizer.step()
    assert optimizer.state[p]["step"] == 2
    assert optimizer.grad_norm == 0


def test_closures_run_with_gradients_before_the_step(make):
    ours, same = net(), net()
    a, b = make(ours.parameters()), make(same.parameters())

    def closure():
        assert torch.is_grad_enabled()
        a.zero_grad()
        loss = loss_of(ours, 0)
        loss.backward()
        return loss

    with torch.no_grad():
        returned = a.step(closure)
    train(same, b, [0])
    assert returned.item() == loss_of(net(), 0).item()
    assert_same(a, b)


def test_hooks_of_a_step(make):
    model, called = net(), []
    optimizer = make(model.parameters())
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    train(model, optimizer, range(2))
    assert called == ["before", "after"] * 2


def test_tied_parameters_are_stepped_once(make):
    class Tied(nn.Module):
        def __init__(self, tie):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            if tie:
                self.b.weight = self.a.weight

    model = Tied(True)
    optimizer = make(model.parameters())
    assert len(optimizer.param_groups[0]["params"]) == 3
    model.b(model.a(torch.ones(2, 8))).sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    single = Tied(True)
    other = make(single.parameters())
    for p, grad in zip(single.parameters(), grads):
        p.grad = grad
    other.step()
    assert model.a.weight is model.b.weight
    assert_same(optimizer, other)
    assert optimizer.state[model.b.weight]["step"] == 1
