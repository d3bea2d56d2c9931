"""A quantized weight as the operations take it: its five pieces, checked against each other."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import require
from . import backends

#: packed, absmax, nested_absmax, nested_offset and nested_table; the last three None without double quantization.
Pieces = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def _blocks(n: int, k: int) -> int:
    return (n * k + 63) // 64


def check_weight(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    nested_table: Tensor | None,
    n: int,
    k: int,
) -> None:
    """Checks the pieces of a quantized weight [n, k] against each other.

    Raises:
        TypeError: when a piece has another dtype than the format's.
        ValueError: when a piece has another size, is on another device, is not contiguous, or is missing.
        RuntimeError: when a piece asks for a gradient.
    """
    if not _weight_fits(packed, absmax, nested_absmax, nested_offset, nested_table, n, k):
        _explain_weight(packed, absmax, nested_absmax, nested_offset, nested_table, n, k)


def _weight_fits(packed, absmax, nested_absmax, nested_offset, nested_table, n, k) -> bool:
    """Whether all is well; on every call, so it builds no messages."""
    blocks = _blocks(n, k)
    device = packed.device
    if not (
        n > 0
        and k > 0
        and packed.dtype is torch.uint8
        and packed.numel() == (n * k + 1) // 2
        and packed.is_contiguous()
        and absmax.numel() == blocks
        and absmax.device == device
        and absmax.is_contiguous()
        and not absmax.requires_grad
    ):
        return False
    if nested_absmax is None or nested_offset is None or nested_table is None:
        return nested_absmax is nested_offset is nested_table is None and absmax.dtype is torch.float32
    return (
        absmax.dtype is torch.uint8
        and nested_absmax.dtype is nested_offset.dtype is nested_table.dtype is torch.float32
        and nested_absmax.numel() == (blocks + 255) // 256
        and nested_offset.numel() == 1
        and nested_table.numel() == 256
        and nested_absmax.device == nested_offset.device == nested_table.device == device
        and nested_absmax.is_contiguous()
        and nested_table.is_contiguous()
        and not (nested_absmax.requires_grad or nested_offset.requires_grad or nested_table.requires_grad)
    )


def _explain_weight(packed, absmax, nested_absmax, nested_offset, nested_table, n, k) -> None:
    """Raises the error for the first thing that is wrong."""
    require(n > 0 and k > 0, ValueError, f"a quantized weight needs N > 0 and K > 0, found [{n}, {k}]")
    blocks = _blocks(n, k)
    nested = (nested_absmax, nested_offset, nested_table)
    expected = [("packed", packed, torch.uint8, (n * k + 1) // 2)]
    if any(piece is None for piece in nested):
        require(
            all(piece is None for piece in nested),
            ValueError,
            "nested_absmax, nested_offset and nested_table come together: all three, or none",
        )
        expected.append(("absmax", absmax, torch.float32, blocks))
    else:
        expected += [
            ("absmax", absmax, torch.uint8, blocks),
            ("nested_absmax", nested_absmax, torch.float32, (blocks + 255) // 256),
            ("nested_offset", nested_offset, torch.float32, 1),
            ("nested_table", nested_table, torch.float32, 256),
        ]
    device = packed.device
    for name, piece, dtype, size in expected:
        if piece.dtype != dtype:
            raise TypeError(f"{name} of a weight [{n}, {k}] should be {dtype}, found {piece.dtype}")
        if piece.numel() != size:
            raise ValueError(f"{name} of a weight [{n}, {k}] should have {size} elements, found {piece.numel()}")
        if piece.device != device:
            raise ValueError(f"packed is on {device}, but {name} on {piece.device}; move the weight as a whole")
        if not piece.is_contiguous():
            raise ValueError(f"{name} should be contiguous")
        if piece.requires_grad:
            raise RuntimeError(f"an NF4 weight is frozen and has no gradient, but {name} asks for one")


def same_pieces(left: tuple[Tensor | None, ...], right: tuple[Tensor | None, ...]) -> bool:
    """Whether these are the same tensors: objects, not values."""
    return (
        left[0] is right[0]
        and left[1] is right[1]
        and left[2] is right[2]
        and left[3] is right[3]
        and left[4] is right[4]
    )


class Operand:
    """A weight [n, k] as the products take it: its five pieces, and what is known of them.

    Checking the pieces takes as long as launching a kernel, and they hardly ever change. So what a check has found is
    kept for as long as they lie where they lay, with as many elements: an exchange of their data (``.data = ...``, a
    move to another device, a freed storage) is seen by that, and checked anew.
    """

    def __init__(self, pieces: tuple[Tensor | None, ...], n: int, k: int) -> None:
        self.pieces, self.n, self.k = pieces, n, k
        self._view: tuple | None = None
        self._sizes: tuple[int, int] | None = None
        self._plain = False
        self.device: torch.device | None = None  # once view() has been asked

    def view(self) -> tuple:
        """The weight as the kernels take it, checked.

        Raises:
            TypeError, ValueError, RuntimeError: as :func:`check_weight` does.
        """
        packed, absmax, nested_absmax, nested_offset, nested_table = self.pieces
        if self._view is not None:
            view = backends.view_of(self.pieces, self.n, self.k)
            if view == self._view and (packed.numel(), absmax.numel()) == self._sizes:
                # Bytes cannot ask for a gradient.
                if nested_absmax is None:
                    if not absmax.requires_grad:
                        return view
                elif not (nested_absmax.requires_grad or nested_offset.requires_grad or nested_table.requires_grad):
                    return view
        check_weight(*self.pieces, self.n, self.k)
        view = backends.view_of(self.pieces, self.n, self.k)
        # The view last: another thread that finds it finds the others.
        self._sizes, self.device = (packed.numel(), absmax.numel()), packed.device
        self._view = view
        return view

    def is_plain(self) -> bool:
        """Whether the pieces are tensors of no other kind, which may want to see operations."""
        self._plain = self._plain or PLAIN.issuperset(map(type, self.pieces))
        return self._plain

    def versions(self) -> tuple[int, ...] | None:
        """Numbers that change when a piece's elements do; None of tensors made in inference mode, which count none."""
        packed, absmax, nested_absmax, nested_offset, nested_table = self.pieces
        try:
            if nested_absmax is None:
                return packed._version, absmax._version
            return (
                packed._version,
                absmax._version,
                nested_absmax._version,
                nested_offset._version,
                nested_table._version,
            )
        except RuntimeError:
            return None


PLAIN = {Tensor, torch.nn.Parameter, type(None)}
