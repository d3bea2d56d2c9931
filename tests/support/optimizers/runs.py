"""Small trainings with paged optimizers, and what they leave behind, to be compared bit for bit."""

from __future__ import annotations

import contextlib
import resource
import sys

import pytest
import torch
from torch import nn

from qlora_kernels import PagedAdamW, PagedLion

#: Both algorithms, both numbers of bits, with a master and without.
KINDS = {
    "adamw": lambda params, **more: PagedAdamW(params, **{"lr": 1e-2, **more}),
    "adamw-8": lambda params, **more: PagedAdamW(params, **{"lr": 1e-2, "state_bits": 8, **more}),
    "lion": lambda params, **more: PagedLion(params, **{"lr": 1e-3, **more}),
    "lion-8": lambda params, **more: PagedLion(params, **{"lr": 1e-3, "state_bits": 8, **more}),
}


class Net(nn.Module):
    """Two layers, with a parameter of no dimension and one of no elements."""

    def __init__(self, width: int = 40):
        super().__init__()
        self.up = nn.Linear(8, width)
        self.norm = nn.LayerNorm(width)
        self.down = nn.Linear(width, 3)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.none = nn.Parameter(torch.empty(0, 7))

    def forward(self, x):
        return self.down(self.norm(self.up(x)).tanh()) * self.scale + self.none.sum()


#: The device of net()'s parameters, which device_fixture sets.
device = "cpu"


@pytest.fixture(params=KINDS, name="make")
def make_fixture(request):
    """Makes an optimizer of each kind in turn."""
    return KINDS[request.param]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], name="device")
def device_fixture(request, monkeypatch):
    """The models' device: a test with this fixture also runs on a card, if there is one."""
    monkeypatch.setattr(sys.modules[__name__], "device", request.param)
    return request.param


def net(seed: int = 0, dtype: torch.dtype = torch.float32, **more) -> Net:
    torch.manual_seed(seed)
    return Net(**more).to(device, dtype)


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    """The loss on a step's batch."""
    generator = torch.Generator().manual_seed(1000 + step)
    x, y = torch.randn(6, 8, generator=generator), torch.randn(6, 3, generator=generator)
    like = next(p for p in model.parameters() if p.numel())
    return (model(x.to(like)) - y.to(like)).square().mean()


def train(model: nn.Module, optimizer, steps, schedule=None) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()


def trained(make, steps=range(3), dtype=torch.float32, **options):
    model = net(dtype=dtype)
    optimizer = make(model.parameters(), **options)
    train(model, optimizer, steps)
    return model, optimizer


def bits(value):
    """A tensor's dtype, shape and bytes; anything else unchanged."""
    if not isinstance(value, torch.Tensor):
        return value
    flat = value.detach().cpu().clone(memory_format=torch.contiguous_format).reshape(-1)
    return (value.dtype, tuple(value.shape), flat.view(torch.uint8).numpy().tobytes())


def states(optimizer, *without: str) -> list:
    """Each parameter's states, by name, as bits."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [{k: bits(v) for k, v in optimizer.state.get(p, {}).items() if k not in without} for p in params]


def values(optimizer) -> list:
    return [bits(p) for group in optimizer.param_groups for p in group["params"]]


def groups(optimizer) -> list:
    options = [{k: bits(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return [(options[i], [id(p) for p in group["params"]]) for i, group in enumerate(optimizer.param_groups)]


@contextlib.contextmanager
def refused(optimizer, error, match):
    """Asserts that a call raises and changes nothing: no parameter, no state, no setting."""
    before = states(optimizer), values(optimizer), groups(optimizer), optimizer.skipped_steps, optimizer.grad_norm
    with pytest.raises(error, match=match):
        yield
    after = states(optimizer), values(optimizer), groups(optimizer), optimizer.skipped_steps, optimizer.grad_norm
    assert after == before


def assert_close(a: nn.Module, b: nn.Module) -> None:
    """Parameters equal but for the rounding of a few steps."""
    for (name, p), q in zip(a.named_parameters(), b.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def assert_same(a, b) -> None:
    assert values(a) == values(b)
    assert states(a) == states(b)


@contextlib.contextmanager
def limited(what: int, most: int):
    """Limits a resource of this process temporarily."""
    soft, hard = resource.getrlimit(what)
    resource.setrlimit(what, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(what, (soft, hard))
