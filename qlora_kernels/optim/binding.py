"""An engine, bound to the parameters and state tensors that its arena was made for."""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops.dispatcher import SUSPICIOUS_ADDRESS
from .checks import bad_gradient, require_own_memory
from .convert import Write, local_entry, state_writes
from .engines.contract import Engine
from .schema import StateSchema
from .shards import is_shard, local_address, local_gradient, local_part, sum_over_processes


def split_parameters(
    param_groups: Sequence[Mapping[str, Any]], has_states: Callable[[Tensor], bool]
) -> tuple[list[Tensor], list[int], list[Tensor]]:
    """Parameters that belong into an arena, the index of each one's group, and the frozen rest.

    A frozen parameter keeps its place if it has states, or a gradient that is about to give it some.
    """
    params, group_indices, frozen = [], [], []
    for index, group in enumerate(param_groups):
        for p in group["params"]:
            if p.requires_grad or p.grad is not None or has_states(p):
                params.append(p)
                group_indices.append(index)
            else:
                frozen.append(p)
    return params, group_indices, frozen


def _geometry(p: Tensor) -> tuple:
    return p.numel(), p.dtype, p.shape, p.stride()


def _same_objects(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


class Binding:
    """An engine with the parameters that its arena was made for, and their states as tensors over it.

    Attributes:
        params: the parameters with a place in the arena, in its order.
        frozen: the optimizer's other parameters.
        states: for each of ``params``, its states as users see them.
    """

    def __init__(
        self,
        engine: Engine,
        schema: StateSchema,
        param_groups: Sequence[Mapping[str, Any]],
        params: list[Tensor],
        frozen: list[Tensor],
    ):
        self.engine, self.params, self.frozen = engine, params, frozen
        self._schema = schema
        self._sharded = any(map(is_shard, params))
        self._groups = [list(group["params"]) for group in param_groups]
        self._locations = [(local_address(p), *_geometry(local_part(p))) for p in params]
        view_at, layout = engine.arena.view, engine.layout
        self.states = {p: schema.exposed(schema.views(view_at, layout, i, p), p) for i, p in enumerate(params)}
        self._entries = list(self.states.values())
        self._entries_with_master = [entry for entry in self._entries if "master" in entry]
        self._common_states = operator.itemgetter(*schema.common_names)
        self._tensors = list(self._state_tensors())
        self._addresses = [local_address(t) for t in self._tensors]
        self._sizes = np.array([count * dtype.itemsize for _, count, dtype, *_ in self._locations], dtype=np.int64)
        self._begins = np.empty(0, np.int64)  # the parameters' addresses, and below sorted by them: begins, ends
        self._sorted = self._begins, self._begins

    def _state_tensors(self) -> Iterable[Tensor]:
        masters = map(operator.itemgetter("master"), self._entries_with_master)
        return chain(*map(self._common_states, self._entries), masters)

    def fill(self, states: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """Fills a new arena from checked states in any form, parameter after parameter.

        If this fails, the arena is of no use.
        """
        self.engine.arena.to_host()
        with torch.no_grad():
            for i, p in enumerate(self.params):
                for write in self._writes(i, p, states, ()):
                    write()

    def stage(self, states: Mapping[Tensor, Mapping[str, Any]]) -> Callable[[], None]:
        """What replaces the arena's states by checked ones in any form; if staging fails, they have not changed.

        States that only have to be copied are not copied twice: the call returned reads them where they are. Those that
        have to be encoded to 8 bits, or put into another order, take memory until then.
        """
        engine = self.engine
        engine.arena.to_host()
        in_use = {t.untyped_storage().data_ptr() for t in map(local_part, self._tensors) if t.numel()}
        with torch.no_grad():
            writes = [write for i, p in enumerate(self.params) for write in self._writes(i, p, states, in_use)]

        def commit() -> None:
            engine.broken = "a load"  # in case a device fails midway
            with torch.no_grad():
                for write in writes:
                    write()
            engine.broken = ""

        return commit

    def _writes(
        self, index: int, p: Tensor, states: Mapping[Tensor, Mapping[str, Any]], in_use: Container[int]
    ) -> list[Write]:
        """Writes to the states of a parameter, through the host, so that no page has to move to the device."""
        views = self._schema.views(self.engine.arena.host_view, self.engine.layout, index, p)
        return state_writes(views, local_entry(states.get(p) or {}, p), local_part(p), in_use)

    def covers(self, param_groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Any]) -> bool:
        """Whether the arena still holds all that the optimizer has.

        It does not if a parameter that was frozen has a gradient now, or if someone wrote to the groups or to
        ``optimizer.state``, which torch lets anyone do.
        """
        if self.engine.shared_with_parent or len(param_groups) != len(self._groups):
            return False
        try:
            same = (
                all(_same_objects(group["params"], params) for group, params in zip(param_groups, self._groups))
                and len(state) >= len(self._entries)
                and all(map(operator.is_, state.values(), self._entries))
                and all(map(operator.is_, self._state_tensors(), self._tensors))
                # t.data = … leaves the tensor the same.
                and list(map(local_address if self._sharded else Tensor.data_ptr, self._tensors)) == self._addresses
            )
        except KeyError:
            return False
        return same and not any(p.grad is not None for p in self.frozen)

    def parameters_changed(self) -> bool:
        """Whether a parameter has another dtype, shape, order in memory or device than when the arena was made."""
        return any(
            _geometry(p) != location[1:] or p.device != self.engine.device
            for p, location in zip(map(local_part, self.params), self._locations)
        )

    def tensor_table(self) -> tuple[np.ndarray, list[Tensor]] | None:
        """OptimizerTensor[tensors], and copies of gradients to keep until the step.

        Gradients are copied if they lie in memory in another order than their parameters, hold negatives, or share
        memory with a parameter. None if a parameter has another dtype, shape, order in memory or device than when the
        arena was made.
        """
        addresses: list[int] = []
        copies = []
        strided, on_cuda = torch.strided, self.engine.device.type == "cuda"
        for i, (whole, (known, count, dtype, shape, strides)) in enumerate(zip(self.params, self._locations)):
            p = local_part(whole) if self._sharded else whole
            address = p.data_ptr()
            changed = address != known or p.numel() != count or p.stride() != strides or p.dtype is not dtype
            if changed or p.is_neg():
                if _geometry(p) != self._locations[i][1:] or p.device != self.engine.device or p.is_neg():
                    return None  # a negative view is refused when a new arena is made
                self._locations[i] = (address, count, dtype, shape, strides)
            grad = whole.grad
            if grad is None:
                addresses += (address, 0)
                continue
            if p is not whole:
                assert is_shard(whole)  # an ordinary tensor is its own local part
                grad, moved = local_gradient(grad, whole, i)
                copies += moved
            usable = grad.dtype is dtype and grad.layout is strided and grad.is_cuda == on_cuda and grad.shape == shape
            if not usable or grad.stride() != strides or grad.is_neg():
                if _geometry(p) != self._locations[i][1:]:  # another parameter at the address of the last one
                    return None
                if not usable:
                    raise bad_gradient(i, p, grad)
                require_own_memory(f"the gradient of parameter {i}", grad)
                grad = torch.empty_like(p, memory_format=torch.preserve_format).copy_(grad)
                copies.append(grad)
            grad_address = grad.data_ptr()
            addresses += (address, grad_address or 1)  # an empty gradient's address is 0, which would mean none
        table = np.array(addresses, dtype=np.int64)
        for i, shared in self._suspicious(table.reshape(-1, 2)):
            grad = self._usable_gradient(i, shared)
            if grad is not None:
                copies.append(grad)
                table[2 * i + 1] = grad.data_ptr()
        return table, copies

    def _usable_gradient(self, i: int, shared: bool) -> Tensor | None:
        """A copy of a gradient if it needs one, after a close look at it and its parameter."""
        whole, p = self.params[i], local_part(self.params[i])
        require_own_memory(f"parameter {i}", p)
        grad = whole.grad
        if grad is None:
            return None
        if is_shard(whole):
            if is_shard(grad) and grad.placements != whole.placements:
                return None  # tensor_table has made a copy
            grad = local_gradient(grad, whole, i)[0]
        if grad.device != p.device:
            raise bad_gradient(i, p, grad)
        zeros = grad._is_zerotensor()
        if not zeros:
            require_own_memory(f"the gradient of parameter {i}", grad)
        return torch.empty_like(p, memory_format=torch.preserve_format).copy_(grad) if zeros or shared else None

    def _suspicious(self, addresses: np.ndarray) -> list[tuple[int, bool]]:
        """Parameters that may have no memory, or whose gradients may have none or share a parameter's.

        Shared memory would change while the step reads it; it is marked with True.
        """
        begins, grads = addresses[:, 0], addresses[:, 1]
        if not np.array_equal(begins, self._begins):
            order = np.argsort(begins)
            self._begins = begins.copy()
            self._sorted = begins[order], np.maximum.accumulate((begins + self._sizes)[order])
        starts, ends = self._sorted
        before = np.searchsorted(starts, grads + self._sizes)  # parameters that begin before the gradient ends
        shared = (ends[before - 1] > grads) & (before > 0) & (grads != 0)
        low = (begins < SUSPICIOUS_ADDRESS) | (grads < SUSPICIOUS_ADDRESS) & (grads != 0)
        found = (shared | low) & (self._sizes > 0)
        return [(int(i), bool(shared[i])) for i in np.flatnonzero(found)] if found.any() else []

    def step(
        self,
        tensors: np.ndarray,
        groups: np.ndarray,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        needs_norm: bool,
    ) -> None:
        """Runs the kernels, and counts the step as a change that torch.autograd notices."""
        total = self._sum_over_processes if self._sharded and needs_norm else None
        self.engine.step(tensors, groups, grad_scale, found_inf, total)
        # As torch's own operations do: backward refuses a tensor that it saved and that has changed since.
        torch.autograd.graph.increment_version([p for p in self.params if p.grad is not None and not p.is_inference()])

    def _sum_over_processes(self, sums: np.ndarray) -> float:
        return sum_over_processes(sums, self.engine.layout.chunks.view(np.int32)[:, 0], self.params)
