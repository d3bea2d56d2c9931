"""What goes into a paged optimizer: parameters, gradients and settings are checked, states of any form converted."""

from __future__ import annotations

import io
import math
import operator
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import backends
from .arena import STATE_BLOCK
from .errors import require
from .shards import check_placements, is_shard, part, placed

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: A learning rate this far below 0 counts as 0: it is what rounding leaves where LinearLR ends at 0.
LR_ROUNDING = 1e-12


def require_number(name: str, value: Any, good: Callable[[float], bool], what: str) -> None:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    require(number and good(value), ValueError, f"{name} should be a finite number {what}, found {value!r}")


def check_parameter(p: Tensor, what: str) -> None:
    if is_shard(p):
        check_placements(p, what)
        p = part(p)
    if hasattr(type(p), "__tensor_flatten__"):  # which torch asks of tensors that stand for others
        raise no_memory_of_its_own(what, p)
    require(p.layout is torch.strided, TypeError, f"{what} is {p.layout}; only dense parameters can be optimized")
    require(
        p.dtype in _DTYPES,
        TypeError,
        f"{what} is {p.dtype}; only float32, bfloat16 and float16 parameters can be optimized",
    )
    # Without holes or overlaps: then the elements, in the order of memory, are one flat array.
    require(
        p.numel() == 0 or torch.empty_like(p, device="meta").stride() == p.stride(),
        TypeError,
        f"{what} of shape {list(p.shape)} has holes or overlaps in memory (strides {list(p.stride())}); "
        "only dense parameters can be optimized",
    )


def no_memory_of_its_own(what: str, tensor: Tensor) -> Exception:
    return TypeError(
        f"{what}, a {type(tensor).__name__} of shape {list(tensor.shape)}, has no memory of its own: what stands for "
        "other tensors (quantized ones, say) and what was freed cannot be optimized here; torch.optim.AdamW can"
    )


def bad_gradient(index: int, p: Tensor, grad: Tensor) -> Exception:
    what = f"the gradient of parameter {index}, of shape {list(p.shape)},"
    if grad.layout is not torch.strided:
        return RuntimeError(f"{what} is sparse ({grad.layout}); only dense gradients can be used")
    if grad.shape != p.shape:
        return RuntimeError(f"{what} has another shape, {list(grad.shape)}; zero_grad() lets go of it")
    if grad.device != p.device:
        return RuntimeError(f"{what} is on {grad.device}, the parameter on {p.device}")
    return RuntimeError(f"{what} is {grad.dtype}, the parameter {p.dtype}; both should have the same dtype")


def check_form(state_dict: Any) -> None:
    """Whether it is built like a state dict of torch.optim."""
    good = isinstance(state_dict, Mapping) and {"state", "param_groups"} <= set(state_dict)
    require(good, ValueError, "a state dict with 'state' and 'param_groups' is expected")
    groups, saved = state_dict["param_groups"], state_dict["state"]
    good = isinstance(groups, (list, tuple)) and all(isinstance(group, Mapping) for group in groups)
    require(good, ValueError, "'param_groups' of the state dict should be a list of dicts")
    for i, group in enumerate(groups):
        keys = group.get("params")
        good = isinstance(keys, (list, tuple)) and all(isinstance(key, (int, str)) for key in keys)
        require(good, ValueError, f"'params' of group {i} of the state dict should be a list of numbers or names")
    found = type(saved).__name__
    require(isinstance(saved, Mapping), ValueError, f"'state' of the state dict should be a dict, found {found}")


def _loads(value: Any) -> bool:
    """Whether torch.load takes what torch.save makes of it."""
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # whatever an object does that is to be written or read
        return False
    return True


def check_loadable(state_dict: Mapping[str, Any]) -> None:
    """Whether torch.load takes everything in a state dict but the tensors of its states, which it does."""
    parts = {f"group {i}": group for i, group in enumerate(state_dict["param_groups"])}
    for key, entry in state_dict["state"].items():
        parts[f"the state of parameter {key}"] = {k: v for k, v in entry.items() if type(v) is not Tensor}
    if not _loads(list(parts.values())):
        bad = [f"{name!r} of {where}" for where, part in parts.items() for name, v in part.items() if not _loads(v)]
        found = ", ".join(bad) or "a group or a state"
        raise ValueError(f"{found} holds what load() would refuse; it takes numbers, text, tensors, lists and dicts")


def check_entry(entry: Mapping[str, Any], moments, p: Tensor, what: str, who: str) -> None:
    """Whether a parameter's states, from wherever, can become its states here."""
    found = type(entry).__name__
    require(isinstance(entry, Mapping), ValueError, f"the state of {what} should be a dict, found {found}")
    for name, _, _ in moments:
        check_moment(entry, name, p, what, who)
    steps = entry.get("step")
    steps = steps.item() if isinstance(steps, Tensor) and steps.numel() == 1 and not steps.is_meta else steps
    good = isinstance(steps, Real) and math.isfinite(steps) and steps >= 0
    require(good, ValueError, f"{what} has no step count among its states, found {steps!r}")
    if "master" in entry:
        check_shape(entry["master"], p, f"'master' of {what}")


def check_shape(value: Any, p: Tensor, what: str) -> None:
    good = isinstance(value, Tensor) and value.shape == p.shape
    found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
    require(good, ValueError, f"the states are of another model: {what} is {found} there and {list(p.shape)} here")
    real = value.layout is torch.strided and not value.is_meta and not value.is_complex()
    require(real, ValueError, f"{what} should be a dense tensor of real numbers")
    if is_shard(value):
        good = is_shard(p) and value.device_mesh == p.device_mesh
        here = f"on {p.device_mesh}" if is_shard(p) else "an ordinary tensor"
        require(
            good,
            ValueError,
            f"{what} is a DTensor on {value.device_mesh}, the parameter {here}; full_tensor() makes it an ordinary one",
        )


def check_moment(entry: Mapping[str, Any], name: str, p: Tensor, what: str, who: str) -> None:
    if f"{name}_code" in entry:
        if is_shard(p) and getattr(entry[f"{name}_code"], "shape", None) == part(p).shape:
            p = part(p)
        check_shape(entry[f"{name}_code"], p, f"'{name}_code' of {what}")
        absmax, blocks = entry.get(f"{name}_absmax"), -(-p.numel() // STATE_BLOCK)
        good = isinstance(absmax, Tensor) and absmax.numel() == blocks and entry[f"{name}_code"].dtype == torch.uint8
        require(good, ValueError, f"'{name}_absmax' of {what} should have {blocks} constants, and its codes be uint8")
        real = absmax.layout is torch.strided and not absmax.is_meta and absmax.is_floating_point()
        require(real, ValueError, f"'{name}_absmax' of {what} should be a dense tensor of real numbers")
        return
    require(name in entry, ValueError, f"the states are of another optimizer: {who} needs '{name}' of {what}")
    check_shape(entry[name], p, f"'{name}' of {what}")


# -------------------------------------------------------------------------------------------- states of other forms


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
    table = torch.tensor(backends.native().dynamic_map(name == "exp_avg"), dtype=torch.float32, device="cpu")
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
                table = backends.native().dynamic_map(name == "exp_avg")
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
