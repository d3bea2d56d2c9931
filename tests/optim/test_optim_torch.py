"""Paged optimizers among what torch users have: schedulers, GradScaler, closures, Trainer, changes to a model."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import os
import pickle

import optimizer_runs
import pytest
import torch
from optimizer_runs import KINDS, assert_same, bits, groups, loss_of, net, refused, states, train, values
from torch import nn
from torch.optim import lr_scheduler

from qlora_kernels import PagedAdamW, PagedLion


@pytest.fixture(params=KINDS)
def make(request):
    return KINDS[request.param]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Where the models are: the test runs on a card, too, where one is."""
    monkeypatch.setattr(optimizer_runs, "device", request.param)
    return request.param


def close(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


# ----------------------------------------------------------------------------------------------------- schedulers


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
    close(ours, theirs)


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
    close(ours, theirs)


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


# ---------------------------------------------------------------------------------------------- groups and gradients


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
    close(ours, theirs)


def test_named_parameters_keep_their_names():
    model, plain = net(), net()
    optimizer = PagedAdamW(model.named_parameters(), lr=0.01)
    names = [name for name, _ in model.named_parameters()]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names
    other = PagedAdamW(plain.parameters(), lr=0.01)
    train(model, optimizer, range(2))
    train(plain, other, range(2))
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
    close(ours, theirs)
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


# ----------------------------------------------------------------------------------------------------- GradScaler


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("scale", [2.0**16, 2.0**-3])
def test_a_scaler_of_a_power_of_two_changes_nothing(device, make, unscale, scale):
    scaled, plain = net(), net()
    options = {"max_grad_norm": 0.25, "skip_nonfinite": True}
    a, b = make(scaled.parameters(), **options), make(plain.parameters(), **options)
    scaler = torch.amp.GradScaler(device, init_scale=scale, growth_interval=2)
    for step in range(4):
        a.zero_grad()
        scaler.scale(loss_of(scaled, step)).backward()
        if unscale:
            scaler.unscale_(a)
        grads = [bits(p.grad) for p in scaled.parameters()]
        scaler.step(a)
        assert [bits(p.grad) for p in scaled.parameters()] == grads, "gradients are read only"
        scaler.update()
        train(plain, b, [step])
        assert_same(a, b)
        assert a.grad_norm == b.grad_norm > 0.25
    assert scaler.get_scale() == 4 * scale
    assert not hasattr(a, "grad_scale")


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scaler_leaves_out_steps_that_overflow(device, make, unscale, dtype):
    model = net(dtype=dtype)
    optimizer = make(model.parameters(), master_weights=True)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    train(model, optimizer, [0])
    before = states(optimizer), values(optimizer)
    optimizer.zero_grad()
    scaler.scale(loss_of(model, 1)).backward()
    model.up.weight.grad[3, 2] = float("inf")
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert (states(optimizer), values(optimizer)) == before
    assert optimizer.skipped_steps == 1
    assert scaler.get_scale() == 512
    optimizer.zero_grad()
    scaler.scale(loss_of(model, 2)).backward()
    scaler.step(optimizer)
    assert optimizer.skipped_steps == 1
    assert values(optimizer) != before[1]


@pytest.mark.parametrize("unscale", [False, True])
def test_a_step_that_raises_leaves_no_scale_behind(device, make, unscale):
    model, plain = net(), net()
    optimizer, same = make(model.parameters(), max_grad_norm=1.0), make(plain.parameters(), max_grad_norm=1.0)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    for one, group in ((model, optimizer), (plain, same)):
        train(one, group, [0])
        group.zero_grad()
    scaler.scale(loss_of(model, 1)).backward()
    if unscale:
        scaler.unscale_(optimizer)
    betas, optimizer.param_groups[0]["betas"] = optimizer.param_groups[0]["betas"], (1.0, 1.0)
    with refused(optimizer, ValueError, r"betas\[0\] of group 0 should be a finite number at least 0 and below 1"):
        scaler.step(optimizer)
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")
    optimizer.param_groups[0]["betas"] = betas
    scaler.step(optimizer)
    train(plain, same, [1])
    assert_same(optimizer, same)
    assert optimizer.grad_norm == same.grad_norm > 0


# ----------------------------------------------------------------------------------------- frameworks around torch


def test_huggingface_trainer_trains_saves_and_resumes(tmp_path):
    transformers = pytest.importorskip("transformers")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net(1)

        def forward(self, x, labels=None):
            out = self.net(x)
            return {"loss": (out - labels).square().mean(), "logits": out}

    generator = torch.Generator().manual_seed(5)
    data = [
        {"x": torch.randn(8, generator=generator), "labels": torch.randn(3, generator=generator)} for _ in range(24)
    ]

    def run(folder, resume=None, stop=None):
        model = Model()
        optimizer = PagedAdamW(model.parameters(), lr=1e-2, state_bits=8)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / folder),
            per_device_train_batch_size=4,
            max_steps=6,
            save_steps=3,
            max_grad_norm=1.0,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
        )
        schedule = lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=6)
        trainer = transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, schedule))
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train(resume_from_checkpoint=resume)
        return optimizer

    straight = run("a")
    assert straight.state[straight.param_groups[0]["params"][0]]["step"] == 6
    resumed = run("b", resume=str(tmp_path / "a" / "checkpoint-3"))
    assert_same(resumed, straight)
    assert resumed.arena_bytes > 0


