"""A small layer, and its state for comparison."""

from __future__ import annotations

import torch
from torch import nn

from qlora_kernels import QLinear

K, N = 100, 72  # K is no multiple of 64


def dense(bias=True, dtype=None, k=K, n=N):
    return nn.Linear(k, n, bias, dtype=dtype)


def layer(rank=4, **options):
    """A QLinear whose adapter does something."""
    made = QLinear.from_linear(dense(), rank, **options)
    for B in made.lora_B.values():
        nn.init.normal_(B, std=0.1)
    return made


def frozen_bits(module):
    return {key: value.clone() for key, value in module.state_dict().items() if key.startswith("weight_")}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for key in left:
        assert left[key].dtype == right[key].dtype, key
        assert torch.equal(left[key], right[key]), key
