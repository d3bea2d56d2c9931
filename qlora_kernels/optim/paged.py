"""What PagedAdamW and PagedLion have in common: groups, the arena, the step."""

from __future__ import annotations

import math
import operator
import os
import sys
from collections.abc import Callable, Mapping
from itertools import chain
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import require
from ..native import extension
from .arena.layout import MASTER, STATE_BLOCK, Layout, Slot
from .checks import LR_ROUNDING, bad_gradient, check_entry, check_parameter, no_memory_of_its_own, require_number
from .convert import convert, form, own_entry, same_tensors
from .engines import choose, contract
from .shards import address, is_shard, part, part_of_gradient, shared, summed
from .state_dict import Saving

_NAMES = {"step", "master"} | {f"exp_avg{sq}{form}" for sq in ("", "_sq") for form in ("", "_code", "_absmax")}


class Paged(Saving):
    """What PagedAdamW and PagedLion have in common."""

    _algorithm: int
    #: The states' names in torch.optim, and the planes of the arena that hold them: of 32 bits, and the constants of 8.
    _moments: tuple[tuple[str, int, int], ...]

    def __init__(
        self, params, defaults, *, state_bits, max_grad_norm, page_budget, master_weights, skip_nonfinite, page_file
    ):
        good = isinstance(state_bits, Integral) and state_bits in (32, 8)
        require(good, ValueError, f"state_bits should be 32 or 8, found {state_bits!r}")
        if max_grad_norm is not None:
            require_number("max_grad_norm", max_grad_norm, lambda x: x > 0, "above 0")
        if page_budget is not None:
            good = isinstance(page_budget, Integral) and not isinstance(page_budget, bool) and page_budget > 0
            require(good, ValueError, f"page_budget should be a number of bytes above 0, found {page_budget!r}")
        for name, value in (("master_weights", master_weights), ("skip_nonfinite", skip_nonfinite)):
            good = isinstance(value, (bool, np.bool_))
            require(good, TypeError, f"{name} should be True or False, found {value!r}")
        if page_file is not None:
            require(bool(os.fspath(page_file)), ValueError, "page_file should be a folder; '' names none")
            page_file = folder = os.path.abspath(os.fspath(page_file))
            require(os.path.isdir(folder), NotADirectoryError, f"page_file should be a folder; {folder} is none")
        self._settings = {
            "state_bits": int(state_bits),
            "max_grad_norm": None if max_grad_norm is None else float(max_grad_norm),
            "page_budget": None if page_budget is None else int(page_budget),
            "master_weights": bool(master_weights),
            "skip_nonfinite": bool(skip_nonfinite),
            "page_file": page_file,
        }
        self._forget()
        self._control = (0.0, 0)  # norm and skipped steps from before there was an arena
        super().__init__(params, defaults)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """torch.amp.GradScaler then leaves the division to the step, which reads scale and infinities on the device.

        Others who ask (Lightning) take it as a refusal to clip gradients, and divide them before the scaler does where
        it is not so. The step does either.
        """
        return sys._getframe(1).f_globals.get("__name__") == torch.amp.grad_scaler.__name__

    def _forget(self) -> None:
        """As if there had never been an arena."""
        self._engine: contract.Engine | None = None
        self._params: list[Tensor] = []  # of the arena, in its order
        self._frozen: list[Tensor] = []  # the others
        self._sharded = False  # whether any of them is a DTensor
        self._seen: list[tuple] = []  # address, and form, of each of _params
        self._groups: list[list[Tensor]] = []  # parameters of each group, when the arena was made
        self._own: list[dict[str, Tensor]] = []  # the states of each of _params, and those with a master
        self._masters: list[dict[str, Tensor]] = []
        self._tensors: list[Tensor] = []  # all of these, and their addresses
        self._places: list[int] = []

    # ------------------------------------------------------------------------------------------------ parameters

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as torch.optim does; the arena, where there is one already, grows.

        Raises:
            ValueError: for a setting out of range, a parameter that is in another group, or one of another device.
            TypeError: for parameters that are complex, sparse or of a dtype without kernels.
            MemoryError: when there is no memory for the larger arena; then nothing has changed.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            seen = [p for g in self.param_groups for p in g["params"] if p.requires_grad]
            devices = sorted({str(p.device) for p in seen})
            require(
                len(devices) <= 1,
                ValueError,
                f"all parameters should be on one device, found {', '.join(devices)}; use an optimizer for each device",
            )
            if self._engine is not None:
                self._build()
        except BaseException:
            self.param_groups.pop()
            raise

    def _check_settings(self, group: Mapping[str, Any], where: str = "") -> None:
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
            require(not group.get(name), ValueError, f"{name}=True{where} is not supported by {type(self).__name__}")

    def _check_group(self, group: Mapping[str, Any]) -> None:
        self._check_settings(group)
        twice = len(set(group["params"])) < len(group["params"])
        require(not twice, ValueError, "a parameter is more than once in the group")
        for i, p in enumerate(group["params"]):
            if p.requires_grad:
                self._check_parameter(p, f"parameter {i} of the group")

    def _check_parameter(self, p: Tensor, what: str) -> None:
        check_parameter(p, what)
        if is_shard(p) and self._measures:
            choose.refuse_sums_of_shards(p)

    @property
    def _measures(self) -> bool:
        return bool(self._settings["max_grad_norm"] or self._settings["skip_nonfinite"])

    # ----------------------------------------------------------------------------------------------------- arena

    def _build(self, loading: Mapping[Tensor, Any] | None = None) -> None:
        """Makes the arena for the parameters as they are, takes the states over, and lets go of the old one.

        What has states, or is about to have, keeps its place while it is frozen. Instead of the states that there are,
        those of ``loading`` are taken where it is given.
        """
        if loading is None:
            self._require_whole()
        taken = self.state if loading is None else loading
        params, groups, frozen = [], [], []
        for index, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.requires_grad or p.grad is not None or self.state.get(p) or (loading and p in loading):
                    params.append(p)
                    groups.append(index)
                else:
                    frozen.append(p)
        require(bool(params), ValueError, "no parameter of the optimizer requires a gradient")
        for i, p in enumerate(params):
            self._check_parameter(p, f"parameter {i}")
        devices = sorted({str(p.device) for p in params})
        require(len(devices) == 1, ValueError, f"all parameters should be on one device, found {', '.join(devices)}")
        require(
            params[0].device.type in ("cpu", "cuda"),
            RuntimeError,
            f"parameters on {devices[0]} cannot be optimized; move the model to the CPU or to a CUDA device first",
        )
        choose.refuse_in_capture(params[0])
        who = type(self).__name__
        for i, p in enumerate(params):
            if part(p).numel() and not address(p):
                raise no_memory_of_its_own(f"parameter {i}", p)
            if loading is None and self.state.get(p):
                check_entry(self.state[p], self._moments, p, f"parameter {i}", who)
        planes = [self._planes_of(p) for p in params]
        slots = [Slot(part(p).numel(), g, extension.code_of(p.dtype), n) for p, g, n in zip(params, groups, planes)]
        layout = Layout(slots, self._settings["state_bits"])
        engine = choose.of(params[0], layout, self._algorithm, self._settings)
        engine.set_found(*self._found())
        if self._engine is not None:
            self._engine.arena.synchronize()
        self._fill(engine, params, taken)
        states = {p: self._exposed(self._views(engine.arena.view, layout, i, p), p) for i, p in enumerate(params)}
        masters = [views for views in states.values() if "master" in views]
        tensors = [views[key] for views in states.values() for key in self._keys()]
        tensors += [views["master"] for views in masters]
        for p, views in states.items():
            views.update({k: v for k, v in self.state.get(p, {}).items() if k not in _NAMES})  # somebody else's
        others = {p: entry for p, entry in self.state.items() if p not in states}
        self.state.clear()
        self.state.update(states)
        self.state.update(others)
        self._params, self._frozen, self._sharded = params, frozen, any(map(is_shard, params))
        self._seen = [(address(p), *form(part(p))) for p in params]
        self._groups = [list(group["params"]) for group in self.param_groups]
        self._own, self._masters = list(states.values()), masters
        self._tensors, self._places = tensors, [address(t) for t in tensors]
        self._engine = engine

    def _fill(self, engine: contract.Engine, params: list[Tensor], states: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """Fills an arena from states of any form, by the host: no page has to come to the device for it."""
        engine.arena.to_host()
        engine.broken = "a load"  # until it is done
        with torch.no_grad():
            for i, p in enumerate(params):
                views = self._views(engine.arena.host_view, engine.layout, i, p)
                convert(own_entry(states.get(p) or {}, p), views, part(p))
        engine.broken = ""

    def _keys(self) -> list[str]:
        """What every parameter has in its state."""
        forms = ("",) if self._settings["state_bits"] == 32 else ("_code", "_absmax")
        return ["step"] + [name + form for name, _, _ in self._moments for form in forms]

    def _planes_of(self, p: Tensor) -> tuple[int, ...]:
        narrow = self._settings["state_bits"] == 8
        planes = [plane for _, plane, _ in self._moments]
        planes += [absmax for _, _, absmax in self._moments] if narrow else []
        planes += [MASTER] if self._settings["master_weights"] and p.dtype != torch.float32 else []
        return tuple(planes)

    def _views(self, at: Callable[..., Tensor], layout: Layout, index: int, p: Tensor) -> dict[str, Tensor]:
        """The states of a parameter: tensors that lie in the arena, of the shape of what this process has of it."""
        p = part(p)

        def view(plane: int, dtype: torch.dtype, count: int) -> Tensor:
            return at(int(layout.planes[index, plane]), count, dtype)

        def shaped(flat: Tensor) -> Tensor:
            # A dense parameter's elements, in the order in which they lie in memory.
            return flat.as_strided(p.shape, p.stride()) if p.numel() else flat.view(p.shape)

        count = p.numel()
        views = {"step": at(layout.steps + 4 * index, 1, torch.float32)[0]}
        for name, plane, absmax in self._moments:
            if self._settings["state_bits"] == 32:
                views[name] = shaped(view(plane, torch.float32, count))
            else:
                views[f"{name}_code"] = shaped(view(plane, torch.uint8, count))
                views[f"{name}_absmax"] = view(absmax, torch.float32, -(-count // STATE_BLOCK))
        if MASTER in self._planes_of(p):
            views["master"] = shaped(view(MASTER, torch.float32, count))
        return views

    def _exposed(self, views: dict[str, Tensor], p: Tensor) -> dict[str, Tensor]:
        """What others see of them: of a shard, DTensors. 8-bit codes stay as they are: their blocks are no whole's."""
        if not is_shard(p):
            return views
        names = {"master", *(name for name, _, _ in self._moments)}
        return {key: shared(view, p) if key in names else view for key, view in views.items()}

    def _require_whole(self) -> None:
        """Refuses to go on with states of which some are a step ahead of the others."""
        if self._engine is not None and self._engine.broken:
            raise RuntimeError(
                f"{self._engine.broken} failed midway, and some states have changed and some have not: load a saved "
                "state dict, or make a new optimizer"
            )

    def _found(self) -> tuple[float, int]:
        return self._control if self._engine is None else self._engine.found()

    # ------------------------------------------------------------------------------------------------------ step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step for every parameter that has a gradient.

        On a CUDA device nothing waits for the device; the work goes to the current stream. Gradients are read, never
        changed. Inside a CUDA graph's capture the step has to have run once before, with everything on the device. Only
        a learning rate that is a tensor on the device has to be read from there: a number is better.

        Where parameters are shards all processes take the step together, with gradients for the same parameters: each
        works on its own shards, and clipping and skipping go by the gradients of all.

        Args:
            closure: computes the loss again and returns it.

        Returns:
            What the closure returns, or None.

        Raises:
            RuntimeError: for a sparse gradient, or one of another dtype, shape or device than its parameter; nothing
                has changed then.
            ValueError: for a setting of a group that is out of range or no finite number; nothing has changed then. And
                when a parameter's shape is no longer its states'.
            MemoryError: when there is no memory for the states, at the first step.

        Where a step goes through the states stretch by stretch, an error of the device may come between two of them.
        A further step, paging, and whatever saves or copies the states then raise a RuntimeError, until load_state_dict
        or load has replaced them.
        """
        try:
            return self._step(closure)
        except BaseException:
            # torch.amp.GradScaler takes them back where a step returns, and multiplies by what is left of the last one.
            for name in ("grad_scale", "found_inf"):
                self.__dict__.pop(name, None)
            raise

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        self._require_whole()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = None if self._stale() else self._addresses()
        if found is None:
            if all(p.grad is None for group in self.param_groups for p in group["params"]):
                return loss
        elif not found[0][1::2].any():
            return loss
        settings = self._hyperparameters()
        if found is None:
            self._build()
            found = self._addresses()
        addresses, keep = found
        self._engine.step(
            addresses,
            settings,
            getattr(self, "grad_scale", None),
            getattr(self, "found_inf", None),
            *([self._total] if self._sharded and self._measures else []),
        )
        # What torch's own operations do: backward then refuses a tensor that it saved and that has changed since.
        torch.autograd.graph.increment_version([p for p in self._params if p.grad is not None and not p.is_inference()])
        del keep  # copies of gradients: their memory may be used again behind the step
        return loss

    def _stale(self) -> bool:
        """Whether there is no arena, or one for other parameters or states than there are now.

        It lacks those which were frozen when it was made; and groups and ``state`` are anybody's to write to.
        """
        if self._engine is None or self._engine.foreign or len(self.param_groups) != len(self._groups):
            return True
        get, master = operator.itemgetter(*self._keys()), operator.itemgetter("master")
        try:
            same = (
                all(same_tensors(group["params"], params) for group, params in zip(self.param_groups, self._groups))
                and len(self.state) >= len(self._own)
                and all(map(operator.is_, self.state.values(), self._own))
                and all(map(operator.is_, chain(*map(get, self._own), map(master, self._masters)), self._tensors))
                and list(map(address if self._sharded else Tensor.data_ptr, self._tensors))
                == self._places  # t.data = …
            )
        except KeyError:
            return True
        return not same or any(p.grad is not None for p in self._frozen)

    def _moved(self) -> bool:
        """Whether a parameter has another dtype, shape, order in memory or device than when the arena was made."""
        mine = map(part, self._params)
        return any(form(p) != seen[1:] or p.device != self._engine.device for p, seen in zip(mine, self._seen))

    def _addresses(self) -> tuple[np.ndarray, list[Tensor]] | None:
        """OptimizerTensor[tensors]: where parameters and gradients lie, and copies of gradients that lay otherwise.

        None when a parameter has another dtype, shape, order in memory or device than when the arena was made.
        """
        addresses: list[int] = []
        copies = []
        strided, on_cuda = torch.strided, self._engine.device.type == "cuda"
        for i, (whole, (at, count, dtype, shape, strides)) in enumerate(zip(self._params, self._seen)):
            p = part(whole) if self._sharded else whole
            here = p.data_ptr()
            if here != at or p.numel() != count or p.stride() != strides or p.dtype is not dtype:
                if form(p) != self._seen[i][1:] or p.device != self._engine.device:
                    return None
                self._seen[i] = (here, count, dtype, shape, strides)
            grad = whole.grad
            if grad is None:
                addresses += (here, 0)
                continue
            if p is not whole:
                grad, sent = part_of_gradient(grad, whole, i)
                copies += sent
            good = grad.dtype is dtype and grad.layout is strided and grad.is_cuda == on_cuda and grad.shape == shape
            if not good or grad.stride() != strides or grad.is_neg():
                if form(p) != self._seen[i][1:]:  # another parameter where the last one lay
                    return None
                if not good:
                    raise bad_gradient(i, p, grad)
                grad = torch.empty_like(p, memory_format=torch.preserve_format).copy_(grad)
                copies.append(grad)
            there = grad.data_ptr()
            if count and not (here and there):
                raise no_memory_of_its_own(f"parameter {i} or its gradient", p if not here else grad)
            addresses += (here, there or 1)  # of an empty one the address is 0, which means none
        return np.array(addresses, dtype=np.int64), copies

    def _hyperparameters(self) -> np.ndarray:
        """OptimizerGroup[groups], checked: what is put into a group between steps nobody else looks at."""
        rows = []
        for i, g in enumerate(self.param_groups):
            try:
                (beta1, beta2), lr = map(float, g["betas"]), float(g["lr"])
                eps, decay = float(g.get("eps", 0.0)), float(g["weight_decay"])
                good = -LR_ROUNDING <= lr < math.inf and 0 <= beta1 < 1 and 0 <= beta2 < 1
                good = good and 0 <= eps < math.inf and 0 <= decay < math.inf
            except (TypeError, ValueError, RuntimeError):  # no number, or several
                good = False
            if not good or g.get("amsgrad") or g.get("maximize"):
                self._check_settings(g, f" of group {i}")
            rows.append((max(lr, 0.0), beta1, beta2, eps, decay, 0.0))
        return np.array(rows, dtype=np.float64)

    def _total(self, sums: np.ndarray) -> float:
        return summed(sums, self._engine.layout.chunks.view(np.int32)[:, 0], self._params)

    def refresh(self) -> None:
        """Gives the groups' settings, such as a scheduler's lr, to CUDA graphs that have captured a step.

        Waits for the device where they have changed: a replay under way goes by the old ones.
        """
        if self._engine is not None:
            self._engine.refresh(self._hyperparameters())

    # ---------------------------------------------------------------------------------------------- what it knows

    @property
    def skipped_steps(self) -> int:
        """Steps left out because of gradients that were not finite. Waits for the device."""
        return self._found()[1]

    @property
    def grad_norm(self) -> float:
        """The norm of all gradients in the last step, before clipping; needs max_grad_norm or skip_nonfinite.

        Waits for the device.
        """
        return self._found()[0]

    def page_out(self) -> None:
        """Sends the states to the host (a CUDA device), or to the file (``page_file``)."""
        self._require_whole()
        if self._engine is not None:
            self._engine.page_out()

    def page_in(self) -> None:
        """Asks for the states to come in the background: to the device those that stay there, or all from the file."""
        self._require_whole()
        if self._engine is not None:
            self._engine.page_in()

    def resident_bytes(self) -> int:
        """Bytes of the arena on the device, as far as was asked for; with ``page_file``, bytes in memory."""
        return 0 if self._engine is None else self._engine.resident_bytes()

    @property
    def arena_bytes(self) -> int:
        """Bytes of the arena; 0 before the first step."""
        return 0 if self._engine is None else self._engine.layout.nbytes

    @property
    def paging(self) -> str:
        """How states are paged here, for people."""
        return "not yet: the arena is made at the first step" if self._engine is None else self._engine.arena.kind
