"""The operations: the numerics contract on every instruction set, determinism, scratch, and opcheck."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from contract import assert_within_contract, make_weight, relative_error
from engines import ORDERS, forced

from qlora_kernels import default_nested_table, ops, quantize
from qlora_kernels.native import extension
from qlora_kernels.ops.backends import reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# N and K: one element; blocks that straddle rows and bytes; a single block; a row of one block and a half vector; an
# odd N with a K that is no multiple of 128; more than one panel both ways, with a tail.
SHAPES = ((1, 1), (7, 100), (3, 64), (33, 192), (65, 320), (290, 520), (130, 640))
# No rows; the one- and two-row path; the first rows after it; a tile, one more; a block of 32,
# one more; two blocks and one.
ROWS = (0, 1, 2, 3, 5, 16, 17, 32, 33, 65)
RANKS = (0, 1, 8, 17, 40, 130)


def rows_for(engine: str, case: int, rows=ROWS) -> tuple[int, ...]:
    """Fewer on the emulator, which is slow: only the tile and its edge matter there. Each order takes one of these, a
    different one in the next case.
    """
    if not engine.startswith("emulated-"):
        return rows
    edges = [m for m in rows if m in (1, 17, 65)]
    order = ORDERS.index(engine.removeprefix("emulated-"))
    return (*(m for m in rows if m == 0), edges[(order + case) % 3])


def forward(x, weight, bias=None, A=None, B=None, scaling=1.0, dropout=0.0, seed=None):
    return ops.linear_forward(x, *weight.pieces, weight.shape[0], bias, A, B, scaling, dropout, seed)


def backward(dy, weight, x=None, u=None, A=None, B=None, scaling=1.0, dropout=0.0, seed=None):
    need = A is not None
    return ops.linear_backward(
        dy, *weight.pieces, weight.shape[1], x, u, A, B, scaling, dropout, seed, True, need, need
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_dx_within_the_contract(engine, shape, dtype):
    n, k = shape
    weight = make_weight(n, k, dtype=dtype)
    dense, exact = weight.dequantize(dtype), weight.dequantize(torch.float32).double()
    for m in rows_for(engine, SHAPES.index(shape) + DTYPES.index(dtype)):
        x, dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
        y, u = forward(x, weight)
        dx, dA, dB = backward(dy, weight)
        assert y.dtype == dx.dtype == dtype
        assert u.shape == (m, 0)
        assert dA.numel() == dB.numel() == 0
        if m == 0:
            assert y.shape == (0, n)
            assert dx.shape == (0, k)
            continue
        case = f"{engine} {dtype} M={m} N={n} K={k}"
        # The error of a handful of outputs is luck, dense's too: such cases are drawn many times.
        outputs = [(y, F.linear(x, dense), x.double() @ exact.T)]
        while not engine.startswith("emulated-") and len(outputs) * m * n < 512:
            x = torch.randn(m, k).to(dtype)
            outputs.append((forward(x, weight)[0], F.linear(x, dense), x.double() @ exact.T))
        assert_within_contract(*map(torch.cat, zip(*outputs)), case)
        assert_within_contract(dx, dy @ dense, dy.double() @ exact, case + " dx")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_that_is_not_contiguous(engine, dtype):
    weight, x = make_weight(24, 64), torch.randn(3, 64).to(dtype)
    for bias in (torch.randn(24, 3).to(dtype)[:, 1], torch.randn(48)[::2], torch.randn(1).to(dtype).expand(24)):
        assert not bias.is_contiguous()
        assert torch.equal(forward(x, weight, bias)[0], forward(x, weight, bias.contiguous())[0])


def test_without_adapters_dropout_has_nothing_to_drop(engine):
    """And needs no seed."""
    weight, x, dy = quantize(torch.randn(8, 64)), torch.randn(2, 64), torch.randn(2, 8)
    assert torch.equal(forward(x, weight, dropout=0.5)[0], forward(x, weight)[0])
    assert torch.equal(backward(dy, weight, dropout=0.5)[0], backward(dy, weight)[0])


@pytest.mark.share(2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", RANKS[1:])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_low_rank_term_and_its_gradients(engine, r, dropout, dtype):
    n, k, scaling = 130, 320, 0.7
    weight = make_weight(n, k)
    exact = weight.dequantize(dtype).double()
    seed = torch.tensor([-987654321987654321])
    tolerance = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}[dtype]
    for m in rows_for(engine, RANKS.index(r) + DTYPES.index(dtype), (1, 2, 5, 17, 65)):
        x, dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
        A, B, bias = torch.randn(r, k).to(dtype), torch.randn(n, r).to(dtype), torch.randn(n)
        mask = reference.dropout_mask(m, k, dropout, seed)
        if dropout:
            assert abs(mask.double().mean() - (1 - dropout)) < 5 * (0.25 / mask.numel()) ** 0.5
        y, u = forward(x, weight, bias, A, B, scaling, dropout, seed)
        dx, dA, dB = backward(dy, weight, x, u, A, B, scaling, dropout, seed)
        u64 = scaling / (1 - dropout) * (x.double() * mask) @ A.double().T
        v64 = scaling / (1 - dropout) * dy.double() @ B.double()
        expected = {
            "u": (u, u64),
            "y": (y, x.double() @ exact.T + u64 @ B.double().T + bias.double()),
            "dx": (dx, dy.double() @ exact + mask * (v64 @ A.double())),
            "dA": (dA, v64.T @ (x.double() * mask)),
            # dB is judged on the u that was saved: u's own rounding is u's error.
            "dB": (dB, dy.double().T @ u.double()),
        }
        for name, (actual, wanted) in expected.items():
            assert actual.shape == wanted.shape
            assert actual.dtype == dtype
            error = relative_error(actual, wanted)
            assert error < tolerance, f"{engine} {name} {dtype} M={m} r={r} p={dropout}: {error:.2e}"


@pytest.mark.parametrize("dropout", [0.1, 0.3, 0.9, 0.99999999])
def test_the_mask_equals_the_reference_in_every_element(engine, dropout):
    # x and A of ones: u counts what was kept. The seed is one whose words come within 52 of the threshold of 0.3.
    m, k, seed = 40, 2048, torch.tensor([62])
    weight = make_weight(32, k)
    kept = reference.dropout_mask(m, k, dropout, seed).sum(1, keepdim=True)
    u = forward(torch.ones(m, k), weight, None, torch.ones(1, k), torch.ones(32, 1), 1.0, dropout, seed)[1]
    assert torch.equal((u.double() * (1 - dropout)).round(), kept.double())


def test_float32_adapters_get_float32_gradients(engine):
    weight = make_weight(96, 128)
    x, dy = torch.randn(9, 128).bfloat16(), torch.randn(9, 96).bfloat16()
    A, B = torch.randn(8, 128), torch.randn(96, 8)
    y, u = forward(x, weight, None, A, B)
    _, dA, dB = backward(dy, weight, x, u, A, B)
    assert y.dtype == u.dtype == torch.bfloat16
    assert dA.dtype == dB.dtype == torch.float32
    # Accumulated in float32 and not rounded after: far more exact than bfloat16 could hold.
    assert relative_error(dB, dy.double().T @ u.double()) < 1e-6
    low = forward(x, weight, None, A.bfloat16(), B.bfloat16())[0]
    assert torch.equal(y, low)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_result_does_not_depend_on_other_rows(engine, dtype):
    weight = make_weight(200, 256)
    dense = weight.dequantize(dtype)
    x = torch.randn(70, 256).to(dtype)
    exact = x.double() @ weight.dequantize(torch.float32).double().T
    for m in (*rows_for(engine, DTYPES.index(dtype))[1:], 70):
        y, _ = forward(x[:m].contiguous(), weight)
        assert_within_contract(y, F.linear(x[:m], dense), exact[:m], f"{engine} {dtype} first {m} rows")


def test_the_same_bits_every_time_and_on_any_number_of_threads(isa):
    weight = make_weight(300, 512)
    before = torch.get_num_threads()
    for dtype in DTYPES:
        for m in (1, 20, 130):
            x, dy = torch.randn(m, 512).to(dtype), torch.randn(m, 300).to(dtype)
            A, B = torch.randn(16, 512).to(dtype), torch.randn(300, 16).to(dtype)
            seed = torch.tensor([5])
            results = []
            try:
                for threads in (1, 2, 2, 3):
                    torch.set_num_threads(threads)
                    y, u = forward(x, weight, None, A, B, 1.0, 0.1, seed)
                    results.append((y, u, *backward(dy, weight, x, u, A, B, 1.0, 0.1, seed)))
            finally:
                torch.set_num_threads(before)
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), (dtype, m)


def test_rows_beyond_one_superblock(engine):
    # More rows than are taken at once (512): the adapters' gradients are summed over the pieces.
    weight = make_weight(64, 128)
    for dtype in (torch.bfloat16, torch.float32):
        m = 200 if engine.startswith("emulated") else 2100
        x, dy = torch.randn(m, 128).to(dtype), torch.randn(m, 64).to(dtype)
        A, B = torch.randn(4, 128).to(dtype), torch.randn(64, 4).to(dtype)
        seed = torch.tensor([3])
        y, u = forward(x, weight, None, A, B, 0.5, 0.2, seed)
        dx, dA, dB = backward(dy, weight, x, u, A, B, 0.5, 0.2, seed)
        lora = ops.LoraTerm(A.double(), B.double(), 0.5, 0.2, seed)
        y64, u64 = reference.linear_forward(x.double(), weight.operand(), None, lora, True)
        grads = reference.linear_backward(dy.double(), weight.operand(), x.double(), u64, lora, (True, True, True))
        for name, actual, wanted in zip(("y", "dx", "dA", "dB"), (y, dx, dA, dB), (y64, *grads), strict=True):
            assert relative_error(actual, wanted) < (1e-2 if dtype == torch.bfloat16 else 1e-5), (engine, name)


# A vector of codes that is half full, whole ones, and rows too long for the first-level cache.
@pytest.mark.parametrize("k", [64, 192, 4160])
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows_of_any_size(isa, dtype, k):
    """Elements that differ by orders of magnitude, very small ones, NaN and infinity; all thread counts alike."""
    n = 131
    for double_quant, m in ((True, 1), (False, 4), (True, 7), (True, 16)):
        weight = quantize(torch.randn(n, k), double_quant)
        dense, exact = weight.dequantize(dtype), weight.dequantize(torch.float32).double()
        some = torch.randn(m, k)
        outliers = torch.where(torch.arange(k) % 61 == 0, 500 * some, some)
        spread = some * torch.logspace(-3, 2, k)[torch.randperm(k)]
        for x in (outliers.to(dtype), spread.to(dtype), (some * (1e-3 if dtype == torch.float16 else 1e-30)).to(dtype)):
            case = f"{isa} {dtype} M={m} K={k} largest {x.abs().max():.0e}"
            y = forward(x, weight)[0]
            assert_within_contract(y, F.linear(x, dense), x.double() @ exact.T, case)
            for threads in (1, 3):
                torch.set_num_threads(threads)  # conftest.py sets it back
                assert torch.equal(forward(x, weight)[0], y), case
        for value in (float("nan"), float("inf"), -float("inf")):
            x = some.to(dtype)
            x[m // 2, k // 3] = value
            y, expected = forward(x, weight)[0], F.linear(x, dense)
            assert torch.equal(y.isnan(), expected.isnan())
            assert torch.equal(y.isfinite(), expected.isfinite())


@pytest.mark.parametrize("m", [1, 4, 8, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows_at_the_ends_of_the_range(isa, dtype, m):
    """Block constants and x that only together are numbers of ordinary size; columns of zeros that meet outliers."""
    n, k = 256, 1024
    weight, x = torch.randn(n, k), torch.randn(m, k)
    cases = {"ordinary": (weight, x)}
    if dtype != torch.float16:
        cases["large x"] = (weight * 1e-6, x * 5e37)
        cases["small x"] = (weight * 1e12, x * 1e-35)
        cases["both small"] = (weight * 1e-12, x * 1e-22)
    for outlier in (100, 1000, 10000):
        without, with_outlier = weight.clone(), x.clone()
        without[:, 77], with_outlier[:, 77] = 0, outlier
        cases[f"an outlier of {outlier}"] = without, with_outlier
    zeros, alone = weight * (1e3 if dtype == torch.float16 else 1e10), torch.zeros(m, k)
    zeros[:, 77], alone[:, 77] = 0, 6e4 if dtype == torch.float16 else 3e38
    for name, (wide, wide_x) in cases.items():
        quantized, rounded_x = quantize(wide, False), wide_x.to(dtype)
        dense, exact = quantized.dequantize(dtype), quantized.dequantize(torch.float32).double()
        y, expected = forward(rounded_x, quantized)[0], F.linear(rounded_x, dense)
        assert_within_contract(y, expected, rounded_x.double() @ exact.T, f"{isa} {dtype} M={m} {name}")
    assert not forward(alone.to(dtype), quantize(zeros, False))[0].any()


# Whole blocks of 64, and rows that cut them and bytes.
@pytest.mark.share(2)
@pytest.mark.parametrize("long", [131072, 70001])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_whose_packed_rows_exceed_the_scratch(isa, dtype, long):
    """x (forward) or dy (backward) is packed piece by piece; the results are those of any other length."""
    short, seed, dropout, scaling = 40, torch.tensor([11]), 0.3, 0.01
    tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-6
    for n, k in ((short, long), (long, short)):
        weight = make_weight(n, k, dtype=dtype)
        dense, exact = weight.dequantize(dtype), weight.dequantize(torch.float32).double()
        for m in (2, 8, 40):
            x, dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
            case = f"{isa} {dtype} M={m} N={n} K={k}"
            if k == long:
                assert_within_contract(forward(x, weight)[0], F.linear(x, dense), x.double() @ exact.T, case)
            else:
                assert_within_contract(backward(dy, weight)[0], dy @ dense, dy.double() @ exact, case + " dx")
        A, B = torch.randn(3, k).to(dtype), torch.randn(n, 3).to(dtype)
        masked = x.double() * (mask := reference.dropout_mask(m, k, dropout, seed))
        u64 = scaling / (1 - dropout) * masked @ A.double().T
        v64 = scaling / (1 - dropout) * dy.double() @ B.double()
        y, u = forward(x, weight, None, A, B, scaling, dropout, seed)
        dx, dA, dB = backward(dy, weight, x, u, A, B, scaling, dropout, seed)
        for name, actual, wanted in (
            ("u", u, u64),
            ("y", y, x.double() @ exact.T + u64 @ B.double().T),
            ("dx", dx, dy.double() @ exact + mask * (v64 @ A.double())),
            ("dA", dA, v64.T @ masked),
            ("dB", dB, dy.double().T @ u.double()),
        ):
            error = relative_error(actual, wanted)
            assert error < tolerance, f"{case} {name}: {error:.2e}"


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e30])
def test_tiny_and_huge_constants(engine, scale):
    weight = quantize((torch.randn(40, 256).double() * scale).float(), double_quant=False)
    for dtype in (torch.float32, torch.bfloat16):
        dense = weight.dequantize(dtype).double()
        for m in (1, 4, 40):
            x = (torch.randn(m, 256) * min(1 / scale, 1e37)).to(dtype)
            dy = (torch.randn(m, 40) * min(1 / scale, 1e37)).to(dtype)
            for actual, wanted in (
                (forward(x, weight)[0], x.double() @ dense.T),
                (backward(dy, weight)[0], dy.double() @ dense),
            ):
                # Processors' bf16 products flush subnormal inputs; against normal ones that loss must not show.
                if scale < 1e-38 and dtype == torch.bfloat16:
                    assert torch.isfinite(actual).all()
                else:
                    assert relative_error(actual, wanted) < (1e-2 if dtype == torch.bfloat16 else 1e-5), (
                        engine,
                        dtype,
                        m,
                    )


def test_non_finite_inputs_stay_visible(engine):
    weight = make_weight(70, 128)
    for dtype in DTYPES:
        for m in (1, 3, 40):
            x = torch.ones(m, 128).to(dtype)
            x[0, 5] = torch.nan
            y = forward(x, weight)[0]
            assert y[0].isnan().all()
            assert torch.isfinite(y[1:]).all()


@pytest.mark.parametrize("m", [1, 33, 600])
def test_scratch_stays_below_8_mib_a_thread(isa, m):
    n, k, r = 256, 14336, 64
    blocks = n * k // 64
    pieces = (
        torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8),
        torch.rand(blocks),
        None,
        None,
        None,
    )
    native = extension.native()
    for dtype in (torch.bfloat16, torch.float32):
        x, dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
        A, B = torch.randn(r, k).to(dtype), torch.randn(n, r).to(dtype)
        native.scratch_peak_bytes(True)
        seed = torch.tensor([1])
        _, u = ops.linear_forward(x, *pieces, n, None, A, B, 1.0, 0.1, seed)
        ops.linear_backward(dy, *pieces, k, x, u, A, B, 1.0, 0.1, seed, True, True, True)
        assert 0 < native.scratch_peak_bytes(True) <= 8 << 20


# Each dtype and each form of the constants once: registration depends on nothing else.
@pytest.mark.share(2)
@pytest.mark.parametrize(("dtype", "double_quant"), [(torch.float32, True), (torch.bfloat16, False)])
def test_opcheck(dtype, double_quant):
    weight = make_weight(6, 64, double_quant)
    x, dy = torch.randn(3, 64).to(dtype), torch.randn(3, 6).to(dtype)
    A, B, bias = torch.randn(2, 64).to(dtype), torch.randn(6, 2).to(dtype), torch.randn(6).to(dtype)
    seed = torch.tensor([7])
    dense = weight.dequantize(x.dtype)
    torch.library.opcheck(ops.quantize, (dense,))
    torch.library.opcheck(ops.quantize_absmax, (torch.rand(300), default_nested_table()))
    torch.library.opcheck(ops.dequantize, (*weight.pieces, 6, 64, x.dtype, 1, 5))
    torch.library.opcheck(ops.dequantize_out, (*weight.pieces, 6, 64, 1, 5, torch.empty(4, 64, dtype=x.dtype)))
    for requires_grad in (False, True):
        leaves = [t.clone().requires_grad_(requires_grad) for t in (x, bias, A, B)]
        torch.library.opcheck(
            ops.linear_forward,
            (leaves[0], *weight.pieces, 6, *leaves[1:], 0.5, 0.1, seed),
            rtol=2e-2,
            atol=2e-2,
        )
    torch.library.opcheck(ops.linear_forward, (x, *weight.pieces, 6, None, None, None, 1.0, 0.0, None))
    u = ops.linear_forward(x, *weight.pieces, 6, None, A, B, 0.5, 0.1, seed)[1]
    for needs in ((True, True, True), (True, False, False), (False, True, True)):
        torch.library.opcheck(ops.linear_backward, (dy, *weight.pieces, 64, x, u, A, B, 0.5, 0.1, seed, *needs))


def test_the_bare_operation_is_differentiable():
    weight = make_weight(6, 64)
    x, A, B = (
        torch.randn(3, 64, requires_grad=True),
        torch.randn(2, 64, requires_grad=True),
        torch.randn(6, 2, requires_grad=True),
    )
    y, _ = torch.ops.qlora_kernels.linear_forward(x, *weight.pieces, 6, None, A, B, 0.5, 0.0, None)
    y.square().sum().backward()
    dense = weight.dequantize(torch.float32)
    x2, A2, B2 = (t.detach().clone().requires_grad_() for t in (x, A, B))
    (x2 @ dense.T + 0.5 * x2 @ A2.T @ B2.T).square().sum().backward()
    for ours, theirs in ((x, x2), (A, A2), (B, B2)):
        assert relative_error(ours.grad, theirs.grad.double()) < 1e-5


def _bad_forward():
    weight = make_weight(6, 64)
    good = dict(
        x=torch.randn(3, 64), pieces=list(weight.pieces), n=6, bias=None, A=None, B=None, dropout=0.0, seed=None
    )
    pieces = weight.pieces

    def pieces_with(i, value):
        return [*pieces[:i], value, *pieces[i + 1 :]]

    yield "x of integers", dict(good, x=torch.ones(3, 64, dtype=torch.int64)), TypeError, "x should be"
    yield "x of another width", dict(good, x=torch.randn(3, 63)), ValueError, "packed"
    yield "x of one dimension", dict(good, x=torch.randn(64)), ValueError, "x should be"
    yield "x not contiguous", dict(good, x=torch.randn(64, 3).T), ValueError, "contiguous"
    yield (
        "x on another device",
        dict(good, x=torch.randn(3, 64, device="meta")),
        (ValueError, RuntimeError),
        "meta|device",
    )
    yield "packed too short", dict(good, pieces=pieces_with(0, pieces[0][:-1])), ValueError, "packed"
    yield "packed of another dtype", dict(good, pieces=pieces_with(0, pieces[0].float())), TypeError, "packed"
    yield "absmax of another dtype", dict(good, pieces=pieces_with(1, pieces[1].float())), TypeError, "absmax"
    yield "no table", dict(good, pieces=pieces_with(4, None)), ValueError, "nested_table"
    yield "a short table", dict(good, pieces=pieces_with(4, pieces[4][:16])), ValueError, "nested_table"
    yield (
        "a gradient for the table",
        dict(good, pieces=pieces_with(4, pieces[4].clone().requires_grad_())),
        RuntimeError,
        "frozen",
    )
    yield "another N", dict(good, n=7), ValueError, "packed"
    yield "N = 0", dict(good, n=0), ValueError, "N > 0"
    yield "bias of another length", dict(good, bias=torch.zeros(5)), ValueError, "bias"
    yield "bias of another dtype", dict(good, bias=torch.zeros(6, dtype=torch.float16)), TypeError, "bias"
    yield "A without B", dict(good, A=torch.zeros(2, 64)), ValueError, "together"
    yield "A of another width", dict(good, A=torch.zeros(2, 63), B=torch.zeros(6, 2)), ValueError, "lora_A"
    yield "B of another rank", dict(good, A=torch.zeros(2, 64), B=torch.zeros(6, 3)), ValueError, "lora_B"
    yield "A of another dtype", dict(good, A=torch.zeros(2, 64).half(), B=torch.zeros(6, 2)), TypeError, "lora_A"
    yield "dropout of 1", dict(good, A=torch.zeros(2, 64), B=torch.zeros(6, 2), dropout=1.0), ValueError, "dropout"
    yield "dropout below 0", dict(good, dropout=-0.1), ValueError, "dropout"
    yield (
        "dropout without a seed",
        dict(good, A=torch.zeros(2, 64), B=torch.zeros(6, 2), dropout=0.1),
        ValueError,
        "seed",
    )


@pytest.mark.parametrize("case", list(_bad_forward()), ids=lambda case: case[0])
def test_bad_input_is_refused(case):
    _, a, error, words = case
    with pytest.raises(error, match=words):
        ops.linear_forward(a["x"], *a["pieces"], a["n"], a["bias"], a["A"], a["B"], 1.0, a["dropout"], a["seed"])


def test_bad_backward_is_refused():
    weight = make_weight(6, 64)
    dy, x, u = torch.randn(3, 6), torch.randn(3, 64), torch.randn(3, 2)
    A, B = torch.randn(2, 64), torch.randn(6, 2)
    for replace, words in (
        (dict(x=None), "x is needed"),
        (dict(u=None), "u is needed"),
        (dict(x=x[:2]), "x should be"),
        (dict(u=u.bfloat16()), "u should be"),
        (dict(A=None, B=None), "need lora_A"),
        (dict(dy=dy[0]), "dy should be"),
    ):
        a = dict(dy=dy, x=x, u=u, A=A, B=B) | replace
        with pytest.raises(ValueError, match=words):
            backward_all(a, weight)


def backward_all(a, weight):
    return ops.linear_backward(
        a["dy"], *weight.pieces, 64, a["x"], a["u"], a["A"], a["B"], 1.0, 0.0, None, True, True, True
    )


def test_an_unknown_instruction_set_names_what_there_is():
    weight = make_weight(6, 64)
    with forced("sse1"), pytest.raises(RuntimeError, match=r"sse1.*portable"):
        forward(torch.randn(1, 64), weight)
    assert forward(torch.randn(1, 64), weight)[0].shape == (1, 6)


def test_philox_is_the_published_generator():
    # Known answers of Random123 for philox4x32-10: counter and key zero, and all ones.
    zero = reference.philox(0, torch.tensor([0]))[0].tolist()
    assert [f"{word:08x}" for word in zero] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
