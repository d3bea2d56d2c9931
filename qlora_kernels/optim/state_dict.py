"""State dicts and files of a paged optimizer."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import require, sentence
from ..storage.digest import digest
from ..storage.formats import save_torch
from ..storage.regular_file import open_regular
from ..storage.torch_file import ForeignContents, load_torch
from .arena.memory import memory_left
from .checks import check_loadable, check_structure, checked_entry, require_own_memory, setting
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


def copied_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the same, which shares nothing with the state dict, such as an lr that is a tensor.

    Raises:
        ValueError: for settings that are nested too deeply.
    """
    try:
        return copy.deepcopy(settings_of(group))
    except RecursionError:
        raise ValueError("a group of the state dict has a setting that is nested too deeply") from None


def matched(
    state_dict: Mapping[str, Any],
    param_groups: Sequence[Mapping[str, Any]],
    moments: Sequence[Moment],
    optimizer: str,
) -> tuple[list[dict[str, Any]], dict[Tensor, dict[str, Any]]]:
    """The groups of a state dict, and its states by parameter, checked.

    Raises:
        ValueError: if it belongs to another model or another optimizer.
        RuntimeError: if the memory of a state was freed.
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
            foreign = f"the state dict comes from an optimizer with {name}=True"
            require(not setting(theirs.get(name)), ValueError, foreign)
        for p, key in zip(mine["params"], theirs["params"]):
            if key not in saved or (isinstance(saved[key], Mapping) and not saved[key]):
                continue
            states[p] = checked_entry(saved[key], moments, p, f"parameter {key}", optimizer)
    return groups, states


def _holders(state_dict: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The groups and entries of a state dict, and what they are called."""
    for i, group in enumerate(state_dict["param_groups"]):
        yield f"group {i}", group
    for key, entry in state_dict["state"].items():
        yield f"the state of parameter {key}", entry


def require_readable(value: Any, what: str) -> None:
    """Refuses a tensor without memory, and lists and tuples that hold one: copying such a tensor ends the process."""
    if isinstance(value, Tensor) and not is_shard(value):
        if value.layout is torch.strided and not value.is_meta and not value._is_zerotensor():
            require_own_memory(what, value)
    elif type(value) in (list, tuple):
        for inner in value:
            if inner is not value:
                require_readable(inner, what)


def write_file(state_dict: dict[str, Any], optimizer: str, path: str | os.PathLike) -> None:
    """Writes a state dict to a file that is the old one or the new one, even if the process is killed.

    Raises:
        OSError: if the file cannot be written.
        ValueError: if the state dict holds values that torch.load refuses.
        RuntimeError: if it holds a tensor whose memory was freed.
    """
    for where, holder in _holders(state_dict):
        for key, value in holder.items():
            require_readable(value, f"{key!r} of {where}")
    try:
        content = without_numpy(state_dict)
        check_loadable(content)
    except RecursionError:
        raise ValueError("a group or a state holds a value that is nested too deeply, or in itself") from None
    try:
        save_torch({"format": _FORMAT, "optimizer": optimizer, "sha256": digest(content), **content}, path)
    except RuntimeError as error:  # torch's writer does not pass on what the system said
        raise OSError(f"{os.fspath(path)} cannot be written; is the disk full? ({sentence(error)})") from error


def read_file(path: str | os.PathLike, optimizer: str, folder: str | os.PathLike | None = None) -> dict[str, Any]:
    """The state dict that write_file wrote for an optimizer of this class, in memory that no other process can change.

    Args:
        folder: where a copy of the file goes if it would take more than half of the memory left; None: beside it.

    Raises:
        OSError: if the file cannot be read or copied.
        ValueError: if it is damaged, or belongs to another optimizer.
    """
    name = os.fspath(path)
    with open_regular(path) as file:
        status = os.fstat(file.fileno())
        left = memory_left()
        if left is None or status.st_size <= left // 2:
            value = _loaded(file, name, left)
        else:
            # Mapped, because then the system can drop its pages; a mapping of the file itself would kill the process if
            # someone cut the file. The copy has no name, so nobody else can open it.
            with tempfile.TemporaryFile(
                dir=os.path.dirname(os.path.abspath(name)) if folder is None else folder
            ) as own:
                shutil.copyfileobj(file, own, 1 << 24)
                own.flush()
                value = _loaded(own, name, None, f"/proc/self/fd/{own.fileno()}")
    has_format = isinstance(value, dict) and value.pop("format", None) == _FORMAT
    require(has_format, ValueError, f"{name} is not an optimizer's file")
    saved_by = value.pop("optimizer", None)
    if saved_by != optimizer:
        # Anything else could be of any length.
        writer = repr(saved_by[:100])[1:-1] if isinstance(saved_by, str) else "something else"
        raise ValueError(f"{name} was saved by {writer}, not by {optimizer}")
    saved_digest = value.pop("sha256", None)
    try:
        intact = saved_digest == digest(value, status.st_size)
    except Exception as error:  # tensors of kinds that write_file refuses, and values that hold themselves
        raise ValueError(f"{name} holds what no optimizer saves ({sentence(error)})") from None
    require(intact, ValueError, f"{name} is damaged: its digest is not the one that was saved with it")
    return value


def _loaded(file: Any, name: str, left: int | None, mapped: str | None = None) -> Any:
    try:
        return load_torch(file, mapped)
    except MemoryError:
        if left is None:
            raise
        # There is room for twice the file, so it asks for what it doesn't hold.
        raise ValueError(f"{name} asks for more memory than its contents take") from None
    except ForeignContents as error:
        raise ValueError(f"{name} holds what no optimizer saves ({sentence(error)})") from None
    except Exception as error:  # damaged bytes can lead to any error
        raise ValueError(f"{name} is not a complete optimizer file ({sentence(error)})") from None
