"""Which states a parameter has, by name, and where they lie in the arena."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .arena.layout import MASTER, STATE_BLOCK, Layout
from .shards import as_dtensor, is_shard, local_part

#: All names that a state of a paged optimizer can have. Anything else in ``optimizer.state`` belongs to someone else.
STATE_NAMES = {"step", "master"} | {f"exp_avg{sq}{suffix}" for sq in ("", "_sq") for suffix in ("", "_code", "_absmax")}


@dataclass(frozen=True)
class Moment:
    """A running mean that an algorithm keeps for each element.

    Attributes:
        name: its name in torch.optim.
        plane: the arena's plane for its values, of 32 or of 8 bits.
        absmax_plane: the plane for the constants of its 8-bit blocks.
    """

    name: str
    plane: int
    absmax_plane: int


@dataclass(frozen=True)
class Algorithm:
    """What the kernels compute.

    Attributes:
        code: its number in csrc/optimizer.h.
        moments: what it keeps.
    """

    code: int
    moments: tuple[Moment, ...]


@dataclass(frozen=True)
class StateSchema:
    """The states of each parameter under given options."""

    moments: tuple[Moment, ...]
    state_bits: int
    master_weights: bool

    @property
    def common_names(self) -> list[str]:
        """The states that every parameter has; some have a master copy besides."""
        suffixes = ("",) if self.state_bits == 32 else ("_code", "_absmax")
        return ["step"] + [moment.name + suffix for moment in self.moments for suffix in suffixes]

    def has_master(self, p: Tensor) -> bool:
        return self.master_weights and p.dtype != torch.float32

    def planes(self, p: Tensor) -> tuple[int, ...]:
        """The arena's planes for a parameter."""
        planes = [moment.plane for moment in self.moments]
        planes += [moment.absmax_plane for moment in self.moments] if self.state_bits == 8 else []
        planes += [MASTER] if self.has_master(p) else []
        return tuple(planes)

    def views(self, view_at: Callable[..., Tensor], layout: Layout, index: int, p: Tensor) -> dict[str, Tensor]:
        """The states of parameter ``index`` as tensors over the arena, shaped like this process's part of it.

        Args:
            view_at: an arena's view or host_view.
        """
        p = local_part(p)
        count = p.numel()

        def flat(plane: int, dtype: torch.dtype, count: int) -> Tensor:
            return view_at(int(layout.planes[index, plane]), count, dtype)

        def shaped(plane: int, dtype: torch.dtype) -> Tensor:
            # A plane holds the elements in the order in which the parameter's lie in memory.
            values = flat(plane, dtype, count)
            return values.as_strided(p.shape, p.stride()) if count else values.view(p.shape)

        views = {"step": view_at(layout.steps + 4 * index, 1, torch.float32)[0]}
        for moment in self.moments:
            if self.state_bits == 32:
                views[moment.name] = shaped(moment.plane, torch.float32)
            else:
                views[f"{moment.name}_code"] = shaped(moment.plane, torch.uint8)
                blocks = -(-count // STATE_BLOCK)
                views[f"{moment.name}_absmax"] = flat(moment.absmax_plane, torch.float32, blocks)
        if self.has_master(p):
            views["master"] = shaped(MASTER, torch.float32)
        return views

    def exposed(self, views: dict[str, Tensor], p: Tensor) -> dict[str, Tensor]:
        """The views as users see them: for a shard, DTensors.

        8-bit codes stay ordinary tensors, because a shard's blocks are not blocks of the whole.
        """
        if not is_shard(p):
            return views
        names = {"master", *(moment.name for moment in self.moments)}
        return {key: as_dtensor(view, p) if key in names else view for key, view in views.items()}
