"""What PagedAdamW and PagedLion have in common: an optimizer of torch's kind whose states lie in an arena."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import require
from ..native import extension
from . import state_dict as state_dicts
from .arena.layout import Layout, Slot
from .binding import Binding, split_parameters
from .checks import check_parameter, check_settings, checked_entry, checked_scale, one_device, require_own_memory
from .engines import choose
from .engines.contract import Engine
from .groups import group_table
from .interrupts import uninterrupted
from .options import Options
from .schema import STATE_NAMES, Algorithm, StateSchema
from .shards import is_shard, local_part


class Paged(torch.optim.Optimizer):
    """An optimizer whose states lie in one arena, paged between the device and the host.

    The arena is made at the first step, or when states are loaded. It is made again, with its states carried over,
    when parameters or states are no longer those that it was made for.

    Args:
        params: parameters, named parameters or groups, as for torch.optim.
        defaults: settings for groups that do not give their own.
        options: how states are kept and gradients are treated.
    """

    #: What the kernels compute.
    _algorithm: Algorithm

    def __init__(self, params, defaults: dict[str, Any], options: Options):
        self._options = options
        self._binding: Binding | None = None
        self._last_control = (0.0, 0)  # norm and skipped steps, until there is an arena
        super().__init__(params, defaults)

    @property
    def _engine(self) -> Engine | None:
        return None if self._binding is None else self._binding.engine

    @property
    def _name(self) -> str:
        return type(self).__name__

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """True for torch.amp.GradScaler, which then leaves unscaling to the step and never reads the device itself.

        Lightning reads the same attribute as a refusal to clip gradients; where it is False, Lightning unscales and
        clips them before the scaler's turn. The step copes with both, so everyone but the scaler sees False.
        """
        return sys._getframe(1).f_globals.get("__name__") == torch.amp.grad_scaler.__name__

    # ------------------------------------------------------------------------------------------------ parameters

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as torch.optim does. If there is an arena already, it grows.

        Raises:
            ValueError: for a setting out of range, or a parameter that is in another group or on another device.
            TypeError: for parameters that are complex, sparse or of a dtype without kernels.
            MemoryError: if there is not enough memory for the larger arena. Nothing has changed then.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            trainable = [p for g in self.param_groups for p in g["params"] if p.requires_grad]
            one_device(trainable, "; use an optimizer for each device")
            if self._binding is not None:
                self._adopt(self._bind())
        except BaseException:
            self.param_groups.pop()
            raise

    def _check_group(self, group: Mapping[str, Any]) -> None:
        check_settings(group, self._name)
        twice = len(set(group["params"])) < len(group["params"])
        require(not twice, ValueError, "a parameter is more than once in the group")
        for i, p in enumerate(group["params"]):
            if p.requires_grad:
                self._check_parameter(p, f"parameter {i} of the group")

    def _check_parameter(self, p: Tensor, what: str) -> None:
        check_parameter(p, what)
        if is_shard(p) and self._options.needs_norm:
            choose.refuse_sums_of_shards(p)

    # ----------------------------------------------------------------------------------------------------- arena

    def _bind(self, loaded: Mapping[Tensor, Any] | None = None) -> Binding:
        """Makes an arena for the parameters as they are now, and fills it with ``loaded`` or the present states.

        The optimizer keeps its old one until _adopt.
        """
        if loaded is None:
            self._require_consistent()

        def has_states(p: Tensor) -> bool:
            return bool(self.state.get(p)) or (loaded is not None and p in loaded)

        params, group_indices, frozen = split_parameters(self.param_groups, has_states)
        self._check_bindable(params)
        states = loaded
        if states is None:
            states = {
                p: checked_entry(self.state[p], self._algorithm.moments, p, f"parameter {i}", self._name)
                for i, p in enumerate(params)
                if self.state.get(p)
            }
        options = self._options
        schema = StateSchema(self._algorithm.moments, options.state_bits, options.master_weights)
        slots = [
            Slot(local_part(p).numel(), index, extension.code_of(p.dtype), schema.planes(p))
            for p, index in zip(params, group_indices)
        ]
        layout = Layout(slots, options.state_bits)
        engine = choose.engine_for(params[0], layout, self._algorithm.code, options)
        engine.write_control(*self._read_control())
        if self._engine is not None:
            self._engine.arena.synchronize()
        binding = Binding(engine, schema, self.param_groups, params, frozen)
        binding.fill(states)
        return binding

    def _adopt(self, binding: Binding) -> None:
        """Replaces the arena, and drops the old one."""
        self._expose(binding.states)
        self._binding = binding

    def _check_bindable(self, params: list[Tensor]) -> None:
        require(bool(params), ValueError, "no parameter of the optimizer requires a gradient")
        for i, p in enumerate(params):
            self._check_parameter(p, f"parameter {i}")
        device = one_device(params)
        require(
            params[0].device.type in ("cpu", "cuda"),
            RuntimeError,
            f"parameters on {device} cannot be optimized; move the model to the CPU or to a CUDA device first",
        )
        choose.refuse_in_capture(params[0])
        for i, p in enumerate(params):
            require_own_memory(f"parameter {i}", local_part(p))

    def _expose(self, states: dict[Tensor, dict[str, Tensor]]) -> None:
        """Puts views of the arena into ``state``, beside what others keep there."""
        for p, views in states.items():
            views.update({k: v for k, v in self.state.get(p, {}).items() if k not in STATE_NAMES})
        others = {p: entry for p, entry in self.state.items() if p not in states}
        self.state.clear()
        self.state.update(states)
        self.state.update(others)

    def _valid_binding(self) -> Binding | None:
        """The binding, if its arena still holds all that the optimizer has."""
        binding = self._binding
        return binding if binding is not None and binding.covers(self.param_groups, self.state) else None

    def _require_consistent(self) -> None:
        """Refuses to continue when some states are a step ahead of others."""
        if self._engine is not None and self._engine.broken:
            raise RuntimeError(
                f"{self._engine.broken} failed midway, and some states have changed while others have not: load a "
                "saved state dict, or make a new optimizer"
            )

    def _read_control(self) -> tuple[float, int]:
        return self._last_control if self._engine is None else self._engine.read_control()

    # ------------------------------------------------------------------------------------------------------ step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step for every parameter that has a gradient.

        On a CUDA device the step goes to the current stream and never waits for the device. (A learning rate that is
        a tensor on the device is the exception: it has to be read. A number is better.) Gradients are read, never
        changed. Before a CUDA graph captures the step, it must have run once, with all states on the device.

        Sharded parameters: all processes take the step together, with gradients for the same parameters. Each updates
        its own shards; clipping and skipping look at the gradients of all.

        Args:
            closure: computes the loss again and returns it.

        Returns:
            What the closure returns, or None.

        Raises:
            RuntimeError: for a sparse gradient, one whose dtype, shape or device is not its parameter's, or a parameter
                or gradient whose memory was freed. Nothing has changed then.
            TypeError: for a parameter or gradient that never had memory of its own. Nothing has changed then.
            ValueError: for a setting of a group that is out of range (nothing has changed then), or a parameter that
                no longer has the shape of its states.
            MemoryError: at the first step, if there is not enough memory for the states.

        If states are paged, a device error may come between two parts of a step. Every further step, paging, saving
        and copying then raises a RuntimeError, until load_state_dict or load has replaced the states.
        """
        try:
            return self._step(closure)
        except BaseException:
            # torch.amp.GradScaler removes these only after a step that returned; the next step would use them again.
            for name in ("grad_scale", "found_inf"):
                self.__dict__.pop(name, None)
            raise

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        self._require_consistent()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        binding = self._valid_binding()
        table = None if binding is None else binding.tensor_table()
        if table is None:
            if all(p.grad is None for group in self.param_groups for p in group["params"]):
                return loss
        elif not table[0][1::2].any():  # no gradient has an address
            return loss
        groups = group_table(self.param_groups, self._name)
        if binding is None or table is None:
            binding = self._bind()
            table = binding.tensor_table()
            assert table is not None  # the arena was made for the parameters as they are
            self._adopt(binding)
        tensors, copies = table
        scale, inf = (checked_scale(name, getattr(self, name, None)) for name in ("grad_scale", "found_inf"))
        binding.step(tensors, groups, scale, inf, self._options.needs_norm)
        del copies  # of gradients; their memory may be reused once the step is queued
        return loss

    def refresh(self) -> None:
        """Passes the groups' settings, such as a scheduler's lr, on to CUDA graphs that have captured a step.

        If they have changed, this waits for the device, because a replay in flight still reads the old ones.
        """
        if self._engine is not None:
            self._engine.refresh(group_table(self.param_groups, self._name))

    # ------------------------------------------------------------------------------------------------ state dicts

    def _all_params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """A state dict like torch.optim's, with the arena's tensors, not copies.

        With 32-bit states the names are torch.optim.AdamW's, which can load it (Lion has "exp_avg" alone). With 8-bit
        states each moment is "exp_avg_code", uint8 of the parameter's shape, and "exp_avg_absmax", float32 [blocks of
        256]; the second moment has "exp_avg_sq_code" and "exp_avg_sq_absmax". With ``master_weights`` there is
        "master", float32.

        States of shards are DTensors with the parameters' placements, for torch.distributed.checkpoint. Their 8-bit
        states are decoded into 32-bit copies, because another way of sharding needs other blocks.
        """
        self._require_consistent()
        if self._engine is not None:
            self._engine.arena.synchronize()
        result = super().state_dict()
        if any(map(is_shard, self.state)):
            params, moments = self._all_params(), self._algorithm.moments
            result["state"] = {
                key: state_dicts.without_shard_codes(entry, params[key], moments)
                for key, entry in result["state"].items()
            }
        return result

    def torch_state_dict(self) -> dict[str, Any]:
        """The same for torch.optim: float32 copies on the parameters' device, decoded if states have 8 bits."""
        result, params = self.state_dict(), self._all_params()
        for index, entry in result["state"].items():
            if "step" in entry:  # without it, someone else's entry, or one that was only looked at
                for name, value in entry.items():
                    state_dicts.require_readable(value, f"{name!r} of the state of parameter {index}")
                result["state"][index] = state_dicts.entry_for_torch(entry, params[index], self._algorithm.moments)
        return result

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads states and settings from this class, with 32 or 8 bits, or from torch.optim.

        States are copied into the arena and stay paged. All of them are checked before the first is copied, so none is
        held twice. Only those that have to change from 32 to 8 bits, or their order in memory, take memory besides.

        Raises:
            ValueError: if it belongs to another model or another optimizer, or holds what can be no state or setting.
            RuntimeError: if the memory of a state was freed.
            MemoryError: if there is not enough memory.

        Nothing has changed then: the optimizer goes on with its own states and settings. Ctrl-C waits for the copy.
        """
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            # Torch's annotation asks for a dict; a hook gets whatever mapping the caller gave.
            replaced = hook(self, cast(dict[str, Any], state_dict))
            state_dict = state_dict if replaced is None else replaced
        saved, states = state_dicts.matched(state_dict, self.param_groups, self._algorithm.moments, self._name)
        groups = [{**group, **state_dicts.settings_of(other)} for group, other in zip(self.param_groups, saved)]
        for group in groups:
            self._check_group(group)
        settings = list(map(state_dicts.copied_settings, saved))
        commit = self._stage(states)  # the last that can fail
        with uninterrupted():
            commit()
            for group, new in zip(self.param_groups, settings):
                group.update(new)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _stage(self, states: Mapping[Tensor, Mapping[str, Any]]) -> Callable[[], None]:
        """What fills the present arena, or puts a new one in its place if the parameters no longer fit it."""
        binding = self._valid_binding()
        if binding is not None and (binding.parameters_changed() or binding.engine.broken):
            binding = None
        if binding is None and not states:
            return self._drop_states
        if binding is None or any(p in states for p in binding.frozen):
            return functools.partial(self._adopt, self._bind(states))
        return binding.stage(states)

    def _drop_states(self) -> None:
        self.state.clear()
        self._binding = None

    def save(self, path: str | os.PathLike) -> None:
        """Writes the state dict to a file that is the old one or the new one, even if the process is killed.

        Raises:
            OSError: if the file cannot be written. The old one is still there then.
            ValueError: if a group or a state holds a value that load() would refuse, or if parameters are shards. The
                old file is still there then.
        """
        require(
            not any(map(is_shard, self._all_params())),
            ValueError,
            "save() writes the states of one process, and this optimizer has sharded parameters: save state_dict() "
            "with torch.distributed.checkpoint",
        )
        for group in self.param_groups:
            check_settings(group, self._name)
        state_dicts.write_file(self.state_dict(), self._name, path)

    def load(self, path: str | os.PathLike) -> None:
        """Loads a file that save() wrote.

        The file is read whole before anything changes, so another process may replace or cut it meanwhile: into
        memory, or, if it would take more than half of what is left, into a file without a name, in ``page_file`` or
        beside it.

        Raises:
            OSError: if there is no such file, or it cannot be read or copied.
            ValueError: if it is damaged, or belongs to another model or optimizer.

        Nothing has changed then.
        """
        self.load_state_dict(state_dicts.read_file(path, self._name, self._options.page_file))

    def __getstate__(self) -> dict[str, Any]:
        self._require_consistent()
        if self._engine is not None:
            self._engine.arena.synchronize()
        # Plain values, so that a pickle names no class but the optimizer's own.
        own = {"_options": dataclasses.asdict(self._options), "_last_control": self._read_control()}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """From a pickle or a deep copy, of this version: save() writes files that later versions read, too.

        Raises:
            ValueError: for a pickle of another version.
        """
        options = state.get("_options")
        try:
            options = options if isinstance(options, Options) else Options(**cast(dict[str, Any], options))
        except TypeError:
            raise ValueError(
                f"this {self._name} was pickled whole by another version of qlora_kernels: only that version can read "
                "it; there, save() writes a file that this one can load"
            ) from None
        # The states arrive as ordinary tensors; the next step makes an arena for them.
        state = {name: value for name, value in state.items() if name != "_algorithm"} | {"_options": options}
        self._binding = None
        super().__setstate__(state)

    # ------------------------------------------------------------------------------------------ paging, and figures

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped because gradients were not finite. Waits for the device."""
        return self._read_control()[1]

    @property
    def grad_norm(self) -> float:
        """The norm of all gradients in the last step, before clipping. Needs max_grad_norm or skip_nonfinite.

        Waits for the device.
        """
        return self._read_control()[0]

    def page_out(self) -> None:
        """Sends the states to the host (from a CUDA device) or to the file (with ``page_file``)."""
        self._require_consistent()
        if self._engine is not None:
            self._engine.page_out()

    def page_in(self) -> None:
        """Starts to bring states back in the background: to the device those that stay there, from a file all."""
        self._require_consistent()
        if self._engine is not None:
            self._engine.page_in()

    def resident_bytes(self) -> int:
        """Bytes of the arena on the device, as far as requested so far; with ``page_file``, bytes in memory."""
        return 0 if self._engine is None else self._engine.resident_bytes()

    @property
    def arena_bytes(self) -> int:
        """Bytes of the arena; 0 before the first step."""
        return 0 if self._engine is None else self._engine.layout.nbytes

    @property
    def paging(self) -> str:
        """How states are paged here, in words."""
        return "not yet: the arena is made at the first step" if self._engine is None else self._engine.arena.kind
