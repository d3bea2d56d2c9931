"""A 4-bit folder's settings, restored in a model without memory before its tensors are loaded, and checked after."""

# Uses private attributes of layers.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from ...errors import listed
from ...formats.constants import check_constants
from ...formats.nf4 import PIECES, meta_weight
from ...formats.nf4_stack import meta_stack
from ...layers.adapters.named import Adapters
from ...layers.experts import QExperts
from ...layers.qlinear import QLinear
from ...models.dense_layers import is_linear_like
from ...models.experts import adapted_layers, stacked_weights
from ...models.places import places_of
from ...models.targets import matches
from ...storage.safetensors_stream import read_header
from . import skeleton
from .expert_stacks import bias_of, expert_modules
from .nf4_config import NF4Config, adapter_of, dtype_of

T = TypeVar("T")


def skipped(model: Any, config: NF4Config) -> str | list[str]:
    """The layers that a folder holds dense, by their names in this model, which may be another class's."""
    names = config.modules_to_not_convert
    if isinstance(names, str):
        return names
    if names is None:
        names = skeleton.skipped(model)
    here = dict.fromkeys(name for name, _ in (*model.named_modules(), *model.named_parameters()))
    wanted = [other for name in names for other in _names_here(model, name)]
    return [name for name in dict.fromkeys(wanted) if any(matches(other, [name]) for other in here)]


def _names_here(model: Any, name: str) -> list[str]:
    """What a module may be called in a model with another head, or with none."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return [name, prefix + name, name.removeprefix(prefix)]


def missing_heads(model: Any, files: Sequence[str] | None) -> list[str]:
    """Linear layers outside the model's trunk that a checkpoint's safetensors files do not hold.

    transformers makes them new, to be trained, so they stay dense.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    if not files or not hasattr(model, prefix[:-1]) or not all(path.endswith(".safetensors") for path in files):
        return []
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    heads = [
        name
        for name, module in model.named_modules()
        if is_linear_like(module) and not name.startswith(prefix) and f"{name}.weight" not in tied
    ]
    if not heads:
        return []
    keys = _keys(files)
    return [name for name in heads if not any(key.startswith(f"{name}.") for key in keys)]


def _keys(files: Sequence[str]) -> list[str]:
    return [key for path in files for key in read_header(path)[0]]


def experts(model: Any, names: Sequence[str]) -> tuple[str, ...]:
    """The modules of experts that a folder holds in 4 bits, by their names in this model.

    Raises:
        ValueError: for a name that is no such module.
    """
    if not names:
        return ()
    here = places_of(model, lambda module: bool(stacked_weights(module)))
    return tuple(_find(model, here, names, "module of experts that can be 4-bit"))


def restore(model: nn.Module, config: NF4Config) -> None:
    """Gives the 4-bit layers of a model without memory the weights' formats and the adapters that a folder has.

    Raises:
        ValueError: for names that the model does not have, and adapters that do not fit.
    """
    layers = dict(adapted_layers(model))
    linear = {name: layer for name, layer in layers.items() if isinstance(layer, QLinear)}
    for name, entry in config.layers.items():
        for here, layer in _find(model, layers, [name]).items():
            layer._set_pieces("weight", _meta_weight(here, layer, entry, config))
            dtype = dtype_of(entry)
            bias = layer.bias if isinstance(layer, QLinear) else bias_of(model, here)
            if dtype is not None:
                layer._dtype = dtype
                if bias is not None:
                    bias.data = bias.data.to(dtype)
    active: dict[str, str] = {}
    for group in config.adapters:
        adapter = adapter_of(group)
        found = linear if "layers" not in group else _find(model, layers, group["layers"])
        for name, layer in found.items():
            adapter.check(layer.out_features, layer.in_features, name)
            options = (adapter.rank, adapter.alpha, adapter.dropout, adapter.rslora)
            layer.add_adapter(group["name"], *options, dtype=dtype_of(group) or layer.dtype)
            if group.get("active", True):
                active[name] = group["name"]
    for name, layer in layers.items():
        if layer.adapters:
            layer.set_adapter(active.get(name))


def _meta_weight(name: str, layer: Adapters, entry: Mapping[str, Any], config: NF4Config) -> Any:
    """A weight without memory, in the format that a folder's entry for the layer says."""
    double_quant, nf4_levels = entry.get("double_quant", config.double_quant), entry.get("nf4_levels", True)
    if isinstance(layer, QLinear):
        return meta_weight(layer.out_features, layer.in_features, double_quant, nf4_levels)
    assert isinstance(layer, QExperts)
    if not nf4_levels:
        raise ValueError(f"quantization_config in config.json: experts ({name}) have NF4's levels only")
    return meta_stack(layer.num_experts, layer.out_features, layer.in_features, double_quant, layer.dtype)


