"""States between forms: 32 and 8 bits, whole and sharded, orders in memory, torch.optim's and this package's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..native import extension
from ..ops import backends
from .arena.layout import STATE_BLOCK
from .checks import require_own_memory
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


def _table(name: str) -> Tensor:
    """What a moment's 8-bit codes stand for."""
    return torch.tensor(extension.native().dynamic_map(name == "exp_avg"), dtype=torch.float32, device="cpu")


def decode_moment(entry: Mapping[str, Tensor], name: str) -> Tensor:
    """A moment in float32 and the parameter's shape. One that had 8 bits is on the CPU."""
    if name in entry:
        return entry[name].detach().float()
    code = entry[f"{name}_code"]
    flat = _flat_as(code, code)
    absmax = entry[f"{name}_absmax"].detach().cpu().reshape(-1).repeat_interleave(STATE_BLOCK)[: flat.numel()]
    values = torch.empty_strided(code.shape, code.stride(), dtype=torch.float32, device="cpu")
    if code.numel():
        values.as_strided((code.numel(),), (1,)).copy_(_table(name)[flat.long()] * absmax)
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


#: Elements of 8-bit states that are decoded at a time.
_PIECE = 1 << 20

#: A write into an arena: everything that can fail has been done before.
Write = Callable[[], object]


def state_writes(
    views: Mapping[str, Tensor], entry: Mapping[str, Any], p: Tensor, in_use: Container[int] = ()
) -> list[Write]:
    """What fills a parameter's states from a checked entry in any form, or with zeros if the entry is empty.

    Values that have to be encoded or put into another order are computed here; others are only referred to.

    Args:
        in_use: addresses of storages that other writes change. What lies there is copied first.
    """

    def copied(target: Tensor, source: Tensor) -> Write:
        if source.numel() and source.untyped_storage().data_ptr() in in_use:
            itself = source.data_ptr() == target.data_ptr() and source.dtype == target.dtype
            if not (itself and source.stride() == target.stride() and not source.is_neg()):
                source = source.clone()
        return lambda: target.copy_(source)

    writes: list[Write] = [functools.partial(views["step"].fill_, entry.get("step", 0.0))]
    for name in ("exp_avg", "exp_avg_sq"):
        if name in views:
            view = views[name]
            if not entry:
                writes.append(view.zero_)
            elif name in entry:
                writes.append(copied(view, entry[name]))
            elif _same_order(entry[f"{name}_code"], view):
                writes.append(
                    functools.partial(_decode_into, view, entry[f"{name}_code"], entry[f"{name}_absmax"], name)
                )
            else:
                writes.append(copied(view, decode_moment(entry, name)))
        elif f"{name}_code" in views:
            code, absmax = views[f"{name}_code"], views[f"{name}_absmax"]
            if not entry:
                zero = extension.native().dynamic_map(name == "exp_avg").index(0.0)
                writes += [functools.partial(code.fill_, zero), absmax.zero_]
            elif f"{name}_code" in entry and _same_order(entry[f"{name}_code"], code):
                writes += [copied(code, entry[f"{name}_code"]), copied(absmax, entry[f"{name}_absmax"])]
            else:
                flat, constants = encode_moment(_flat_as(decode_moment(entry, name), p), name == "exp_avg")
                in_memory_order = code.as_strided((p.numel(),), (1,)) if p.numel() else code.reshape(-1)
                writes += [copied(in_memory_order, flat), copied(absmax, constants)]
    if "master" in views:
        if "master" not in entry:
            require_own_memory("a parameter whose master copy is to be made", p)
        writes.append(copied(views["master"], entry["master"] if "master" in entry else p.detach()))
    return writes


def _decode_into(view: Tensor, code: Tensor, absmax: Tensor, name: str) -> None:
    """Decodes 8-bit states piece by piece; ``code`` lies in memory in the order of ``view``."""
    count = code.numel()
    if count == 0:
        return
    values, codes = view.as_strided((count,), (1,)), code.as_strided((count,), (1,))
    table = _table(name)
    for first in range(0, count, _PIECE):
        piece = codes[first : first + _PIECE].cpu()
        constants = absmax[first // STATE_BLOCK : (first + _PIECE) // STATE_BLOCK].cpu()
        scales = constants.repeat_interleave(STATE_BLOCK)[: len(piece)]
        values[first : first + _PIECE].copy_(table[piece.long()] * scales)
