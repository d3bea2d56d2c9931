"""Small Llama models, quantized, and their state for comparison."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qlora_kernels import quantize_model
from qlora_kernels.models import targets

transformers = pytest.importorskip("transformers")
IDS = torch.arange(16).view(2, 8)
CONFIG = transformers.LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)


def llama():
    torch.manual_seed(3)
    return transformers.LlamaForCausalLM(CONFIG).eval()


def quantized(rank=4, **options):
    """A quantized Llama whose adapters do something."""
    model = llama()
    quantize_model(model, rank, progress=False, **options)
    randomize(model)
    return model


def randomize(model):
    for _, layer in targets.qlora_layers(model):
        for matrix in (*layer.lora_A.values(), *layer.lora_B.values()):
            nn.init.normal_(matrix, std=0.1)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}, {
        name: (layer.adapters, layer.active_adapter) for name, layer in targets.qlora_layers(model)
    }


def assert_unchanged(model, before):
    after = state(model)
    assert after[1] == before[1]
    assert after[0].keys() == before[0].keys()
    assert all(torch.equal(after[0][key], before[0][key]) for key in before[0])
