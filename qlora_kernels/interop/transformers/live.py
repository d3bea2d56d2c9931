"""Models of transformers in memory: what their config says about their 4-bit layers, so that save_pretrained can."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import torch
from torch import nn

from ...errors import listed
from ...layers.adapters.config import AdapterConfig
from ...layers.adapters.named import Adapters
from ...layers.qlinear import QLinear
from ...models.experts import adapted_layers, experts_layers
from ...models.origin import Origin, origin_of_model
from ...models.targets import not_quantized
from .expert_stacks import bias_of, expert_modules
from .nf4_config import NF4Config, dtype_name


def describe(model: nn.Module) -> NF4Config:
    """The settings with which a folder of this model is loaded again.

    What cannot be saved, :func:`check_savable` says.
    """
    layers = dict(adapted_layers(model))
    double_quant = Counter(layer.weight.double_quant for layer in layers.values()).most_common(1)[0][0]
    dtype = getattr(model, "dtype", None)
    origin = _origin(model)
    return NF4Config(
        double_quant,
        modules_to_not_convert=sorted(not_quantized(model)),
        layers=_exceptions(model, layers, double_quant, dtype),
        adapters=_groups(layers, dtype),
        experts=list(expert_modules(model)),
        base_model_name_or_path=origin.name,
        base_model_revision=origin.revision,
    )


def _origin(model: nn.Module) -> Origin:
    with warnings.catch_warnings():  # that it is unknown, save_adapter says where it matters
        warnings.simplefilter("ignore")
        return origin_of_model(model)


def check_savable(model: nn.Module) -> None:
    """
    Raises:
        ValueError: naming the layers that cannot be saved as they are, and what to do.
    """
    layers = dict(adapted_layers(model))
    known = tuple(f"{name}." for name in expert_modules(model))
    alone = [name for name, _ in experts_layers(model) if not name.startswith(known)]
    if alone:
        raise ValueError(
            f"{listed(alone, 3)}: 4-bit experts outside a module of transformers' experts; save model.state_dict()"
        )
    merged = [name for name, layer in layers.items() if layer.merged_adapter_name is not None]
    if merged:
        raise ValueError(
            f"an adapter is merged into {listed(merged, 3)}; call qlora_kernels.unmerge_adapters(model) before saving, "
            "since the folder would have the adapter twice"
        )
    inside = [name for name in layers if name.endswith(".base_layer") or ".base_layer." in name]
    if inside:
        raise ValueError(
            f"PEFT's layers are around {listed(inside, 3)}; save the adapter with PeftModel.save_pretrained, or take "
            "PEFT's layers off with unload() first"
        )


def _exceptions(
    model: nn.Module, layers: dict[str, Adapters], double_quant: bool, dtype: torch.dtype | None
) -> dict[str, dict[str, Any]]:
    """Layers whose weight or bias differs from those of the most, or from the model's dtype."""
    exceptions: dict[str, dict[str, Any]] = {}
    for name, layer in layers.items():
        entry: dict[str, Any] = {}
        if layer.weight.double_quant != double_quant:
            entry["double_quant"] = layer.weight.double_quant
        if isinstance(layer, QLinear) and not layer.weight.has_nf4_levels:
            entry["nf4_levels"] = False
        bias = layer.bias if isinstance(layer, QLinear) else bias_of(model, name)
        own = layer.dtype if bias is None else bias.dtype
        if own != dtype:
            entry["dtype"] = dtype_name(own)
        if entry:
            exceptions[name] = entry
    return exceptions


def _groups(layers: dict[str, Adapters], dtype: torch.dtype | None) -> list[dict[str, Any]]:
    """The adapters, those with the same settings together."""
    groups: dict[tuple[str, AdapterConfig, torch.dtype, bool], list[str]] = {}
    for name, layer in layers.items():
        for adapter, config in layer.adapters.items():
            key = (adapter, config, layer.lora_A[adapter].dtype, adapter == layer.active_adapter)
            groups.setdefault(key, []).append(name)
    linear = [name for name, layer in layers.items() if isinstance(layer, QLinear)]
    described = []
    for (adapter, config, own, active), names in groups.items():
        alpha = config.alpha if isinstance(config.alpha, int) else float(config.alpha)
        group: dict[str, Any] = {"name": adapter, "rank": config.rank, "alpha": alpha}
        if config.dropout:
            group["dropout"] = config.dropout
        if config.rslora:
            group["rslora"] = True
        if own != dtype:
            group["dtype"] = dtype_name(own)
        if not active:
            group["active"] = False
        if names != linear:  # without names, a group is of all linear layers
            group["layers"] = names
        described.append(group)
    return described
