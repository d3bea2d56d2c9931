"""linear_grouped: each expert's rows against a loop, in float64, and against the products of single weights."""

from __future__ import annotations

import itertools

import pytest
import torch
from contract import relative_error
from engines import ORDERS

from qlora_kernels import ops, quantize
from qlora_kernels.formats.nf4 import PIECES
from qlora_kernels.formats.nf4_stack import meta_stack, quantize_stack
from qlora_kernels.layers.grouped import linear_grouped

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
# N and K: one element, blocks that straddle rows and bytes, several parts of columns, a K of no whole number of blocks.
SHAPES = ((1, 1), (33, 100), (65, 192), (600, 128), (40, 320))
#: Rows of each expert: none at either end and within, one, a few, more than a block.
ROWS = ((0, 1, 5, 0, 70, 2), (3,), (0, 0, 0), (1, 1, 1, 1, 1, 1, 1, 1), (0, 130, 0))


def offsets_of(rows) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(rows)])


def make_stack(experts: int, n: int, k: int, double_quant: bool = True):
    """Experts that differ in scale."""
    return quantize_stack(torch.randn(experts, n, k) * torch.logspace(-1, 1, experts).view(-1, 1, 1), double_quant)


def exact(x, stack, offsets, bias, A, B, scaling):
    """In float64, a loop."""
    W = stack.dequantize(torch.float32).double()
    y = []
    for e, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        rows = x[begin:end]
        one = rows @ W[e].T
        if bias is not None:
            one = one + bias[e]
        if A is not None:
            one = one + scaling * (rows @ A[e].T) @ B[e].T
        y.append(one)
    return torch.cat(y)


def check(n, k, rows, r, dtype, with_bias, double_quant=True, adapters=None):
    experts, m, offsets, scaling = len(rows), sum(rows), offsets_of(rows), 0.7
    stack = make_stack(experts, n, k, double_quant)
    x, dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
    A = torch.randn(experts, r, k).to(adapters or dtype) if r else None
    B = torch.randn(experts, n, r).to(adapters or dtype) if r else None
    bias = torch.randn(experts, n) if with_bias else None
    leaves = [None if t is None else t.requires_grad_() for t in (x, bias, A, B)]
    y = linear_grouped(x, stack, offsets.to(torch.int32) if with_bias else offsets, bias, A, B, scaling=scaling)
    assert y.dtype == dtype
    assert y.shape == (m, n)
    wide = [None if t is None else t.detach().double().requires_grad_() for t in leaves]
    y64 = exact(wide[0], stack, offsets, *wide[1:], scaling)
    present = [i for i, t in enumerate(leaves) if t is not None]
    gradients = torch.autograd.grad(y, [leaves[i] for i in present], dy)
    wanted = torch.autograd.grad(y64, [wide[i] for i in present], dy.double())
    for i, a, b in zip((-1, *present), (y, *gradients), (y64, *wanted), strict=True):
        assert a.dtype == (y if i < 0 else leaves[i]).dtype
        if m == 0:
            assert not a.any()
            continue
        assert relative_error(a, b) < TOLERANCE[dtype], (i, n, k, rows, dtype)
        if i >= 2:  # an expert without rows has no gradient
            assert not a[[e for e, count in enumerate(rows) if count == 0]].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients(engine, shape, dtype):
    cases = list(itertools.product(ROWS, (0, 3)))
    if engine.startswith("emulated-"):
        start = ORDERS.index(engine.removeprefix("emulated-")) + SHAPES.index(shape) + DTYPES.index(dtype)
        cases = [((0, 1, 5, 0, 18, 2), (0, 3)[start % 2])]
    for number, (rows, r) in enumerate(cases):
        check(*shape, rows, r, dtype, number % 2 == 0, number % 3 > 0)


