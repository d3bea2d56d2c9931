"""The layer on a card at real model sizes, for which the emulator is too slow."""

from __future__ import annotations

import pytest
import torch
from contract import assert_within_contract, relative_error

from qlora_kernels import NF4Weight, default_nested_table, linear, ops, quantize
from qlora_kernels.ops.backends import reference

N = K = 4096
ROWS = (1, 4, 16, 64, 512)
REPEATS = 10
#: For a 16-bit result with an adapter, whose u or v is rounded once more.
ALLOWED = {torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.fixture(autouse=True)
def _whole_sums():
    """torch's products accumulate in float32, as the contract's dense layer does, not in their own dtype."""
    settings = torch.backends.cuda.matmul
    names = [f"allow_{dtype}_reduced_precision_reduction" for dtype in ("bf16", "fp16")]
    before = {name: getattr(settings, name) for name in names}
    for name in names:
        setattr(settings, name, False)
    yield
    for name, value in before.items():
        setattr(settings, name, value)


def random(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(shape, generator=generator, device="cuda") * scale).to(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("r", [0, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_large_layer(monkeypatch, dtype, r):
    weight = quantize(random(N, K, dtype=torch.float32, seed=1))
    dense = weight.dequantize(dtype)
    # An adapter whose terms are about half as large as those of the weight.
    A, B = (random(r, K, dtype=dtype, seed=2), random(N, r, dtype=dtype, seed=3, scale=1 / 8)) if r else (None, None)
    for m in ROWS:
        x, dy = random(m, K, dtype=dtype, seed=4), random(m, N, dtype=dtype, seed=5)

        def step(x=x, dy=dy):
            y, u = ops.linear_forward(x, *weight.pieces, N, None, A, B, 1.0, 0.0, None)
            rest = (x if r else None, u if r else None, A, B, 1.0, 0.0, None, True, bool(r), bool(r))
            return (y, u, *ops.linear_backward(dy, *weight.pieces, K, *rest))

        y, u, dx, dA, dB = first = step()
        case = f"{dtype} M={m} r={r}"
        exact_y, exact_dx = x.double() @ dense.double().T, dy.double() @ dense.double()
        if r:
            u64, v64 = x.double() @ A.double().T, dy.double() @ B.double()
            for name, actual, exact, allowed in (
                ("u", u, u64, ALLOWED[dtype]),
                ("y", y, exact_y + u.double() @ B.double().T, ALLOWED[dtype]),
                ("dx", dx, exact_dx + v64 @ A.double(), ALLOWED[dtype]),
                ("dA", dA, v64.T @ x.double(), ALLOWED[dtype]),
                ("dB", dB, dy.double().T @ u.double(), 1e-5 if dA.dtype == torch.float32 else ALLOWED[dtype]),
            ):
                error = relative_error(actual, exact)
                assert error < allowed, f"{case} {name}: {error:.2e}"
        else:
            assert_within_contract(y, x @ dense.T, exact_y, case)
            assert_within_contract(dx, dy @ dense, exact_dx, case + " dx")
        for _ in range(REPEATS):
            assert all(torch.equal(a, b) for a, b in zip(step(), first, strict=True)), f"{case}: other bits"
        with monkeypatch.context() as patch:  # where nothing begins before the launch before it has ended
            patch.setenv("QLORA_KERNELS_CUDA_EARLY", "0")
            assert all(torch.equal(a, b) for a, b in zip(step(), first, strict=True)), f"{case}: early launches"
        streams = [torch.cuda.Stream() for _ in range(2)]
        by_stream: list[list] = [[], []]
        torch.cuda.synchronize()
        for _ in range(REPEATS // 2):
            for stream, results in zip(streams, by_stream):
                with torch.cuda.stream(stream):
                    results.append(step())
        torch.cuda.synchronize()
        for other in (*by_stream[0], *by_stream[1]):
            assert all(torch.equal(a, b) for a, b in zip(other, first, strict=True)), f"{case}: two streams at once"


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 4, 40, 130])
def test_a_layer_of_more_weights_than_32_bits_count(m):
    n, k = 2**16 + 72, 2**15
    assert n * k > 2**31
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free memory")
    generator = torch.Generator("cuda").manual_seed(0)

    def codes(count):
        return torch.randint(0, 256, (count,), dtype=torch.uint8, device="cuda", generator=generator)

    blocks = n * k // 64
    weight = NF4Weight(
        codes(n * k // 2),
        codes(blocks),
        torch.rand(blocks // 256, device="cuda", generator=generator) + 0.5,
        torch.ones(1, device="cuda"),
        default_nested_table("cuda"),
        torch.Size((n, k)),
        torch.bfloat16,
    )
    x, dy = random(m, k, dtype=torch.bfloat16, seed=1), random(m, n, dtype=torch.bfloat16, seed=2)
    with torch.no_grad():
        y = linear(x, weight)
    assert y.isfinite().all()
    # The first rows of W, the last, and those around 2^31 weights. A row has 512 blocks in two groups.
    for begin in (0, 2**16 - 32, n - 64):
        rows = slice(begin, begin + 64)
        packed, absmax, nested, offset, table = weight.pieces
        pieces = (
            packed[begin * k // 2 : (begin + 64) * k // 2],
            absmax[begin * 512 : (begin + 64) * 512],
            nested[begin * 2 : (begin + 64) * 2],
        )
        dense = reference.decode((*pieces, offset, table), 64, k, torch.bfloat16).double()
        error = relative_error(y[:, rows], x.double() @ dense.T)
        assert error < ALLOWED[torch.bfloat16], f"M={m}, rows from {begin}: {error:.2e}"
    dx, _, _ = ops.linear_backward(dy, *weight.pieces, k, None, None, None, None, 1.0, 0.0, None, True, False, False)
    assert dx.isfinite().all()
    columns = torch.tensor([*range(32), *range(k - 32, k)], device="cuda")
    exact = torch.zeros(m, 64, dtype=torch.float64, device="cuda")
    for begin in range(0, n, 8192):
        end = min(begin + 8192, n)
        decoded = weight.dequantize(torch.bfloat16, row_begin=begin, row_end=end)[:, columns]
        exact += dy[:, begin:end].double() @ decoded.double()
    error = relative_error(dx[:, columns], exact)
    assert error < ALLOWED[torch.bfloat16], f"M={m} dx: {error:.2e}"
