"""What a model of transformers says about its quantization, kept in line with its layers."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

_MARKS = ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit")


def _models(model: nn.Module) -> list[Any]:
    """The models of transformers in a module: models have a config of their own, parts may share it."""
    return [module for module in model.modules() if hasattr(type(module), "save_pretrained") and _config(module)]


def _config(module: nn.Module) -> Any:
    return getattr(module, "config", None)


def unmark_bitsandbytes(model: nn.Module) -> None:
    """Takes away what says that a model is quantized by bitsandbytes."""
    for module in _models(model):
        for mark in _MARKS:
            module.__dict__.pop(mark, None)
        for key in ("quantization_config", "_is_quantized"):
            _config(module).__dict__.pop(key, None)


def mark_bitsandbytes(model: nn.Module, quantized: set[str], kind: str, double_quant: bool, dtype: torch.dtype) -> None:
    """Says that a model is quantized by bitsandbytes, as transformers says it after loading one.

    Args:
        model: any module; only a model of transformers is changed.
        quantized: names of its 4-bit layers.
        kind: "nf4" or "fp4".
        double_quant: whether all of them have double quantization.
        dtype: what they compute in.
    """
    if not any(module is model for module in _models(model)):
        return
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=_skipped(model, quantized),
    )
    unmark_bitsandbytes(model)
    marked: Any = model
    marked.hf_quantizer = Bnb4BitHfQuantizer(config, pre_quantized=True)
    marked.is_quantized = marked.is_loaded_in_4bit = True
    marked.quantization_method = config.quant_method
    marked.config.quantization_config = config
    for module in _models(model):
        _config(module)._is_quantized = True


def _skipped(model: nn.Module, quantized: set[str]) -> list[str]:
    """The dense linear layers, as transformers reads it: a name's beginning as a regular expression, or its end."""
    skip = []
    for name, module in model.named_modules():
        dense = type(module) is nn.Linear or type(module).__name__ == "Conv1D"
        if not dense or name in quantized:
            continue
        clashes = any(other.endswith(name) or re.match(rf"{name}(\.|$)", other) for other in quantized)
        skip.append(f"^{re.escape(name)}$" if clashes else name)
    return skip
