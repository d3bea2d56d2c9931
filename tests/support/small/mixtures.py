"""Tiny random mixtures of experts, and the dense models that their 4-bit twins decode to."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import qlora_kernels
from qlora_kernels.models.experts import adapted_layers, experts_layers

transformers = pytest.importorskip("transformers")

COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 16,
}
# gpt-oss has transposed weights, biases, and gate and up interleaved.
KINDS = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
BOTH = ["gate_up_proj", "down_proj"]
TOKENS = torch.arange(18).view(2, 9)


def make(kind: str, **changes) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**COMMON | KINDS[kind] | changes)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("_bias"):  # zero at the start
            nn.init.normal_(parameter, std=0.1)
    return model


def quantized(model: nn.Module, rank: int = 0, **options) -> tuple[nn.Module, qlora_kernels.QuantizeReport]:
    model = copy.deepcopy(model)
    return model, qlora_kernels.quantize_model(model, rank=rank, progress=False, **options)


def decoded(model: nn.Module, packed: nn.Module) -> nn.Module:
    """The dense model with the weights that ``packed`` decodes to, without its adapters."""
    twin = copy.deepcopy(model)
    for name, layer in qlora_kernels.qlora_layers(packed):
        twin.get_submodule(name).weight.data = layer.weight.dequantize()
    for name, layer in experts_layers(packed):
        module, weights = twin.get_submodule(name.rpartition(".")[0]), layer.weight.dequantize()
        weights = weights.transpose(1, 2).contiguous() if module.is_transposed else weights
        module.get_parameter(name.rpartition(".")[2]).data = weights
    return twin


def randomize(model: nn.Module) -> None:
    """Adapters that do something."""
    for _, layer in adapted_layers(model):
        for matrix in (*layer.lora_A.values(), *layer.lora_B.values()):
            nn.init.normal_(matrix, std=0.1)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits
