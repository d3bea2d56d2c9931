"""Sharded parameters (DTensors, such as FSDP2's): the part that this process holds, and sums over all processes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from ..errors import require

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def _dtensor_type() -> type[DTensor] | None:
    """DTensor if it was imported already. Before that no tensor can be one, and the import is slow."""
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else module.DTensor


def is_shard(tensor: Any) -> TypeGuard[DTensor]:
    kind = _dtensor_type()
    return kind is not None and isinstance(tensor, kind)


def local_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, sharing its memory. For an ordinary tensor that is all of it."""
    if not is_shard(tensor):
        return tensor
    with torch.no_grad():
        local = tensor.to_local()
        wait = getattr(local, "wait", None)  # a collective may still be filling it
        return local if wait is None else wait()


def local_address(tensor: Tensor) -> int:
    """The address of a tensor's elements in this process."""
    return local_part(tensor).data_ptr()


def local_gradient(grad: Tensor, p: DTensor, index: int) -> tuple[Tensor, list[Tensor]]:
    """This process's part of a DTensor's gradient, placed as the parameter is, and copies to keep until the step.

    Raises:
        RuntimeError: for a gradient of another kind, mesh or shape.
    """
    if not (is_shard(grad) and grad.device_mesh == p.device_mesh and grad.shape == p.shape):
        raise RuntimeError(
            f"the gradient of parameter {index} should be a DTensor of shape {list(p.shape)} on {p.device_mesh}, as "
            f"the parameter is, found {type(grad).__name__} of shape {list(grad.shape)}"
        )
    if grad.placements == p.placements:
        return local_part(grad), []
    moved = local_part(grad.redistribute(placements=p.placements))
    return moved, [moved]


def check_placements(p: DTensor, what: str) -> None:
    """Raises a TypeError if processes hold terms of a DTensor's sum (Partial) instead of its elements."""
    require(
        not any(placement.is_partial() for placement in p.placements),
        TypeError,
        f"{what} is placed as {list(p.placements)}; only sharded or replicated parameters can be optimized",
    )


def as_dtensor(local: Tensor, like: DTensor) -> Tensor:
    """A DTensor placed as ``like``, over the memory of this process's part. Nothing is sent."""
    return _dtensor_over(local, like.device_mesh, like.placements, like)


def _dtensor_over(local: Tensor, mesh: Any, placements: tuple, like: Tensor) -> DTensor:
    """Built as FSDP2 builds its own: DTensor.from_local would copy an offloaded shard to the mesh's device."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    spec = DTensorSpec(mesh, placements, tensor_meta=TensorMeta(like.shape, like.stride(), local.dtype))
    return DTensor(local, spec, requires_grad=False)


def local_part_as(value: Tensor, like: DTensor) -> Tensor:
    """This process's part of ``value``, placed as ``like``.

    ``value`` is a DTensor on the same mesh, or an ordinary tensor that is whole in each process.
    """
    value = value.detach()
    if not is_shard(value):
        from torch.distributed.tensor import Replicate

        whole, mesh = value.to(local_part(like).device), like.device_mesh
        value = _dtensor_over(whole, mesh, (Replicate(),) * mesh.ndim, whole)
    return local_part(value.redistribute(placements=like.placements))


def sum_over_processes(sums: np.ndarray, owners: np.ndarray, params: Sequence[Tensor]) -> float:
    """The sum over the chunks of all processes, in which every shard counts once.

    All processes get the same bits, because they add in the order of their ranks. Ordinary parameters and replicas
    hold the same values everywhere, and count once.

    Args:
        sums: float64 [chunks] of this process.
        owners: int [chunks], each chunk's parameter, as an index into ``params``.
        params: the parameters, in the same order in all processes.
    """
    cuts = [_sharded_over(p) for p in params]
    total = 0.0
    for cut in dict.fromkeys(cuts):
        mine = sums[np.array([c == cut for c in cuts])[owners]]
        value = float(np.cumsum(mine)[-1]) if len(mine) else 0.0  # one after the other, as the kernels add
        mesh, dimensions = cut
        for dimension in dimensions:
            group = mesh.get_group(dimension)
            world = torch.distributed.get_world_size(group)
            gathered = torch.zeros(world, dtype=torch.float64, device=mesh.device_type)
            torch.distributed.all_gather(list(gathered.split(1)), torch.full_like(gathered[:1], value), group=group)
            value = sum(gathered.tolist())
        total += value
    return total


def _sharded_over(p: Tensor) -> tuple:
    """A parameter's mesh, and the dimensions of the mesh that cut it."""
    if not is_shard(p):
        return None, ()
    # FSDP2 over tensor parallelism uses a placement of its own, _StridedShard, whose is_shard() is False.
    return p.device_mesh, tuple(i for i, placement in enumerate(p.placements) if not placement.is_replicate())
