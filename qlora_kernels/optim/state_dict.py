"""State dicts and files of a paged optimizer, its copies and pickles: what goes out of the arena and comes in."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import require, sentence
from ..storage.digest import digest
from ..storage.formats import save_torch
from .checks import check_entry, check_form, check_loadable
from .convert import decoded, plain
from .shards import is_shard, part, shared

# Of torch.optim.AdamW's groups: without meaning here, and not kept.
_TORCH_ONLY = ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay")
_FORMAT = "qlora_kernels.optim/1"


class Saving(torch.optim.Optimizer):
    """The part of a paged optimizer that this file is about; paged.py has the rest, which it goes by."""

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's: the tensors are those of the arena, not copies.

        With 32-bit states the names are torch.optim.AdamW's, which can load it (Lion's: "exp_avg" alone). With 8 bits
        "exp_avg_code" uint8 of the parameter's shape and "exp_avg_absmax" float32 [blocks of 256], likewise
        "exp_avg_sq". "master" float32 with ``master_weights``.

        Of parameters that are shards (DTensors), states are DTensors, placed alike, for torch.distributed.checkpoint;
        those of 8 bits are decoded into 32, which are copies: to cut them otherwise, blocks are chosen anew.
        """
        self._require_whole()
        if self._engine is not None:
            self._engine.arena.synchronize()
        own = super().state_dict()
        if any(map(is_shard, self.state)):
            params = [p for group in self.param_groups for p in group["params"]]
            own["state"] = {key: self._whole_entry(entry, params[key]) for key, entry in own["state"].items()}
        return own

    def _whole_entry(self, entry: dict[str, Any], p: Tensor) -> dict[str, Any]:
        """Without the codes of a shard, which mean nothing elsewhere."""
        names = [name for name, _, _ in self._moments if f"{name}_code" in entry and is_shard(p)]
        parts = {f"{name}_{form}" for name in names for form in ("code", "absmax")}
        kept = {key: value for key, value in entry.items() if key not in parts}
        return {**kept, **{name: shared(decoded(entry, name).to(part(p).device), p) for name in names}}

    def torch_state_dict(self) -> dict[str, Any]:
        """The same for torch.optim: float32 copies, decoded where states have 8 bits, on the parameters' device."""
        own = self.state_dict()
        params = [p for group in self.param_groups for p in group["params"]]
        for index, entry in own["state"].items():
            if "step" not in entry:  # somebody else's, or only looked at
                continue
            wide = {"step": entry["step"].detach().cpu().clone()}
            for name, _, _ in self._moments:
                wide[name] = decoded(entry, name).to(params[index].device, copy=True)
            own["state"][index] = wide
        return own

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over states and settings of a state dict of this class, of either number of bits, or of torch.optim.

        The states stay paged: they are copied into the arena, wherever they come from.

        Raises:
            ValueError: when it is of another model or another optimizer; nothing has changed then.
        """
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        groups, states = self._checked(state_dict)
        before = [dict(group) for group in self.param_groups]
        try:
            for group, saved in zip(self.param_groups, groups):
                kept = {k: v for k, v in saved.items() if k != "params" and k not in _TORCH_ONLY}
                group.update(copy.deepcopy(kept))  # an lr that is a tensor is not to be shared
                self._check_group(group)
            stale = self._stale() or self._moved() or bool(self._engine.broken)
            if not states and stale:
                self.state.clear()
                self._forget()
            elif stale or any(p in states for p in self._frozen):
                self._build(states)
            else:
                self._fill(self._engine, self._params, states)
        except BaseException:
            for group, old in zip(self.param_groups, before):
                group.clear()
                group.update(old)
            raise
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _checked(self, state_dict: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[Tensor, dict[str, Any]]]:
        """The groups and the states by parameter, after every check that needs no arena."""
        who = type(self).__name__
        check_form(state_dict)
        groups, saved = list(state_dict["param_groups"]), state_dict["state"]
        require(
            len(groups) == len(self.param_groups),
            ValueError,
            f"the state dict is of another model: {len(groups)} parameter groups there, {len(self.param_groups)} here",
        )
        states: dict[Tensor, dict[str, Any]] = {}
        for i, (mine, theirs) in enumerate(zip(self.param_groups, groups)):
            require(
                len(mine["params"]) == len(theirs["params"]),
                ValueError,
                f"the state dict is of another model: group {i} has {len(theirs['params'])} parameters there, "
                f"{len(mine['params'])} here",
            )
            for name in ("amsgrad", "maximize"):
                require(not theirs.get(name), ValueError, f"the state dict is of an optimizer with {name}=True")
            for p, key in zip(mine["params"], theirs["params"]):
                if key not in saved or (isinstance(saved[key], Mapping) and not saved[key]):
                    continue
                check_entry(saved[key], self._moments, p, f"parameter {key}", who)
                states[p] = saved[key]
        return groups, states

    def save(self, path: str | os.PathLike) -> None:
        """Writes the state dict to a file that is the old one or the new one, whenever the process is killed.

        Raises:
            OSError: when the file cannot be written; the old one is still there then.
            ValueError: when a group or a state holds what load() would refuse, or parameters are shards; likewise.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        require(
            not any(map(is_shard, params)),
            ValueError,
            "save() writes what one process has, and parameters of this optimizer are shards: save state_dict() with "
            "torch.distributed.checkpoint",
        )
        for group in self.param_groups:
            self._check_settings(group)
        own = plain(self.state_dict())
        check_loadable(own)
        try:
            save_torch({"format": _FORMAT, "optimizer": type(self).__name__, "sha256": digest(own), **own}, path)
        except RuntimeError as error:  # of torch's writer, which does not say what the system said
            raise OSError(f"{os.fspath(path)} cannot be written; is the disk full? ({sentence(error)})") from error

    def load(self, path: str | os.PathLike) -> None:
        """Loads what save() has written.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when it is damaged, or of another model or optimizer; nothing has changed then.
        """
        with open(path, "rb"):
            pass  # what keeps a file from being read is told as it is; torch tells of damage as OSError, too
        try:
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # whatever the bytes of a damaged file lead to
            raise ValueError(f"{os.fspath(path)} is not a whole optimizer file ({sentence(error)})") from None
        good = isinstance(value, dict) and value.pop("format", None) == _FORMAT
        require(good, ValueError, f"{os.fspath(path)} is not an optimizer's file")
        who = value.pop("optimizer", None)
        require(who == type(self).__name__, ValueError, f"{os.fspath(path)} is of {who}, not of {type(self).__name__}")
        good = value.pop("sha256", None) == digest(value)
        require(good, ValueError, f"{os.fspath(path)} is damaged: it does not have the digest that was written with it")
        self.load_state_dict(value)

    def __getstate__(self) -> dict[str, Any]:
        self._require_whole()
        if self._engine is not None:
            self._engine.arena.synchronize()
        return {**super().__getstate__(), "_settings": self._settings, "_control": self._found()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The states come as ordinary tensors; the next step makes an arena for them.
        self._forget()
        super().__setstate__(state)
