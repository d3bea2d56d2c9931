"""Layers and blocks with the shapes of well-known models, in each contender's form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..points import MODELS

_SHIFT = 4099  # no multiple of a row


def dense_weights(shapes: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Weights [n, k], normally distributed; in memory of their own.

    All take the same numbers, each from another one on, which saves most of the time: with the very same ones queries
    would equal keys, and each token would attend to itself alone.
    """
    most = max(n * k for n, k in shapes) + _SHIFT * len(shapes)
    numbers = torch.randn(most, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(device, dtype)
    return [numbers[i * _SHIFT :][: n * k].clone().view(n, k) for i, (n, k) in enumerate(shapes)]


def peft_lora(linear: nn.Module, A: Tensor, B: Tensor, alpha: float) -> nn.Module:
    """PEFT's LoRA layer over a layer, with A [r, k] and B [n, r] in their own dtype."""
    from peft import LoraConfig, get_peft_model

    # LoraConfig declares an int, and takes any number.
    config = LoraConfig(r=A.shape[0], lora_alpha=cast(int, alpha), lora_dropout=0.0, target_modules=["0"])
    model = get_peft_model(nn.Sequential(linear), config, autocast_adapter_dtype=False)
    layer = cast(Any, model).base_model.model[0]
    for module, value in ((layer.lora_A["default"], A), (layer.lora_B["default"], B)):
        module.weight = nn.Parameter(value.clone())
    return layer


def peft_adapter(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """A and B of PEFT's LoRA layer, which torch's annotations know nothing of."""
    lora = cast(Any, layer)
    return lora.lora_A["default"].weight, lora.lora_B["default"].weight


def plain_lora(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """y + scaling * (x A^T) B^T for 2-dimensional x and y, as plain torch does it with the fewest passes over y."""
    return torch.addmm(y, scaling * F.linear(x, A), B.t())


class PlainLora(nn.Module):
    """x W^T + scaling * (x A^T) B^T in plain torch: what others are held against."""

    weight: Tensor

    def __init__(self, weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.A, self.B, self.scaling = nn.Parameter(A), nn.Parameter(B), scaling

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + self.scaling * F.linear(F.linear(x, self.A), self.B)


class Block(nn.Module):
    """A decoder layer of transformers' Llama with random weights and its rotary embedding: [1, M, hidden] to the same.

    Args:
        model: a key of MODELS.
        dtype, device: of the weights.
        weights: of the linear layers, by name, instead of random ones.
    """

    def __init__(
        self, model: str, dtype: torch.dtype, device: torch.device, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

        super().__init__()
        shape = MODELS[model]
        # attn_implementation is read from what PretrainedConfig gets beside the declared fields.
        options: dict[str, Any] = {"attn_implementation": "sdpa"}
        config = LlamaConfig(
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            num_hidden_layers=1,
            **options,
        )
        with torch.device("meta"):
            self.layer = LlamaDecoderLayer(config, layer_idx=0)
        self.rotary = LlamaRotaryEmbedding(config).to(device)
        linears = self.linears()
        if weights is None:
            made = dense_weights([(m.out_features, m.in_features) for m in linears.values()], dtype, device)
            weights = dict(zip(linears, made))
        for name, linear in linears.items():
            linear.weight = nn.Parameter(weights[name], requires_grad=False)
        for name, parameter in list(self.layer.named_parameters()):
            if parameter.is_meta:  # the norms
                module, _, last = name.rpartition(".")
                value = nn.Parameter(torch.ones(parameter.shape, dtype=dtype, device=device), requires_grad=False)
                setattr(self.layer.get_submodule(module), last, value)

    def linears(self) -> dict[str, nn.Linear]:
        """Its dense linear layers, by name."""
        return {name: module for name, module in self.named_modules() if type(module) is nn.Linear}

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)[None]
        y = self.layer(x, position_embeddings=self.rotary(x, positions), position_ids=positions)
        return y[0] if isinstance(y, tuple) else y
