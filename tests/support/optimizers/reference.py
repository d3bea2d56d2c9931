"""AdamW and Lion as plain scalar float32 arithmetic: numpy, one rounding an operation."""

from __future__ import annotations

import math

import numpy as np
import torch

F = np.float32


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().float().numpy().copy()


def adamw(p, g, m, v, step, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
    """torch.optim.AdamW's formulas (_single_tensor_adam, decoupled decay); step counts from 1. All float32."""
    beta1, beta2 = betas
    p = p * F(1 - lr * weight_decay)
    weight = F(1 - beta1)
    m = m + weight * (g - m) if weight < 0.5 else g - (g - m) * (F(1) - weight)
    v = v * F(beta2) + F(1 - beta2) * g * g
    rate = F(lr / (1 - beta1**step))
    denominator = np.sqrt(v) / F(math.sqrt(1 - beta2**step)) + F(eps)
    return p + -rate * m / denominator, m, v


def lion(p, g, m, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
    beta1, beta2 = betas
    sign = np.sign(m * F(beta1) + F(1 - beta1) * g)
    return p * F(1 - lr * weight_decay) + -F(lr) * sign, m * F(beta2) + F(1 - beta2) * g


def quantize_states(values, table: list[float], is_signed: bool):
    """The nearest entries, the smaller magnitude of two equally near (float32 midpoints), by looking at all of them."""
    codes, constants = [], []
    entries = np.array(table, dtype=F)
    zero = table.index(0.0)
    positive = entries[zero:]
    middle = ((positive[:-1].astype(np.float64) + positive[1:]) / 2).astype(F)
    for at in range(0, len(values), 256):
        block = np.clip(np.nan_to_num(values[at : at + 256], nan=0.0), -np.finfo(F).max, np.finfo(F).max)
        largest = np.abs(block).max()
        constants.append(largest)
        if largest == 0:
            codes.append(np.full(len(block), zero))
            continue
        rank = (np.abs(block)[:, None] / largest > middle[None]).sum(1)
        if is_signed:
            codes.append(np.where(block < 0, zero - np.minimum(rank, zero), zero + rank))
        else:
            codes.append(np.where((rank == 0) & (block > 0), 1, rank))
    return np.concatenate(codes).astype(np.uint8), np.array(constants, dtype=F)
