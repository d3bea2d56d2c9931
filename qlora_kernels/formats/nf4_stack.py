"""A stack of NF4 weights of one shape, as a mixture's experts have them: each with blocks and constants of its own."""

# Users' arguments are checked whatever their annotations say.
# pyright: reportUnnecessaryIsInstance=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from .. import ops
from ..errors import require
from ..ops.weight import expert_pieces, same_pieces
from .nf4 import PIECES, NF4Weight, check_range, meta_weight, quantize


@dataclass(eq=False)
class NF4Stack:
    """The frozen weights [E, N, K] of E experts in 4-bit NormalFloat, every piece a plain tensor.

    Attributes:
        packed: uint8 [E, ceil(N*K/2)], two codes a byte, the first in the high nibble, row-major.
        absmax: uint8 [E, ceil(N*K/64)] codes into ``nested_table``, or float32 constants when not double-quantized.
        nested_absmax: float32 [E, ceil(blocks/256)], or None.
        nested_offset: float32 [E], the mean of each expert's constants, or None.
        nested_table: float32 [256], which all experts share, or None.
        shape: (E, N, K).
        dtype: the default type of :meth:`dequantize`.

    What belongs to one expert is what :func:`qlora_kernels.quantize` makes of its matrix, bit for bit.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    nested_table: Tensor | None
    shape: torch.Size
    dtype: torch.dtype = torch.float32

    @property
    def pieces(self) -> ops.Pieces:
        """The five tensors (None where there is no double quantization), as the operations take them."""
        return (self.packed, self.absmax, self.nested_absmax, self.nested_offset, self.nested_table)

    @property
    def double_quant(self) -> bool:
        return self.nested_absmax is not None

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def is_meta(self) -> bool:
        return self.packed.is_meta

    def numel(self) -> int:
        return self.shape.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and constants, without the 256-entry table."""
        parts = (self.packed, self.absmax, self.nested_absmax, self.nested_offset)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / max(self.numel(), 1)

    def operand(self) -> ops.Operand:
        """The stack as the products take it; the same one as long as the pieces are the same tensors."""
        kept = self.__dict__.get("_operand")
        if kept is not None and same_pieces(kept.pieces, self.pieces):
            return kept
        experts, n, k = self.shape
        operand = ops.Operand(self.pieces, n, k, experts)
        if not torch.compiler.is_compiling():
            self.__dict__["_operand"] = operand
        return operand

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_operand"}

    def expert(self, index: int) -> NF4Weight:
        """One expert's weight [N, K], on the stack's memory.

        Raises:
            IndexError: for an index outside [0, E).
        """
        experts, n, k = self.shape
        require(0 <= index < experts, IndexError, f"expert {index} of a stack of {experts}")
        return NF4Weight(*expert_pieces(self.pieces, experts, index), torch.Size((n, k)), self.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weights [E, N, K], each rounded as :meth:`NF4Weight.dequantize` rounds."""
        dtype = self.dtype if dtype is None else dtype
        return torch.stack([self.expert(e).dequantize(dtype) for e in range(self.shape[0])])

    def __repr__(self) -> str:
        return (
            f"NF4Stack(shape={tuple(self.shape)}, bits_per_weight={self.bits_per_weight:.3f}, "
            f"dtype={self.dtype}, device='{self.device}')"
        )


def quantize_stack(weights: Tensor, double_quant: bool = True, *, name: str = "weights") -> NF4Stack:
    """Quantizes a stack of weights to NF4, one after another, so that no copy of all of them is made.

    Args:
        weights: float32, bfloat16 or float16 [E, N, K], finite; may be a transposed view.
        double_quant: store the constants in 8 bits (4.127 bits per weight) rather than float32 (4.5).
        name: what to call the tensor in errors.

    Raises:
        TypeError, ValueError: as :func:`qlora_kernels.quantize`, and for a tensor that is not three-dimensional.
    """
    require(isinstance(weights, Tensor), TypeError, f"{name} should be a tensor, found {type(weights).__name__}")
    require(weights.dim() == 3, ValueError, f"{name} should be [experts, N, K], found shape {list(weights.shape)}")
    require(weights.numel() > 0, ValueError, f"{name} is empty: shape {list(weights.shape)}")
    experts, n, k = weights.shape
    if weights.is_meta:
        return meta_stack(experts, n, k, double_quant, weights.dtype)
    stack: list[Tensor | None] = []
    for e in range(experts):
        one = quantize(weights[e], double_quant, name=f"{name}[{e}]")
        check_range(one, f"{name}[{e}]")
        if e == 0:
            stack = [_room(piece, experts, key) for key, piece in zip(PIECES, one.pieces, strict=True)]
        for key, room, piece in zip(PIECES, stack, one.pieces, strict=True):
            if room is not None and piece is not None and key != "nested_table":
                room.view(experts, -1)[e].copy_(piece)
    return NF4Stack(*cast(ops.Pieces, tuple(stack)), weights.shape, weights.dtype)


def _room(piece: Tensor | None, experts: int, key: str) -> Tensor | None:
    """A stack's tensor for one expert's piece."""
    if piece is None or key == "nested_table":
        return piece
    return piece.new_empty((experts,) if key == "nested_offset" else (experts, piece.numel()))


def meta_stack(experts: int, n: int, k: int, double_quant: bool, dtype: torch.dtype = torch.float32) -> NF4Stack:
    """The shapes of a quantized stack [experts, n, k], on the meta device."""
    pieces = meta_weight(n, k, double_quant).pieces
    stack = tuple(_room(piece, experts, key) for key, piece in zip(PIECES, pieces, strict=True))
    return NF4Stack(*cast(ops.Pieces, stack), torch.Size((experts, n, k)), dtype)
