"""A mixture's products on a CUDA device (csrc/cuda/linear/grouped.cuh): results, launches, who reads the offsets."""

from __future__ import annotations

import itertools

import pytest
import torch
from contract import assert_within_contract, relative_error
from emulated import counted, emulated
from engines import ORDERS

from qlora_kernels import ops
from qlora_kernels.formats.nf4_stack import quantize_stack
from qlora_kernels.ops import backends
from qlora_kernels.ops.weight import Operand

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
#: Rows of each expert: with and without rows at either end; one with all; several tiles of 64 and 128, and tails;
#: rows that end on a tile's edge; more experts than rows. Up to 16 rows for each on average tiles have 16.
ROWS = ((0, 3, 130, 0, 1, 66), (0, 0, 193, 0), (128, 64, 0, 128), (1, 0) * 9, (5, 0, 33, 0, 16))


def stack_of(experts: int, n: int, k: int, double_quant: bool = True):
    """Experts that differ in scale."""
    return quantize_stack(torch.randn(experts, n, k) * torch.logspace(-1, 1, experts).view(-1, 1, 1), double_quant)


def offsets_of(rows) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(rows)])


def per_expert(offsets, left, right):
    """Each expert's rows of ``left`` times its matrix of ``right`` [experts, ...], one below the other."""
    return torch.cat([left[b:t] @ right[e] for e, (b, t) in enumerate(itertools.pairwise(offsets.tolist()))])


def over_rows(offsets, left, right):
    """[experts, ...]: the transpose of each expert's rows of ``left``, times those of ``right``."""
    return torch.stack([left[b:t].T @ right[b:t] for b, t in itertools.pairwise(offsets.tolist())])


def case_of(engine: str, index: int) -> tuple[tuple[int, ...], ...]:
    """On the emulator, each order takes other rows of the list."""
    return ROWS if engine == "cuda" else ROWS[(ORDERS.index(engine.removeprefix("emulated-")) + index) % 3 :: 3]


