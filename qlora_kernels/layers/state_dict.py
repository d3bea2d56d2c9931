"""What QLinear checks in a state dict before any of it is copied: torch casts silently, packed data must not be."""

# Uses private attributes of layers.
# pyright: reportPrivateUsage=false
# Users' arguments are checked whatever their annotations say.
# pyright: reportUnnecessaryIsInstance=false, reportUnnecessaryComparison=false

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from ..formats.nf4 import PIECES, NF4Weight, check_constants
from ..ops import dispatcher
from .adapters.named import Adapters


def problems(layer: Adapters, state: Mapping[str, Tensor], prefix: str, assign: bool = False) -> list[str]:
    """Sentences on what does not fit: weight, bias and adapters. If there are any, nothing is loaded into the layer."""
    if f"{prefix}weight" in state:
        return [
            f'"{prefix}weight" is a dense weight, but the layer is 4-bit; load the checkpoint into the dense model, '
            "then quantize that with quantize_model or QLinear.from_linear."
        ]
    misfits = _check_tensors(layer, state, prefix, assign)
    if misfits:
        return misfits
    merged = f"{prefix}merged_adapter" in state
    if merged and not isinstance(layer.weight, NF4Weight):
        return [f'"{prefix}merged_adapter" is for a linear layer; adapters of experts are not merged.']
    misfits = _check_pieces(layer, state, f"{prefix}weight_", merged) + _check_trained(layer, state, prefix)
    if not merged:
        return misfits
    misfits += _check_pieces(layer, state, f"{prefix}unmerged_", required=True)
    name = _merged_name(state[f"{prefix}merged_adapter"])
    if name is None:
        misfits.append(f'"{prefix}merged_adapter" should be the UTF-8 bytes of a name, uint8, not on the meta device.')
    elif name not in layer.adapters:
        known = ", ".join(map(repr, layer.adapters)) or "none"
        misfits.append(f"adapter {name!r} is merged in the checkpoint, but {prefix[:-1] or 'this layer'} has: {known}.")
    return misfits


def keep(layer: Adapters, state: MutableMapping[str, Tensor], prefix: str) -> None:
    """Puts the layer's own adapters in the state dict, so that loading them, which torch does next, changes nothing."""
    state.update({prefix + name: own for name, own in _trained(layer).items() if prefix + name in state})


def make_contiguous(state: MutableMapping[str, Tensor], prefix: str) -> None:
    """For ``assign=True``: the kernels take a weight's pieces only as contiguous tensors with memory."""
    for name in PIECES:
        for key in (f"{prefix}weight_{name}", f"{prefix}unmerged_{name}"):
            if key in state and (not state[key].is_contiguous() or state[key]._is_zerotensor()):
                state[key] = dispatcher.with_memory(state[key].detach()).contiguous()


def match_merged_state(layer: Adapters, state: Mapping[str, Tensor], prefix: str) -> None:
    """Makes room for a base that was saved merged, or drops the backup when the saved one was not.

    A state dict without a base (adapters alone, say) changes nothing.
    """
    if f"{prefix}weight_packed" not in state:
        return
    code = state.get(f"{prefix}merged_adapter")
    if code is None:
        if layer.merged_adapter_name is not None and not layer._unmerged_weight().has_nf4_levels:
            layer._set_pieces("weight", layer._unmerged_weight())  # there is room for its levels
        layer._set_pieces("unmerged", None)
        layer._set_merged(None)
        return
    name = _merged_name(code)
    weight = layer.weight if layer.merged_adapter_name is None else layer._unmerged_weight()
    room = {
        key: None if piece is None else torch.empty_like(piece)
        for key, piece in zip(PIECES, weight.pieces, strict=True)
    }
    layer._set_pieces("unmerged", replace(weight, **room))
    if not layer.weight.has_nf4_levels:
        table = None if weight.nested_absmax is None else torch.empty_like(cast(Tensor, weight.nested_table)[:256])
        layer._set_pieces("weight", replace(weight, nested_table=table))
    layer._set_merged(None)
    layer.set_adapter(name)
    layer._set_merged(name)


def _merged_name(code: Tensor) -> str | None:
    if code.dtype != torch.uint8 or code.dim() != 1 or code.is_meta:
        return None
    try:
        return bytes(int(byte) for byte in code).decode()
    except UnicodeDecodeError:
        return None


def _trained(layer: Adapters) -> dict[str, Tensor]:
    """Bias and adapters by their names in the state dict."""
    own: dict[str, Tensor] = {} if layer.bias is None else {"bias": layer.bias}
    for matrices in ("lora_A", "lora_B"):
        own |= {f"{matrices}.{name}": matrix for name, matrix in getattr(layer, matrices).items()}
    return own


