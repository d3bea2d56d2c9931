"""A small model of two blocks in plain torch, and its state for comparison."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from qlora_kernels import quantize_model
from qlora_kernels.models.targets import qlora_layers


class Block(nn.Module):
    def __init__(self, width: int = 64):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.norm = nn.Linear(width, 2 * width, bias=False), nn.LayerNorm(width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        return self.norm(x + self.down(F.silu(self.up(self.v_proj(x) * self.q_proj(x).sigmoid()))))


class Model(nn.Module):
    """Two blocks between an embedding and a head."""

    def __init__(self, tied: bool = False):
        super().__init__()
        self.embedding = nn.Embedding(50, 64)
        self.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(64, 50, bias=False)
        if tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


LINEARS = [f"layers.{i}.{name}" for i in range(2) for name in ("q_proj", "v_proj", "up", "down")]
IDS = torch.arange(12).view(2, 6)


def quantize(model, **options):
    return quantize_model(model, **{"rank": 4, "progress": False, **options})


def quantized(model):
    return [name for name, _ in qlora_layers(model)]


def with_adapters(model):
    return [name for name, layer in qlora_layers(model) if layer.adapters]


def randomize(model):
    for _, layer in qlora_layers(model):
        for B in layer.lora_B.values():
            nn.init.normal_(B, std=0.05)


def fingerprint(model):
    return [(name, type(module)) for name, module in model.named_modules()], {
        key: (value.clone(), value.requires_grad) for key, value in dict(model.named_parameters()).items()
    }


def assert_unchanged(model, before):
    modules, parameters = fingerprint(model)
    assert modules == before[0]
    assert parameters.keys() == before[1].keys()
    for key, (value, requires_grad) in parameters.items():
        assert torch.equal(value.nan_to_num(), before[1][key][0].nan_to_num())
        assert requires_grad == before[1][key][1]