def test_lightning():
    """Lightning is not a dependency; this does what its optimizer wrapper and its manual loop do.

    Of lightning.pytorch.core.optimizer.LightningOptimizer: step(closure=...) where the closure runs forward, zero_grad
    and backward; the parameters of the other optimizer have requires_grad off meanwhile (toggle_model); attributes
    reach the inner optimizer by __getattr__. Checkpoints are deep copies of state_dict(), loaded into new optimizers.
    """

    class Wrapper:
        def __init__(self, inner):
            self._optimizer = inner

        def __getattr__(self, name):
            return getattr(self._optimizer, name)

        def step(self, closure=None, **more):
            return self._optimizer.step(closure=closure, **more)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = net(1), net(2)

        def forward(self, x):
            return self.a(x) + self.b(x)

    def begin(model):
        # The first has all parameters in it; half of them are frozen while its arena is made.
        kinds = PagedAdamW(model.parameters(), lr=1e-2), PagedLion(model.b.parameters(), lr=1e-3)
        return [Wrapper(kind) for kind in kinds]

    def go_on(model, optimizers, steps):
        for step in steps:
            active = optimizers[step % 2]
            others = [p for p in model.parameters() if not any(p is q for q in model_half(model, step))]
            for p in others:
                p.requires_grad_(False)

            def closure(step=step, active=active):
                loss = loss_of(model, step)
                active.zero_grad()
                loss.backward()
                return loss

            assert active.step(closure=closure).requires_grad
            for p in others:
                p.requires_grad_(True)

    def model_half(model, step):
        return list((model.a, model.b)[step % 2].parameters())

    straight, first = Two(), Two()
    expected = begin(straight)
    go_on(straight, expected, range(8))
    optimizers = begin(first)
    go_on(first, optimizers, range(4))
    saved = copy.deepcopy([optimizer.state_dict() for optimizer in optimizers])
    second = Two()
    second.load_state_dict(first.state_dict())
    resumed = begin(second)
    for optimizer, state in zip(resumed, saved):
        optimizer.load_state_dict(state)
    go_on(second, resumed, range(4, 8))
    for a, b in zip(resumed, expected):
        assert values(a) == values(b)
        assert all(got == want for got, want in zip(states(a), states(b)) if want)
    theirs = Two()
    go_on(
        theirs, [torch.optim.AdamW(theirs.parameters(), lr=1e-2), PagedLion(theirs.b.parameters(), lr=1e-3)], range(8)
    )
    close(straight, theirs)


