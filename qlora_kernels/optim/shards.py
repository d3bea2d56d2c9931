"""Parameters that are shards, FSDP2's DTensors: a process's part of them, and sums over all processes' parts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import require


def _dtensor() -> type | None:
    """DTensor where somebody has imported it: nobody has one before, and the import takes long."""
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else module.DTensor


def is_shard(tensor: Any) -> bool:
    kind = _dtensor()
    return kind is not None and isinstance(tensor, kind)


def part(tensor: Tensor) -> Tensor:
    """What this process has of a tensor, in the same memory; of an ordinary one everything."""
    if not is_shard(tensor):
        return tensor
    with torch.no_grad():
        own = tensor.to_local()
        return own.wait() if hasattr(own, "wait") else own  # of a collective that is under way


def address(tensor: Tensor) -> int:
    """Where a tensor's elements lie, or this process's of them."""
    return part(tensor).data_ptr()


def part_of_gradient(grad: Tensor, p: Tensor, index: int) -> tuple[Tensor, list[Tensor]]:
    """What this process has of a DTensor's gradient, placed as the parameter is; and what has to be kept for it.

    Raises:
        RuntimeError: for a gradient of another kind, mesh or shape.
    """
    good = is_shard(grad) and grad.device_mesh == p.device_mesh and grad.shape == p.shape
    require(
        good,
        RuntimeError,
        f"the gradient of parameter {index}, a DTensor of shape {list(p.shape)}, should be one of that shape on "
        f"{p.device_mesh}, found {type(grad).__name__} of shape {list(grad.shape)}",
    )
    if grad.placements == p.placements:
        return part(grad), []
    own = part(grad.redistribute(placements=p.placements))
    return own, [own]


def check_placements(p: Tensor, what: str) -> None:
    """Whether each process has elements of a DTensor, and not terms of a sum.

    Raises:
        TypeError: when it is otherwise.
    """
    require(
        not any(placement.is_partial() for placement in p.placements),
        TypeError,
        f"{what} is placed as {list(p.placements)}; only parameters that are sharded or replicated can be optimized",
    )


def shared(own: Tensor, like: Tensor) -> Tensor:
    """A DTensor placed as ``like``, of this process's part, whose memory it shares; nothing is sent."""
    return _made(own, like.device_mesh, like.placements, like)


def _made(own: Tensor, mesh: Any, placements: tuple, like: Tensor) -> Tensor:
    """As FSDP2 makes its own: DTensor.from_local would take what is offloaded to the mesh's device, a copy."""
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    spec = DTensorSpec(mesh, placements, tensor_meta=TensorMeta(like.shape, like.stride(), own.dtype))
    return _dtensor()(own, spec, requires_grad=False)


def placed(value: Tensor, like: Tensor) -> Tensor:
    """This process's part, placed as ``like``, of a DTensor on the same mesh or of what is whole in each process."""
    if not is_shard(value):
        from torch.distributed.tensor import Replicate

        there, mesh = value.detach().to(part(like).device), like.device_mesh
        value = _made(there, mesh, (Replicate(),) * mesh.ndim, there)
    return part(value.detach().redistribute(placements=like.placements))


def summed(sums: np.ndarray, owners: np.ndarray, params: Sequence[Tensor]) -> float:
    """The sum over all processes of what each has found, every shard counted once.

    The bits are the same in all of them: processes are added up in the order of their ranks, whatever a collective
    would do. Ordinary parameters, and replicas, are the same in all processes.

    Args:
        sums: float64 [chunks], this process's.
        owners: int [chunks], the index of each one's parameter.
        params: the parameters. All processes have the same ones, in one order.
    """
    kinds = [_sharded_over(p) for p in params]
    total = 0.0
    for kind in dict.fromkeys(kinds):
        mine = sums[np.array([k == kind for k in kinds])[owners]]
        value = float(np.cumsum(mine)[-1]) if len(mine) else 0.0  # one after the other, as the kernels add
        mesh, dimensions = kind
        for dimension in dimensions:
            group = mesh.get_group(dimension)
            every = torch.zeros(torch.distributed.get_world_size(group), dtype=torch.float64, device=mesh.device_type)
            torch.distributed.all_gather(list(every.split(1)), torch.full_like(every[:1], value), group=group)
            value = sum(every.tolist())
        total += value
    return total


def _sharded_over(p: Tensor) -> tuple:
    """A parameter's mesh, and those dimensions of it over which it is cut."""
    if not is_shard(p):
        return None, ()
    # The shards of FSDP2 over those of tensor parallelism are of a kind of their own, of which is_shard() is not so.
    return p.device_mesh, tuple(i for i, placement in enumerate(p.placements) if not placement.is_replicate())
