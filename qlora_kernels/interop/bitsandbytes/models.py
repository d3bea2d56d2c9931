"""from_bitsandbytes and to_bitsandbytes: all 4-bit layers of a model, in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar, cast

import torch
from torch import nn

from ...errors import listed, peft_names
from ...formats.bitsandbytes import quant_type
from ...layers.adapters.config import AdapterConfig
from ...layers.qlinear import QLinear
from ...models.heads import new_heads
from ...models.places import places_of, put, take_hooks
from ...models.quantize import after_quantizing, choose_what_is_trained
from ...models.targets import Plan, adapted_among
from .layers import linear4bit, to_linear4bit, to_qlinear
from .marks import mark_bitsandbytes, refuse_other_layers, unmark_bitsandbytes

Model = TypeVar("Model", bound=nn.Module)


@peft_names
def from_bitsandbytes(
    model: Model,
    rank: int = 0,
    alpha: float = 16,
    dropout: float = 0.0,
    rslora: bool = False,
    target_modules: str | Sequence[str] = "all-linear",
    adapter_dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Model:
    """Replaces all bitsandbytes.nn.Linear4bit layers of a model by QLinear, in place; needs bitsandbytes.

    Weights are not quantized again: they decode to the bits that bitsandbytes decodes. Biases stay the same
    Parameters, hooks and training mode carry over, and a layer that is in several places stays one. After a forward
    pass in eval mode on a CPU with AVX512-BF16, bitsandbytes has rounded a layer's constants to bfloat16 for good;
    it is converted with these.

    Args:
        model: any module, or a Linear4bit itself.
        rank, alpha, dropout, rslora, target_modules, adapter_dtype: as for :func:`quantize_model`. With rank 0, by
            default, there are no adapters, and what asks for a gradient stays so; with adapters, all else is frozen but
            dense new heads and the adapters of layers that are here already, as quantize_model has it.
        compute_dtype: dtype of bias and adapters; by default a bias keeps its own, and adapters have that of the dense
            weight. Products are computed in the dtype of x, or autocast's.

    Returns:
        The model; of a Linear4bit the new layer.

    Raises:
        ImportError: when bitsandbytes is not installed.
        ValueError: for a model without such layers, or with one that cannot be converted, by its name: blocks of 32,
            no weights (offloaded, or not quantized yet), inside a PEFT layer; and for adapters that do not fit.
            The model is unchanged.
        TypeError: for a dtype that bias or adapters cannot have, PEFT's argument names, and something that is no
            module. The model is unchanged.
    """
    adapter = AdapterConfig(rank, alpha, dropout, rslora)
    kind = linear4bit()
    _check_module(model)
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, kind)}
    if not found:
        others = {
            type(layer).__name__ for layer in model.modules() if type(layer).__module__.startswith("bitsandbytes")
        }
        there = f"; of bitsandbytes it has {listed(sorted(others))}" if others else ""
        raise ValueError(f"the model has no 4-bit layers of bitsandbytes (Linear4bit) to convert{there}")
    _refuse_inside_peft(model, found)
    adapted = set(adapted_among(list(found), target_modules)) if rank else set()
    plain = AdapterConfig(0, 1)
    for name, layer in found.items():
        if name in adapted:
            adapter.check(layer.out_features, layer.in_features, name)
    if not rank:
        adapter.check(1, 1)
    layers = {
        name: to_qlinear(
            layer,
            name or "the layer",
            adapter if name in adapted else plain,
            compute_dtype,
            adapter_dtype,
        )
        for name, layer in found.items()
    }
    new = tuple(new_heads(model)) if rank else ()
    result = _replace(model, layers, found)
    if rank:
        choose_what_is_trained(result, Plan((), (), {}, adapter, trained=new))
    unmark_bitsandbytes(result)
    for note in after_quantizing:
        note(result)
    return result


def to_bitsandbytes(model: Model, *, compute_dtype: torch.dtype | None = None, drop_adapters: bool = False) -> Model:
    """Replaces all QLinear layers of a model by bitsandbytes.nn.Linear4bit, in place; needs bitsandbytes.

    The inverse of :func:`from_bitsandbytes`: weights decode to the same bits. A model of transformers is marked as
    quantized by bitsandbytes, so that its ``save_pretrained`` writes a folder that transformers loads with
    bitsandbytes alone.

    bitsandbytes keeps adapters outside its layers, so a layer with one is refused. An adapter that is merged counts as
    part of the weight.

    Args:
        model: any module, or a QLinear itself.
        compute_dtype: what bitsandbytes computes in; by default the dtype of each layer.
        drop_adapters: leave adapters out.

    Returns:
        The model; of a QLinear the new layer.

    Raises:
        ImportError: when bitsandbytes is not installed.
        ValueError: for a model without such layers, or with one that has adapters, has no data, is distributed, lies
            inside a PEFT layer, is kept elsewhere by accelerate, or stands for float64; and for a model of transformers
            with 8-bit layers or 4-bit experts too. The model is unchanged.
        TypeError: for something that is no module, and a compute_dtype that is none.
    """
    linear4bit()
    _check_module(model)
    if compute_dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"compute_dtype should be torch.float32, bfloat16 or float16, found {compute_dtype!r}")
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, QLinear)}
    if not found:
        raise ValueError("the model has no 4-bit layers of qlora_kernels (QLinear) to convert")
    _refuse_inside_peft(model, found)
    adapters = {
        name: sorted(set(layer.adapters) - {layer.merged_adapter_name})
        for name, layer in found.items()
        if not drop_adapters
    }
    lost = [f"{name or 'the layer'} ({', '.join(names)})" for name, names in adapters.items() if names]
    if lost:
        raise ValueError(
            f"{len(lost)} layers have adapters, which bitsandbytes' layers do not hold: {listed(lost, 3)}. Write them "
            "with save_adapter, for PEFT to load on the result, and pass drop_adapters=True; or fold them into the "
            "weights with merge_adapters. The model is unchanged."
        )
    refuse_other_layers(model)
    layers = {name: to_linear4bit(layer, name or "the layer", compute_dtype) for name, layer in found.items()}
    double_quant = all(layer.weight.double_quant for layer in found.values())
    dtype = compute_dtype or next(iter(found.values())).dtype
    result = _replace(model, layers, found)
    kind = quant_type(next(iter(found.values())).weight)
    mark_bitsandbytes(result, kind, double_quant, dtype)
    return result


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model should be a torch.nn.Module, found {type(model).__name__}")


def _refuse_inside_peft(model: nn.Module, found: Mapping[str, nn.Module]) -> None:
    wrapped = {
        id(module.base_layer): name
        for name, module in model.named_modules()
        if isinstance(getattr(module, "base_layer", None), nn.Module)
    }
    for name, layer in found.items():
        if id(layer) in wrapped:
            raise ValueError(
                f"{name} is inside an adapter of another library ({wrapped[id(layer)]}); convert the model before "
                "get_peft_model, or after unload() or merge_and_unload(). The model is unchanged."
            )


def _replace(model: Model, layers: Mapping[str, nn.Module], found: Mapping[str, nn.Module]) -> Model:
    """Puts the new layers in the places of the old ones; from here on nothing fails."""
    if "" in layers:
        take_hooks(layers[""], model)
        return cast(Model, layers[""])
    old = {id(layer) for layer in found.values()}
    places = places_of(model, lambda module: id(module) in old)
    for name, layer in layers.items():
        put(layer, places[name])
    return model
