"""What a paged optimizer refuses: settings, parameters, gradients, state dicts."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..errors import require, require_number
from .arena.layout import STATE_BLOCK
from .schema import Moment
from .shards import check_placements, is_shard, local_part

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: A learning rate this little below 0 counts as 0: rounding leaves that where LinearLR ends at 0.
LR_ROUNDING = 1e-12


def check_settings(group: Mapping[str, Any], optimizer: str, where: str = "") -> None:
    """Refuses settings of a parameter group that are out of range; ``optimizer`` is the class's name."""
    require_number(f"lr{where}", group["lr"], lambda x: x >= -LR_ROUNDING, "at least 0")
    require_number(f"weight_decay{where}", group["weight_decay"], lambda x: x >= 0, "at least 0")
    betas = group["betas"]
    pair = isinstance(betas, (tuple, list)) and len(betas) == 2
    require(pair, ValueError, f"betas{where} should be two numbers, found {betas!r}")
    for i, beta in enumerate(betas):
        require_number(f"betas[{i}]{where}", beta, lambda x: 0 <= x < 1, "at least 0 and below 1")
    if "eps" in group:
        require_number(f"eps{where}", group["eps"], lambda x: x >= 0, "at least 0")
    for name in ("amsgrad", "maximize"):
        require(not group.get(name), ValueError, f"{name}=True{where} is not supported by {optimizer}")


def check_parameter(p: Tensor, what: str) -> None:
    if is_shard(p):
        check_placements(p, what)
        p = local_part(p)
    if hasattr(type(p), "__tensor_flatten__"):  # torch requires it of wrappers around other tensors
        raise no_memory_of_its_own(what, p)
    require(p.layout is torch.strided, TypeError, f"{what} is {p.layout}; only dense parameters can be optimized")
    require(
        p.dtype in _DTYPES,
        TypeError,
        f"{what} is {p.dtype}; only float32, bfloat16 and float16 parameters can be optimized",
    )
    # Without holes or overlaps, the elements in the order of memory are one flat array.
    require(
        p.numel() == 0 or torch.empty_like(p, device="meta").stride() == p.stride(),
        TypeError,
        f"{what} of shape {list(p.shape)} has holes or overlaps in memory (strides {list(p.stride())}); "
        "only dense parameters can be optimized",
    )


def one_device(params: Sequence[Tensor], advice: str = "") -> str:
    """The device that all parameters are on, or "" if there are none."""
    devices = sorted({str(p.device) for p in params})
    several = ", ".join(devices)
    require(len(devices) <= 1, ValueError, f"all parameters should be on one device, found {several}{advice}")
    return devices[0] if devices else ""


def no_memory_of_its_own(what: str, tensor: Tensor) -> Exception:
    return TypeError(
        f"{what}, a {type(tensor).__name__} of shape {list(tensor.shape)}, has no memory of its own: wrappers around "
        "other tensors (quantized ones, say) and freed tensors cannot be optimized here; torch.optim.AdamW can do it"
    )


def bad_gradient(index: int, p: Tensor, grad: Tensor) -> Exception:
    what = f"the gradient of parameter {index}, of shape {list(p.shape)},"
    if grad.layout is not torch.strided:
        return RuntimeError(f"{what} is sparse ({grad.layout}); only dense gradients are supported")
    if grad.shape != p.shape:
        return RuntimeError(f"{what} has another shape, {list(grad.shape)}; zero_grad() drops it")
    if grad.device != p.device:
        return RuntimeError(f"{what} is on {grad.device}, the parameter on {p.device}")
    return RuntimeError(f"{what} is {grad.dtype}, the parameter {p.dtype}; both should have the same dtype")


# --------------------------------------------------------------------------------------------------- state dicts


def check_structure(state_dict: Any) -> None:
    """Refuses anything that is not structured like a state dict of torch.optim."""
    complete = isinstance(state_dict, Mapping) and {"state", "param_groups"} <= set(state_dict)
    require(complete, ValueError, "a state dict should have 'state' and 'param_groups'")
    groups, states = state_dict["param_groups"], state_dict["state"]
    all_dicts = isinstance(groups, (list, tuple)) and all(isinstance(group, Mapping) for group in groups)
    require(all_dicts, ValueError, "'param_groups' of the state dict should be a list of dicts")
    for i, group in enumerate(groups):
        keys = group.get("params")
        all_keys = isinstance(keys, (list, tuple)) and all(isinstance(key, (int, str)) for key in keys)
        require(all_keys, ValueError, f"'params' of group {i} of the state dict should be a list of numbers or names")
    kind = type(states).__name__
    require(isinstance(states, Mapping), ValueError, f"'state' of the state dict should be a dict, found {kind}")