def test_float32_adapters_get_float32_gradients(engine):
    check(40, 128, (4, 0, 9), 8, torch.bfloat16, False, adapters=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_on_any_number_of_threads(isa, dtype):
    """However experts are cut into tasks: one has most of the rows, and there are more threads than experts."""
    rows, n, k, r = (1, 0, 200, 3), 1100, 512, 4
    offsets, stack = offsets_of(rows), make_stack(4, n, k)
    x, dy = torch.randn(204, k).to(dtype), torch.randn(204, n).to(dtype)
    A, B = torch.randn(4, r, k).to(dtype), torch.randn(4, n, r).to(dtype)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        y, u = ops.linear_grouped_forward(x, *stack.pieces, offsets, n, None, A, B, 1.0)
        rest = (k, x, u, A, B, 1.0, True, True, True)
        results.append((y, u, *ops.linear_grouped_backward(dy, *stack.pieces, offsets, *rest)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    # And the bits of a single weight's products.
    one = stack.expert(2)
    part = slice(1, 201)
    y, u = ops.linear_forward(x[part], *one.pieces, n, None, A[2], B[2], 1.0, 0.0, None)
    rest = (k, x[part], u, A[2], B[2], 1.0, 0.0, None, True, True, True)
    dx, dA, dB = ops.linear_backward(dy[part], *one.pieces, *rest)
    for a, b in zip((y, u, dx, dA, dB), results[0], strict=True):
        assert torch.equal(a, b[2] if b.dim() == 3 else b[part])


@pytest.mark.parametrize("double_quant", [True, False])
def test_each_expert_is_quantized_by_itself(double_quant):
    weights = torch.randn(3, 20, 70).transpose(1, 2)
    stack = quantize_stack(weights, double_quant)
    assert stack.shape == (3, 70, 20)
    for e in range(3):
        one = quantize(weights[e].contiguous(), double_quant)
        for a, b in zip(stack.expert(e).pieces, one.pieces, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
    assert torch.equal(stack.dequantize()[2], stack.expert(2).dequantize())
    meta = meta_stack(3, 70, 20, double_quant)
    for name in PIECES:
        a, b = getattr(stack, name), getattr(meta, name)
        assert (a is None and b is None) or (a.shape == b.shape and a.dtype == b.dtype)


def test_a_stack_that_cannot_be_quantized():
    with pytest.raises(ValueError, match=r"should be \[experts, N, K\]"):
        quantize_stack(torch.randn(4, 4))
    bad = torch.randn(3, 4, 4)
    bad[1, 2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"experts\[1\] holds nan"):
        quantize_stack(bad, name="experts")
    with pytest.raises(TypeError, match="float64"):
        quantize_stack(torch.randn(2, 4, 4, dtype=torch.float64))


def call(x=None, offsets=(0, 2, 3, 5), bias=None, A=None, B=None):
    """The operation on a stack of 3 weights [32, 64], with 5 rows."""
    x = torch.randn(5, 64) if x is None else x
    return linear_grouped(x, make_stack(3, 32, 64), torch.as_tensor(offsets), bias, A, B)


A4, B4 = torch.zeros(3, 4, 64), torch.zeros(3, 32, 4)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"x": torch.zeros(5, 63)}, ValueError, r"x should be \[M, 64\]"),
        ({"x": torch.zeros(5, 64, dtype=torch.int32)}, TypeError, "x should be bfloat16"),
        ({"offsets": (0, 2, 5)}, ValueError, r"offsets should be \[4\]"),
        ({"offsets": (0, 2, 1, 5)}, ValueError, "ascend from 0 to M = 5"),
        ({"offsets": (1, 2, 3, 5)}, ValueError, "ascend from 0 to M = 5"),
        ({"offsets": (0, 2, 3, 4)}, ValueError, "ascend from 0 to M = 5"),
        ({"offsets": (0.0, 2.0, 3.0, 5.0)}, TypeError, "offsets should be int64 or int32"),
        ({"bias": torch.zeros(32)}, ValueError, r"bias should be \[3, 32\]"),
        ({"bias": [0.0]}, TypeError, "bias should be a tensor"),
        ({"A": A4}, ValueError, "come together"),
        ({"A": torch.zeros(3, 4, 63), "B": B4}, ValueError, r"lora_A should be .* = \[3, 4, 64\]"),
        ({"A": A4, "B": torch.zeros(3, 32, 5)}, ValueError, r"lora_B should be .* = \[3, 32, 4\]"),
    ],
)
def test_operands_that_do_not_fit(given, error, message):
    call()
    with pytest.raises(error, match=message):
        call(**given)


def test_a_stack_of_another_size_is_refused():
    stack, x = make_stack(3, 32, 64), torch.randn(5, 64)
    with pytest.raises(ValueError, match=r"packed of a weight \[2, 32, 64\] should have 2048 elements, found 3072"):
        ops.linear_grouped_forward(x, *stack.pieces, torch.tensor([0, 2, 5]), 32, None, None, None, 1.0)
    with pytest.raises(ValueError, match="nested_offset"):
        pieces = (*stack.pieces[:3], stack.nested_offset[:1], stack.nested_table)
        ops.linear_grouped_forward(x, *pieces, torch.tensor([0, 2, 3, 5]), 32, None, None, None, 1.0)


def test_there_is_no_second_derivative():
    stack = make_stack(2, 8, 64)
    x = torch.randn(4, 64, requires_grad=True)
    y = linear_grouped(x, stack, torch.tensor([0, 1, 4]))
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


def test_gradcheck():
    stack, offsets = make_stack(3, 6, 20), torch.tensor([0, 2, 2, 5])
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in ((5, 20), (3, 6), (3, 2, 20), (3, 6, 2))]

    def call(x, bias, A, B):
        return linear_grouped(x, stack, offsets, bias, A, B, scaling=0.5)

    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in tensors])


@pytest.mark.parametrize("r", [0, 3])
def test_opcheck(r):
    stack, offsets, n, k = make_stack(3, 24, 64), torch.tensor([0, 2, 2, 5]), 24, 64
    x, dy = torch.randn(5, k, requires_grad=True), torch.randn(5, n)
    A = torch.randn(3, r, k, requires_grad=True) if r else None
    B = torch.randn(3, n, r, requires_grad=True) if r else None
    bias = torch.randn(3, n, requires_grad=True)
    forward = (x, *stack.pieces, offsets, n, bias, A, B, 0.5)
    torch.library.opcheck(torch.ops.qlora_kernels.linear_grouped_forward.default, forward)
    u = torch.randn(5, r)
    saved = (x.detach(), u, A.detach(), B.detach()) if A is not None and B is not None else (None,) * 4
    backward = (dy, *stack.pieces, offsets, k, *saved, 0.5, True, bool(r), bool(r))
    torch.library.opcheck(torch.ops.qlora_kernels.linear_grouped_backward.default, backward)


@pytest.mark.slow
def test_compiled():
    stack, offsets = make_stack(3, 24, 64), torch.tensor([0, 2, 2, 5])
    x, A, B = torch.randn(5, 64), torch.randn(3, 2, 64), torch.randn(3, 24, 2)

    def call(x, A, B):
        return linear_grouped(x, stack, offsets, None, A, B).square().sum()

    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (x, A, B)]
        loss = function(*leaves)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
