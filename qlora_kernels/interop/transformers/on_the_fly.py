"""The operation that transformers applies to each dense weight that becomes 4-bit while a model is loaded."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps


class Quantizer(Protocol):
    """What the operation asks."""

    def param_needs_quantization(self, model: nn.Module, param_name: str) -> bool: ...

    def quantize(self, model: nn.Module, name: str, weight: Tensor) -> bool: ...


class QuantizeWeight(ConversionOps):
    """Takes the weights of layers out of what is to be loaded, and makes the layers 4-bit with them."""

    def __init__(self, hf_quantizer: Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        *,
        model: nn.Module,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        rest: dict[str, Any] = {}
        for key, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            needed = isinstance(weight, Tensor) and self.hf_quantizer.param_needs_quantization(model, key)
            if not needed or not self.hf_quantizer.quantize(model, key.removesuffix(".weight"), weight):
                rest[key] = value
            elif missing_keys is not None:
                missing_keys.discard(key)
        return rest
