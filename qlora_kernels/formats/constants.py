"""The constants of a 4-bit weight: whether they can be decoded."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..ops import dispatcher
from ..ops.backends import reference


def check_constants(pieces: Mapping[str, Tensor | None]) -> None:
    """Checks that the constants of a weight are finite; of its codes, the 4-bit ones are not read.

    Args:
        pieces: the weight's, in the order of the operations, by the names to use in errors. Without data, as on the
            meta device, nothing is checked.

    Raises:
        ValueError: naming the piece.
    """
    tensors = [piece for piece in pieces.values() if piece is not None]
    if not all(map(_has_data, tensors)):
        return
    largest: list[float] = []
    for name, piece in pieces.items():
        if piece is None or not piece.is_floating_point() or not piece.numel():
            continue
        largest.append(torch.stack(torch.aminmax(piece.detach())).abs().max().item())
        if not math.isfinite(largest[-1]):
            raise ValueError(f"'{name}' holds NaN or infinity; the constants of a 4-bit weight are finite")
        if (
            name.endswith("nested_table")
            and piece.numel() in (16, 272)
            and piece.detach().flatten()[-16:].abs().max() > 1
        ):
            raise ValueError(f"the levels of a weight, the last 16 entries of '{name}', should be from -1 to 1")
    if len(tensors) < 5:  # no double quantization
        return
    scale, offset, entry = largest
    # No constant exceeds this sum; which of them come near it, only the codes say.
    if scale * entry + offset <= torch.finfo(torch.float32).max:
        return
    packed, absmax, nested_absmax, nested_offset, nested_table = tensors
    if nested_offset.numel() > 1:  # a stack's: no sum may overflow, whatever the codes say
        raise ValueError(f"'{list(pieces)[2]}' holds {scale:.5g}, with which constants may overflow float32")
    decoded = reference.decode_absmax((packed, absmax, nested_absmax, nested_offset, nested_table))
    if not decoded.isfinite().all():
        raise ValueError(f"'{list(pieces)[2]}' holds {scale:.5g}, with which the weight's constants overflow float32")


def _has_data(tensor: Tensor) -> bool:
    # Subclasses are DTensors, whose values lie elsewhere too, and the tensors of tracers, which have none.
    return type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta and not dispatcher.has_mode()
