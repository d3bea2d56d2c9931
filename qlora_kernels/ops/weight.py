"""A quantized weight as the operations take it: its five pieces, checked against each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import require
from .dispatcher import are_plain, require_memory

#: packed, absmax, nested_absmax, nested_offset and nested_table; the last three None without double quantization.
#: A weight with levels of its own has them at the end of nested_table, which without double quantization has only them.
Pieces = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
#: Entries of nested_table: what the codes of the constants mean.
_TABLE = 256
#: What the 16 codes of the weight mean, where it is not NF4.
_LEVELS = 16
_NAMES = ("packed", "absmax", "nested_absmax", "nested_offset", "nested_table")


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
    experts: int = 1,
) -> None:
    """Checks the pieces of a quantized weight [n, k] against each other; of a stack, those of all ``experts``.

    Raises:
        TypeError: when a piece has another dtype than the format's.
        ValueError: when a piece has another size, is on another device, is not contiguous, or is missing.
        RuntimeError: when a piece asks for a gradient.
    """
    if not _weight_fits(packed, absmax, nested_absmax, nested_offset, nested_table, n, k, experts):
        _explain_weight(packed, absmax, nested_absmax, nested_offset, nested_table, n, k, experts)


def _weight_fits(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    nested_table: Tensor | None,
    n: int,
    k: int,
    experts: int,
) -> bool:
    """Whether the pieces fit. It runs on every call, so it builds no messages."""
    blocks = _blocks(n, k)
    device = packed.device
    if not (
        n > 0
        and k > 0
        and packed.dtype is torch.uint8
        and packed.numel() == experts * ((n * k + 1) // 2)
        and packed.is_contiguous()
        and absmax.numel() == experts * blocks
        and absmax.device == device
        and absmax.is_contiguous()
        and not absmax.requires_grad
    ):
        return False
    if nested_absmax is None or nested_offset is None or nested_table is None:
        return (
            nested_absmax is nested_offset is None
            and absmax.dtype is torch.float32
            and (nested_table is None or _are_levels(nested_table, device))
        )
    return (
        absmax.dtype is torch.uint8
        and nested_absmax.dtype is nested_offset.dtype is nested_table.dtype is torch.float32
        and nested_absmax.numel() == experts * ((blocks + 255) // 256)
        and nested_offset.numel() == experts
        and nested_table.numel() in (_TABLE, _TABLE + _LEVELS)
        and nested_absmax.device == nested_offset.device == nested_table.device == device
        and nested_absmax.is_contiguous()
        and nested_offset.is_contiguous()
        and nested_table.is_contiguous()
        and not (nested_absmax.requires_grad or nested_offset.requires_grad or nested_table.requires_grad)
    )


def _are_levels(table: Tensor, device: torch.device) -> bool:
    return (
        table.dtype is torch.float32
        and table.numel() == _LEVELS
        and table.device == device
        and table.is_contiguous()
        and not table.requires_grad
    )


def own_levels(pieces: Pieces) -> Tensor | None:
    """The weight's own levels, float32 [16], on its device; None for NF4."""
    _, _, nested_absmax, _, table = pieces
    if table is None or table.numel() == _TABLE:
        return None
    return table.flatten()[0 if nested_absmax is None else _TABLE :]


