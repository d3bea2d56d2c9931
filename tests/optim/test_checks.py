"""Settings, options, parameters and gradients that a paged optimizer refuses without changing anything."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from optimizers.runs import bits, loss_of, make_fixture, net, refused, states, train, trained, values  # noqa: F401 - fixtures
from torch import nn

from qlora_kernels import PagedAdamW, PagedLion

BAD_GROUPS = [
    *[({"lr": lr}, "lr should be a finite number at least 0") for lr in (-1, -1e-9, float("nan"), float("inf"))],
    *[({"lr": lr}, "lr should be a finite number at least 0") for lr in ("0.1", None, True, 1j, torch.ones(2))],
    ({"lr": torch.tensor(-1.0)}, "lr should be a finite number at least 0"),
    *[({"betas": (beta, 0.9)}, r"betas\[0\] should be") for beta in (1.0, -0.1, float("nan"), "a", None)],
    *[({"betas": (0.9, beta)}, r"betas\[1\] should be") for beta in (1.0, -0.1, float("nan"), "a", None)],
    *[({"betas": betas}, "betas should be two numbers") for betas in (0.9, (0.9,), (0.9, 0.9, 0.9), "ab", None)],
    *[({"weight_decay": decay}, "weight_decay should be") for decay in (-1, float("nan"), None)],
]
BAD_EPS = [({"eps": eps}, "eps should be") for eps in (-1, float("nan"), float("inf"), None)]


@pytest.mark.parametrize("kind", [PagedAdamW, PagedLion])
def test_settings_out_of_range(kind):
    for options, message in BAD_GROUPS + BAD_EPS * (kind is PagedAdamW):
        with pytest.raises(ValueError, match=message):
            kind(net().parameters(), **options)
        model, optimizer = trained(kind)
        with refused(optimizer, ValueError, message):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], **options})
        saved = copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][0].update(options)
        with refused(optimizer, ValueError, message):
            optimizer.load_state_dict(saved)
        train(model, optimizer, [3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *[({"state_bits": b}, "state_bits should be 32 or 8") for b in (16, 0, None, "8", 8.0, np.int64(16))],
        *[({"max_grad_norm": norm}, "max_grad_norm should be") for norm in (0, -1, float("nan"), float("inf"), "1")],
        *[({"page_budget": budget}, "page_budget should be") for budget in (0, -1, 1.5, True, "1")],
        ({"page_file": ""}, "page_file should be a folder, found ''"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        PagedAdamW(net().parameters(), **options)


@pytest.mark.parametrize("name", ["master_weights", "skip_nonfinite"])
def test_options_that_are_not_booleans(name):
    for value in ("no", 1, None, torch.ones(1)):
        with pytest.raises(TypeError, match=f"{name} should be True or False, found"):
            PagedAdamW(net().parameters(), **{name: value})
    PagedAdamW(net().parameters(), **{name: np.True_})


def test_options_in_numpy_numbers():
    model, optimizer = trained(PagedAdamW, state_bits=np.int64(8), page_budget=np.int32(1 << 20))
    assert "exp_avg_code" in optimizer.state[model.scale]
    copied = copy.deepcopy(optimizer)._options
    assert (type(copied.state_bits), type(copied.page_budget)) == (int, int)


NOT_FINITE = (float("nan"), float("inf"), torch.tensor(float("nan")), None, "much", torch.ones(2))
LATER = {
    "lr": (-1e-9, -1, torch.tensor(-0.5), *NOT_FINITE),
    "weight_decay": (-1e-9, *NOT_FINITE),
    "betas": ((1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, float("nan")), (0.9,), (0.9, 0.9, 0.9), 0.9, None),
    "eps": (-1e-9, *NOT_FINITE),
    "maximize": (True,),
    "amsgrad": (True,),
}


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("name", LATER)
def test_settings_that_go_out_of_range_are_refused_at_the_step(make, name, begun):
    model, optimizer = trained(make, range(1) if begun else ())
    second = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [second]})
    second.grad = torch.ones(3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    group = optimizer.param_groups[1]
    if name == "eps" and "eps" not in group:
        return  # Lion has none
    for bad in LATER[name]:
        earlier = dict(group)
        group[name] = bad
        with refused(optimizer, ValueError, rf"{name}(\[[01]\])?(=True)? of group 1 (should be|is not supported)"):
            optimizer.step()
        group.clear()
        group.update(earlier)
    assert bool(states(optimizer)[0]) == begun
    before = values(optimizer)
    optimizer.step()
    assert values(optimizer) != before


def test_without_a_gradient_settings_do_not_matter(make):
    model, optimizer = trained(make)
    before = states(optimizer), values(optimizer)
    optimizer.param_groups[0]["lr"] = -1.0
    optimizer.zero_grad()
    optimizer.step()
    assert (states(optimizer), values(optimizer)) == before
    with pytest.raises(ValueError, match=r"lr of group 0 should be a finite number at least 0, found -1\.0"):
        train(model, optimizer, [3])


def test_parameters_twice():
    model, optimizer = trained(PagedAdamW)
    p = model.up.weight
    with pytest.raises(ValueError, match="more than one parameter group"):
        PagedAdamW([{"params": [p]}, {"params": [p]}])
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match="more than once"):
        PagedAdamW([p, p])
    with refused(optimizer, ValueError, "more than one parameter group"):
        optimizer.add_param_group({"params": [p]})
    train(model, optimizer, [3])


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_parameters_without_kernels(dtype):
    bad = nn.Parameter(torch.ones(3, dtype=dtype))
    with pytest.raises(TypeError, match=f"parameter 1 of the group is {dtype}; only float32, bfloat16 and float16"):
        PagedAdamW([nn.Parameter(torch.ones(3)), bad])
    model, optimizer = trained(PagedAdamW)
    with refused(optimizer, TypeError, f"{dtype}"):
        optimizer.add_param_group({"params": [bad]})
    train(model, optimizer, [3])


def test_parameters_that_are_not_dense():
    with pytest.raises(TypeError, match="only dense"):
        PagedAdamW([nn.Parameter(torch.eye(3).to_sparse())])
    for holes in (torch.ones(6, 6)[:, ::2], torch.ones(1).expand(6)):
        with pytest.raises(TypeError, match="has holes or overlaps"):
            PagedAdamW([nn.Parameter(holes)])


def test_a_model_that_becomes_float64(make):
    model, optimizer = trained(make)
    model.double()
    with refused(optimizer, TypeError, "float64; only float32"):
        train(model, optimizer, [3])
    model.float()
    train(model, optimizer, [3])
    assert optimizer.state[model.scale]["step"] == 4


def test_a_model_without_memory():
    model = nn.Linear(3, 3, device="meta")
    optimizer = PagedAdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="parameters on meta cannot be optimized"):
        optimizer.step()


def test_parameters_on_two_devices(make):
    far = nn.Parameter(torch.ones(3, device="meta"))
    with pytest.raises(ValueError, match="on one device, found cpu, meta; use an optimizer for each device"):
        make([nn.Parameter(torch.ones(3)), far])
    model, optimizer = trained(make)
    with refused(optimizer, ValueError, "on one device, found cpu, meta"):
        optimizer.add_param_group({"params": [far]})
    far.requires_grad_(False)
    optimizer.add_param_group({"params": [far]})
    far.requires_grad_(True)
    far.grad = torch.ones(3, device="meta")
    before = states(optimizer), [bits(p) for p in model.parameters()]
    with pytest.raises(ValueError, match="on one device, found cpu, meta"):
        optimizer.step()
    assert (states(optimizer), [bits(p) for p in model.parameters()]) == before
    far.grad = None
    train(model, optimizer, [3])


def test_sparse_gradients(make):
    model, embedding = net(), nn.Embedding(5, 4, sparse=True)
    optimizer = make([*model.parameters(), *embedding.parameters()])
    train(model, optimizer, range(2))
    loss_of(model, 2).backward()
    embedding(torch.tensor([1, 2])).sum().backward()
    with refused(optimizer, RuntimeError, r"gradient of parameter 8, of shape \[5, 4\], is sparse"):
        optimizer.step()
    embedding.weight.grad = embedding.weight.grad.to_dense()
    optimizer.step()
    assert optimizer.state[embedding.weight]["step"] == 1


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float64, torch.float16])
def test_gradients_of_another_dtype(make, dtype):
    p = nn.Parameter(torch.ones(300, dtype=dtype))
    p.grad = torch.ones(300, dtype=dtype)
    p.data = torch.ones(300)  # beneath its gradient
    first = nn.Parameter(torch.ones(300))
    optimizer = make([first, p])
    first.grad = torch.ones(300)
    for _ in range(2):
        before = bits(first), bits(p)
        with pytest.raises(RuntimeError, match=f"gradient of parameter 1, .* is {dtype}, the parameter torch.float32"):
            optimizer.step()
        assert (bits(first), bits(p)) == before
        assert all(state["step"] == 0 for state in optimizer.state.values())
    p.grad = torch.ones(300)
    optimizer.step()
    assert bits(first) == bits(p) != before[0]


def test_gradients_without_memory_of_their_own_are_refused():
    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            if function in (torch.ops.aten.empty_like.default, torch.ops.aten.detach.default):
                return torch.empty(args[0].shape, **{k: v for k, v in (kwargs or {}).items() if k == "device"})
            raise NotImplementedError(str(function))

    p = nn.Parameter(torch.ones(4))
    ours = PagedAdamW([p])
    p.grad = torch.ones(4)
    ours.step()
    p.grad = None
    p.grad = Wrapper(torch.ones(4))
    with pytest.raises(TypeError, match="no memory of its own"):
        ours.step()
