"""States between their form in memory and in a state dict."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..native import extension
from ..ops import backends
from .arena.layout import STATE_BLOCK
from .shards import is_shard, part, placed


def form(p: Tensor) -> tuple:
    return p.numel(), p.dtype, p.shape, p.stride()


def same_tensors(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


def same_order(a: Tensor, b: Tensor) -> bool:
    """Whether elements of dense tensors of one shape lie in the same order."""
    return all(n == 1 or s == t for n, s, t in zip(a.shape, a.stride(), b.stride()))


def plain(value: Any) -> Any:
    """numpy's numbers, which some schedulers leave behind and torch.load refuses, as Python's."""
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    if type(value) is dict:
        return {plain(k): plain(v) for k, v in value.items()}
    return value.item() if isinstance(value, np.generic) else value


def flattened(tensor: Tensor, like: Tensor) -> Tensor:
    """Elements in the order in which ``like``'s lie in memory, on the CPU: a copy."""
    out = torch.empty_strided(like.shape, like.stride(), dtype=tensor.dtype, device="cpu")
    out.copy_(tensor.detach())
    return out.as_strided((like.numel(),), (1,)) if like.numel() else out.reshape(-1)


def decoded(entry: Mapping[str, Tensor], name: str) -> Tensor:
    """A moment in float32, of the parameter's shape; on the CPU where it had 8 bits."""
    if name in entry:
        return entry[name].detach().float()
    code = entry[f"{name}_code"]
    table = torch.tensor(extension.native().dynamic_map(name == "exp_avg"), dtype=torch.float32, device="cpu")
    flat = flattened(code, code)
    absmax = entry[f"{name}_absmax"].detach().cpu().reshape(-1).repeat_interleave(STATE_BLOCK)[: flat.numel()]
    values = torch.empty_strided(code.shape, code.stride(), dtype=torch.float32, device="cpu")
    if code.numel():
        values.as_strided((code.numel(),), (1,)).copy_(table[flat.long()] * absmax)
    return values


def own_entry(entry: Mapping[str, Any], p: Tensor) -> Mapping[str, Any]:
    """A parameter's states, from wherever; of a shard, this process's part of them, in ordinary tensors.

    States of 8 bits are taken as they are where they are a part's, and decoded where they are the whole's: blocks run
    through memory, and a shard's begin elsewhere.
    """
    if not is_shard(p) or not entry:
        return entry
    own = {"step": entry["step"]}
    for name in ("exp_avg", "exp_avg_sq", "master"):
        code = entry.get(f"{name}_code")
        if code is not None and code.shape == part(p).shape:
            own[f"{name}_code"], own[f"{name}_absmax"] = code, entry[f"{name}_absmax"]
        elif code is not None or name in entry:
            own[name] = placed(entry[name] if code is None else decoded(entry, name), p)
    return own


def encoded(values: Tensor, is_signed: bool) -> tuple[Tensor, Tensor]:
    """float32 [count] to codes and constants, by the rules of csrc/cpu/optimizer/optimizer.h."""
    return backends.CPU.quantize_states(values, is_signed)


def convert(entry: Mapping[str, Any], views: dict[str, Tensor], p: Tensor) -> None:
    """Fills a parameter's states from those of another form; zeros where there are none."""
    steps = entry.get("step", 0.0)
    views["step"].fill_(float(steps))
    for name in ("exp_avg", "exp_avg_sq"):
        if name in views:
            views[name].copy_(decoded(entry, name)) if entry else views[name].zero_()
        elif f"{name}_code" in views:
            code, absmax = views[f"{name}_code"], views[f"{name}_absmax"]
            if not entry:
                table = extension.native().dynamic_map(name == "exp_avg")
                code.fill_(table.index(0.0))
                absmax.zero_()
            elif f"{name}_code" in entry and same_order(entry[f"{name}_code"], code):
                code.copy_(entry[f"{name}_code"])
                absmax.copy_(entry[f"{name}_absmax"].reshape(-1))
            else:
                flat, constants = encoded(flattened(decoded(entry, name), p), name == "exp_avg")
                if p.numel():
                    code.as_strided((p.numel(),), (1,)).copy_(flat)
                absmax.copy_(constants)
    if "master" in views:
        views["master"].copy_(entry["master"] if "master" in entry else p.detach())
