"""What a model of transformers says about its quantization, kept in line with its layers."""

from __future__ import annotations

import re
import sys
from typing import Any

import torch
from torch import nn

from ...errors import listed
from ...layers.packed import PackedLayer
from ...layers.qlinear import QLinear
from .layers import linear4bit

_MARKS = ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit")


def _models(model: nn.Module) -> list[Any]:
    """The models of transformers in a module, those around others first: each has a config, parts may share it."""
    library = sys.modules.get("transformers.modeling_utils")  # without which there are none
    if library is None:
        return []
    return [module for module in model.modules() if isinstance(module, library.PreTrainedModel)]


def refuse_other_layers(model: nn.Module) -> None:
    """
    Raises:
        ValueError: for a model of transformers with 8-bit layers or 4-bit experts, whose folder could not say what is
            what.
    """
    for one in _models(model):
        modules = dict(one.named_modules())
        eight = [name for name, module in modules.items() if type(module).__name__ == "Linear8bitLt"]
        if eight:
            raise ValueError(
                f"{len(eight)} layers of {type(one).__name__} are 8-bit layers of bitsandbytes: {listed(eight, 3)}. A "
                "model of transformers has 4-bit or 8-bit layers, not both. The model is unchanged."
            )
        experts = [
            name
            for name, module in modules.items()
            if isinstance(module, PackedLayer) and not isinstance(module, QLinear)
        ]
        if experts:
            raise ValueError(
                f"{type(one).__name__} has 4-bit experts, for which bitsandbytes has no layer: {listed(experts, 3)}. "
                "Convert a model whose experts are dense. The model is unchanged."
            )


def unmark_bitsandbytes(model: nn.Module) -> None:
    """Takes away what says that a model is quantized by bitsandbytes."""
    for module in _models(model):
        for mark in _MARKS:
            module.__dict__.pop(mark, None)
        for key in ("quantization_config", "_is_quantized"):
            module.config.__dict__.pop(key, None)


def mark_bitsandbytes(model: nn.Module, kind: str, double_quant: bool, dtype: torch.dtype) -> None:
    """Says that a model is quantized by bitsandbytes, as transformers says it after loading one.

    Args:
        model: any module; only the models of transformers in it that hold 4-bit layers are changed.
        kind: "nf4" or "fp4".
        double_quant: whether all of them have double quantization.
        dtype: what they compute in.
    """
    models = _models(model)
    unmark_bitsandbytes(model)
    done: set[int] = set()
    for marked in models:
        quantized = {name for name, module in marked.named_modules() if isinstance(module, linear4bit())}
        if id(marked) not in done and quantized:
            _mark(marked, quantized, kind, double_quant, dtype)
        done |= {id(module) for module in marked.modules()}


def _mark(marked: Any, quantized: set[str], kind: str, double_quant: bool, dtype: torch.dtype) -> None:
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=_skipped(marked, quantized),
    )
    marked.hf_quantizer = Bnb4BitHfQuantizer(config, pre_quantized=True)
    marked.is_quantized = marked.is_loaded_in_4bit = True
    marked.quantization_method = config.quant_method
    marked.config.quantization_config = config
    for module in _models(marked):
        module.config._is_quantized = True


def _skipped(model: nn.Module, quantized: set[str]) -> list[str]:
    """The dense linear layers, as transformers reads it: a name's beginning as a regular expression, or its end."""
    skip = []
    # What adapters of PEFT consist of, no folder has.
    adapted = tuple(f"{name}." for name, module in model.named_modules() if "base_layer" in module._modules)
    for name, module in model.named_modules():
        if name.startswith(adapted) and not name.endswith(".base_layer"):
            continue
        dense = type(module) is nn.Linear or type(module).__name__ == "Conv1D"
        if not dense or name in quantized:
            continue
        name = name.removesuffix(".base_layer")
        clashes = any(other.endswith(name) or re.match(rf"{name}(\.|$)", other) for other in quantized)
        skip.append(f"^{re.escape(name)}$" if clashes else name)
    return skip
