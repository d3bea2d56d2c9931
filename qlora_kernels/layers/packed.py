"""The module that holds one frozen 4-bit weight: how its tensors are registered, moved, copied and merged into."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from .. import ops
from ..formats.nf4 import PIECES, NF4Weight
from ..ops.weight import same_pieces

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class PackedLayer(nn.Module):
    """A layer on one frozen weight [out_features, in_features] in NF4.

    Bytes are frozen Parameters (``weight_packed``, ``weight_absmax``), which FSDP2 shards like any other; float32
    constants are buffers (``weight_nested_*``), which neither ``.half()`` nor a mixed-precision policy casts. While an
    adapter is merged, ``unmerged_*`` hold the base's original tensors and ``merged_adapter`` the adapter's name.
    """

    #: Whether the layer stands for transformers' Conv1D, whose weight is [in, out]; PEFT's files say so.
    fan_in_fan_out: bool = False

    in_features: int
    out_features: int
    bias: nn.Parameter | None
    weight_packed: nn.Parameter
    _shape: torch.Size
    _dtype: torch.dtype
    _merged: str | None

    def _set_up_weight(self, weight: NF4Weight, dtype: torch.dtype) -> None:
        """To be called once, after ``nn.Module.__init__``."""
        self.out_features, self.in_features = weight.shape
        self._shape = weight.shape
        self._dtype = dtype
        self._merged = None
        self._set_pieces("weight", weight)

    @property
    def weight(self) -> NF4Weight:
        """The frozen base [N, K]; while an adapter is merged, the base with it."""
        return NF4Weight(*self._pieces(), self._shape, self._dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the dense layer that this one stands for; ``.to(dtype)`` changes it, inputs may have any."""
        return self._dtype

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            if isinstance(value, NF4Weight) and same_pieces(value.pieces, self._pieces()):
                return  # its own, as PEFT assigns it when it unloads adapters
            raise AttributeError(
                "the weight of a QLinear is 4-bit and cannot be assigned; quantize a dense layer with "
                "QLinear.from_linear(linear)"
            )
        super().__setattr__(name, value)

    # ------------------------------------------------------------------------------------------------- its tensors

    def _pieces(self) -> ops.Pieces:
        # Read past nn.Module.__getattr__, whose searches would cost as much as the rest of a call.
        parameters: dict[str, Any] = self._parameters
        buffers: dict[str, Any] = self._buffers
        absmax = parameters.get("weight_absmax")
        return (
            parameters["weight_packed"],
            buffers["weight_absmax"] if absmax is None else absmax,
            buffers["weight_nested_absmax"],
            buffers["weight_nested_offset"],
            buffers["weight_nested_table"],
        )

    def _operand(self) -> ops.Operand:
        """The weight as the products take it, kept as long as its pieces are the same tensors."""
        pieces, kept = self._pieces(), self.__dict__.get("_kept_operand")
        if kept is not None and same_pieces(kept.pieces, pieces):
            return kept
        operand = ops.Operand(pieces, *self._shape)
        if not torch.compiler.is_compiling():
            self.__dict__["_kept_operand"] = operand
        return operand

    def _forget_operand(self) -> None:
        """Lets go of pieces that have been replaced."""
        self.__dict__.pop("_kept_operand", None)

    def _set_pieces(self, prefix: str, weight: NF4Weight | None) -> None:
        """Registers a weight's tensors under ``prefix``, or removes them."""
        self._forget_operand()
        for name in PIECES:
            attribute = f"{prefix}_{name}"
            self._parameters.pop(attribute, None)
            self._buffers.pop(attribute, None)
        if weight is None:
            return
        for name, piece in zip(PIECES, weight.pieces, strict=True):
            if piece is not None and piece.dtype == torch.uint8:
                self.register_parameter(f"{prefix}_{name}", nn.Parameter(piece, requires_grad=False))
            else:
                if name == "nested_table" and piece is not None:
                    piece = piece.clone()  # all weights share one, and safetensors refuses tensors that share memory
                self.register_buffer(f"{prefix}_{name}", piece)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLayer:
        """``.to``, ``.half``, ``.to_empty``, ``.share_memory`` and the like: packed data moves but is never cast."""
        frozen = {id(tensor): tensor for tensor in frozen_tensors(self)}  # the values keep the ids from being reused

        def apply(tensor: Tensor) -> Tensor:
            if id(tensor) not in frozen:
                return fn(tensor)
            # Casts leave integers alone, so fn sees bytes; .type(dtype) does not, so of that only the device counts.
            data = tensor if tensor.dtype == torch.uint8 else tensor.view(torch.uint8)
            moved = fn(data)
            return (moved if moved.dtype == torch.uint8 else data.to(moved.device)).view(tensor.dtype)

        dtype = fn(torch.empty(0, dtype=self._dtype, device=self.weight_packed.device)).dtype
        if dtype.is_complex:
            raise TypeError(f"a layer on a 4-bit weight is real and cannot be cast to {dtype}")
        cast(Any, super())._apply(apply, recurse)
        self._forget_operand()
        if dtype != self._dtype and dtype.is_floating_point:
            self._dtype = dtype
            self._dtype_has_changed()
        return self

    def _dtype_has_changed(self) -> None:
        """Called when a cast has given the layer another dtype."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_kept_operand"}

    # ------------------------------------------------------------------------------------------------- merged or not

    def _set_merged(self, name: str | None) -> None:
        """Records which adapter is merged: a name in Python, its UTF-8 bytes in the state dict."""
        self._merged = name
        self._buffers.pop("merged_adapter", None)
        if name is not None:
            code = torch.tensor(list(name.encode()), dtype=torch.uint8, device=self.weight_packed.device)
            self.register_buffer("merged_adapter", code)

    def _unmerged_weight(self) -> NF4Weight:
        """The base as it was before the merge."""
        pieces = {name: getattr(self, f"unmerged_{name}") for name in PIECES}
        return NF4Weight(**pieces, shape=self._shape, dtype=self._dtype)


def is_sharded(tensor: Any) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor, as FSDP2 makes of parameters. Before the module is imported none can be."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def frozen_tensors(layer: PackedLayer) -> list[Tensor]:
    """The tensors that no cast may touch: the pieces of the weight, and of the base while an adapter is merged."""
    names = {f"{prefix}_{name}" for prefix in ("weight", "unmerged") for name in PIECES} | {"merged_adapter"}
    own = (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))
    return [tensor for name, tensor in own if name in names]
