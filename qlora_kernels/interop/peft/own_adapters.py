"""The own adapters of QLinear and QExperts in a model that PEFT is to manage: PEFT neither selects nor saves them."""

from __future__ import annotations

import warnings
from collections.abc import Collection

from torch import nn

from ...errors import listed
from ...layers.adapters.named import Adapters
from ...models.experts import adapted_layers, experts_layers
from ...models.targets import matches


def check_own_adapters(model: nn.Module) -> None:
    """Refuses adapters that hold something, which would be used in training and left out of every save.

    Raises:
        ValueError: names the layers and says what to do. Nothing has changed.
    """
    used = [_place(name, layer) for name, layer in adapted_layers(model) if not _all_fresh(layer)]
    if used:
        raise ValueError(
            f"{len(used)} layers have trained adapters of their own, which PEFT would not save: {listed(used, 3)}. "
            "Save them with qlora_kernels.save_adapter, quantize the model with rank=0, and load them with "
            "PeftModel.from_pretrained(model, folder); those of experts with qlora_kernels.load_adapter alone"
        )


def check_parameters(model: nn.Module, patterns: Collection[str]) -> None:
    """Refuses target_parameters for 4-bit experts: PEFT finds no parameter, and would leave them out with a warning.

    Raises:
        ValueError: names the experts and says what to do.
    """
    covered = [name for name, _ in experts_layers(model) if matches(name.replace(".base_layer.", "."), patterns)]
    if covered:
        raise ValueError(
            f"target_parameters covers 4-bit experts ({listed(covered, 3)}), on which PEFT can put no adapter. For "
            "adapters to train use quantize_model(model, target_parameters=[...]), for a saved one "
            "qlora_kernels.load_adapter(model, folder); without target_parameters PEFT adapts the linear layers alone"
        )


def drop_own_adapters(model: nn.Module) -> None:
    """Deletes adapters that add nothing (B is zero), with a warning: quantize_model makes them by default."""
    dropped: list[str] = []
    for name, layer in adapted_layers(model):
        if layer.adapters:
            dropped.append(_place(name, layer))
            for adapter in layer.adapters:
                layer.delete_adapter(adapter)
    if dropped:
        warnings.warn(
            f"{len(dropped)} layers had untrained adapters of their own, which PEFT would not save; they were "
            f"removed: {listed(dropped, 3)}. Quantize with rank=0 when PEFT makes the adapters",
            stacklevel=4,
        )


def _place(name: str, layer: Adapters) -> str:
    adapters = listed(map(repr, layer.adapters), 3)
    return f"{name.removesuffix('.base_layer') or 'the model itself'} ({adapters})"


def _all_fresh(layer: Adapters) -> bool:
    if layer.merged_adapter_name is not None:
        return False
    matrices = [layer.lora_B[name] for name in layer.adapters]
    return not any(matrix.is_meta or bool(matrix.any()) for matrix in matrices)
