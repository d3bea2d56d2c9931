"""Each instruction that kernels use by name: the emulator's twin against numpy, and, on a card, against the card."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emulated import ROOT, build, emulated, load, module

U32 = np.uint32
KERNELS = module().conformance_kernels()
# float32 bit patterns: zeros, infinities, NaN, subnormals and the smallest normal, the largest; then, of float16, the
# largest, the last that rounds to it, the first that does not, the least subnormal, half of it, the least normal.
SPECIAL = (0, 1 << 31, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 1, 0x80000001, 0x7FFFFF, 0x800000, 0x7F7FFFFF)
SPECIAL += (0x477FE000, 0x477FEFFF, 0x477FF000, 0x33800000, 0x33000000, 0x33000001, 0x387FC000, 0x38800000)
ROUNDS = 64  # sets of operands for each


def operands(name: str) -> torch.Tensor:
    """int32 [ROUNDS, 32, words]: random bits, and, where floats are wanted, those that are hard to round."""
    words = KERNELS[name][0]
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
        # Elements near 1, so that sums of 16 products neither overflow nor vanish, and accumulators of their size.
        dtype = torch.bfloat16 if name == "mma_bf16" else torch.float16
        pairs = torch.from_numpy(random.standard_normal((ROUNDS, 32, 12)).astype(np.float32)).to(dtype)
        bits[..., :6] = pairs.view(torch.int16).numpy().view(np.uint16).view(np.uint32)
        bits[..., 6:] = random.standard_normal((ROUNDS, 32, 4)).astype(np.float32).view(U32)
    if name == "widen":
        # One of each 32 neighbours among the 16-bit patterns.
        bits[:, :, 0] = np.arange(ROUNDS * 32).reshape(ROUNDS, 32) * 32 + random.integers(0, 32, (ROUNDS, 32))
    return torch.from_numpy(bits.view(np.int32))


def run(kernels, name: str, given: torch.Tensor, device: str = "cpu") -> torch.Tensor:
    given = given.to(device)
    found = torch.full((ROUNDS, 32, KERNELS[name][1]), -1, dtype=torch.int32, device=device)
    queue = (0, torch.cuda.current_stream().cuda_stream) if device == "cuda" else (0, 0)
    for one_in, one_out in zip(given, found, strict=True):
        kernels.run_conformance(name, one_in.data_ptr(), one_out.data_ptr(), *queue)
    return found.cpu()


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


def expected_mma(dtype):
    def product(x):
        g, t = np.arange(32) // 4, np.arange(32) % 4
        a, b = (
            torch.from_numpy(np.ascontiguousarray(part).view(np.int16)).view(dtype).double().numpy()
            for part in (x[..., :4], x[..., 4:6])
        )
        c = x[..., 6:].copy().view(np.float32).astype(np.float64)
        left, right, total = np.zeros((ROUNDS, 16, 16)), np.zeros((ROUNDS, 16, 8)), np.zeros((ROUNDS, 16, 8))
        for e in range(2):
            for i in range(4):
                left[:, g + i % 2 * 8, 2 * t + e + i // 2 * 8] = a[..., 2 * i + e]
                total[:, g + i // 2 * 8, 2 * t + i % 2] = c[..., i]
            for i in range(2):
                right[:, 2 * t + e + 8 * i, g] = b[..., 2 * i + e]
        total += left @ right
        found = np.stack([total[:, g + i // 2 * 8, 2 * t + i % 2] for i in range(4)], -1)
        return found.astype(np.float32).view(U32)

    return product


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
    "global_memory": lambda x: x,
    "async_copies": expected_copies,
}


def same(found: np.ndarray, expected: np.ndarray, name: str) -> None:
    """The same bits; of a float's NaN only that it is one, for processors differ in which.

    How a card rounds within a product on tensor cores is not specified: there, the value, to the last bits of float32.
    """
    if name.startswith("mma"):
        np.testing.assert_allclose(found.view(np.float32), expected.view(np.float32), rtol=0, atol=4e-6)
        return
    if name in ("widen", "mul_add", "round_down"):
        both_nan = np.isnan(found.view(np.float32)) & np.isnan(expected.view(np.float32))
        found, expected = np.where(both_nan, 0, found), np.where(both_nan, 0, expected)
    assert np.array_equal(found, expected), f"{name}: {(found != expected).sum()} of {found.size} words differ"


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("landing", ["earliest", "latest", "random"])
def test_the_twins_do_what_the_isa_says(name, landing):
    given = operands(name)
    with emulated("random", landing):
        found = run(module(), name, given)
    same(found.numpy().view(U32), EXPECTED[name](given.numpy().view(U32)), name)


@pytest.fixture(scope="session")
def conformance_on_the_card():
    major, minor = torch.cuda.get_device_capability()
    folder = ROOT / "build" / f"conformance-sm{major}{minor}"
    return load(build(folder, "_conformance", QLK_CONFORMANCE="ON", QLK_CUDA_ARCHS=f"{major}{minor}"), "_conformance")


@pytest.mark.gpu
@pytest.mark.parametrize("name", KERNELS)
def test_the_twins_do_what_the_card_does(name, conformance_on_the_card):
    given = operands(name)
    with emulated("random", "random"):
        twin = run(module(), name, given)
    card = run(conformance_on_the_card, name, given, "cuda")
    same(card.numpy().view(U32), twin.numpy().view(U32), name)
