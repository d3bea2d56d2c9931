"""PagedAdamW and PagedLion: what they compute, on every engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from optimizers import reference

from qlora_kernels import PagedAdamW, PagedLion
from qlora_kernels.native import extension
from qlora_kernels.ops import backends

#: Sizes around a block of 256, two chunks of 8192, and none.
SHAPES = ((3, 5), (0,), (), (256,), (300, 7), (16384,), (129, 130))


def parameters(dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(1)
    random = (torch.randn(s, generator=generator, device="cpu") for s in shapes)
    return [torch.nn.Parameter(t.to(torch.get_default_device(), dtype)) for t in random]


def set_gradients(params, step, scale=1.0, without=()):
    generator = torch.Generator().manual_seed(100 + step)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator, device="cpu") * 10.0 ** ((i % 5) - 3) * scale
        p.grad = None if i in without else grad.to(p)


def bits(tensor):
    return (
        tensor.detach().cpu().reshape(-1).clone().numpy().tobytes()
        if tensor.dtype != torch.bfloat16
        else bits(tensor.view(torch.int16))
    )


def same_bits(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and bits(a) == bits(b)


def expect(actual, expected):
    """Asserts equal bits, except for the sign of NaN."""
    expected = torch.from_numpy(np.asarray(expected)).to(actual.dtype)
    actual = actual.detach().cpu()
    assert torch.equal(torch.isnan(actual), torch.isnan(expected))
    assert same_bits(torch.nan_to_num(actual), torch.nan_to_num(expected.reshape(actual.shape)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.0, "betas": (0.3, 0.95), "eps": 1e-3},
        {"lr": 3e-2, "betas": (0.0, 0.0)},
    ],
)
def test_adamw_is_scalar_float32(engine, options):
    params = parameters()
    ours = PagedAdamW(params, **options)
    states = [(reference.to_numpy(p), *(np.zeros(p.shape, np.float32) for _ in range(2))) for p in params]
    for step in range(1, 5):
        # The fourth has no gradient in the second step: its count stays behind.
        set_gradients(params, step, without={3} if step == 2 else ())
        ours.step()
        for i, p in enumerate(params):
            if p.grad is not None:
                count = step - 1 if i == 3 and step > 2 else step
                states[i] = reference.adamw(states[i][0], reference.to_numpy(p.grad), *states[i][1:], count, **options)
            expect(p, states[i][0])
    for i, p in enumerate(params):
        expect(ours.state[p]["exp_avg"], states[i][1])
        expect(ours.state[p]["exp_avg_sq"], states[i][2])
        assert ours.state[p]["step"].item() == (3 if i == 3 else 4)


def test_lion_is_scalar_float32(engine):
    params = parameters()
    options = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.99)}
    ours = PagedLion(params, **options)
    states = [(reference.to_numpy(p), np.zeros(p.shape, np.float32)) for p in params]
    for step in range(1, 4):
        set_gradients(params, step)
        ours.step()
        for i, p in enumerate(params):
            states[i] = reference.lion(states[i][0], reference.to_numpy(p.grad), states[i][1], **options)
            expect(p, states[i][0])
            expect(ours.state[p]["exp_avg"], states[i][1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("master", [False, True])
def test_16_bit_parameters(engine, dtype, master):
    params = parameters(dtype)
    ours = PagedAdamW(params, lr=1e-2, master_weights=master)
    states = [(reference.to_numpy(p), *(np.zeros(p.shape, np.float32) for _ in range(2))) for p in params]
    for step in range(1, 4):
        set_gradients(params, step)
        if step == 3:  # user code writes to a parameter
            with torch.no_grad():
                params[4][7] = 3.25
            states[4][0][7] = 3.25
        ours.step()
        for i, p in enumerate(params):
            new, m, v = reference.adamw(states[i][0], reference.to_numpy(p.grad), *states[i][1:], step, lr=1e-2)
            rounded = torch.from_numpy(np.asarray(new)).to(dtype)
            assert same_bits(p.cpu(), rounded)
            states[i] = (np.asarray(new) if master else rounded.float().numpy(), m, v)
            if master:
                expect(ours.state[p]["master"], new)


@pytest.mark.parametrize("kind", [PagedAdamW, PagedLion])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8_bit_states(engine, kind, dtype):
    params = parameters(dtype)
    ours = kind(params, lr=1e-2, state_bits=8)
    names = [moment.name for moment in ours._algorithm.moments]
    tables = {n: extension.native().dynamic_map(n == "exp_avg") for n in names}
    moments = [{n: np.zeros(p.numel(), np.float32) for n in names} for p in params]
    values = [reference.to_numpy(p).reshape(-1) for p in params]
    for step in range(1, 4):
        set_gradients(params, step)
        ours.step()
        for i, p in enumerate(params):
            g, old = reference.to_numpy(p.grad).reshape(-1), moments[i]
            if kind is PagedAdamW:
                new, *updated = reference.adamw(values[i], g, old["exp_avg"], old["exp_avg_sq"], step, lr=1e-2)
            else:
                new, *updated = reference.lion(values[i], g, old["exp_avg"], lr=1e-2)
            values[i] = torch.from_numpy(new).to(dtype).float().numpy()
            assert same_bits(p.cpu().reshape(-1), torch.from_numpy(new).to(dtype))
            for name, value in zip(names, updated):
                if p.numel() == 0:
                    continue
                code, absmax = reference.quantize_states(value, tables[name], name == "exp_avg")
                assert torch.equal(ours.state[p][f"{name}_code"].cpu().reshape(-1), torch.from_numpy(code))
                assert same_bits(ours.state[p][f"{name}_absmax"], torch.from_numpy(absmax))
                constants = np.repeat(absmax, 256)[: len(value)]
                moments[i][name] = np.array(tables[name], np.float32)[code] * constants


def test_8_bit_moments_that_overflow_hold_zeros_or_nan(engine):
    p = torch.nn.Parameter(torch.zeros(1024))
    ours = PagedAdamW([p], state_bits=8)
    grad = torch.zeros(1024)
    grad[0], grad[1] = 3e38, -1.0  # whose square is beyond float32
    grad[300] = float("nan")
    grad[301] = 1e-3
    grad[600] = 1e-30  # whose square is below float32
    p.grad = grad.to(p)
    ours.step()
    state = {k: v.cpu() for k, v in ours.state[p].items()}
    largest = torch.finfo(torch.float32).max
    assert state["exp_avg_sq_absmax"][0] == largest
    assert state["exp_avg_sq_code"][1] == 1, "a second moment does not become zero under a gradient"
    assert state["exp_avg_absmax"][1] > 0, "NaN spoils its own element, not its block"
    assert state["exp_avg_absmax"][3] == state["exp_avg_sq_absmax"][3] == 0
    after = p.detach().cpu()
    assert torch.isnan(after).nonzero().flatten().tolist() == [300]
    assert (after[768:] == 0).all()
    p.grad = torch.ones(1024).to(p)
    ours.step()
    assert torch.isnan(p.detach().cpu()).sum() == 1
    assert all(torch.isfinite(v.float()).all() for v in ours.state[p].values())


def test_the_dynamic_maps():
    signed, unsigned = (torch.tensor(extension.native().dynamic_map(s)) for s in (True, False))
    for table in (signed, unsigned):
        assert len(table.unique()) == 256
        assert (table.diff() > 0).all()
        assert table[-1] == 1
    assert unsigned[0] == 0
    assert torch.equal(signed[:127], -signed[128:255].flip(0))
    # Seven decades, the top one in 64 and 128 parts.
    assert ((signed > 0.1) & (signed < 1)).sum() == 64
    assert ((unsigned > 0.1) & (unsigned < 1)).sum() == 128
    torch.testing.assert_close(unsigned[1], torch.tensor(0.325e-6))


@pytest.mark.parametrize("is_signed", [True, False])
def test_codes_are_the_nearest_entry(isa, is_signed):
    table = extension.native().dynamic_map(is_signed)
    entries = torch.tensor(table)
    middle = ((entries[:-1].double() + entries[1:]) / 2).float()
    generator = torch.Generator().manual_seed(3)
    magnitudes = 10 ** (-9 * torch.rand(20000, generator=generator))
    around = torch.cat([entries, middle, middle.nextafter(torch.tensor(2.0)), middle.nextafter(torch.tensor(-2.0))])
    values = torch.cat([around, magnitudes, -magnitudes if is_signed else magnitudes / 3])
    if not is_signed:
        values = values.abs()
    # A 1 in every block, so that values are not scaled.
    blocks = values[: len(values) // 255 * 255].reshape(-1, 255)
    values = torch.cat([blocks, torch.ones(len(blocks), 1)], 1).reshape(-1)
    code, absmax = backends.CPU.quantize_states(values, is_signed)
    expected, constants = reference.quantize_states(values.numpy(), table, is_signed)
    assert torch.equal(code, torch.from_numpy(expected))
    assert torch.equal(absmax, torch.from_numpy(constants))
    away = (entries[code.long()] - values).abs()
    nearest = (entries[None] - values[:, None]).abs().min(1).values
    raised = (code == 1) & (values > 0) & (not is_signed)
    # Midpoints are rounded to float32.
    assert (away[~raised] <= nearest[~raised] + 2.4e-7 * values[~raised].abs()).all()


def test_gradients_are_clipped_as_torch_does(engine):
    params = parameters()
    clipped = parameters()
    set_gradients(params, 1)
    set_gradients(clipped, 1)
    exact = torch.cat([p.grad.double().flatten() for p in params]).norm().item()
    torch.nn.utils.clip_grad_norm_(clipped, 0.5)
    ours = PagedAdamW(params, max_grad_norm=0.5, lr=0.1, eps=0.1)
    theirs = torch.optim.AdamW(clipped, lr=0.1, eps=0.1)
    before = [p.grad.clone() for p in params]
    ours.step()
    theirs.step()
    assert ours.grad_norm == pytest.approx(exact, rel=1e-6)
    assert all(torch.equal(p.grad, g) for p, g in zip(params, before)), "gradients are read only"
    for a, b in zip(params, clipped):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    set_gradients(params, 2, scale=1e-6)
    states = [(reference.to_numpy(p), reference.to_numpy(p.grad), p) for p in params]
    moments = [tuple(reference.to_numpy(ours.state[p][k]) for k in ("exp_avg", "exp_avg_sq")) for p in params]
    ours.step()
    for (value, g, p), (m, v) in zip(states, moments):
        expect(p, reference.adamw(value, g, m, v, 2, lr=0.1, eps=0.1)[0])  # below the norm nothing is changed


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_steps_with_gradients_that_are_not_finite_are_left_out(engine, bad):
    params = parameters()
    ours = PagedAdamW(params, skip_nonfinite=True)
    set_gradients(params, 1)
    ours.step()
    before = [p.detach().clone() for p in params]
    states = [{k: v.clone() for k, v in ours.state[p].items()} for p in params]
    set_gradients(params, 2)
    params[4].grad[200, 3] = bad
    ours.step()
    ours.step()
    assert ours.skipped_steps == 2
    assert all(same_bits(p.detach(), b) for p, b in zip(params, before))
    for p, saved in zip(params, states):
        assert all(same_bits(ours.state[p][k], saved[k]) for k in saved)
    # Finite ones whose squares overflow float32 are not left out.
    set_gradients(params, 3)
    params[4].grad[200, 3] = 3e30
    ours.step()
    assert ours.skipped_steps == 2
    assert ours.grad_norm == pytest.approx(3e30, rel=1e-6)
    assert all(ours.state[p]["step"] == 2 for p in params)


def test_the_same_bits_again(engine):
    results = []
    for _ in range(2):
        params = parameters(torch.bfloat16)
        ours = PagedAdamW(params, max_grad_norm=0.3, skip_nonfinite=True, state_bits=8, master_weights=True)
        for step in range(3):
            set_gradients(params, step)
            ours.step()
        results.append([bits(t) for p in params for t in (p, *ours.state[p].values())] + [ours.grad_norm])
    assert results[0] == results[1]


@pytest.mark.parametrize("state_bits", [32, 8])
def test_layouts_of_parameters_and_gradients(engine, state_bits):
    dense = torch.randn(2, 3, 8, 9)
    params = [
        torch.nn.Parameter(dense.to(memory_format=torch.channels_last)),
        torch.nn.Parameter(torch.randn(40, 30).t()),
        torch.nn.Parameter(torch.randn(1001)[1:]),  # on 4 bytes
    ]

    def in_memory(tensor):
        """The elements in memory order, which the blocks of 8-bit states follow."""
        return tensor.detach().as_strided((tensor.numel(),), (1,))

    twins = [torch.nn.Parameter(in_memory(p).clone()) for p in params]
    options = {"lr": 0.1, "state_bits": state_bits}
    ours, theirs = PagedAdamW(params, **options), PagedAdamW(twins, **options)
    for step in range(2):
        set_gradients(twins, step)
        for p, q in zip(params, twins):
            grad = torch.empty_like(p)
            in_memory(grad).copy_(q.grad)
            p.grad = grad.contiguous() if step else grad
        assert [p.grad.stride() == p.stride() for p in params] == [not step, not step, True]
        ours.step()
        theirs.step()
    for p, q in zip(params, twins):
        assert torch.equal(in_memory(p), q)
        for name in ("exp_avg", "exp_avg_sq"):
            name += "" if state_bits == 32 else "_code"
            assert ours.state[p][name].stride() == p.stride()
            assert torch.equal(in_memory(ours.state[p][name]), theirs.state[q][name])


def test_agrees_with_torch(engine):
    ours_params, theirs_params = parameters(), parameters()
    ours = PagedAdamW(ours_params, lr=0.01, weight_decay=0.1)
    theirs = torch.optim.AdamW(theirs_params, lr=0.01, weight_decay=0.1)
    for step in range(5):
        set_gradients(ours_params, step)
        set_gradients(theirs_params, step)
        ours.step()
        theirs.step()
    for a, b in zip(ours_params, theirs_params):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_graph_that_saved_a_parameter_notices_the_step(engine):
    w = torch.nn.Parameter(torch.ones(4))
    x = torch.ones(4, requires_grad=True)
    y = (w * x).sum()
    w.grad = torch.ones(4)
    PagedAdamW([w], lr=0.5).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_gradients_that_are_negated_views(engine):
    params = [torch.nn.Parameter(torch.ones(5)) for _ in range(2)]
    params[0].grad = torch._neg_view(torch.ones(5))
    params[1].grad = -torch.ones(5)
    for p in params:
        PagedAdamW([p], lr=0.1).step()
    assert torch.equal(params[0], params[1])