def _explain_weight(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    nested_table: Tensor | None,
    n: int,
    k: int,
    experts: int,
) -> None:
    """Raises the error for the first thing that is wrong."""
    require(n > 0 and k > 0, ValueError, f"a quantized weight needs N > 0 and K > 0, found [{n}, {k}]")
    blocks = _blocks(n, k)
    expected = [("packed", packed, torch.uint8, experts * ((n * k + 1) // 2))]
    if nested_absmax is None or nested_offset is None or nested_table is None:
        require(
            nested_absmax is nested_offset is None,
            ValueError,
            "nested_absmax, nested_offset and nested_table come together: all three, or none",
        )
        expected.append(("absmax", absmax, torch.float32, experts * blocks))
        if nested_table is not None:
            expected.append(("nested_table", nested_table, torch.float32, _LEVELS))
    else:
        expected += [
            ("absmax", absmax, torch.uint8, experts * blocks),
            ("nested_absmax", nested_absmax, torch.float32, experts * ((blocks + 255) // 256)),
            ("nested_offset", nested_offset, torch.float32, experts),
            ("nested_table", nested_table, torch.float32, _TABLE + (_LEVELS if nested_table.numel() > _TABLE else 0)),
        ]
    device, shape = packed.device, f"[{n}, {k}]" if experts == 1 else f"[{experts}, {n}, {k}]"
    for name, piece, dtype, size in expected:
        if piece.dtype != dtype:
            raise TypeError(f"{name} of a weight {shape} should be {dtype}, found {piece.dtype}")
        if piece.numel() != size:
            raise ValueError(f"{name} of a weight {shape} should have {size} elements, found {piece.numel()}")
        if piece.device != device:
            raise ValueError(f"packed is on {device}, but {name} on {piece.device}; move the weight as a whole")
        if not piece.is_contiguous():
            raise ValueError(f"{name} should be contiguous")
        if piece.requires_grad:
            raise RuntimeError(f"an NF4 weight is frozen and has no gradient, but {name} asks for one")


def _is_lazy(piece: Tensor | None) -> bool:
    """Whether its elements are computed as they are read: negatives, or zeros without memory."""
    return piece is not None and (piece.is_neg() or piece._is_zerotensor())


def _check_memory(pieces: Pieces) -> None:
    """Checks that the kernels find the pieces' elements at their addresses.

    Raises:
        RuntimeError: for a piece without its memory.
        ValueError: for one whose elements are the negatives of those in memory, or a tensor of zeros without memory.
    """
    for name, piece in zip(_NAMES, pieces, strict=True):
        if piece is None:
            continue
        require_memory(name, piece)
        if _is_lazy(piece):
            raise ValueError(f"{name} is computed when it is read, and has no elements in memory; give {name}.clone()")


def _state(tensor: Tensor) -> tuple[int, int]:
    """Address, and a number that changes when an element does; tensors made in inference mode have none."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def expert_pieces(pieces: Pieces, experts: int, expert: int) -> Pieces:
    """One expert's pieces of a stack's, as views."""
    packed, absmax, nested_absmax, nested_offset, nested_table = (
        piece if piece is None or name == "nested_table" else piece.view(experts, -1)[expert]
        for name, piece in zip(_NAMES, pieces, strict=True)
    )
    assert packed is not None
    assert absmax is not None
    return packed, absmax, nested_absmax, nested_offset, nested_table


def same_pieces(left: Pieces, right: Pieces) -> bool:
    """Whether these are the same tensors: objects, not values."""
    return (
        left[0] is right[0]
        and left[1] is right[1]
        and left[2] is right[2]
        and left[3] is right[3]
        and left[4] is right[4]
    )


class Operand:
    """A weight [n, k] as the operations and their backends take it: its five pieces, and what is known of them.

    Checking the pieces takes as long as launching a kernel, and they hardly ever change. So a check stays valid while
    the pieces keep their addresses and sizes, and so does the struct passed to the kernels. Replacing their data
    (``.data = ...``, a move to another device) changes the addresses, and so does freeing or resizing a storage.

    Attributes:
        pieces: see :data:`Pieces`.
        n: rows of the weight.
        k: its columns.
        experts: how many such weights the pieces hold, one behind the other: those of a mixture. Only nested_table,
            with levels if there are any, is the same for all.
    """

    __slots__ = ("_checked", "_is_plain", "_levels", "_native", "device", "experts", "k", "n", "pieces")

    def __init__(self, pieces: Pieces, n: int, k: int, experts: int = 1) -> None:
        for name, piece in zip(_NAMES, pieces, strict=True):
            if not isinstance(piece, Tensor) and (piece is not None or name in ("packed", "absmax")):
                raise TypeError(f"{name} of a quantized weight should be a tensor, found {type(piece).__name__}")
        self.pieces, self.n, self.k, self.experts = pieces, n, k, experts
        #: Where the pieces lie.
        self.device = pieces[0].device
        # The pieces' addresses, then their bytes, that a check has found to be right.
        self._checked: tuple[int, ...] | None = None
        # The struct for the kernels, its class, and what of _checked it was made from.
        self._native: tuple[Any, Any, tuple[int, ...]] | None = None
        # The weight's own levels as they were when last read: address and version, and 16 numbers on the host.
        self._levels: tuple[tuple[int, int], Tensor] | None = None
        self._is_plain = False

    def check(self) -> None:
        """Checks the pieces, unless they are where they were when they were last checked.

        Raises:
            TypeError, ValueError, RuntimeError: as :func:`check_weight` does.
        """
        packed, absmax, nested_absmax, nested_offset, nested_table = self.pieces
        # Bytes cannot ask for a gradient.
        if nested_absmax is None or nested_offset is None or nested_table is None:
            place = (
                packed.data_ptr(),
                absmax.data_ptr(),
                packed.nbytes,
                absmax.nbytes,
            )
            if place == self._checked and not absmax.requires_grad and self._has_levels():
                return
        else:
            place = (
                packed.data_ptr(),
                absmax.data_ptr(),
                nested_absmax.data_ptr(),
                nested_offset.data_ptr(),
                nested_table.data_ptr(),
                packed.nbytes,
                absmax.nbytes,
                nested_absmax.nbytes,
                nested_offset.nbytes,
                nested_table.nbytes,
            )
            if (
                place == self._checked
                and not (nested_absmax.requires_grad or nested_offset.requires_grad or nested_table.requires_grad)
                and self._has_levels()
            ):
                return
        check_weight(*self.pieces, self.n, self.k, self.experts)
        _check_memory(self.pieces)
        self._read_levels()
        self.device = packed.device
        self._checked = place

    def _has_levels(self) -> bool:
        """Whether the levels are those that were read. Their values count, not only where they lie."""
        if self._levels is None:
            table = self.pieces[4]
            return table is None or table.numel() == _TABLE
        levels = own_levels(self.pieces)
        return levels is not None and self._levels[0] == _state(levels)

    def _read_levels(self) -> None:
        levels = own_levels(self.pieces)
        if levels is None:
            self._levels = None
            return
        host = levels.detach().to("cpu", copy=True)
        if not bool((host.abs() <= 1).all()):
            raise ValueError("the levels of a weight, the last 16 entries of nested_table, should be from -1 to 1")
        self._levels = (_state(levels), host)

    def native(self, kind: Any) -> Any:
        """The weight as the kernels take it, an extension's class Weight; rebuilt when a check has found other
        addresses."""
        checked, kept = self._checked, self._native
        if kept is not None and kept[2] is checked and kept[1] is kind:
            return kept[0]
        if checked is None:
            self.check()
            return self.native(kind)
        packed, absmax, *nested = checked[: len(checked) // 2]
        nested_absmax, nested_offset, nested_table = nested or (0, 0, 0)
        levels = 0 if self._levels is None else self._levels[1].data_ptr()  # the class copies them
        made = kind(
            {
                "packed": packed,
                "absmax": 0 if nested else absmax,
                "absmax_code": absmax if nested else 0,
                "nested_absmax": nested_absmax,
                "nested_table": nested_table,
                "nested_offset": nested_offset,
                "n": self.n,
                "k": self.k,
                "levels": levels,
            }
        )
        self._native = (made, kind, checked)
        return made

    def is_plain(self) -> bool:
        """Whether the pieces are ordinary tensors in memory: subclasses may intercept operations, and negatives and
        zeros without memory are the dispatcher's to resolve."""
        self._is_plain = self._is_plain or (are_plain(self.pieces) and not any(map(_is_lazy, self.pieces)))
        return self._is_plain

    def versions(self) -> tuple[int, ...] | None:
        """Numbers that change when a piece's elements do; None for tensors made in inference mode, which have none."""
        packed, absmax, nested_absmax, nested_offset, nested_table = self.pieces
        try:
            if nested_absmax is None or nested_offset is None or nested_table is None:
                levels = 0 if nested_table is None else nested_table._version
                return packed._version, absmax._version, levels
            return (
                packed._version,
                absmax._version,
                nested_absmax._version,
                nested_offset._version,
                nested_table._version,
            )
        except RuntimeError:
            return None