@pytest.mark.parametrize("scaled", [False, True])
def test_lightnings_mixed_precision(device, make, scaled):
    """What lightning.pytorch.plugins.MixedPrecision does, with a scaler (16-mixed) and without one (bf16-mixed).

    It clips only where the optimizer does not say that it divides gradients by itself; then it divides them before
    torch.amp.GradScaler would.
    """
    model, plain = net(), net()
    optimizer, same = make(model.parameters()), make(plain.parameters())
    scaler = torch.amp.GradScaler(device, init_scale=1024.0, enabled=scaled)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        assert not getattr(optimizer, "_step_supports_amp_scaling", False)
        if scaled:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        scaler.step(optimizer)
        scaler.update()
        same.zero_grad()
        loss_of(plain, step).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.25)
        same.step()
        assert_same(optimizer, same)
    optimizer.zero_grad()
    scaler.scale(loss_of(model, 3)).backward()
    grads = [bits(p.grad) for p in model.parameters()]
    scaler.step(optimizer)
    assert [bits(p.grad) for p in model.parameters()] == grads, "torch's scaler itself leaves it to the step"


# ---------------------------------------------------------------------------------------------- copies and changes


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
    close(ours, theirs)
    assert a.state[ours.up.weight]["step"] == b.state[theirs.up.weight]["step"] == 4
    assert a.state[ours.down.weight]["step"] == b.state[theirs.down.weight]["step"] == 4


def test_a_parameter_that_is_frozen_keeps_its_states_when_the_arena_is_made_anew(make):
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
    # What comes next may lie where the last one lay, so that the address says nothing.
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
    # Blocks of 8-bit states run through memory; their codes were chosen anew.
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
    """Gradients in the parameters' order in memory, as backward makes them, or in the usual one."""
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        grad = torch.randn(p.shape, generator=generator)
        p.grad = grad if contiguous else torch.empty_like(p).copy_(grad)
    optimizer.step()


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
    # As programs do that add or prune rows in mid-training.
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


def test_states_taken_away_begin_anew(make):
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
        with refused(optimizer, ValueError, rf"'exp_avg' of parameter 0 is \[1000\] there and \[{size}\] here"):
            optimizer.step()
    p.data = old  # the gradient is still that of the larger one
    with refused(optimizer, RuntimeError, r"gradient of parameter 0, .* has another shape, \[3000\]"):
        optimizer.step()
    p.grad = torch.ones(1000)
    optimizer.step()
    assert optimizer.state[p]["step"] == 2


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


# ------------------------------------------------------------------------------------------------------ convergence


@pytest.mark.slow
@pytest.mark.parametrize("kind", [PagedAdamW, PagedLion])
def test_8_bits_learn_as_well_as_32(kind):
    # The next byte of Python's library from the eight before; wide enough for rows of several blocks.
    with open(os.__file__, "rb") as file:
        text = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8).long() % 128

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(128, 16)
            self.up, self.norm, self.down = nn.Linear(128, 192), nn.LayerNorm(192), nn.Linear(192, 128)

        def forward(self, x):
            return self.down(self.norm(self.up(self.embed(x).flatten(1)).relu()))

    final = {}
    for state_bits in (32, 8):
        torch.manual_seed(0)
        model, generator = Model(), torch.Generator().manual_seed(1)
        optimizer = kind(model.parameters(), lr=3e-3 if kind is PagedAdamW else 3e-4, state_bits=state_bits)
        losses = []
        for _ in range(400):
            at = torch.randint(len(text) - 9, (128, 1), generator=generator)
            window = text[at + torch.arange(9)]
            loss = nn.functional.cross_entropy(model(window[:, :8]), window[:, 8])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        final[state_bits] = sum(losses[-100:]) / 100
        assert final[state_bits] < 0.6 * losses[0], "it learns"
    assert final[8] == pytest.approx(final[32], rel=0.01)


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
