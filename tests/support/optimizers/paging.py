"""Small steps of paged optimizers on the emulator, which knows on which side each page lies."""

from __future__ import annotations

import gc

import pytest
import torch
from emulated import emulated, paging
from emulated import module as emulator

from qlora_kernels.optim.arena import layout

#: Small pages, so that small arenas have many of them.
PAGE = 4096


STRICT = {"forbid_faults": True, "page_bytes": PAGE}


#: Several chunks of 8192 with an odd end, two with one, less than a block of 256, and a little more.
SIZES = (40_000, 10, 300, 24_576, 9_000, 40_001)


def parameters(dtype=torch.float32, sizes=SIZES):
    generator = torch.Generator().manual_seed(2)
    return [torch.nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for n in sizes]


def steps(optimizer, params, count=3, first=0):
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def everything(optimizer, params):
    """Parameters and states, as bytes."""
    optimizer.state_dict()  # waits for copies in flight
    tensors = [t for p in params for t in (p.detach(), *optimizer.state[p].values())]
    return [t.reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors]


def least(kind, params, **options):
    """The smallest budget that a step can run with."""
    probe = kind(params, page_budget=1, **options)
    with pytest.raises(ValueError, match=r"page_budget should be at least (\d+) bytes") as raised:
        steps(probe, params, 1)
    return int(str(raised.value).split("at least ")[1].split()[0])


@pytest.fixture(autouse=True, name="_small_pages")
def small_pages_fixture(monkeypatch):
    monkeypatch.setattr(layout, "PAGE", PAGE)


LANDINGS = ("earliest", "latest", "random")


@pytest.fixture(params=LANDINGS, name="landing")
def landing_fixture(request):
    """The emulator, with prefetched pages landing as early or as late as the events permit, or at random."""
    with emulated("forward", landing=request.param, **STRICT):
        gc.collect()
        emulator().reset_paging()
        assert paging()["resident"] == 0, "arenas are freed with their optimizers"
        yield request.param