def _check_tensors(layer: Adapters, state: Mapping[str, Tensor], prefix: str, assign: bool) -> list[str]:
    """That everything is a dense tensor, and one with data where it is to be copied, or the weight has data."""
    base = state.get(f"{prefix}weight_packed") if assign else None
    base = base if isinstance(base, Tensor) else layer.weight_packed
    names = [f"{kind}_{name}" for kind in ("weight", "unmerged") for name in PIECES]
    misfits: list[str] = []
    for name in (*names, "merged_adapter", *_trained(layer)):
        key = prefix + name
        if key not in state:
            continue
        if not isinstance(state[key], Tensor):
            misfits.append(f'"{key}" should be a tensor, found {type(state[key]).__name__}.')
        elif state[key].is_meta and not assign and not layer.weight_packed.is_meta:
            misfits.append(f'"{key}" is on the meta device and has no data to copy.')
        elif state[key].is_meta and not base.is_meta:
            misfits.append(f'"{key}" is on the meta device, but the 4-bit weight has data.')
        elif assign and name in names and base.is_meta and not state[key].is_meta:
            misfits.append(f'"{key}" has data, but "{prefix}weight_packed" is on the meta device.')
        elif state[key].layout is not torch.strided:
            misfits.append(f'"{key}" should be a dense tensor, found {state[key].layout}.')
        else:
            try:
                dispatcher.require_memory(f'"{key}"', state[key])
            except RuntimeError as error:
                misfits.append(f"{error}.")
    return misfits


def _check_trained(layer: Adapters, state: Mapping[str, Tensor], prefix: str) -> list[str]:
    misfits: list[str] = []
    for name, own in _trained(layer).items():
        tensor = state.get(prefix + name)
        if tensor is None:
            continue  # strict loading reports what is missing
        if not tensor.is_floating_point():
            misfits.append(f'"{prefix}{name}" should be floating, found {tensor.dtype}.')
        elif tensor.shape != own.shape:
            misfits.append(
                f"size mismatch for {prefix}{name}: the layer has shape {list(own.shape)}, "
                f"the checkpoint {list(tensor.shape)}."
            )
    return misfits


def _check_pieces(
    layer: Adapters, state: Mapping[str, Tensor], prefix: str, merged: bool = False, required: bool = False
) -> list[str]:
    """
    Args:
        merged: the pieces are of a base with an adapter in it, which has NF4's levels whatever the base has.
        required: they have to be there.
    """
    base = layer.weight if layer.merged_adapter_name is None else layer._unmerged_weight()
    own: dict[str, Tensor | None] = {name: piece for name, piece in zip(PIECES, base.pieces, strict=True)}
    if merged and not base.has_nf4_levels:
        table = own["nested_table"]
        own["nested_table"] = None if base.nested_absmax is None or table is None else table[:256]
    present = [name for name in PIECES if prefix + name in state]
    if not present and not required:
        return []  # strict loading reports what is missing
    missing = [name for name, piece in own.items() if piece is not None and name not in present]
    if missing:
        # Codes of one weight with constants of another decode to nonsense, so this holds without strict as well.
        keys = ", ".join(f'"{prefix}{name}"' for name in missing)
        return [
            f"an incomplete 4-bit weight: no {keys} (a layer with double_quant={own['nested_absmax'] is not None})."
        ]
    misfits: list[str] = []
    for name in present:
        tensor, piece = state[prefix + name], own[name]
        if piece is None:
            misfits.append(
                f'"{prefix}{name}" belongs to a double-quantized weight, but the layer has double_quant=False.'
            )
        elif tensor.dtype != piece.dtype:
            misfits.append(f'"{prefix}{name}" should be {piece.dtype}, found {tensor.dtype}.')
        elif tensor.shape != piece.shape:
            weight = f"[{layer.out_features}, {layer.in_features}]"
            misfits.append(
                f'"{prefix}{name}" of a weight {weight} should have shape {list(piece.shape)}, '
                f"found {list(tensor.shape)}."
            )
    if not misfits:
        try:
            check_constants({prefix + name: state[prefix + name] for name in present})
        except ValueError as error:
            misfits.append(f"{error}.")
    return misfits


class CheckedLoading(Adapters):
    """A layer that takes a state dict whole or not at all: what does not fit is told before anything changes."""

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        assign = local_metadata.get("assign_to_params_buffers", False)
        misfits = problems(self, state_dict, prefix, assign)
        if misfits:
            error_msgs.extend(misfits)
            keep(self, state_dict, prefix)
            return
        if assign:
            make_contiguous(state_dict, prefix)
        match_merged_state(self, state_dict, prefix)
        rest = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        cast(Any, super())._load_from_state_dict(state_dict, prefix, *rest)
