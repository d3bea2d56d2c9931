"""What a paged optimizer refuses: settings, parameters, gradients, state dicts."""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping, Sequence
from numbers import Number, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import require, require_number, sentence
from ..ops.dispatcher import require_memory
from ..storage.digest import digest
from ..storage.torch_file import load_torch
from .arena.layout import STATE_BLOCK
from .schema import Moment
from .shards import check_placements, is_shard, local_part

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: A learning rate this little below 0 counts as 0: rounding leaves that where LinearLR ends at 0.
LR_ROUNDING = 1e-12


def check_settings(group: Mapping[str, Any], optimizer: str, where: str = "") -> None:
    """Refuses settings of a parameter group that are out of range; ``optimizer`` is the class's name."""
    require_number(f"lr{where}", setting(group["lr"]), lambda x: x >= -LR_ROUNDING, "at least 0")
    require_number(f"weight_decay{where}", setting(group["weight_decay"]), lambda x: x >= 0, "at least 0")
    betas = group["betas"]
    pair = isinstance(betas, (tuple, list)) and len(betas) == 2
    betas = tuple(map(setting, betas)) if isinstance(betas, (tuple, list)) and len(betas) < 4 else setting(betas)
    require(pair, ValueError, f"betas{where} should be two numbers, found {betas!r}")
    for i, beta in enumerate(betas):
        require_number(f"betas[{i}]{where}", beta, lambda x: 0 <= x < 1, "at least 0 and below 1")
    if "eps" in group:
        require_number(f"eps{where}", setting(group["eps"]), lambda x: x >= 0, "at least 0")
    for name in ("amsgrad", "maximize"):
        require(not setting(group.get(name)), ValueError, f"{name}=True{where} is not supported by {optimizer}")


def setting(value: Any) -> Any:
    """A setting that is a tensor as the number in it; one that can't be a number as text for an error.

    Even printing a tensor reads its memory, which may have been freed, so no error may print what holds one.
    """
    if value is None or isinstance(value, (Number, np.generic, str)):
        return value
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    try:
        if value.numel() == 1 and not value.is_complex():
            require_own_memory("a setting", value)
            return value.item()
    except Exception:  # sparse, quantized, on the meta device, ...: each has its own error
        pass
    return f"a tensor of {value.dtype}, {value.layout}"


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
    negative = "holds the negatives of what is in memory; resolve_neg() makes an ordinary tensor"
    require(not p.is_neg(), TypeError, f"{what} {negative}")
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


_NO_DISPATCH = getattr(Tensor, "__torch_dispatch__")  # noqa: B009


def intercepts(tensor: Tensor) -> bool:
    """Whether a tensor's class handles operations itself, as wrappers around other tensors and fake tensors do."""
    return getattr(type(tensor), "__torch_dispatch__") is not _NO_DISPATCH  # noqa: B009 - pyright does not know it


def require_own_memory(what: str, tensor: Tensor) -> None:
    """Refuses a tensor whose elements are not all in memory of its own.

    Raises:
        RuntimeError: for freed memory.
        TypeError: for a wrapper, and a tensor that never had memory.
    """
    if tensor.numel() == 0:
        return
    if tensor.layout is not torch.strided or tensor.is_meta or tensor._is_zerotensor():
        raise no_memory_of_its_own(what, tensor)
    if not intercepts(tensor):
        require_memory(what, tensor.detach().as_subclass(Tensor))
    elif tensor.data_ptr() <= tensor.storage_offset() * tensor.itemsize:
        raise no_memory_of_its_own(what, tensor)


def checked_scale(name: str, value: Any) -> Tensor | None:
    """What torch.amp.GradScaler hands over, as a tensor that the kernels can read.

    Raises:
        ValueError: for anything but a tensor with one element.
        RuntimeError: if its memory was freed.
    """
    if value is None:
        return None
    single = isinstance(value, Tensor) and value.layout is torch.strided and value.numel() == 1
    require(single, ValueError, f"{name} should be a tensor with one element, found {type(value).__name__}")
    if value._is_zerotensor():
        return torch.zeros(1, dtype=value.dtype, device=value.device)
    require_own_memory(name, value)
    return value.resolve_neg()


