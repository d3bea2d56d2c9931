"""Each instruction that kernels use by name: the emulator's twin against numpy, and, on a card, against the card."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from cuda_code.fragments import U32
from emulated import ROOT, emulated, module

from bench.emulator import conformance_module

# float32 bit patterns: zeros, infinities, NaN, subnormals and the smallest normal, the largest; then, of float16, the
# largest, the last that rounds to it, the first that does not, the least subnormal, half of it, the least normal.
SPECIAL = (0, 1 << 31, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 1, 0x80000001, 0x7FFFFF, 0x800000, 0x7F7FFFFF)
SPECIAL += (0x477FE000, 0x477FEFFF, 0x477FF000, 0x33800000, 0x33000000, 0x33000001, 0x387FC000, 0x38800000)
ROUNDS = 64  # sets of operands for each
ROUGH = 32  # of a product on tensor cores, those whose sums round; the others' are exact on any card
#: Functions of ptx.cuh without a kernel here, by prefix: they return no value, they only order execution.
CONTROL = {
    "bar_": "named barriers are of several warps; the emulator's own samples (test_emulator.py) hold them",
    "griddep_": "what they order lies in two launches",
}


def words_of(name: str) -> tuple[int, int]:
    """How many words a lane of a kernel takes and gives."""
    return module().conformance_kernels()[name]


def operands(name: str) -> torch.Tensor:
    """int32 [ROUNDS, 32, words]: random bits, and, where floats are wanted, those that are hard to round."""
    words = words_of(name)[0]
    random = np.random.default_rng(0)
    bits = random.integers(0, 2**32, (ROUNDS, 32, words), dtype=np.uint32)
    if name in ("cvt_bf16x2", "cvt_fp16x2", "mul_add", "round_down"):
        # Floats that float16 can hold; half-way cases; then zeros, infinities, NaN, subnormals, the ends of float16.
        scale = 2.0 ** random.integers(-28, 18, (24, 32, words))
        bits[8:32] = (random.standard_normal((24, 32, words)) * scale).astype(np.float32).view(U32)
        bits[32:40] &= U32(0xFFFF8000)
        bits[40:48] = bits[8:16] & U32(0xFFFFF000)
        special = np.array(SPECIAL, dtype=np.uint32)
        bits[48:56] = special[random.integers(0, len(special), (8, 32, words))]
    if name.startswith("mma"):
        dtype = torch.bfloat16 if name == "mma_bf16" else torch.float16
        # Elements near 1, so that sums of 16 products neither overflow nor vanish, and accumulators of their size.
        pairs = random.standard_normal((ROUNDS, 32, 12)).astype(np.float32)
        sums = random.standard_normal((ROUNDS, 32, 4)).astype(np.float32)
        # Small integers, and sums that are none, so that no result is a zero of either sign.
        pairs[ROUGH:] = random.integers(-8, 9, pairs[ROUGH:].shape)
        sums[ROUGH:] = random.integers(-512, 512, sums[ROUGH:].shape) + 0.5
        # Among those of the last rounds a few infinities and NaN, which reach their rows and columns and no others.
        for operand in (pairs, sums):
            last = operand[ROUGH + 16 :]
            which = random.random(last.shape) < 0.01
            last[which] = random.choice(np.array([np.inf, -np.inf, np.nan], dtype=np.float32), int(which.sum()))
        bits[..., :6] = torch.from_numpy(pairs).to(dtype).view(torch.int16).numpy().view(np.uint16).view(U32)
        bits[..., 6:] = sums.view(U32)
    if name == "widen":
        # One of each 32 neighbours among the 16-bit patterns.
        bits[:, :, 0] = np.arange(ROUNDS * 32).reshape(ROUNDS, 32) * 32 + random.integers(0, 32, (ROUNDS, 32))
    return torch.from_numpy(bits.view(np.int32))


def run(kernels, name: str, given: torch.Tensor, device: str = "cpu") -> torch.Tensor:
    given = given.to(device)
    results = torch.full((ROUNDS, 32, words_of(name)[1]), -1, dtype=torch.int32, device=device)
    queue = (0, torch.cuda.current_stream().cuda_stream) if device == "cuda" else (0, 0)
    for one_in, one_out in zip(given, results, strict=True):
        kernels.run_conformance(name, one_in.data_ptr(), one_out.data_ptr(), *queue)
    return results.cpu()


def nearest_16_bits(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """What torch rounds to, with the card's NaN."""
    y = torch.from_numpy(x.copy()).to(dtype).view(torch.int16).numpy().view(np.uint16).astype(U32)
    return np.where(np.isnan(x), U32(0x7FFF), y)


def expected_lop3(x):
    a, b, c = (x[..., i] for i in range(3))
    return np.stack([(a & b) | c, a ^ b ^ c, (a & b) | (a & c) | (b & c), (a & b) | (~a & c)], -1)


