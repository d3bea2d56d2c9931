"""State dicts and files of a paged optimizer."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import require, sentence
from ..storage.digest import digest
from ..storage.formats import save_torch
from .checks import check_entry, check_loadable, check_structure
from .convert import decode_moment, without_numpy
from .schema import Moment
from .shards import as_dtensor, is_shard, local_part

# Settings in groups of torch.optim.AdamW that mean nothing here, and are dropped.
_TORCH_ONLY = ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay")
_FORMAT = "qlora_kernels.optim/1"


def without_shard_codes(entry: dict[str, Any], p: Tensor, moments: Sequence[Moment]) -> dict[str, Any]:
    """A parameter's states with a shard's 8-bit codes decoded, because those mean nothing to other shards."""
    if not is_shard(p):
        return dict(entry)
    names = [moment.name for moment in moments if f"{moment.name}_code" in entry]
    encoded = {f"{name}_{suffix}" for name in names for suffix in ("code", "absmax")}
    kept = {key: value for key, value in entry.items() if key not in encoded}
    return {**kept, **{name: as_dtensor(decode_moment(entry, name).to(local_part(p).device), p) for name in names}}


def entry_for_torch(entry: dict[str, Any], p: Tensor, moments: Sequence[Moment]) -> dict[str, Any]:
    """A parameter's states for torch.optim: float32 copies on the parameter's device."""
    wide = {"step": entry["step"].detach().cpu().clone()}
    for moment in moments:
        wide[moment.name] = decode_moment(entry, moment.name).to(p.device, copy=True)
    return wide


def settings_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a state dict's group that mean something to a paged optimizer."""
    return {key: value for key, value in group.items() if key != "params" and key not in _TORCH_ONLY}


def matched(
    state_dict: Mapping[str, Any],
    param_groups: Sequence[Mapping[str, Any]],
    moments: Sequence[Moment],
    optimizer: str,
) -> tuple[list[dict[str, Any]], dict[Tensor, dict[str, Any]]]:
    """The groups of a state dict, and its states by parameter.

    Raises:
        ValueError: if it belongs to another model or another optimizer.
    """
    check_structure(state_dict)
    groups, saved = list(state_dict["param_groups"]), state_dict["state"]
    require(
        len(groups) == len(param_groups),
        ValueError,
        f"the state dict belongs to another model: it has {len(groups)} parameter groups, this optimizer "
        f"{len(param_groups)}",
    )
    states: dict[Tensor, dict[str, Any]] = {}
    for i, (mine, theirs) in enumerate(zip(param_groups, groups)):
        require(
            len(mine["params"]) == len(theirs["params"]),
            ValueError,
            f"the state dict belongs to another model: its group {i} has {len(theirs['params'])} parameters, this "
            f"optimizer's {len(mine['params'])}",
        )
        for name in ("amsgrad", "maximize"):
            require(not theirs.get(name), ValueError, f"the state dict comes from an optimizer with {name}=True")
        for p, key in zip(mine["params"], theirs["params"]):
            if key not in saved or (isinstance(saved[key], Mapping) and not saved[key]):
                continue
            check_entry(saved[key], moments, p, f"parameter {key}", optimizer)
            states[p] = saved[key]
    return groups, states


def write_file(state_dict: dict[str, Any], optimizer: str, path: str | os.PathLike) -> None:
    """Writes a state dict to a file that is the old one or the new one, even if the process is killed.

    Raises:
        OSError: if the file cannot be written.
        ValueError: if the state dict holds values that torch.load refuses.
    """
    content = without_numpy(state_dict)
    check_loadable(content)
    try:
        save_torch({"format": _FORMAT, "optimizer": optimizer, "sha256": digest(content), **content}, path)
    except RuntimeError as error:  # torch's writer does not pass on what the system said
        raise OSError(f"{os.fspath(path)} cannot be written; is the disk full? ({sentence(error)})") from error


def read_file(path: str | os.PathLike, optimizer: str) -> dict[str, Any]:
    """The state dict that write_file wrote for an optimizer of this class.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if it is damaged, or belongs to another optimizer.
    """
    with open(path, "rb"):
        pass  # raises what keeps the file from being read; torch reports damage as an OSError, too
    try:
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damaged bytes can lead to any error
        raise ValueError(f"{os.fspath(path)} is not a complete optimizer file ({sentence(error)})") from None
    has_format = isinstance(value, dict) and value.pop("format", None) == _FORMAT
    require(has_format, ValueError, f"{os.fspath(path)} is not an optimizer's file")
    saved_by = value.pop("optimizer", None)
    require(saved_by == optimizer, ValueError, f"{os.fspath(path)} was saved by {saved_by}, not by {optimizer}")
    intact = value.pop("sha256", None) == digest(value)
    require(intact, ValueError, f"{os.fspath(path)} is damaged: its digest is not the one that was saved with it")
    return value
