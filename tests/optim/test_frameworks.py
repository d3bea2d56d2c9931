"""Paged optimizers under GradScaler, the Hugging Face Trainer and Lightning."""

from __future__ import annotations

import contextlib
import copy
import io

import pytest
import torch
from optimizers.runs import (  # noqa: F401 - fixtures
    assert_close,
    assert_same,
    bits,
    device_fixture,
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

from qlora_kernels import PagedAdamW, PagedLion

# ----------------------------------------------------------------------------------------------------------- GradScaler


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("scale", [2.0**16, 2.0**-3])
def test_a_scaler_of_a_power_of_two_changes_nothing(device, make, unscale, scale):
    scaled, unscaled = net(), net()
    options = {"max_grad_norm": 0.25, "skip_nonfinite": True}
    a, b = make(scaled.parameters(), **options), make(unscaled.parameters(), **options)
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
        train(unscaled, b, [step])
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
    model, untouched = net(), net()
    optimizer, same = make(model.parameters(), max_grad_norm=1.0), make(untouched.parameters(), max_grad_norm=1.0)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    for one, group in ((model, optimizer), (untouched, same)):
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
    train(untouched, same, [1])
    assert_same(optimizer, same)
    assert optimizer.grad_norm == same.grad_norm > 0


# ---------------------------------------------------------------------------------------------- frameworks around torch


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


class LightningsWrapper:
    """What lightning.pytorch.core.optimizer.LightningOptimizer does: it is no dependency. Attributes reach the inner
    optimizer by __getattr__."""

    def __init__(self, inner):
        self._optimizer = inner

    def __getattr__(self, name):
        return getattr(self._optimizer, name)

    def step(self, closure=None, **more):
        return self._optimizer.step(closure=closure, **more)


class TwoHalves(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = net(1), net(2)

    def forward(self, x):
        return self.a(x) + self.b(x)


def wrapped_optimizers(model):
    # The first has all parameters in it; half of them are frozen while its arena is made.
    return [
        LightningsWrapper(PagedAdamW(model.parameters(), lr=1e-2)),
        LightningsWrapper(PagedLion(model.b.parameters(), lr=1e-3)),
    ]


def alternate(model, optimizers, steps):
    """Lightning's manual loop with two optimizers: the closure runs forward, zero_grad and backward; the other half of
    the model has requires_grad off meanwhile (toggle_model)."""
    for step in steps:
        active = optimizers[step % 2]
        frozen = list((model.b, model.a)[step % 2].parameters())
        for p in frozen:
            p.requires_grad_(False)

        def closure(step=step, active=active):
            loss = loss_of(model, step)
            active.zero_grad()
            loss.backward()
            return loss

        assert active.step(closure=closure).requires_grad
        for p in frozen:
            p.requires_grad_(True)


def test_lightnings_two_optimizers_step_as_torch_s():
    model, torchs = TwoHalves(), TwoHalves()
    alternate(model, wrapped_optimizers(model), range(8))
    adamw, lion = torch.optim.AdamW(torchs.parameters(), lr=1e-2), PagedLion(torchs.b.parameters(), lr=1e-3)
    alternate(torchs, [adamw, lion], range(8))
    assert_close(model, torchs)


def test_lightnings_checkpoint_goes_on_as_if_it_had_not_ended():
    """A checkpoint is a deep copy of state_dict(), loaded into new optimizers."""
    straight, first, second = TwoHalves(), TwoHalves(), TwoHalves()
    expected = wrapped_optimizers(straight)
    alternate(straight, expected, range(8))
    optimizers = wrapped_optimizers(first)
    alternate(first, optimizers, range(4))
    saved = copy.deepcopy([optimizer.state_dict() for optimizer in optimizers])
    second.load_state_dict(first.state_dict())
    resumed = wrapped_optimizers(second)
    for optimizer, state in zip(resumed, saved):
        optimizer.load_state_dict(state)
    alternate(second, resumed, range(4, 8))
    for a, b in zip(resumed, expected):
        assert values(a) == values(b)
        assert all(got == want for got, want in zip(states(a), states(b)) if want)


@pytest.mark.parametrize("scaled", [False, True])
def test_lightnings_mixed_precision(device, make, scaled):
    """What lightning.pytorch.plugins.MixedPrecision does, with a scaler (16-mixed) and without one (bf16-mixed).

    It clips only where the optimizer does not say that it divides gradients by itself; then it divides them before
    torch.amp.GradScaler would.
    """
    model, by_hand = net(), net()
    optimizer, same = make(model.parameters()), make(by_hand.parameters())
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
        loss_of(by_hand, step).backward()
        nn.utils.clip_grad_norm_(by_hand.parameters(), 0.25)
        same.step()
        assert_same(optimizer, same)
    optimizer.zero_grad()
    scaler.scale(loss_of(model, 3)).backward()
    grads = [bits(p.grad) for p in model.parameters()]
    scaler.step(optimizer)
    assert [bits(p.grad) for p in model.parameters()] == grads, "torch's scaler itself leaves it to the step"