def no_memory_of_its_own(what: str, tensor: Tensor) -> Exception:
    return TypeError(
        f"{what}, a {type(tensor).__name__} of shape {list(tensor.shape)}, has no memory of its own: wrappers around "
        "other tensors (quantized ones, say) cannot be optimized here; torch.optim.AdamW can do it"
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
    """Whether what torch.save makes of a value is read back: by load_torch, and within the limits of a digest."""
    file = io.BytesIO()
    try:
        torch.save(value, file)
        digest(load_torch(file), len(file.getvalue()))
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


def checked_entry(
    entry: Mapping[str, Any], moments: Sequence[Moment], p: Tensor, what: str, optimizer: str
) -> dict[str, Any]:
    """A parameter's states, ready to be copied into states of ``optimizer`` (a class's name).

    "step" is a float that float32 can hold. Tensors are strided ones of real numbers, in memory, with no bits or
    classes that change what their elements mean; 8-bit codes are dense. They are the entry's own where those are.

    Raises:
        ValueError: if the states don't fit.
        RuntimeError: if the memory of one was freed.
    """
    kind = type(entry).__name__
    require(isinstance(entry, Mapping), ValueError, f"the state of {what} should be a dict, found {kind}")
    checked: dict[str, Any] = {}
    for moment in moments:
        checked |= _moment(entry, moment.name, p, what, optimizer)
    checked["step"] = _step_count(entry.get("step"), what)
    if "master" in entry:
        checked["master"] = _elements_like(entry["master"], p, f"'master' of {what}")
    return checked


def _step_count(value: Any, what: str) -> float:
    if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta and value.numel() == 1:
        value = local_part(_elements(value, f"'step' of {what}")).item()
    try:
        if isinstance(value, Real) and 0 <= float(value) <= torch.finfo(torch.float32).max:
            return float(value)
    except OverflowError:  # an integer beyond any float
        pass
    raise ValueError(f"{what} has no step count among its states, found {setting(value)!r}")


@functools.cache
def _converts(dtype: torch.dtype) -> bool:
    """Whether torch can convert a dtype to float32 without a loss of meaning."""
    try:
        return not dtype.is_complex and torch.empty(1, dtype=dtype, device="cpu").float().numel() == 1
    except (RuntimeError, TypeError):  # dtypes that hold bits only; quantized ones, which carry a scale
        return False


def _elements(value: Tensor, what: str) -> Tensor:
    """The tensor as an ordinary one, or as a DTensor, whose elements can be copied."""
    part = local_part(value)
    dense = part.layout is torch.strided and not part.is_nested and not part.is_meta and not part.is_quantized
    require(dense and _converts(part.dtype), ValueError, f"{what} should be a dense tensor of real numbers")
    if is_shard(value):
        require_own_memory(what, part)
        return value
    if intercepts(part):
        # A result of a collective or a quantized tensor becomes an ordinary one; a fake tensor does not.
        try:
            part = part.detach().float() if part.is_floating_point() else part.detach().clone()
        except Exception as error:  # its class may raise anything
            raise ValueError(f"{what} cannot be read ({sentence(error)})") from error
        require(not intercepts(part), ValueError, f"{what}, a {type(value).__name__}, has no memory of its own")
    part = part.detach().as_subclass(Tensor)
    if part._is_zerotensor():
        return torch.zeros(part.shape, dtype=part.dtype, device=part.device)
    require_memory(what, part)
    return part


def _elements_like(value: Any, p: Tensor, what: str) -> Tensor:
    """The elements of a state that has the parameter's shape."""
    nested = isinstance(value, Tensor) and value.is_nested  # has no shape
    require(not nested, ValueError, f"{what} should be a dense tensor of real numbers")
    fits = isinstance(value, Tensor) and value.shape == p.shape
    shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
    require(
        fits,
        ValueError,
        f"the states belong to another model: {what} is {shape}, the parameter {list(p.shape)}",
    )
    if is_shard(value):
        same_mesh = is_shard(p) and value.device_mesh == p.device_mesh
        here = f"on {p.device_mesh}" if is_shard(p) else "an ordinary tensor"
        require(
            same_mesh,
            ValueError,
            f"{what} is a DTensor on {value.device_mesh}, the parameter {here}; full_tensor() makes it an ordinary one",
        )
    return _elements(value, what)


def _overlaps(tensor: Tensor) -> bool:
    """Whether elements share memory, as after expand()."""
    span = 0
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride()) if size != 1):
        if stride <= span:
            return tensor.numel() > 0
        span += stride * (size - 1)
    return False


def _moment(entry: Mapping[str, Any], name: str, p: Tensor, what: str, optimizer: str) -> dict[str, Tensor]:
    if f"{name}_code" not in entry:
        missing = f"the states belong to another optimizer: {optimizer} needs '{name}' of {what}"
        require(name in entry, ValueError, missing)
        return {name: _elements_like(entry[name], p, f"'{name}' of {what}")}
    code, absmax = entry[f"{name}_code"], entry.get(f"{name}_absmax")
    if is_shard(p) and getattr(code, "shape", None) == local_part(p).shape:
        p = local_part(p)
    code = _elements_like(code, p, f"'{name}_code' of {what}")
    blocks = -(-p.numel() // STATE_BLOCK)
    if not isinstance(absmax, Tensor) or absmax.is_nested or absmax.numel() != blocks or code.dtype != torch.uint8:
        raise ValueError(f"'{name}_absmax' of {what} should have {blocks} constants, and its codes be uint8")
    constants = f"'{name}_absmax' of {what}"
    require(absmax.is_floating_point(), ValueError, f"{constants} should be a dense tensor of real numbers")
    absmax = local_part(_elements(absmax, constants)).resolve_neg().reshape(-1).float()
    # NaN and infinity are what gradients of that kind leave; a constant below 0 is none that an encoder gives.
    require(not bool((absmax < 0).any()), ValueError, f"{constants} should hold no number below 0")
    if not is_shard(code):
        # Blocks run through memory, so the order of the elements there has to be clear.
        require(not _overlaps(code), ValueError, f"elements of '{name}_code' of {what} overlap in memory; clone() it")
        code = code.resolve_neg()
        if torch.empty_like(code, device="meta").stride() != code.stride():
            code = code.clone()
    return {f"{name}_code": code, f"{name}_absmax": absmax}