def expected_prmt(x):
    pool = np.concatenate([x[..., 0:1].copy().view(np.uint8), x[..., 1:2].copy().view(np.uint8)], -1)
    out = np.zeros(x.shape[:-1], U32)
    for i in range(4):
        pick = x[..., 2] >> U32(4 * i) & U32(15)
        byte = np.take_along_axis(pool, (pick & U32(7))[..., None].astype(np.int64), -1)[..., 0]
        byte = np.where(pick & U32(8), np.where(byte & 128, 255, 0), byte)
        out |= byte.astype(U32) << U32(8 * i)
    return out[..., None]


def expected_pair(dtype):
    def pair(x):
        f = x.view(np.float32)
        return (nearest_16_bits(f[..., 1], dtype) << U32(16) | nearest_16_bits(f[..., 0], dtype))[..., None]

    return pair


def expected_widen(x):
    half = torch.from_numpy((x[..., 0] & U32(0xFFFF)).astype(np.uint16).view(np.int16))
    return np.stack([half.view(t).float().numpy().view(U32) for t in (torch.bfloat16, torch.float16)], -1)


def expected_mul_add(x):
    f = x.view(np.float32)
    with np.errstate(all="ignore"):
        product = f[..., 0] * f[..., 1]
        return np.stack([product, product + f[..., 2]], -1).view(U32)


def expected_round_down(x):
    with np.errstate(all="ignore"):
        f = x.view(np.float32).astype(np.float64)
        exact = f[..., 0] * f[..., 1]
        near = exact.astype(np.float32)
        below = np.nextafter(near, np.float32(-np.inf))
        return np.where(near.astype(np.float64) > exact, below, near)[..., None].view(U32)