#: N and K: of the tensor cores, a tile and less, tails both ways; of the float32 units, K of no whole blocks.
SHAPES = ((136, 128), (77, 192), (34, 100))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_expert_keeps_the_contract(cuda_engine, shape, dtype):
    n, k = shape
    index = SHAPES.index(shape) + DTYPES.index(dtype)
    for rows in case_of(cuda_engine, index):
        stack, offsets, m = stack_of(len(rows), n, k, index % 2 == 0), offsets_of(rows), sum(rows)
        dense, unrounded = stack.dequantize(dtype), stack.dequantize(torch.float32).double()
        x, dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
        y, _ = ops.linear_grouped_forward(x, *stack.pieces, offsets, n, None, None, None, 1.0)
        rest = (None, None, None, None, 1.0, True, False, False)
        dx, *_ = ops.linear_grouped_backward(dy, *stack.pieces, offsets, k, *rest)
        for name, actual, left, W, exact in (
            ("y", y, x, dense.mT, unrounded.mT),
            ("dx", dx, dy, dense, unrounded),
        ):
            rounded = per_expert(offsets, left, W)
            wanted = per_expert(offsets, left.double(), exact)
            assert_within_contract(actual, rounded, wanted, f"{cuda_engine} {name} {dtype} {rows} N={n} K={k}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [3, 16, 65])
def test_adapters_and_biases(cuda_engine, r, dtype):
    n, k, scaling = (72, 128, 0.7) if r != 3 else (34, 100, 0.7)
    for rows in case_of(cuda_engine, r):
        stack, offsets, m = stack_of(len(rows), n, k), offsets_of(rows), sum(rows)
        experts = len(rows)
        W = stack.dequantize(dtype).double()
        x, dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
        wide = torch.float32 if r == 16 else dtype
        A, B = torch.randn(experts, r, k).to(wide), torch.randn(experts, n, r).to(wide)
        bias = torch.randn(experts, n).to(dtype if r == 65 else torch.float32)
        y, u = ops.linear_grouped_forward(x, *stack.pieces, offsets, n, bias, A, B, scaling)
        rest = (x, u, A, B, scaling, True, True, True)
        dx, dA, dB = ops.linear_grouped_backward(dy, *stack.pieces, offsets, k, *rest)
        x64, dy64, A64, B64 = (t.double() for t in (x, dy, A, B))
        v64 = scaling * per_expert(offsets, dy64, B64)
        counts = torch.tensor(rows)
        wanted_y = per_expert(offsets, x64, W.mT + scaling * A64.mT @ B64.mT)
        wanted_y += bias.double().repeat_interleave(counts, dim=0)
        for name, actual, wanted in (
            ("y", y, wanted_y),
            ("dx", dx, per_expert(offsets, dy64, W) + per_expert(offsets, v64, A64)),
            ("dA", dA, over_rows(offsets, v64, x64)),
            ("dB", dB, over_rows(offsets, dy64, u.double())),
        ):
            error = relative_error(actual, wanted)
            limit = 1e-5 if dtype is torch.float32 else 1e-2
            assert error < limit, f"{cuda_engine} {name} {rows} r={r}: {error:.2e}"
        for e, count in enumerate(rows):
            if count == 0:
                assert not dA[e].any()
                assert not dB[e].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_not_aligned_to_16_bytes(cuda_engine, dtype):
    n, k, rows = 72, 128, (3, 0, 20)
    stack, offsets, m = stack_of(3, n, k), offsets_of(rows), sum(rows)
    W = stack.dequantize(dtype).double()
    x, dy = torch.randn(m * k + 1).to(dtype)[1:].view(m, k), torch.randn(m * n + 1).to(dtype)[1:].view(m, n)
    packed = torch.cat((stack.packed.new_zeros(1), stack.packed.flatten()))[1:].view(stack.packed.shape)
    for pieces in (stack.pieces, (packed, *stack.pieces[1:])):
        y, _ = ops.linear_grouped_forward(x, *pieces, offsets, n, None, None, None, 1.0)
        rest = (None, None, None, None, 1.0, True, False, False)
        dx, *_ = ops.linear_grouped_backward(dy, *pieces, offsets, k, *rest)
        limit = 1e-5 if dtype is torch.float32 else 4e-3
        assert relative_error(y, per_expert(offsets, x.double(), W.mT)) < limit
        assert relative_error(dx, per_expert(offsets, dy.double(), W)) < limit


@pytest.mark.parametrize(("kernel", "rows"), [("tiles128x3", (7, 130, 0, 2)), ("tiles16", (7, 30, 0, 2))])
def test_an_expert_has_the_bits_of_a_single_weight(monkeypatch, kernel, rows):
    monkeypatch.setenv("QLORA_KERNELS_CUDA_KERNEL", kernel)
    n, k = 136, 192
    stack, offsets, m = stack_of(4, n, k), offsets_of(rows), sum(rows)
    x, dy = torch.randn(m, k).bfloat16(), torch.randn(m, n).bfloat16()
    rest = (None, None, None, None, 1.0)
    with emulated():
        y, _ = ops.linear_grouped_forward(x, *stack.pieces, offsets, n, None, None, None, 1.0)
        dx, *_ = ops.linear_grouped_backward(dy, *stack.pieces, offsets, k, *rest, True, False, False)
        for e, (b, t) in enumerate(itertools.pairwise(offsets.tolist())):
            one = stack.expert(e).pieces
            assert torch.equal(y[b:t], ops.linear_forward(x[b:t], *one, n, None, None, None, 1.0, 0.0, None)[0])
            single = ops.linear_backward(dy[b:t], *one, k, *rest, 0.0, None, True, False, False)[0]
            assert torch.equal(dx[b:t], single)


class Unreadable(torch.Tensor):
    """Offsets whose values the host may not see: only what stays on a device is allowed."""

    ALLOWED = ("to", "contiguous", "data_ptr", "dim", "__get__", "is_contiguous", "detach", "storage_offset")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ not in cls.ALLOWED:
            raise AssertionError(f"the host reads offsets by {func.__name__}")
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_host_does_not_read_the_offsets(dtype):
    n, k, rows, r = 40, 128, (3, 0, 9), 4
    stack, offsets = stack_of(3, n, k), offsets_of(rows).as_subclass(Unreadable)
    with pytest.raises(AssertionError, match="tolist"):
        offsets.tolist()
    x, dy, A, B = (torch.randn(*s).to(dtype) for s in ((12, k), (12, n), (3, r, k), (3, n, r)))
    with emulated():
        backend = backends.backend_for(x)
        weight = Operand(stack.pieces, n, k, 3)
        y, u = backend.linear_grouped_forward(x, weight, offsets, None, A, B, 1.0)
        found = backend.linear_grouped_backward(dy, weight, offsets, x, u, A, B, 1.0, (True, True, True))
    assert y.shape == (12, n)
    assert all(torch.isfinite(t).all() for t in (y, *found))


def test_as_many_launches_for_any_experts():
    n, k, r = 40, 128, 4
    for rows in ((12,), (0, 5, 0, 7), (1,) * 12):
        experts = len(rows)
        stack, offsets = stack_of(experts, n, k), offsets_of(rows)
        x, dy, A, B = (torch.randn(*s).bfloat16() for s in ((12, k), (12, n), (experts, r, k), (experts, n, r)))
        u = torch.randn(12, r).bfloat16()

        def forward(stack=stack, offsets=offsets, x=x, A=A, B=B):
            ops.linear_grouped_forward(x, *stack.pieces, offsets, n, None, A, B, 1.0)

        def backward(stack=stack, offsets=offsets, x=x, u=u, dy=dy, A=A, B=B):
            rest = (x, u, A, B, 1.0, True, True, True)
            ops.linear_grouped_backward(dy, *stack.pieces, offsets, k, *rest)

        assert counted(forward)["launches"] == 2
        assert counted(backward)["launches"] == 4


@pytest.mark.parametrize("offsets", [(-5, 3, 12), (0, 99, 12), (0, 7, 5), (3, 4, 5), (9, 2, 1 << 60)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offsets_that_are_wrong_touch_no_other_memory(offsets, dtype):
    # Where the host has not read them. The emulator refuses accesses outside of operands.
    n, k, r = 40, 128, 4
    stack = stack_of(2, n, k)
    x, dy, A, B = (torch.randn(*s).to(dtype) for s in ((12, k), (12, n), (2, r, k), (2, n, r)))
    with emulated():
        given = torch.tensor(offsets)
        y, u = ops.linear_grouped_forward(x, *stack.pieces, given, n, None, A, B, 1.0)
        found = ops.linear_grouped_backward(dy, *stack.pieces, given, k, x, u, A, B, 1.0, True, True, True)
        assert all(torch.isfinite(t).all() for t in (y, u, *found))
