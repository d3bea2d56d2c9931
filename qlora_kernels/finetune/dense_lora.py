"""The baseline: LoRA in plain torch on dense 16-bit layers, with the same initial values as the 4-bit run."""

from __future__ import annotations

import math
import zlib

import torch
import torch.nn.functional as F
from torch import nn

from ..layers.adapters.named import Adapters


def initial_A(name: str, rank: int, columns: int, seed: int) -> torch.Tensor:
    """Kaiming-uniform float32 [r, K]; depends on the layer's name and the seed, not on how the base is stored."""
    generator = torch.Generator().manual_seed((seed << 32) ^ zlib.crc32(name.encode()))
    bound = math.sqrt(3) * math.sqrt(2 / (1 + 5)) / math.sqrt(columns)  # kaiming_uniform_ with a = sqrt(5), as PEFT
    return torch.empty(rank, columns).uniform_(-bound, bound, generator=generator)


class DenseLoRA(nn.Module):
    """y = linear(x) + s * (dropout(x) A^T) B^T, with the adapters in float32 and computed in x's dtype."""

    def __init__(self, linear: nn.Linear, rank: int, scaling: float, dropout: float, A: torch.Tensor) -> None:
        super().__init__()
        self.linear = linear
        self.scaling, self.dropout = scaling, dropout
        device = linear.weight.device
        self.lora_A = nn.Parameter(A.to(device))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dropped = F.dropout(x, self.dropout, self.training) if self.dropout else x
        u = F.linear(dropped, self.lora_A.to(x.dtype))
        return self.linear(x) + self.scaling * F.linear(u, self.lora_B.to(x.dtype))


def add_lora(
    model: nn.Module, names: list[str], rank: int, alpha: float, dropout: float, rslora: bool, seed: int
) -> None:
    """Freezes a dense model and puts adapters on the named layers, in place."""
    model.requires_grad_(False)
    scaling = alpha / (math.sqrt(rank) if rslora else rank)
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)  # only those get quantized and adapted
        A = initial_A(name, rank, linear.in_features, seed)
        model.set_submodule(name, DenseLoRA(linear, rank, scaling, dropout, A))


def share_initial_values(layers: dict[str, Adapters], seed: int) -> None:
    """Gives the adapters of 4-bit layers the initial values that :func:`add_lora` uses, and those of each expert their
    own."""
    with torch.no_grad():
        for name, layer in layers.items():
            adapter = layer.active_adapter
            assert adapter is not None
            A = layer.lora_A[adapter]
            each = [(name, A)] if A.dim() == 2 else [(f"{name}.{expert}", a) for expert, a in enumerate(A)]
            for own_name, a in each:
                a.copy_(initial_A(own_name, a.shape[0], a.shape[1], seed))
            layer.lora_B[adapter].zero_()