def expected_shuffles(x):
    lane = np.arange(32)
    value, source = x[..., 0], x[..., 1].astype(np.int64)

    def at(lanes):
        return np.take_along_axis(value, np.broadcast_to(lanes, value.shape), -1)

    xor20 = lane ^ 20
    xor20 = np.where(xor20 // 8 > lane // 8, lane, xor20)
    return np.stack(
        [
            at(source & 31),
            at((lane & 16) | (source & 15)),
            at(lane ^ 5),
            at(xor20),
            at(np.where(lane + 3 < 32, lane + 3, lane)),
            at(np.where(lane % 8 >= 3, lane - 3, lane)),
        ],
        -1,
    )


def expected_votes(x):
    v = x[..., 0]
    weight = U32(1) << np.arange(32, dtype=np.uint32)
    ballot = ((v & U32(1)) * weight).sum(-1, keepdims=True).astype(U32)
    half = (((v & U32(2)) != 0) * weight)[:, :16].sum(-1, keepdims=True).astype(U32)
    ones = np.ones_like(v)
    return np.stack(
        [
            ballot * ones,
            ((v & U32(63)) == 0).any(-1, keepdims=True) * ones,
            ((v & U32(1023)) != 0).all(-1, keepdims=True) * ones,
            np.where(np.arange(32) < 16, half, U32(7)),
        ],
        -1,
    ).astype(U32)


def expected_copies(x):
    y = x.copy()
    for lane in range(32):
        y[:, lane, 8 + lane % 5 :] = 0
    return np.roll(y, -1, axis=1)


def expected_ldmatrix(x):
    rows = x.copy().view(np.uint16).reshape(ROUNDS, 4, 8, 8)  # matrix, row, element
    both = []
    for m in (rows, rows.transpose(0, 1, 3, 2)):
        pairs = np.ascontiguousarray(m).view(U32).reshape(ROUNDS, 4, 32)  # lane: 4 * row + pair
        both.append(pairs.transpose(0, 2, 1))
    return np.concatenate(both, -1)


def of_mma(x, dtype):
    """The operands of each round as float64 matrices: a [16, 16], b [16, 8], c [16, 8]."""
    g, t = np.arange(32) // 4, np.arange(32) % 4
    a, b = (
        torch.from_numpy(np.ascontiguousarray(registers).view(np.int16)).view(dtype).double().numpy()
        for registers in (x[..., :4], x[..., 4:6])
    )
    c = x[..., 6:].copy().view(np.float32).astype(np.float64)
    left, right, total = np.zeros((ROUNDS, 16, 16)), np.zeros((ROUNDS, 16, 8)), np.zeros((ROUNDS, 16, 8))
    for e in range(2):
        for i in range(4):
            left[:, g + i % 2 * 8, 2 * t + e + i // 2 * 8] = a[..., 2 * i + e]
            total[:, g + i // 2 * 8, 2 * t + i % 2] = c[..., i]
        for i in range(2):
            right[:, 2 * t + e + 8 * i, g] = b[..., 2 * i + e]
    return left, right, total


def of_lanes(total):
    """[rounds, 16, 8] as each lane has it: [rounds, 32, 4]."""
    g, t = np.arange(32) // 4, np.arange(32) % 4
    return np.stack([total[:, g + i // 2 * 8, 2 * t + i % 2] for i in range(4)], -1)


def sum_of_products(left, right, total):
    with np.errstate(invalid="ignore"):
        return total + (left[..., None] * right[:, None]).sum(2)  # no product of a library, that may leave zeros out


def expected_mma(dtype):
    return lambda x: of_lanes(sum_of_products(*of_mma(x, dtype))).astype(np.float32).view(U32)


DTYPES = {"mma_bf16": torch.bfloat16, "mma_fp16": torch.float16}


EXPECTED = {
    "ldmatrix": expected_ldmatrix,
    "mma_bf16": expected_mma(torch.bfloat16),
    "mma_fp16": expected_mma(torch.float16),
    "prmt": expected_prmt,
    "lop3": expected_lop3,
    "cvt_bf16x2": expected_pair(torch.bfloat16),
    "cvt_fp16x2": expected_pair(torch.float16),
    "widen": expected_widen,
    "mul_add": expected_mul_add,
    "round_down": expected_round_down,
    "shuffles": expected_shuffles,
    "votes": expected_votes,
    "global_memory": lambda x: np.concatenate([x, x], -1),
    "async_copies": expected_copies,
}


def same(actual: np.ndarray, expected: np.ndarray, name: str, given: np.ndarray) -> None:
    """The same bits, except that any NaN matches any other: processors differ in which they produce.

    How tensor cores round within a product is not specified. A card aligns the addends to the largest, cuts off what
    lies below its last bits, and cuts the sum: each of 17 addends loses at most some 2^-24 of that. Where nothing is
    cut, the bits match.
    """
    if name in DTYPES:
        sizes = (np.abs(operand[:ROUGH]) for operand in of_mma(given, DTYPES[name]))
        bound = of_lanes(sum_of_products(*sizes)) * 2.0**-21
        error = np.abs(actual[:ROUGH].view(np.float32).astype(np.float64) - expected[:ROUGH].view(np.float32))
        assert (error <= bound).all(), f"{name}: {np.max(error / bound):.2f} times the error that cut addends explain"
        actual, expected = actual[ROUGH:], expected[ROUGH:]
    if name in ("widen", "mul_add", "round_down", *DTYPES):
        both_nan = np.isnan(actual.view(np.float32)) & np.isnan(expected.view(np.float32))
        actual, expected = np.where(both_nan, 0, actual), np.where(both_nan, 0, expected)
    assert np.array_equal(actual, expected), f"{name}: {(actual != expected).sum()} of {actual.size} words differ"


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("landing", ["earliest", "latest", "random"])
def test_the_twins_do_what_the_isa_says(name, landing):
    given = operands(name)
    with emulated("random", landing):
        results = run(module(), name, given)
    given = given.numpy().view(U32)
    same(results.numpy().view(U32), EXPECTED[name](given), name, given)


@pytest.mark.gpu
@pytest.mark.parametrize("name", EXPECTED)
def test_the_twins_do_what_the_card_does(name):
    given = operands(name)
    with emulated("random", "random"):
        twin = run(module(), name, given)
    card = run(conformance_module(), name, given, "cuda")
    same(card.numpy().view(U32), twin.numpy().view(U32), name, given.numpy().view(U32))


@pytest.mark.parametrize("name", DTYPES)
def test_a_product_that_cuts_its_addends_passes_and_a_wrong_one_does_not(name):
    given = operands(name).numpy().view(U32)
    left, right, total = of_mma(given, DTYPES[name])
    exact = EXPECTED[name](given)
    rough = exact[ROUGH:].view(np.float32)
    assert np.isnan(rough).any()
    assert np.isinf(rough).any()
    assert np.isfinite(rough[:16]).all()
    # As cards have been seen to: aligned to the largest addend, a bit below float32's last, and cut.
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        addends = np.concatenate([left[..., None] * right[:, None], total[:, :, None]], 2)
        unit = 2.0 ** (np.floor(np.log2(np.abs(addends).max(2, keepdims=True))) - 24)
        cut = (np.trunc(addends / unit) * unit).sum(2)
    card = exact.copy()
    card[:ROUGH] = of_lanes(cut).astype(np.float32).view(U32)[:ROUGH]
    assert (card != exact).mean() > 0.02
    same(card, exact, name, given)
    for where in ((0, 3, 1), (ROUGH, 3, 1)):
        wrong = exact.copy()
        wrong[where] ^= U32(1 << 6 if where[0] < ROUGH else 1)
        with pytest.raises(AssertionError, match=name):
            same(wrong, exact, name, given)


def test_every_function_of_ptx_has_a_twin_and_a_kernel_here():
    """So a new instruction cannot be forgotten."""
    cuda, twins, kernels = (
        (ROOT / path).read_text()
        for path in ("csrc/cuda/device/ptx.cuh", "tests/emulator/ptx.cuh", "tests/emulator/conformance.cu")
    )
    lines = [line for line in cuda.splitlines() if "QLK_DEVICE" in line]
    names = {re.match(r"(?:template <\w* ?\w*> )?QLK_DEVICE \w+ (\w+)[<(]", line).group(1) for line in lines}
    assert {"prmt", "mma_16x8x16", "cp_async_wait", "ld_global_once_16"} <= names
    for name in sorted(names):
        assert re.search(rf"^(inline )?\w+ {name}\(", twins, re.MULTILINE), f"{name} has no twin"
        if not name.startswith(tuple(CONTROL)):
            assert re.search(rf"\b{name}[<(]", kernels), f"{name} has no kernel in conformance.cu"
    assert set(EXPECTED) == set(module().conformance_kernels())
