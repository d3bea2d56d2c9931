"""The operations in plain torch: what float64 runs on, what the tests compare with, and what the docs mean.

Slow, and it does form the dense weight. The module is a backend like the others (protocol.py), on any device.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from ...native import extension
from ..lora import LoraTerm
from ..weight import Operand, Pieces, expert_pieces, own_levels

refuses_non_finite = True
is_host = True


def capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def levels() -> Tensor:
    """The 16 NF4 levels, float32, as csrc/nf4.h has them."""
    return torch.tensor(extension.native().nf4_levels(), dtype=torch.float32)


def decode_absmax(pieces: Pieces) -> Tensor:
    """The float32 constants [blocks]: table[code] * nested_absmax + offset, a rounded multiply, then a rounded add."""
    # The kernels see elements, not shapes: a piece may be [blocks, 1], as bitsandbytes has some.
    _, absmax, nested_absmax, nested_offset, nested_table = pieces
    absmax = absmax.flatten()
    if nested_absmax is None or nested_offset is None or nested_table is None:
        return absmax
    scales = nested_absmax.flatten().repeat_interleave(256)[: absmax.numel()]
    return nested_table.flatten()[absmax.long()] * scales + nested_offset.flatten()


def decode(pieces: Pieces, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """The dense weight [n, k]: round_to_dtype(float32(level) * float32(absmax))."""
    packed, own = pieces[0].flatten(), own_levels(pieces)
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).flatten()[: n * k].long()
    scales = decode_absmax(pieces).repeat_interleave(64)[: n * k]
    values = levels().to(packed.device) if own is None else own
    return (values[codes] * scales).to(dtype).view(n, k)


def philox(seed: int, blocks: Tensor) -> Tensor:
    """Words [len(blocks), 4] (int64 in [0, 2^32)) of Philox 4x32-10 with key ``seed`` and counters ``blocks``."""
    low = 0xFFFFFFFF
    c0, c1 = blocks & low, (blocks >> 32) & low
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & low, (seed >> 32) & low

    def multiply(constant: int, value: Tensor) -> tuple[Tensor, Tensor]:
        # 32 x 32 -> 64 bits in signed int64: by 16-bit halves, so that nothing overflows.
        a = constant * (value & 0xFFFF)
        b = constant * (value >> 16)
        total_low = a + ((b & 0xFFFF) << 16)
        return ((b >> 16) + (total_low >> 32)) & low, total_low & low

    for _ in range(10):
        high0, low0 = multiply(0xD2511F53, c0)
        high1, low1 = multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return torch.stack((c0, c1, c2, c3), dim=-1)


def dropout_mask(
    m: int, k: int, dropout: float, seed: Tensor | int | None, device: torch.device | None = None
) -> Tensor:
    """bool [m, k], True where kept: element i takes word i % 4 of Philox block i / 4, kept when >= p * 2^32."""
    if dropout == 0.0 or m * k == 0:
        return torch.ones(m, k, dtype=torch.bool, device=device)
    value = int(0 if seed is None else seed) & 0xFFFFFFFFFFFFFFFF
    words = philox(value, torch.arange((m * k + 3) // 4, device=device)).flatten()[: m * k]
    return (words >= min(int(dropout * 2**32), 2**32 - 1)).view(m, k)


def quantize(weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
    raise TypeError(f"{name} should be float32, bfloat16 or float16, found {weight.dtype}")


def quantize_absmax(absmax: Tensor, nested_table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    raise TypeError(f"absmax should be float32, found {absmax.dtype}")


def quantize_nested(weight: Tensor, nested_table: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    raise TypeError(f"{name} should be float32, bfloat16 or float16, found {weight.dtype}")


def dequantize(weight: Operand, dtype: torch.dtype, row_begin: int, row_end: int) -> Tensor:
    return decode(weight.pieces, weight.n, weight.k, dtype)[row_begin:row_end].contiguous()


def dequantize_out(weight: Operand, row_begin: int, row_end: int, out: Tensor) -> None:
    out.copy_(dequantize(weight, out.dtype, row_begin, row_end))


def linear_forward(
    x: Tensor, weight: Operand, bias: Tensor | None, lora: LoraTerm | None, keep_u: bool
) -> tuple[Tensor, Tensor | None]:
    rows = x.reshape(-1, weight.k)
    y, u = rows @ decode(weight.pieces, weight.n, weight.k, x.dtype).T, None
    if bias is not None:
        y = y + bias.to(x.dtype)
    if lora is not None:
        masked = rows * dropout_mask(len(rows), weight.k, lora.dropout, lora.seed, x.device)
        u = lora.scaling / (1 - lora.dropout) * (masked @ lora.A.to(x.dtype).T)
        y = y + u @ lora.B.to(x.dtype).T
    return y.view(*x.shape[:-1], weight.n), u


def linear_backward(
    dy: Tensor,
    weight: Operand,
    x: Tensor | None,
    u: Tensor | None,
    lora: LoraTerm | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    rows = dy.reshape(-1, weight.n)
    dx = rows @ decode(weight.pieces, weight.n, weight.k, dy.dtype) if needs[0] else None
    dA = dB = None
    if lora is not None:
        mask = dropout_mask(len(rows), weight.k, lora.dropout, lora.seed, dy.device)
        v = lora.scaling / (1 - lora.dropout) * (rows @ lora.B.to(dy.dtype))
        if dx is not None:
            dx = dx + mask * (v @ lora.A.to(dy.dtype))
        if needs[1] and x is not None:
            dA = (v.T @ (x.reshape(-1, weight.k) * mask)).to(lora.A.dtype)
        if needs[2] and u is not None:
            dB = (rows.T @ u).to(lora.B.dtype)
    return None if dx is None else dx.view(*dy.shape[:-1], weight.k), dA, dB


def _experts(weight: Operand, offsets: Tensor) -> Iterator[tuple[int, slice, Operand]]:
    """Each expert with rows: its number, its rows, its weight. The host reads the offsets."""
    ends = cast(list[int], offsets.tolist())  # pyright: ignore[reportUnknownMemberType]
    for e, (begin, end) in enumerate(itertools.pairwise(ends)):
        if end > begin:
            yield e, slice(begin, end), Operand(expert_pieces(weight.pieces, weight.experts, e), weight.n, weight.k)


def linear_grouped_forward(
    x: Tensor,
    weight: Operand,
    offsets: Tensor,
    bias: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor | None]:
    y = x.new_zeros(x.shape[0], weight.n)
    u = None if A is None else x.new_zeros(x.shape[0], A.shape[1])
    for e, rows, one in _experts(weight, offsets):
        lora = None if A is None or B is None else LoraTerm(A[e], B[e], scaling)
        y[rows], part = linear_forward(x[rows], one, None if bias is None else bias[e], lora, True)
        if u is not None and part is not None:
            u[rows] = part
    return y, u


def linear_grouped_backward(
    dy: Tensor,
    weight: Operand,
    offsets: Tensor,
    x: Tensor | None,
    u: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    scaling: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dx = dy.new_zeros(dy.shape[0], weight.k) if needs[0] else None
    dA = torch.zeros_like(A) if needs[1] and A is not None else None
    dB = torch.zeros_like(B) if needs[2] and B is not None else None
    for e, rows, one in _experts(weight, offsets):
        lora = None if A is None or B is None else LoraTerm(A[e], B[e], scaling)
        saved = (None if x is None else x[rows], None if u is None else u[rows])
        for all_of_them, part in zip((dx, dA, dB), linear_backward(dy[rows], one, *saved, lora, needs), strict=True):
            if all_of_them is not None and part is not None:
                all_of_them[rows if all_of_them is dx else e] = part
    return dx, dA, dB
