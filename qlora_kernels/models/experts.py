"""A mixture's experts in three-dimensional parameters: which of a model can be 4-bit, and swapping them."""

# Uses private attributes of modules.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ..formats.nf4_stack import quantize_stack
from ..layers.adapters.config import AdapterConfig
from ..layers.adapters.named import Adapters
from ..layers.experts import QExperts, QExpertsModule
from ..layers.qlinear import QLinear
from .places import Places, put

# What transformers (5.0 on) notes in a module of experts, for its own implementations of them; later ones note more.
_FLAGS = ("has_bias", "is_transposed", "num_experts")


def stacked_weights(experts: nn.Module) -> tuple[str, ...]:
    """Names of the three-dimensional weights of a module of experts that QExpertsModule can replace; else none."""
    if not all(hasattr(experts, flag) for flag in _FLAGS) or getattr(experts, "_is_expert_parallel", False):
        return ()
    has_gate = getattr(experts, "has_gate", True)
    names = ("gate_up_proj" if has_gate else "up_proj", "down_proj")
    if has_gate and not hasattr(type(experts), "_apply_gate"):
        return ()
    # A hook that computes the weight, or a forward of its own, would be lost.
    weights = [experts._parameters.get(name) for name in names]
    if "forward" in experts.__dict__ or not all(weight is not None and weight.dim() == 3 for weight in weights):
        return ()
    return names


def weight_stack(experts: nn.Module, name: str) -> torch.Tensor:
    """A module's weights as [E, N, K], a view."""
    weights = experts.get_parameter(name).detach()
    return weights.transpose(1, 2) if experts.is_transposed else weights


def experts_layers(model: nn.Module) -> Iterator[tuple[str, QExperts]]:
    """(name, layer) of every QExperts in a model, in the order of ``named_modules``."""
    for name, module in model.named_modules():
        if isinstance(module, QExperts):
            yield name, module


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Adapters]]:
    """(name, layer) of everything in a model that can have adapters: QLinear and QExperts."""
    for name, module in model.named_modules():
        if isinstance(module, (QLinear, QExperts)):
            yield name, module


def swap_experts(
    places: Places,
    name: str,
    adapted: set[str],
    adapter: AdapterConfig,
    double_quant: bool,
    adapter_dtype: torch.dtype | None,
    compute_dtype: torch.dtype | None,
    device: str | torch.device | None,
) -> None:
    """Replaces one module of experts in all its places; each dense stack is free before the next one is quantized.

    Args:
        name: of the module, for errors.
        adapted: names of the parameters that get adapters.
    """
    parent, key = places[0]
    experts = parent._modules[key]
    assert experts is not None  # places_of lists modules
    if device is not None:
        experts.to(device)
    names, stacks = stacked_weights(experts), {}
    for weight in names:
        full = f"{name}.{weight}"
        stack = quantize_stack(weight_stack(experts, weight), double_quant, name=full)
        config = adapter if full in adapted else AdapterConfig(rank=0, alpha=1)
        stacks[weight] = QExperts(stack, config, compute_dtype, adapter_dtype)
    module = QExpertsModule(experts, stacks)
    if compute_dtype is not None:
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(compute_dtype)
    put(module, places)
