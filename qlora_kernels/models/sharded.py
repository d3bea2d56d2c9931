"""Models that FSDP2 has sharded: whole tensors from parts, parts of whole tensors, and one process that writes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..layers.packed import is_sharded

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def refuse_flat_parameters(model: nn.Module) -> None:
    """
    Raises:
        RuntimeError: for FullyShardedDataParallel, whose flat parameters hold no layer's matrices.
    """
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise RuntimeError(
            "the model is wrapped in FullyShardedDataParallel, whose flat parameters hold adapters in pieces; use "
            "fully_shard (FSDP2), or load and save adapters before wrapping"
        )


def reshard(model: nn.Module) -> None:
    """Brings back the sharded parameters: FSDP2 may leave whole ones in their place after a forward pass."""
    if "torch.distributed.fsdp" not in sys.modules:
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, without gradient. For a DTensor every process of its mesh has to call this."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def fill(parameter: Tensor, value: Tensor) -> None:
    """Copies all of a value, which every process has, into a parameter: of a DTensor this process's part."""
    with torch.no_grad():
        if is_sharded(parameter):
            from torch.distributed.tensor import distribute_tensor

            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter, value = parameter.to_local(), value.to_local()
        parameter.copy_(value)


def mesh_of(tensors: Iterable[Tensor]) -> DeviceMesh | None:
    """The mesh of the first DTensor, or None."""
    return next((tensor.device_mesh for tensor in tensors if is_sharded(tensor)), None)


def on_first_process(mesh: DeviceMesh | None, write: Callable[[], Any]) -> None:
    """Calls a function on the first process of a mesh; the others wait for it, and raise what it raised.

    Without a mesh this process calls it.
    """
    if mesh is None:
        write()
        return
    import torch.distributed as dist

    coordinate = mesh.get_coordinate()
    outcome: list[BaseException | None] = [None]
    if coordinate is not None and not any(coordinate):
        try:
            write()
        except BaseException as error:
            outcome[0] = error
    # From the first process along each dimension in turn: after the last one all have heard of it.
    for dimension in range(mesh.ndim):
        dist.broadcast_object_list(outcome, group=mesh.get_group(dimension), group_src=0)
    if outcome[0] is not None:
        raise outcome[0]
