"""States between forms: 32 and 8 bits, whole and sharded, orders in memory, torch.optim's and this package's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..native import extension
from ..ops import backends
from .arena.layout import STATE_BLOCK
from .shards import is_shard, local_part, local_part_as


def without_numpy(value: Any) -> Any:
    """The value with numpy's numbers turned into Python's: some schedulers leave them, and torch.load refuses them."""
    if type(value) in (list, tuple):
        return type(value)(map(without_numpy, value))
    if type(value) is dict:
        return {without_numpy(k): without_numpy(v) for k, v in value.items()}
    return value.item() if isinstance(value, np.generic) else value


def _same_order(a: Tensor, b: Tensor) -> bool:
    """Whether the elements of two dense tensors of one shape lie in the same order in memory."""
    return all(n == 1 or s == t for n, s, t in zip(a.shape, a.stride(), b.stride()))


def _flat_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A flat copy on the CPU, with the elements in the order in which ``like``'s lie in memory."""
    out = torch.empty_strided(like.shape, like.stride(), dtype=tensor.dtype, device="cpu")
    out.copy_(tensor.detach())
    return out.as_strided((like.numel(),), (1,)) if like.numel() else out.reshape(-1)


def decode_moment(entry: Mapping[str, Tensor], name: str) -> Tensor:
    """A moment in float32 and the parameter's shape. One that had 8 bits is on the CPU."""
    if name in entry:
        return entry[name].detach().float()
    code = entry[f"{name}_code"]
    table = torch.tensor(extension.native().dynamic_map(name == "exp_avg"), dtype=torch.float32, device="cpu")
    flat = _flat_as(code, code)
    absmax = entry[f"{name}_absmax"].detach().cpu().reshape(-1).repeat_interleave(STATE_BLOCK)[: flat.numel()]
    values = torch.empty_strided(code.shape, code.stride(), dtype=torch.float32, device="cpu")
    if code.numel():
        values.as_strided((code.numel(),), (1,)).copy_(table[flat.long()] * absmax)
    return values


def encode_moment(values: Tensor, is_signed: bool) -> tuple[Tensor, Tensor]:
    """Codes and constants of float32 [count], by the rules of csrc/cpu/optimizer/optimizer.h."""
    return backends.CPU.quantize_states(values, is_signed)


def local_entry(entry: Mapping[str, Any], p: Tensor) -> Mapping[str, Any]:
    """A parameter's states as this process needs them: for a shard, ordinary tensors with its part.

    8-bit states of the part are kept as they are. 8-bit states of the whole are decoded, because blocks run through
    memory and start elsewhere in a shard.
    """
    if not is_shard(p) or not entry:
        return entry
    local = {"step": entry["step"]}
    for name in ("exp_avg", "exp_avg_sq", "master"):
        code = entry.get(f"{name}_code")
        if code is not None and code.shape == local_part(p).shape:
            local[f"{name}_code"], local[f"{name}_absmax"] = code, entry[f"{name}_absmax"]
        elif code is not None or name in entry:
            local[name] = local_part_as(entry[name] if code is None else decode_moment(entry, name), p)
    return local


def fill_states(views: dict[str, Tensor], entry: Mapping[str, Any], p: Tensor) -> None:
    """Fills a parameter's states from an entry in any form, or with zeros if the entry is empty."""
    views["step"].fill_(float(entry.get("step", 0.0)))
    for name in ("exp_avg", "exp_avg_sq"):
        if name in views:
            views[name].copy_(decode_moment(entry, name)) if entry else views[name].zero_()
        elif f"{name}_code" in views:
            _fill_8_bits(views[f"{name}_code"], views[f"{name}_absmax"], entry, name, p)
    if "master" in views:
        views["master"].copy_(entry["master"] if "master" in entry else p.detach())


def _fill_8_bits(code: Tensor, absmax: Tensor, entry: Mapping[str, Any], name: str, p: Tensor) -> None:
    if not entry:
        code.fill_(extension.native().dynamic_map(name == "exp_avg").index(0.0))
        absmax.zero_()
    elif f"{name}_code" in entry and _same_order(entry[f"{name}_code"], code):
        code.copy_(entry[f"{name}_code"])
        absmax.copy_(entry[f"{name}_absmax"].reshape(-1))
    else:
        flat, constants = encode_moment(_flat_as(decode_moment(entry, name), p), name == "exp_avg")
        if p.numel():
            code.as_strided((p.numel(),), (1,)).copy_(flat)
        absmax.copy_(constants)
