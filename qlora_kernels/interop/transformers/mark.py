"""Notes on a transformers model in memory that its layers are 4-bit, for save_pretrained, Trainer and the like."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from torch import nn

from ...models.experts import adapted_layers
from .live import describe


def mark(model: nn.Module) -> None:
    """Notes in the config of each transformers model within ``model`` that it is 4-bit.

    ``save_pretrained`` writes the note, and without it ``from_pretrained`` would make dense layers with random weights.
    """
    from transformers import PreTrainedModel

    from .quantizer import NF4Quantizer

    for one in _outermost(model, PreTrainedModel):
        other = getattr(one, "hf_quantizer", None)
        if other is not None and not isinstance(other, NF4Quantizer):
            warnings.warn(
                f"{type(one).__name__} was quantized by {other.quantization_config.quant_method} before; what "
                "save_pretrained writes of it cannot be loaded again",
                stacklevel=3,
            )
            continue
        config = describe(one)
        quantizer = NF4Quantizer(config, pre_quantized=True)
        if other is None:
            _give_own_config(one)
        marked: Any = one
        marked.hf_quantizer = quantizer
        marked.quantization_method = config.quant_method
        marked.config.quantization_config = config


def _give_own_config(model: Any) -> None:
    """A copy of its config, which other models may have too, in all its modules."""
    shared, own = model.config, copy.copy(model.config)
    for module in model.modules():
        if module.__dict__.get("config") is shared:
            module.config = own


def _outermost(model: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    """The modules of a kind that hold 4-bit layers, and lie in no other of that kind."""
    if isinstance(model, kind):
        return [model] if any(adapted_layers(model)) else []
    return [found for child in model.children() for found in _outermost(child, kind)]
