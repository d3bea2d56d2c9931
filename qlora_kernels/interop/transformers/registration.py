"""Makes quant_method "qlora_kernels" known to transformers, when and if that is imported."""

from __future__ import annotations

from types import ModuleType

from ..import_hooks import when_imported

_ATTRIBUTES = "LOADING_ATTRIBUTES_CONFIG_TYPES"


def register() -> None:
    """Registers the quantizer now if transformers' quantizers are loaded, or else as soon as they are.

    Costs nothing where transformers is never imported.
    """
    when_imported("transformers.quantizers.auto", _register)


def _register(auto: ModuleType) -> None:
    from ...models.quantize import after_quantizing
    from . import quantizer  # noqa: F401  it enters itself, since its own import may be what has led here
    from .mark import mark
    from .nf4_config import NF4Config

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[NF4Config.quant_method] = NF4Config
    # Configs whose loading attributes an argument of from_pretrained may add to those of a quantized folder.
    types = getattr(auto, _ATTRIBUTES, None)
    if isinstance(types, tuple) and NF4Config not in types:
        setattr(auto, _ATTRIBUTES, (*types, NF4Config))
    if mark not in after_quantizing:
        after_quantizing.append(mark)