def _find(model: Any, layers: Mapping[str, T], names: Iterable[str], kind: str = "4-bit layer") -> dict[str, T]:
    """The layers with these names.

    Raises:
        ValueError: for a name that is not there, unless the model is of another class than the one that was saved.
    """
    found: dict[str, T] = {}
    for name in names:
        here = next((other for other in _names_here(model, name) if other in layers), None)
        if here is not None:
            found[here] = layers[here]
        elif type(model).__name__ in (getattr(model.config, "architectures", None) or []):
            close = difflib.get_close_matches(name, layers, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"quantization_config in config.json names {name!r:.200}, which is no {kind}{hint}")
    return found


def check_loaded(model: Any) -> None:
    """
    Raises:
        ValueError: when a tensor of a 4-bit layer, or of experts, was not in the folder, so that it holds what
            memory held before; for constants, biases and adapters that are not finite.
    """
    layers = dict(adapted_layers(model))
    tensors = {
        f"{name}.{key}": tensor
        for name, layer in layers.items()
        for key, tensor in (*layer.named_parameters(), *layer.named_buffers())
    }
    modules = expert_modules(model)
    for name, module in modules.items():  # nothing else would notice that biases are missing
        tensors |= {f"{name}.{key}": tensor for key, tensor in module.named_parameters(recurse=False)}
    for name, module in model.named_modules():  # dense experts, if config.json says so and the files do not
        tensors |= {f"{name}.{key}": module.get_parameter(key) for key in stacked_weights(module)}
    folder = getattr(model, "name_or_path", "") or "the checkpoint"
    # transformers marks each tensor that it has loaded. Those of offloaded layers lie elsewhere.
    offloaded = tuple(f"{name}." for name, layer in (*layers.items(), *modules.items()) if hasattr(layer, "_hf_hook"))
    missing = [
        key
        for key, tensor in tensors.items()
        if not getattr(tensor, "_is_hf_initialized", False) and not (tensor.is_meta and key.startswith(offloaded))
    ]
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} tensors of its 4-bit layers: {listed(missing, 3)}; it is damaged, or its "
            "config.json belongs to another folder"
        )
    for name, layer in layers.items():
        if layer.weight_packed.is_meta:
            continue
        try:
            layer.weight.operand().check()
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder}: {name} does not fit: {error}") from None
        pieces = zip(PIECES, layer.weight.pieces, strict=True)
        check_constants({f"{name}.weight_{kind}": piece for kind, piece in pieces})
    for key, tensor in tensors.items():
        if (
            ("lora_" in key or key.endswith((".bias", "_bias")))
            and not tensor.is_meta
            and not torch.isfinite(tensor).all()
        ):
            raise ValueError(f"{folder}: {key} holds NaN or infinity; only finite weights can be used")


def check_dense(model: Any, files: Sequence[str] | None) -> None:
    """Refuses a 4-bit folder without the weights of its dense parts, which would be random numbers.

    A model of another class than the saved one may have new parts, such as a head, and so may one for which
    transformers was told to ignore mismatched sizes: those tensors are there.

    Raises:
        ValueError: naming what is missing, and layers that are 4-bit in the files and dense by config.json.
    """
    new = [key for key, p in model.named_parameters() if not getattr(p, "_is_hf_initialized", False)]
    if not new or not files or not all(path.endswith(".safetensors") for path in files):
        return
    keys = set(_keys(files))
    folder = getattr(model, "name_or_path", "") or "the checkpoint"
    four_bit = [key for key in new if any(f"{other}_packed" in keys for other in _names_here(model, key))]
    if four_bit:
        raise ValueError(
            f"{folder} holds {listed(four_bit, 3)} in 4 bits, but modules_to_not_convert in config.json names it as "
            "dense"
        )
    if type(model).__name__ not in (getattr(model.config, "architectures", None) or []):
        return
    optional = "|".join(f"(?:{pattern})" for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ())
    missing = [
        key for key in new if keys.isdisjoint(_names_here(model, key)) and not (optional and re.search(optional, key))
    ]
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} tensors of its dense parts: {listed(missing, 3)}; it is damaged"
        )
