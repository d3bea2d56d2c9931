"""The operations in plain torch: what float64 runs on, what the tests compare with, and what the docs mean.

Slow, and it does form the dense weight. The functions have the signatures of the backends in backends.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...native import extension


def levels() -> Tensor:
    """The 16 NF4 levels, float32, as csrc/nf4.h has them."""
    return torch.tensor(extension.native().nf4_levels(), dtype=torch.float32)


def decode_absmax(pieces: tuple[Tensor | None, ...]) -> Tensor:
    """The float32 constants [blocks]: table[code] * nested_absmax + offset, a rounded multiply, then a rounded add."""
    _, absmax, nested_absmax, nested_offset, nested_table = pieces
    if nested_absmax is None:
        return absmax
    return nested_table[absmax.long()] * nested_absmax.repeat_interleave(256)[: absmax.numel()] + nested_offset


def decode(pieces: tuple[Tensor | None, ...], n: int, k: int, dtype: torch.dtype) -> Tensor:
    """The dense weight [n, k]: round_to_dtype(float32(level) * float32(absmax))."""
    packed = pieces[0]
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).flatten()[: n * k].long()
    scales = decode_absmax(pieces).repeat_interleave(64)[: n * k]
    return (levels().to(packed.device)[codes] * scales).to(dtype).view(n, k)


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
    value = int(seed) & 0xFFFFFFFFFFFFFFFF
    words = philox(value, torch.arange((m * k + 3) // 4, device=device)).flatten()[: m * k]
    return (words >= min(int(dropout * 2**32), 2**32 - 1)).view(m, k)


def quantize(weight: Tensor, name: str):
    raise TypeError(f"{name} should be float32, bfloat16 or float16, found {weight.dtype}")


def dequantize(pieces, n: int, k: int, dtype: torch.dtype, row_begin: int, row_end: int) -> Tensor:
    return decode(pieces, n, k, dtype)[row_begin:row_end].contiguous()


def linear_forward(x, pieces, n, bias, lora_A, lora_B, scaling, dropout, seed):
    m, k = x.shape
    y = x @ decode(pieces, n, k, x.dtype).T
    if bias is not None:
        y = y + bias.to(x.dtype)
    if lora_A is None:
        return y, x.new_empty(m, 0)
    masked = x * dropout_mask(m, k, dropout, seed, x.device)
    u = scaling / (1 - dropout) * (masked @ lora_A.to(x.dtype).T)
    return y + u @ lora_B.to(x.dtype).T, u


def linear_backward(dy, pieces, k, x, u, lora_A, lora_B, scaling, dropout, seed, need_dx, need_dA, need_dB):
    m, n = dy.shape
    dx = dA = dB = dy.new_empty(0)
    mask = dropout_mask(m, k, dropout, seed, dy.device)
    if lora_A is not None:
        v = scaling / (1 - dropout) * (dy @ lora_B.to(dy.dtype))
    if need_dx:
        dx = dy @ decode(pieces, n, k, dy.dtype)
        if lora_A is not None:
            dx = dx + mask * (v @ lora_A.to(dy.dtype))
    if need_dA:
        dA = (v.T @ (x * mask)).to(lora_A.dtype)
    if need_dB:
        dB = (dy.T @ u).to(lora_B.dtype)
    return dx, dA, dB
