"""Layers, models and folders of the real bitsandbytes, on the CPU."""

from __future__ import annotations

import bitsandbytes as bnb
import torch
import transformers
from bitsandbytes import functional as F
from torch import nn

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}


def decoded(packed: torch.Tensor, state: F.QuantState) -> torch.Tensor:
    """What bitsandbytes decodes a weight to.

    Where a row's length is no multiple of the block size, its kernel for CPUs gives some weights the constants of other
    blocks. Its own implementation in torch, which it calls "default", stands
    in for that kernel there.
    """
    if state.shape[-1] % state.blocksize == 0:
        return F.dequantize_4bit(packed, state)
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    absmax = state.absmax.float()
    if state.nested:
        absmax = F.dequantize_blockwise(state.absmax, state.state2)
        absmax += state.offset
        absmax = absmax.float()
    codes = packed.contiguous().view(torch.uint8).reshape(-1)
    compute = getattr(_dequantize_4bit_compute, "_torchdynamo_orig_callable", _dequantize_4bit_compute)
    return compute(codes, absmax, state.code, state.blocksize, state.shape, state.dtype)


def tensors_of(packed: torch.Tensor, state: F.QuantState) -> dict[str, torch.Tensor]:
    """A weight's tensors as bitsandbytes saves them."""
    return {"weight": packed} | {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}


def linear4bit(n: int, k: int, bias: bool = True, dtype: torch.dtype = torch.bfloat16, **options) -> bnb.nn.Linear4bit:
    """A quantized layer."""
    dense = nn.Linear(k, n, bias=bias, dtype=dtype)
    layer = bnb.nn.Linear4bit(k, n, bias=bias, **({"quant_type": "nf4"} | options))
    layer.load_state_dict(dense.state_dict())
    if bias:
        layer.bias.data = layer.bias.data.to(dtype)
    layer.weight.data = layer.weight.data.to(dtype)
    return layer.to("cpu")


def llama(**changes) -> transformers.LlamaConfig:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    return transformers.LlamaConfig(**(sizes | changes))


def dense_folder(folder, config=None) -> None:
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config or llama()).bfloat16().save_pretrained(folder)


def in_4_bits(folder, **options) -> nn.Module:
    """A model from a dense folder, quantized by transformers with bitsandbytes."""
    config = transformers.BitsAndBytesConfig(**(NF4 | options))
    return load(folder, quantization_config=config)


def load(folder, **options) -> nn.Module:
    """A model from a folder, in training mode: in eval mode bitsandbytes rounds its constants, on some CPUs."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options).train()


def logits(model: nn.Module) -> torch.Tensor:
    return model(torch.arange(16).view(2, 8)).logits.detach()