def _torch_load_accepts(value: Any) -> bool:
    """Whether torch.load reads back, with weights_only, what torch.save makes of a value."""
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # an object's own code for pickling may raise anything
        return False
    return True


def check_loadable(state_dict: Mapping[str, Any]) -> None:
    """Refuses a state dict that torch.load would not read back. Its tensors are left out, because those load."""
    holders = {f"group {i}": group for i, group in enumerate(state_dict["param_groups"])}
    for key, entry in state_dict["state"].items():
        holders[f"the state of parameter {key}"] = {k: v for k, v in entry.items() if type(v) is not Tensor}
    if not _torch_load_accepts(list(holders.values())):
        bad = [
            f"{name!r} of {where}"
            for where, holder in holders.items()
            for name, value in holder.items()
            if not _torch_load_accepts(value)
        ]
        places = ", ".join(bad) or "a group or a state"
        raise ValueError(
            f"{places} holds a value that load() would refuse; it takes numbers, text, tensors, lists and dicts"
        )


def check_entry(entry: Mapping[str, Any], moments: Sequence[Moment], p: Tensor, what: str, optimizer: str) -> None:
    """Refuses a parameter's states if they cannot become states of ``optimizer`` (a class's name)."""
    kind = type(entry).__name__
    require(isinstance(entry, Mapping), ValueError, f"the state of {what} should be a dict, found {kind}")
    for moment in moments:
        _check_moment(entry, moment.name, p, what, optimizer)
    steps = entry.get("step")
    steps = steps.item() if isinstance(steps, Tensor) and steps.numel() == 1 and not steps.is_meta else steps
    is_count = isinstance(steps, Real) and math.isfinite(steps) and not steps < 0
    require(is_count, ValueError, f"{what} has no step count among its states, found {steps!r}")
    if "master" in entry:
        _check_shape(entry["master"], p, f"'master' of {what}")


def _check_shape(value: Any, p: Tensor, what: str) -> None:
    fits = isinstance(value, Tensor) and value.shape == p.shape
    shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
    require(
        fits,
        ValueError,
        f"the states belong to another model: {what} is {shape}, the parameter {list(p.shape)}",
    )
    real = value.layout is torch.strided and not value.is_meta and not value.is_complex()
    require(real, ValueError, f"{what} should be a dense tensor of real numbers")
    if is_shard(value):
        same_mesh = is_shard(p) and value.device_mesh == p.device_mesh
        here = f"on {p.device_mesh}" if is_shard(p) else "an ordinary tensor"
        require(
            same_mesh,
            ValueError,
            f"{what} is a DTensor on {value.device_mesh}, the parameter {here}; full_tensor() makes it an ordinary one",
        )


def _check_moment(entry: Mapping[str, Any], name: str, p: Tensor, what: str, optimizer: str) -> None:
    if f"{name}_code" in entry:
        if is_shard(p) and getattr(entry[f"{name}_code"], "shape", None) == local_part(p).shape:
            p = local_part(p)
        _check_shape(entry[f"{name}_code"], p, f"'{name}_code' of {what}")
        absmax, blocks = entry.get(f"{name}_absmax"), -(-p.numel() // STATE_BLOCK)
        if not isinstance(absmax, Tensor) or absmax.numel() != blocks or entry[f"{name}_code"].dtype != torch.uint8:
            raise ValueError(f"'{name}_absmax' of {what} should have {blocks} constants, and its codes be uint8")
        real = absmax.layout is torch.strided and not absmax.is_meta and absmax.is_floating_point()
        require(real, ValueError, f"'{name}_absmax' of {what} should be a dense tensor of real numbers")
        return
    require(name in entry, ValueError, f"the states belong to another optimizer: {optimizer} needs '{name}' of {what}")
    _check_shape(entry[name], p, f"'{name}' of {what}")
